"""The labelled volume of a `Scene`, placed and ordered as the SSCNet files have it.

240 x 144 x 240 voxels of 0.02 m. World X runs to the right, Y forward, Z up. The volume starts 0.05 m below the floor;
its X range is centred on what the camera looks at, and its Y range begins up to 0.9 m before the camera, as in the NYU
files.

Furniture is solid: each closed part is filled, and every surface marks the voxel it passes through, hidden or not.
Walls, floor and ceiling are two to three voxels thick, outwards. What is outside the room is 255 (unknown).
"""

from typing import no_type_check

import numpy as np
from numba import njit

from enfilade import labels
from enfilade.data import room_shell as shell
from enfilade.data.room_scene import Scene
from enfilade.types import IGNORE, LabelVolume

SHAPE = (240, 144, 240)  # X, Z (up), Y
SIZE = 0.02
FLOOR = -0.05  # the volume's lowest z; SSCNet's value


@njit(cache=True, nogil=True)
@no_type_check
def _paint(vertices, faces, which, label_of, grid, outward):
    """Mark the voxels that the faces pass through; with `outward` > 0 also that many voxels behind each face.
    Vertices are in voxels, (X, Y, Z)."""
    nx, nz, ny = grid.shape
    for f in which:
        label = label_of[f]
        ax, ay, az = vertices[faces[f, 0], 0], vertices[faces[f, 0], 1], vertices[faces[f, 0], 2]
        bx, by, bz = vertices[faces[f, 1], 0] - ax, vertices[faces[f, 1], 1] - ay, vertices[faces[f, 1], 2] - az
        cx, cy, cz = vertices[faces[f, 2], 0] - ax, vertices[faces[f, 2], 1] - ay, vertices[faces[f, 2], 2] - az
        lx, hx = ax + min(0.0, bx, cx), ax + max(0.0, bx, cx)
        ly, hy = ay + min(0.0, by, cy), ay + max(0.0, by, cy)
        lz, hz = az + min(0.0, bz, cz), az + max(0.0, bz, cz)
        if hx < -4 or hy < -4 or hz < -4 or lx > nx + 4 or ly > ny + 4 or lz > nz + 4:
            continue
        px, py, pz = by * cz - bz * cy, bz * cx - bx * cz, bx * cy - by * cx
        area = np.sqrt(px * px + py * py + pz * pz) + 1e-12
        px, py, pz = px / area, py / area, pz / area
        # Steps of half a voxel along both edges; the longest edge bounds both.
        u_steps = int(np.sqrt(bx * bx + by * by + bz * bz) * 2) + 1
        v_length = np.sqrt(cx * cx + cy * cy + cz * cz)
        third = np.sqrt((bx - cx) ** 2 + (by - cy) ** 2 + (bz - cz) ** 2)
        for i in range(u_steps + 1):
            u = i / u_steps
            v_steps = int(max(v_length, min(third, v_length)) * (1 - u) * 2) + 1
            for j in range(v_steps + 1):
                v = (1 - u) * j / v_steps
                x, y, z = ax + u * bx + v * cx, ay + u * by + v * cy, az + u * bz + v * cz
                for layer in range(outward + 1):
                    gx, gy, gz = (
                        int(np.floor(x - layer * px)),
                        int(np.floor(y - layer * py)),
                        int(np.floor(z - layer * pz)),
                    )
                    if 0 <= gx < nx and 0 <= gy < ny and 0 <= gz < nz:
                        grid[gx, gz, gy] = label


@njit(cache=True, nogil=True)
@no_type_check
def _fill(vertices, faces, first, last, label, grid, crossings, counts):
    """Fill one closed part: along each upright line through voxel centres, between the odd and the even crossings."""
    nx, nz, ny = grid.shape
    most = crossings.shape[2]
    low_x, high_x, low_y, high_y = nx, -1, ny, -1
    for f in range(first, last):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        for v in (a, b, c):
            low_x, high_x = min(low_x, int(np.floor(vertices[v, 0]))), max(high_x, int(np.floor(vertices[v, 0])))
            low_y, high_y = min(low_y, int(np.floor(vertices[v, 1]))), max(high_y, int(np.floor(vertices[v, 1])))
    low_x, high_x, low_y, high_y = max(low_x, 0), min(high_x, nx - 1), max(low_y, 0), min(high_y, ny - 1)
    if high_x < low_x or high_y < low_y:
        return
    counts[low_x : high_x + 1, low_y : high_y + 1] = 0
    for f in range(first, last):
        ax, ay, az = vertices[faces[f, 0], 0], vertices[faces[f, 0], 1], vertices[faces[f, 0], 2]
        bx, by, bz = vertices[faces[f, 1], 0], vertices[faces[f, 1], 1], vertices[faces[f, 1], 2]
        cx, cy, cz = vertices[faces[f, 2], 0], vertices[faces[f, 2], 1], vertices[faces[f, 2], 2]
        det = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if abs(det) < 1e-9:
            continue
        for gx in range(max(low_x, int(np.floor(min(ax, bx, cx)))), min(high_x, int(np.floor(max(ax, bx, cx)))) + 1):
            for gy in range(
                max(low_y, int(np.floor(min(ay, by, cy)))), min(high_y, int(np.floor(max(ay, by, cy)))) + 1
            ):
                # Off the exact centre by a hair, so that a line rarely meets an edge of two triangles.
                x, y = gx + 0.500137, gy + 0.500071
                u = ((x - ax) * (cy - ay) - (y - ay) * (cx - ax)) / det
                v = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / det
                if u >= 0 and v >= 0 and u + v < 1 and counts[gx, gy] < most:
                    crossings[gx, gy, counts[gx, gy]] = az + u * (bz - az) + v * (cz - az)
                    counts[gx, gy] += 1
    for gx in range(low_x, high_x + 1):
        for gy in range(low_y, high_y + 1):
            n = counts[gx, gy]
            if n < 2:
                continue
            line = np.sort(crossings[gx, gy, :n])
            for k in range(0, n - 1, 2):
                for gz in range(max(int(np.ceil(line[k] - 0.5)), 0), min(int(np.floor(line[k + 1] - 0.5)), nz - 1) + 1):
                    grid[gx, gz, gy] = label


def origin_of(scene: Scene) -> np.ndarray:
    """The corner of the volume in the world."""
    camera = scene.camera
    assert camera is not None
    assert camera.pose is not None
    forward = camera.pose[:2, 2] / np.linalg.norm(camera.pose[:2, 2])
    reach = SHAPE[0] * SIZE
    # About three metres ahead lies the middle of the scene; both rules give NYU0003's origin to a few centimetres.
    x = 3.0 * forward[0] / max(forward[1], 0.5) - reach / 2
    far = float(scene.plan[:, 1].max())
    return np.array([x, np.clip(far + 0.1 - reach, 0.0, 0.9), FLOOR])


def voxelise(scene: Scene) -> LabelVolume:
    """The SSC-12 labels of the scene (see the module's text)."""
    to_ssc = labels.mapping("nyu40", "ssc12")
    origin = origin_of(scene)
    grid = np.full(SHAPE, IGNORE, np.uint8)
    x = origin[0] + SIZE * (np.arange(SHAPE[0]) + 0.5)
    y = origin[1] + SIZE * (np.arange(SHAPE[2]) + 0.5)
    columns = shell.inside(scene.plan, np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)).reshape(
        len(x), len(y)
    )
    z = origin[2] + SIZE * (np.arange(SHAPE[1]) + 0.5)
    levels = (z > 0) & (z < scene.height)
    grid[columns[:, None, :] & levels[None, :, None]] = 0
    vertices = (scene.vertices - origin) / SIZE
    label_of = to_ssc[scene.object_labels[scene.face_object]]
    open_faces = np.repeat(~scene.part_closed, np.diff(scene.part_faces))
    # Walls first: what hangs on them overwrites them.
    _paint(vertices, scene.faces, np.flatnonzero(open_faces), label_of, grid, 2)
    crossings, counts = np.empty((SHAPE[0], SHAPE[2], 24)), np.zeros((SHAPE[0], SHAPE[2]), np.int64)
    for part in np.flatnonzero(scene.part_closed):
        first, last = scene.part_faces[part : part + 2]
        _fill(vertices, scene.faces, first, last, label_of[first], grid, crossings, counts)
    _paint(vertices, scene.faces, np.flatnonzero(~open_faces), label_of, grid, 0)
    return LabelVolume(grid, origin, SIZE)
