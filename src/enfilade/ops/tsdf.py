"""The truncated signed distance of voxels to what a depth map sees, plain and flipped: what completion networks take.

* Song, Yu, Zeng, Chang, Savva, Funkhouser: Semantic scene completion from a single depth image, CVPR 2017, Section 3.1

A voxel in view gets sign * min(1, distance to the nearest surface voxel / 0.24 m), positive before the surface that the
camera sees and negative behind it; a surface voxel (one that a pixel's point lies in) gets 0. Voxels out of view, and
those whose pixel has no depth in 0.5..8 m, get 1. *Flipped* values are `sign * max(0.001, 1 - |value|)`: strong near
the surface, weak in the open, and 1 on the surface itself.

Distances are taken between voxels, so only those of fewer than 12 steps matter. They come from one pass along each
axis (z while the surface is marked, then x, then y), each over 23 neighbours at most, in one sweep with the sign:
nothing but the result is of the volume's size in floats.
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Float, Float32, UInt8
from numba import njit

from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.ops import voxels
from enfilade.ops.lattice import run_parts
from enfilade.ops.voxels import VoxelGrid, project_row

TRUNCATION = 0.24  # metres
NEAR, FAR = 0.5, 8.0  # metres: depth that a Kinect can be trusted with
# SSCNet counts a voxel as before the surface until it is a tenth of a millimetre behind it. The paper does not say so:
# on NYU0003 the sign of 11 voxels hangs on it, and with it all 8,294,400 values meet the stored ones to 1e-6.
BEHIND = 1e-4
WEAKEST = 0.001


def steps(grid: VoxelGrid, truncation: float = TRUNCATION) -> int:
    """The truncation in voxels; UserError where that is not in 1..255."""
    found = round(truncation / grid.size)
    if not 1 <= found <= 255:
        raise UserError(
            f"a truncation of {truncation} m is {found} voxels of {grid.size} m: choose one of 1 to 255 voxels"
        )
    return found


@njit(cache=True, nogil=True)
@no_type_check  # a checked function cannot be compiled
def _mark(index, reach, near, occupied):
    """near = reach - (steps along z to the nearest surface voxel) where positive, and which rows have a surface."""
    _, ny, nz = near.shape
    for v in range(index.shape[0]):
        for u in range(index.shape[1]):
            flat = index[v, u]
            if flat < 0:
                continue
            row, k = flat // nz, flat % nz
            i, j = row // ny, row % ny
            if near[i, j, k] == reach:
                continue
            occupied[i, j] = True
            for other in range(max(0, k - reach + 1), min(nz, k + reach)):
                value = reach - abs(other - k)
                if value > near[i, j, other]:
                    near[i, j, other] = value


@njit(cache=True, nogil=True)
@no_type_check
def _within(a, b, first, last):
    """The part of first..last in which a + b * k may be positive, one step more to either side."""
    if b > 0:
        first = max(first, int(max(-a / b, -2.0)) - 1) if -a / b < last + 2 else last
    elif b < 0:
        last = min(last, int(min(-a / b, last + 2.0)) + 2) if -a / b > first - 2 else first
    elif a < 0:
        last = first
    return first, max(first, last)


@njit(cache=True, nogil=True)
@no_type_check
def _in_view(i, j, count, camera, width, height, inverse, origin, size):
    """first, last: no voxel of row (i, j) outside them is in view. The view is a pyramid, a row meets it once."""
    fx, fy, cx, cy = camera
    x, y, z = origin[0] + i * size, origin[1], origin[2] + j * size
    a = inverse[:, 0] * x + inverse[:, 1] * y + inverse[:, 2] * z + inverse[:, 3]
    b = inverse[:, 1] * size
    first, last = _within(a[2], b[2], 0, count)
    first, last = _within(fx * a[0] + (cx + 0.5) * a[2], fx * b[0] + (cx + 0.5) * b[2], first, last)
    right, bottom = width - 0.5 - cx, height - 0.5 - cy
    first, last = _within(right * a[2] - fx * a[0], right * b[2] - fx * b[0], first, last)
    first, last = _within(fy * a[1] + (cy + 0.5) * a[2], fy * b[1] + (cy + 0.5) * b[2], first, last)
    return _within(bottom * a[2] - fy * a[1], bottom * b[2] - fy * b[1], first, last)


@njit(cache=True, nogil=True)
@no_type_check
def _fill(part, parts, near, occupied, depth, camera, inverse, origin, size, reach, flipped, out):
    """The values of every `parts`-th plane along x."""
    nx, ny, nz = out.shape
    height, width = np.int32(depth.shape[0]), np.int32(depth.shape[1])
    pixels = depth.reshape(-1)
    limit, scale = np.float32(reach * reach), np.float32(reach)
    one, weakest = np.float32(1), np.float32(WEAKEST)
    plane, filled = np.empty((ny, nz), np.float32), np.empty(ny, np.bool_)
    best_, index_, z_, seen_ = np.empty(nz, np.float32), np.empty(nz, np.int32), np.empty(nz), np.empty(nz)
    unknown = weakest if flipped else one
    for i in range(part, nx, parts):
        for j in range(ny):  # squared distances to the surface voxels of the same height
            filled[j] = False
            target = plane[j]
            for other in range(max(0, i - reach + 1), min(nx, i + reach)):
                if not occupied[other, j]:
                    continue
                if not filled[j]:
                    filled[j] = True
                    target[:] = limit
                source, across = near[other, j], np.float32((other - i) * (other - i))
                for k in range(nz):
                    along = scale - np.float32(source[k])
                    value = along * along + across
                    target[k] = value if value < target[k] else target[k]
        for j in range(ny):
            first, last = _in_view(i, j, nz, camera, width, height, inverse, origin, size)
            out[i, j, :first] = unknown
            out[i, j, last:] = unknown
            # Slices, not k from first to last: a k that might be negative keeps loops from becoming vectors.
            best, index, z, seen = best_[first:last], index_[first:last], z_[first:last], seen_[first:last]
            row = out[i, j, first:last]
            best[:] = limit
            for other in range(max(0, j - reach + 1), min(ny, j + reach)):
                if not filled[other]:
                    continue
                source, across = plane[other, first:last], np.float32((other - j) * (other - j))
                for k in range(len(best)):
                    value = source[k] + across
                    best[k] = value if value < best[k] else best[k]
            project_row(i, j, first, camera, width, height, inverse, origin, size, 0.0, index, z)
            for k in range(len(best)):
                seen[k] = pixels[max(index[k], 0)]
            for k in range(len(best)):
                value = np.sqrt(best[k]) / scale
                if flipped:
                    value = one - value
                    value = value if value > weakest else weakest
                value = -value if seen[k] - z[k] < -BEHIND else value
                value = value if seen[k] >= NEAR else unknown
                value = value if seen[k] <= FAR else unknown
                row[k] = value if index[k] >= 0 else unknown
            if occupied[i, j]:
                for k in range(nz):
                    if near[i, j, k] == reach:
                        out[i, j, k] = one if flipped else np.float32(0)


def tsdf(
    depth: Float[np.ndarray, "h w"],
    camera: Camera,
    grid: VoxelGrid,
    *,
    flipped: bool = True,
    truncation: float = TRUNCATION,
    threads: int | None = None,
) -> Float32[np.ndarray, "x y z"]:
    """The flipped TSDF of a depth map in metres (0 or not finite where unknown), or the plain one; see the module.

    `threads`: torch's number if None. Values do not depend on it. Raises UserError where the camera is of another size
    than the depth, or the truncation is no number of 1..255 voxels."""
    reach = steps(grid, truncation)
    index = voxels.pixel_voxels(depth, camera, grid, threads=threads)
    near, occupied = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape[:2], bool)
    _mark(index, reach, near, occupied)
    out = np.empty(grid.shape, np.float32)
    arguments = near, occupied, np.ascontiguousarray(depth), voxels.numbers_of(camera), grid.from_world
    arguments = *arguments, grid.origin.astype(np.float64), grid.size, reach, flipped, out
    parts = voxels.parts(threads)
    run_parts(lambda part, *_: _fill(part, parts, *arguments), parts, parts)
    return out


def tsdf_reference(
    depth: Float[np.ndarray, "h w"],
    camera: Camera,
    grid: VoxelGrid,
    *,
    flipped: bool = True,
    truncation: float = TRUNCATION,
) -> Float32[np.ndarray, "x y z"]:
    """`tsdf` with SciPy's distance transform, in whole arrays."""
    from scipy.ndimage import distance_transform_edt

    reach = steps(grid, truncation)
    surface = np.zeros(grid.shape, bool)
    index = voxels.pixel_voxels_reference(depth, camera, grid)
    surface.reshape(-1)[index[index >= 0]] = True
    distance = np.full(grid.shape, np.inf)
    if surface.any():
        distance = np.asarray(distance_transform_edt(~surface))
    pixel, z = voxels.voxel_pixels_reference(camera, grid)
    seen = np.where(pixel >= 0, depth.reshape(-1)[pixel], np.nan).astype(np.float64)
    value = np.minimum(distance.astype(np.float32), np.float32(reach)) / np.float32(reach)
    if flipped:
        value = np.maximum(np.float32(WEAKEST), 1 - value)
    value = np.where(seen - z < -BEHIND, -value, value)
    value = np.where((seen >= NEAR) & (seen <= FAR), value, np.float32(WEAKEST if flipped else 1))
    return np.where(surface, np.float32(1 if flipped else 0), value)


@njit(cache=True, nogil=True)
@no_type_check
def _see(part, parts, depth, camera, inverse, origin, size, out):
    nx, ny, nz = out.shape
    height, width = np.int32(depth.shape[0]), np.int32(depth.shape[1])
    pixels = depth.reshape(-1)
    index_, z_, seen_ = np.empty(nz, np.int32), np.empty(nz), np.empty(nz)
    for i in range(part, nx, parts):
        for j in range(ny):
            first, last = _in_view(i, j, nz, camera, width, height, inverse, origin, size)
            out[i, j, :first] = 0
            out[i, j, last:] = 0
            index, z, seen, row = index_[first:last], z_[first:last], seen_[first:last], out[i, j, first:last]
            project_row(i, j, first, camera, width, height, inverse, origin, size, 0.0, index, z)
            for k in range(len(row)):
                seen[k] = pixels[max(index[k], 0)]
            for k in range(len(row)):
                state = 3 if seen[k] - z[k] < -BEHIND else 1
                state = state if (seen[k] >= NEAR) & (seen[k] <= FAR) else 0
                row[k] = state if index[k] >= 0 else 0


def visibility(
    depth: Float[np.ndarray, "h w"], camera: Camera, grid: VoxelGrid, *, threads: int | None = None
) -> UInt8[np.ndarray, "x y z"]:
    """What the depth map says of each voxel: `voxels.OUTSIDE` (0) out of view or without depth in 0.5..8 m there,
    `FREE` (1) before what the camera sees, `SURFACE` (2) touched by a pixel's point, `OCCLUDED` (3) behind. These are
    the signs of `tsdf`, which does not tell the first two apart. For `voxels.score_masks`."""
    index = voxels.pixel_voxels(depth, camera, grid, threads=threads)
    out = np.empty(grid.shape, np.uint8)
    arguments = np.ascontiguousarray(depth), voxels.numbers_of(camera), grid.from_world
    arguments = *arguments, grid.origin.astype(np.float64), grid.size, out
    parts = voxels.parts(threads)
    run_parts(lambda part, *_: _see(part, parts, *arguments), parts, parts)
    out.reshape(-1)[index[index >= 0]] = voxels.SURFACE
    return out
