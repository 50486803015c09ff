"""The image files of data sets: colour, and maps of one channel. Errors name the file.

Pixels are read as they are stored: an EXIF orientation is not applied, because depth and label files do not carry one
and the three must stay aligned. (A user's single photos are turned upright: `enfilade.images.read`.)
"""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float32, Shaped

from enfilade.errors import UserError

_PALETTE = 3  # PNG colour type


def _load(path: str | os.PathLike) -> np.ndarray:
    """The bytes of an image file. OpenCV fills the rest of a truncated file with grey and only prints a warning, so
    the end marker is looked for here."""
    try:
        data = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if data.size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    tail = data[-4096:].tobytes()
    start = data[:8].tobytes()
    jpeg, png = start.startswith(b"\xff\xd8"), start.startswith(b"\x89PNG")
    if (jpeg and b"\xff\xd9" not in tail) or (png and b"IEND" not in tail):
        raise UserError(f"{path} is truncated: its end is missing")
    return data


def _decode(path: str | os.PathLike, data: np.ndarray, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(data, flags)
    except cv2.error as error:  # a header that asks for more than 2^30 pixels
        raise UserError(f"{path} is no readable image ({error.err or error})") from error
    if image is None:
        raise UserError(f"{path} is no readable image")
    return image


def read_rgb(path: str | os.PathLike) -> Float32[np.ndarray, "h w 3"]:
    """A colour image, RGB in [0, 1]; grey becomes colour, alpha is dropped."""
    image = _decode(path, _load(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return np.multiply(image, np.float32(1 / 255), dtype=np.float32)


def read_map(path: str | os.PathLike) -> Shaped[np.ndarray, "h w"]:
    """A single-channel image in the type it is stored in (8 or 16 bits, or float); a palette image gives indices."""
    data = _load(path)
    if data[:4].tobytes() == b"\x89PNG" and data.size > 25 and data[25] == _PALETTE:
        try:
            return np.array(PIL.Image.open(BytesIO(data.tobytes()), formats=("PNG",)))
        except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise UserError(f"{path} is no readable image ({error})") from error
    image = _decode(path, data, cv2.IMREAD_UNCHANGED)
    if image.ndim != 2:
        raise UserError(f"{path} has {image.shape[2]} channels: a depth or label image has one")
    return image


def demand_size(array: Shaped[np.ndarray, "_ _ *c"], path: Path, image: Float32[np.ndarray, "h w 3"], of: Path) -> None:
    """Raise UserError where a map, read from `path`, has another size than its image, read from `of`."""
    if array.shape[:2] != image.shape[:2]:
        raise UserError(
            f"{path} is {array.shape[1]}x{array.shape[0]}, but {of.name} {image.shape[1]}x{image.shape[0]}: "
            "the files of one frame have one size"
        )


def demand_files(paths: Sequence[Path], name: str, way_out: str) -> None:
    """Raise FileNotFoundError where files of the data set `name` are missing; `way_out` is what else to do than to
    complete the folder. Folders are listed once: asking for each file alone is slow on network drives."""
    present = {folder: set(os.listdir(folder)) if folder.is_dir() else () for folder in {p.parent for p in paths}}
    missing = [path for path in paths if path.name not in present[path.parent]]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} not found ({len(missing)} of the {len(paths)} files of {name} are missing): complete the "
            f"folder, or {way_out}"
        )
