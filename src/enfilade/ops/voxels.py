"""Voxel grids: where they lie, which pixels and voxels see each other, and label volumes at a quarter of the size.

* Song, Yu, Zeng, Chang, Savva, Funkhouser: Semantic scene completion from a single depth image, CVPR 2017 (SSCNet:
  the grid, the labels, what is scored)

Conventions, of all arrays of voxels in the library:

* World frame: X right, Y forward, Z up, metres; gravity is -Z.
* An array of voxels has the axes `x y z` of SSCNet's files: x runs along the world's X, **y upwards** (the world's Z)
  and z **away from the camera** (the world's Y). Voxel (i, j, k) fills `origin + size * [i..i+1, k..k+1, j..j+1]`, in
  the world's X Y Z. The rooms of `data.rooms` and the `types.VoxelGrid` of a sample have these axes and this origin.
* A point belongs to the voxel floor((point - origin) / size). Where a voxel is looked up in an image, SSCNet projects
  its lowest corner, not its centre.
* Flat numbers: voxel (i, j, k) is (i * ny + j) * nz + k, pixel (u, v) is v * width + u; -1 is none.

`tsdf` encodes a depth map in such a grid, `projection` carries features between pixels and voxels.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, UInt8
from numba import njit

from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.ops import hha
from enfilade.ops.lattice import run_parts
from enfilade.types import IGNORE

SHAPE = (240, 144, 240)
SIZE = 0.02  # metres
FACTOR = 4  # of the networks' output: 60 x 36 x 60 voxels of 0.08 m
BELOW = 0.05  # the grid starts so many metres below the floor


@dataclass(frozen=True, slots=True, eq=False)
class VoxelGrid:
    """A block of voxels in the world, and the camera's place in that world; the axes are the module's.

    `pose` is camera-to-world. A `Camera` has one too: in functions that take both, the grid's counts."""

    origin: Float[np.ndarray, "3"]  # the lowest corner: X, Y, Z in metres
    pose: Float[np.ndarray, "4 4"]
    size: float = SIZE
    shape: tuple[int, int, int] = SHAPE

    def __post_init__(self):
        if not (np.shape(self.origin) == (3,) and np.isfinite(self.origin).all()):
            raise UserError(f"a grid's origin is three numbers in metres (world X, Y, Z), not {self.origin}")
        if not (np.shape(self.pose) == (4, 4) and np.isfinite(self.pose).all()) or np.linalg.det(self.pose) == 0:
            raise UserError("a grid's pose is an invertible 4x4 matrix, camera-to-world, without NaN")
        if not (self.size > 0 and min(self.shape) > 0):
            raise UserError(f"a grid needs voxels of positive size and at least one along each axis, not {self}")

    @property
    def from_world(self) -> Float[np.ndarray, "3 4"]:
        """World-to-camera, the upper three rows."""
        return np.linalg.inv(self.pose.astype(np.float64))[:3]

    def coarse(self, factor: int = FACTOR) -> "VoxelGrid":
        """The same block in voxels `factor` times as wide."""
        if any(n % factor for n in self.shape):
            raise UserError(f"a grid of {self.shape} voxels cannot be divided by {factor}")
        x, y, z = self.shape
        return replace(self, size=self.size * factor, shape=(x // factor, y // factor, z // factor))


def demand_camera(depth: Float[np.ndarray, "h w"], camera: Camera) -> None:
    """Raise UserError where the camera is of another size than the depth map."""
    if depth.shape != (camera.height, camera.width):
        raise UserError(
            f"depth is {depth.shape[1]}x{depth.shape[0]}, its camera {camera.width}x{camera.height}: "
            "resize one with Camera.resized or by nearest neighbour"
        )


def parts(threads: int | None) -> int:
    """The number of threads, torch's if None."""
    return torch.get_num_threads() if threads is None else max(1, threads)


def numbers_of(camera: Camera) -> np.ndarray:
    """fx, fy, cx, cy for compiled loops."""
    return np.array([camera.fx, camera.fy, camera.cx, camera.cy])


# ------------------------------------------------------------------------------------------------- pixels and voxels


@njit(cache=True, nogil=True)
@no_type_check  # a checked function cannot be compiled
def _pixel_voxels(depth, camera, pose, origin, size, shape, start, stop, out):
    fx, fy, cx, cy = camera
    for v in range(start, stop):
        for u in range(depth.shape[1]):
            z = np.float64(depth[v, u])
            out[v, u] = -1
            if not (z > 0 and z < np.inf):
                continue
            x, y = (u - cx) * z / fx, (v - cy) * z / fy
            a = (pose[0, 0] * x + pose[0, 1] * y + pose[0, 2] * z + pose[0, 3] - origin[0]) / size
            b = (pose[2, 0] * x + pose[2, 1] * y + pose[2, 2] * z + pose[2, 3] - origin[2]) / size
            c = (pose[1, 0] * x + pose[1, 1] * y + pose[1, 2] * z + pose[1, 3] - origin[1]) / size
            # Compared before they become integers: a far point would overflow.
            if 0 <= a < shape[0] and 0 <= b < shape[1] and 0 <= c < shape[2]:
                out[v, u] = (int(a) * shape[1] + int(b)) * shape[2] + int(c)


def pixel_voxels(
    depth: Float[np.ndarray, "h w"], camera: Camera, grid: VoxelGrid, *, threads: int | None = None
) -> Int32[np.ndarray, "h w"]:
    """The flat number of the voxel that each pixel's point lies in; -1 where the depth is unknown (not finite, or not
    above 0) or the point outside the grid. `depth` in metres. `threads`: torch's number if None.

    For the output grid of a network pass `grid.coarse()`: a point's coarse voxel is the one that holds its fine voxel.
    Raises UserError where the camera is of another size."""
    demand_camera(depth, camera)
    depth, out = np.ascontiguousarray(depth), np.empty(depth.shape, np.int32)
    arguments = numbers_of(camera), grid.pose.astype(np.float64), grid.origin.astype(np.float64), grid.size, grid.shape
    run_parts(lambda _, start, stop: _pixel_voxels(depth, *arguments, start, stop, out), len(depth), threads)
    return out


def pixel_voxels_reference(
    depth: Float[np.ndarray, "h w"], camera: Camera, grid: VoxelGrid
) -> Int32[np.ndarray, "h w"]:
    """`pixel_voxels` in whole arrays."""
    v, u = np.mgrid[: camera.height, : camera.width]
    known = np.isfinite(depth) & (depth > 0)
    z = np.where(known, depth, 1).astype(np.float64)
    x, y = (u - camera.cx) * z / camera.fx, (v - camera.cy) * z / camera.fy
    pose = grid.pose.astype(np.float64)
    point = [row[0] * x + row[1] * y + row[2] * z + row[3] for row in pose[:3]]
    cell = [np.floor((point[axis] - grid.origin[axis]) / grid.size) for axis in (0, 2, 1)]
    for index, count in zip(cell, grid.shape):
        known &= (index >= 0) & (index < count)
    i, j, k = (np.where(known, index, 0).astype(np.int32) for index in cell)
    return np.where(known, (i * grid.shape[1] + j) * grid.shape[2] + k, -1).astype(np.int32)


@njit(cache=True, nogil=True)
@no_type_check
def project_row(i, j, first, camera, width, height, inverse, origin, size, at, index, depths):
    """The pixels that the voxels of row (i, j) from `first` on fall on, and their depths, to index and depths."""
    fx, fy, cx, cy = camera
    x, z = origin[0] + (i + at) * size, origin[2] + (j + at) * size
    for k in range(len(index)):
        y = origin[1] + (first + k + at) * size
        a = inverse[0, 0] * x + inverse[0, 1] * y + inverse[0, 2] * z + inverse[0, 3]
        b = inverse[1, 0] * x + inverse[1, 1] * y + inverse[1, 2] * z + inverse[1, 3]
        c = inverse[2, 0] * x + inverse[2, 1] * y + inverse[2, 2] * z + inverse[2, 3]
        ahead = c > 0
        c = c if ahead else 1.0
        u, v = np.floor(fx * a / c + cx + 0.5), np.floor(fy * b / c + cy + 0.5)
        seen = ahead & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        # No branch, so that the loop becomes vectors.
        index[k] = np.int32(v if seen else 0.0) * width + np.int32(u if seen else -1.0)
        depths[k] = c


@njit(cache=True, nogil=True)
@no_type_check
def _voxel_pixels(camera, width, height, inverse, origin, size, at, start, stop, out):
    depths = np.empty(out.shape[2])
    for i in range(start, stop):
        for j in range(out.shape[1]):
            project_row(i, j, 0, camera, width, height, inverse, origin, size, at, out[i, j], depths)


def voxel_pixels(
    camera: Camera, grid: VoxelGrid, *, at: float = 0.0, threads: int | None = None
) -> Int32[np.ndarray, "x y z"]:
    """The flat number of the pixel that each voxel falls on, hidden or not; -1 behind the camera and beside the image.

    `at` is the point of the voxel that is projected, in voxels: 0 its lowest corner, as SSCNet has it, 0.5 its centre.
    The latter is the better choice for `grid.coarse()`."""
    out = np.empty(grid.shape, np.int32)
    arguments = numbers_of(camera), np.int32(camera.width), np.int32(camera.height), grid.from_world
    arguments = *arguments, grid.origin.astype(np.float64), grid.size, float(at)
    run_parts(lambda _, start, stop: _voxel_pixels(*arguments, start, stop, out), grid.shape[0], threads)
    return out


def voxel_pixels_reference(
    camera: Camera, grid: VoxelGrid, *, at: float = 0.0
) -> tuple[Int32[np.ndarray, "x y z"], Float[np.ndarray, "x y z"]]:
    """`voxel_pixels` in whole arrays, and the depths of the voxels' points in the camera frame."""
    x, z, y = ((grid.origin[axis] + (np.arange(count) + at) * grid.size) for axis, count in zip((0, 2, 1), grid.shape))
    x, z, y = x[:, None, None], z[None, :, None], y[None, None, :]
    a, b, c = (row[0] * x + row[1] * y + row[2] * z + row[3] for row in grid.from_world)
    ahead = c > 0
    divisor = np.where(ahead, c, 1)
    u = np.floor(camera.fx * a / divisor + camera.cx + 0.5)
    v = np.floor(camera.fy * b / divisor + camera.cy + 0.5)
    seen = ahead & (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
    index = np.where(seen, v, 0).astype(np.int32) * camera.width + np.where(seen, u, -1).astype(np.int32)
    return index.astype(np.int32), c


# ----------------------------------------------------------------------------------------------------- label volumes


@njit(cache=True, nogil=True)
@no_type_check
def _downsample(labels, factor, start, stop, out):
    counts = np.zeros(256, np.int32)
    full = factor * factor * factor
    for i in range(start, stop):
        for j in range(out.shape[1]):
            for k in range(out.shape[2]):
                first = labels[i * factor, j * factor, k * factor]
                same = True
                for a in range(i * factor, (i + 1) * factor):
                    for b in range(j * factor, (j + 1) * factor):
                        for c in range(k * factor, (k + 1) * factor):
                            same &= labels[a, b, c] == first
                if same:  # most blocks are all empty or all unknown
                    out[i, j, k] = first
                    continue
                for a in range(i * factor, (i + 1) * factor):
                    for b in range(j * factor, (j + 1) * factor):
                        for c in range(k * factor, (k + 1) * factor):
                            counts[labels[a, b, c]] += 1
                best = 0
                if counts[0] + counts[IGNORE] > 0.95 * full:
                    best = 0 if counts[0] > counts[IGNORE] else IGNORE
                else:
                    most = 0
                    for label in range(1, IGNORE):
                        if counts[label] > most:
                            best, most = label, counts[label]
                out[i, j, k] = best
                counts[:] = 0


def downsample_labels(
    labels: UInt8[np.ndarray, "x y z"], factor: int = FACTOR, *, threads: int | None = None
) -> UInt8[np.ndarray, "x//{factor} y//{factor} z//{factor}"]:
    """The labels of blocks of factor^3 voxels, by SSCNet's rule: a block more than 95 % of which is empty (0) or
    unknown (255) is the more frequent of the two (255 if they are equal), any other the most frequent of its classes
    (the lowest of equal ones). On NYU0003 all labelled voxels come out as in the file.

    Raises UserError where the volume cannot be divided."""
    if factor < 1 or any(n % factor for n in labels.shape):
        raise UserError(f"a label volume of {labels.shape} voxels cannot be divided by {factor}")
    x, y, z = labels.shape
    out = np.empty((x // factor, y // factor, z // factor), np.uint8)
    run_parts(lambda _, start, stop: _downsample(labels, factor, start, stop, out), len(out), threads)
    return out


def downsample_labels_reference(
    labels: UInt8[np.ndarray, "x y z"], factor: int = FACTOR
) -> UInt8[np.ndarray, "x//{factor} y//{factor} z//{factor}"]:
    """`downsample_labels` in whole arrays."""
    empty, unknown = _block_counts(labels == 0, factor), _block_counts(labels == IGNORE, factor)
    classes = np.array([label for label in np.unique(labels) if label not in (0, IGNORE)] or [IGNORE], np.uint8)
    most = classes[np.stack([_block_counts(labels == label, factor) for label in classes]).argmax(0)]
    void = empty + unknown > 0.95 * factor**3
    return np.where(void, np.where(empty > unknown, 0, IGNORE), most).astype(np.uint8)


def _block_counts(mask: Bool[np.ndarray, "x y z"], factor: int) -> np.ndarray:
    x, y, z = (n // factor for n in mask.shape)
    return mask.reshape(x, factor, y, factor, z, factor).sum((1, 3, 5), dtype=np.int32)


# ------------------------------------------------------------------------------------------------- what is scored

# What a depth map says of a voxel (`tsdf.visibility`).
OUTSIDE, FREE, SURFACE, OCCLUDED = 0, 1, 2, 3


@dataclass(frozen=True, slots=True, eq=False)
class ScoreMasks:
    """Which voxels of a label volume count, for whom. `free`, `occluded` and neither (out of view) exclude each other;
    `surface` may go with any of them."""

    room: Bool[np.ndarray, "x y z"]  # the ground truth knows the voxel: it is not 255
    surface: Bool[np.ndarray, "x y z"]  # a pixel's point lies in it
    occluded: Bool[np.ndarray, "x y z"]  # in view, behind what the camera measured
    free: Bool[np.ndarray, "x y z"]  # in view, before it: seen to be empty
    scored: Bool[np.ndarray, "x y z"]  # semantic completion is scored here: in the room and in view, full or occluded

    @property
    def completion(self) -> Bool[np.ndarray, "x y z"]:
        """Where completion alone (full or empty) is scored: what no pixel touches, of what is `scored`."""
        return self.scored & ~self.surface


def score_masks(labels: UInt8[np.ndarray, "x y z"], visibility: UInt8[np.ndarray, "_ _ _"]) -> ScoreMasks:
    """The masks of a label volume, from the `tsdf.visibility` of the same or of finer voxels: a coarse voxel has a
    surface if one of its parts has, is in view if at least half of them are, and occluded if more than half are.

    The released data hold such a mask (`weights`) without the rule that made it. On NYU0003 `scored` meets it at an
    IoU of 0.98, where both know the label. Raises UserError for sizes that do not fit."""
    factor = visibility.shape[0] // labels.shape[0]
    if factor < 1 or tuple(factor * n for n in labels.shape) != visibility.shape:
        raise UserError(f"visibility of {visibility.shape} voxels does not divide into labels of {labels.shape}")
    full = factor**3
    outside, free, surface, occluded = (
        _block_counts(visibility == state, factor) for state in (OUTSIDE, FREE, SURFACE, OCCLUDED)
    )
    room, hidden, in_view = labels != IGNORE, 2 * occluded > full, 2 * outside <= full
    return ScoreMasks(
        room=room,
        surface=surface > 0,
        occluded=hidden,
        free=in_view & (free > occluded) & ~hidden,
        scored=room & in_view & ((labels > 0) | hidden),
    )


# ------------------------------------------------------------------------------------------ a grid for one's own camera


def place_grid(
    depth: Float[np.ndarray, "h w"],
    camera: Camera,
    gravity: Float[np.ndarray, "3"] | None = None,
    *,
    height: float | None = None,
    walls: bool = True,
    size: float = SIZE,
    shape: tuple[int, int, int] = SHAPE,
) -> VoxelGrid:
    """The grid for a frame of one's own camera, placed as those of NYU are: what `tsdf` needs beside depth and camera.

    The world's origin is the point of the floor below the camera. Z is up; Y is the camera's heading, or with `walls`
    the horizontal direction nearest to it that the walls run along, since the rooms of the training data stand straight
    in their grids. The grid starts 5 cm below the floor; to the sides it is centred on what lies 3 m ahead; forwards it
    starts at the camera, or up to 0.9 m before it where the room is deeper than the grid.

    Args:
        depth: metres, 0 or not finite where unknown.
        camera: its intrinsics; its pose is not looked at, because its world need not be upright.
        gravity: the direction in which things fall, in the camera frame (x right, y down, z forward), of any length:
            from an accelerometer, or `-pose[2, :3]` of a camera-to-world pose whose world has Z up. If None it is
            found from the surfaces in view (`hha.gravity`, then the plane of the floor where enough of it is seen),
            which needs a camera held within 45 degrees of level.
        height: of the camera above the floor, metres. If None: above the lowest level surface in view, if nothing lies
            below that; else the floor is taken to be out of view and the camera 1.3 m above it (`hha.hha` does so too),
            or as much as the lowest point asks for. A view of a table top and nothing lower misleads this: give the
            height.
        walls: turn the grid to the walls.

    Raises UserError without any known depth, or for a gravity or a height that cannot be."""
    demand_camera(depth, camera)
    known = np.isfinite(depth) & (depth > 0)
    if not known.any():
        raise UserError("a grid cannot be placed: the depth map has no known pixel (finite and above 0)")
    down = hha.gravity(depth, camera) if gravity is None else np.asarray(gravity, np.float64)
    if down.shape != (3,) or not np.isfinite(down).all() or not down.any():
        raise UserError(f"gravity is a direction in the camera frame, three finite numbers, not {gravity}")
    if height is not None and not 0 < height < np.inf:
        raise UserError(f"the camera's height above the floor is a positive number of metres, not {height}")
    up = -down / np.linalg.norm(down)
    normals = hha.normals(np.where(known, depth, 0), camera, radius=10)[known].astype(np.float64)
    points = (camera.rays() * np.where(known, depth, 0)[..., None])[known]
    found, floor = _floor(points @ up, normals @ up)
    for _ in range(3):
        if gravity is not None or len(floor) < 0.02 * len(points):
            break
        # Much floor in view tells the upright better than the directions of all surfaces do.
        normal = np.linalg.svd(points[floor] - points[floor].mean(0), full_matrices=False)[2][2]
        normal = normal if normal @ up > 0 else -normal
        if normal @ up < np.cos(np.radians(6)):
            break
        up = normal
        found, floor = _floor(points @ up, normals @ up)
    height = found if height is None else height

    # Heading: the optical axis, laid flat; for a camera that looks straight down, the top of its image.
    ahead = np.array([0.0, 0.0, 1.0]) if abs(up[2]) < np.sin(np.radians(85)) else np.array([0.0, np.sign(up[2]), 0.0])
    heading = ahead - (ahead @ up) * up
    forward = heading = heading / np.linalg.norm(heading)
    right = np.cross(forward, up)
    if walls:
        turn = _turn_to_walls(normals, forward, right, up)
        forward, right = np.cos(turn) * forward + np.sin(turn) * right, np.cos(turn) * right - np.sin(turn) * forward

    pose = np.eye(4)
    pose[:3, :3] = right, forward, up
    pose[2, 3] = height
    reach_x, reach_y = shape[0] * size, shape[2] * size
    sideways, along = pose[:2, :3] @ heading
    far = np.percentile(points @ forward, 99)  # one wrong pixel moves nothing
    origin = np.array([3 * sideways / max(along, 0.5) - reach_x / 2, np.clip(far + 0.1 - reach_y, 0, 0.9), -BELOW])
    return VoxelGrid(origin, pose, size, shape)


def _turn_to_walls(normals: np.ndarray, forward: np.ndarray, right: np.ndarray, up: np.ndarray) -> float:
    """The angle in -45..45 degrees, from `forward` towards `right`, at which most walls stand straight; 0 where there
    are none. Walls at right angles agree once their angles are taken four times."""
    upright = (np.abs(normals @ up) < np.sin(np.radians(15))) & normals.any(-1)
    angles = 4 * np.arctan2(normals[upright] @ right, normals[upright] @ forward)
    if len(angles) < 0.01 * len(normals):
        return 0.0
    found = np.exp(1j * angles).mean()
    for _ in range(5):  # then without what stands askew
        near = np.cos(angles - np.angle(found)) > np.cos(np.radians(4 * 10))
        if not near.any():
            break
        found = np.exp(1j * angles[near]).mean()
    return float(np.angle(found) / 4)


def _floor(heights: np.ndarray, facing: np.ndarray) -> tuple[float, np.ndarray]:
    """The camera's height above the floor, and which points are of the floor, from the points' heights above the
    camera and their normals' share of up."""
    lowest = -float(np.percentile(heights, 0.5))
    level = (facing > np.cos(np.radians(15))) & (heights < 0)
    if level.sum() < 0.005 * len(heights):
        return max(lowest, 1.3), np.empty(0, np.intp)
    bins = np.floor(heights[level] / 0.05).astype(int)
    counts = np.bincount(bins - bins.min())
    # The lowest level that holds its share: below it lie only reflections and noise.
    first = bins.min() + np.flatnonzero(counts >= 0.05 * counts.sum())[0]
    floor = np.flatnonzero(level & (np.abs(heights - 0.05 * (first + 0.5)) < 0.1))
    found = -float(np.median(heights[floor]))
    if found < lowest - 0.1:
        return max(lowest, 1.3), np.empty(0, np.intp)
    return found, floor
