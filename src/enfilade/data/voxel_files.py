"""One's own depth map, as the file of voxels that completion starts from; labels are not needed.

    sample = frame(read_depth("depth.png"), camera, rgb="image.jpg")
    grid = place_grid(sample.depth, sample.camera)
    print(describe_grid(grid))
    write_voxels("voxels.npz", encode(sample, grid=grid), grid)

`ops.voxels.place_grid` is the one place where camera height, gravity and origin are decided.
"""

import os
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Float32

from enfilade.camera import Camera
from enfilade.data.files import read_map, read_rgb
from enfilade.errors import UserError
from enfilade.images import write_atomic
from enfilade.ops.voxels import VoxelGrid
from enfilade.types import Sample


def read_depth(path: str | os.PathLike, *, unit: float | None = None) -> Float32[np.ndarray, "h w"]:
    """A depth map in metres, 0 where unknown: a PNG or TIFF, or a NumPy array (.npy).

    `unit` is metres per stored unit; default: 0.001 for whole numbers, 1 for floats. 0, the largest 16-bit number, NaN
    and infinity are missing. Raises FileNotFoundError, and `UserError` that names the file where it does not fit."""
    path = Path(path)
    if unit is not None and not 0 < unit < np.inf:
        raise UserError(f"a depth map's unit is a positive number of metres, not {unit}")
    if path.suffix.lower() == ".npy":
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found")
        try:
            stored = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no readable NumPy array ({error})") from error
    else:
        stored = read_map(path)
    if stored.ndim != 2 or stored.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {stored.dtype} {list(stored.shape)}: a depth map is numbers in two dimensions")
    if stored.dtype == np.uint8 and unit is None:
        raise UserError(f"{path} has 8 bits, too few for millimetres: give the unit, how many metres a step is")
    whole = stored.dtype.kind in "iu"
    known = (stored > 0) & ((stored != 65535) if whole else np.isfinite(stored))
    if not known.any():
        raise UserError(f"{path}: not a pixel has depth")
    return np.where(known, stored, 0).astype(np.float32) * np.float32(unit or (0.001 if whole else 1.0))


def frame(
    depth: Float32[np.ndarray, "h w"], camera: Camera, *, rgb: str | os.PathLike | None = None, name: str = "depth"
) -> Sample:
    """A depth map, and the colour image that is aligned with it, as a sample of the depth map's size; without an image
    it is black. A camera or an image of another size, but of the same proportions, is resized; UserError for others."""
    height, width = depth.shape
    _demand_shape("the camera", camera.width, camera.height, width, height)
    image = np.zeros((height, width, 3), np.float32)
    if rgb is not None:
        image = read_rgb(rgb)
        _demand_shape(str(rgb), image.shape[1], image.shape[0], width, height)
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if (camera.width, camera.height) != (width, height):
        camera = camera.resized(width, height)
    return Sample(image=image, name=name, depth=depth, camera=camera)


def _demand_shape(what: str, width: int, height: int, depth_width: int, depth_height: int) -> None:
    if abs(width * depth_height - height * depth_width) > 0.01 * width * depth_height:
        raise UserError(
            f"{what} is of {width}x{height} pixels, but the depth map {depth_width}x{depth_height}: they need the same "
            "proportions, and must be aligned"
        )


def read_pose(path: str | os.PathLike) -> Float[np.ndarray, "4 4"]:
    """A camera-to-world pose: 16 numbers in a text file, row by row. Raises FileNotFoundError or `UserError`."""
    try:
        values = np.array(Path(path).read_text().replace(",", " ").split(), np.float64)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds something that is no number ({error})") from error
    if values.size != 16 or not np.isfinite(values).all():
        raise UserError(f"{path} holds {values.size} numbers: a pose is a finite 4x4 matrix, camera-to-world")
    pose = values.reshape(4, 4)
    if np.abs(pose[:3, :3] @ pose[:3, :3].T - np.eye(3)).max() > 0.01 or np.abs(pose[3] - [0, 0, 0, 1]).max() > 0.01:
        raise UserError(f"{path}: expected a rotation, a place and a last row of 0 0 0 1, in metres, rows first")
    return pose


def describe_grid(grid: VoxelGrid, *, height: str = "found", gravity: str = "found") -> str:
    """Camera height, gravity and origin of a grid that `place_grid` has made, in a sentence each. `height` and
    `gravity` tell where these come from."""
    down = np.round(-grid.pose[2, :3], 3) + 0.0  # and no -0
    tilt = np.degrees(np.arcsin(np.clip(-grid.pose[2, 2], -1, 1)))
    x, y, z = np.round(grid.origin, 2) + 0.0
    reach = " x ".join(f"{n * grid.size:.2f}" for n in (grid.shape[0], grid.shape[2], grid.shape[1]))
    looks = f"{abs(tilt):.1f} degrees {'down' if tilt >= 0 else 'up'}"
    return "\n".join(
        [
            f"Camera height: the camera is {grid.pose[2, 3]:.2f} m above the floor ({height}).",
            f"Gravity: things fall along ({down[0]:.3f}, {down[1]:.3f}, {down[2]:.3f}) in the camera frame (x right, "
            f"y down, z forward), so the camera looks {looks} ({gravity}).",
            f"Origin: the grid of {reach} m begins at ({x:.2f}, {y:.2f}, {z:.2f}) m in a world with X right, Y forward "
            "and Z up, whose origin is on the floor below the camera.",
        ]
    )


def write_voxels(path: str | os.PathLike, sample: Sample, grid: VoxelGrid) -> None:
    """Write an encoded sample (`data.volumes.encode`) as an .npz, which NumPy reads:

    * `tsdf` float32 [x, y, z], flipped, of the grid; axes as in `ops.voxels`
    * `voxels` int32 [h, w]: each pixel's flat voxel of the output grid, a quarter as fine; -1 for none
    * `pixels` int32 [x / 4, y / 4, z / 4]: the flat pixel that each of its voxels falls on; -1 out of view
    * `origin` [3], the grid's lowest corner (world X, Y, Z in metres), `size` of a voxel (metres), and `pose` [4, 4],
      camera-to-world: the camera's height is pose[2, 3], gravity in the camera frame -pose[2, :3]
    * `intrinsics` [3, 3] of the depth map, `depth` float32 [h, w] in metres, `image` 8-bit RGB
    * `volume`, labels of the output grid (ssc12), if known

    Raises UserError for a sample that is not encoded, and where the file cannot be written."""
    if sample.completion is None or sample.camera is None or sample.depth is None:
        raise UserError(f"{sample.name} cannot be written as voxels: encode it first")
    arrays = {
        "tsdf": sample.completion.tsdf,
        "voxels": sample.completion.voxels,
        "pixels": sample.completion.pixels,
        "origin": grid.origin,
        "size": np.float64(grid.size),
        "pose": grid.pose,
        "intrinsics": sample.camera.matrix,
        "depth": sample.depth,
        "image": np.rint(255 * sample.image).astype(np.uint8),
    }
    if sample.completion.volume is not None:
        arrays["volume"] = sample.completion.volume
    write_atomic(path, lambda file: np.savez_compressed(file, **arrays))
