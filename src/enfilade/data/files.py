"""Image files in and out, for all readers. Errors name the file.

Pixels are read as they are stored: an EXIF orientation is not applied, because depth and label files do not carry one
and the three must stay aligned.
"""

import os
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32, Shaped, UInt8

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


def read_rgb(path: str | os.PathLike) -> Float32[np.ndarray, "h w 3"]:
    """A colour image, RGB in [0, 1]; grey becomes colour, alpha is dropped."""
    image = cv2.imdecode(_load(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise UserError(f"{path} is no readable image")
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return np.multiply(image, np.float32(1 / 255), dtype=np.float32)


def read_map(path: str | os.PathLike) -> Shaped[np.ndarray, "h w"]:
    """A single-channel image in the type it is stored in (8 or 16 bits, or float); a palette image gives indices."""
    data = _load(path)
    if data[:4].tobytes() == b"\x89PNG" and data.size > 25 and data[25] == _PALETTE:
        from io import BytesIO

        from PIL import Image

        try:
            return np.array(Image.open(BytesIO(data.tobytes()), formats=("PNG",)))
        except (OSError, SyntaxError) as error:
            raise UserError(f"{path} is no readable image ({error})") from error
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED | cv2.IMREAD_ANYDEPTH)
    if image is None:
        raise UserError(f"{path} is no readable image")
    if image.ndim != 2:
        raise UserError(f"{path} has {image.shape[2]} channels: a depth or label image has one")
    return image


def write_image(path: str | os.PathLike, image: UInt8[np.ndarray, "h w 3"] | Shaped[np.ndarray, "h w"], quality=95):
    """Write RGB or one channel as the ending of `path` says (jpg, png), atomically."""
    path = Path(path)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix == ".jpg" else []
    ok, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image, options)
    if not ok:
        raise ValueError(f"{path}: cannot encode an image of shape {image.shape} and type {image.dtype}")
    write_bytes(path, data.tobytes())


def write_bytes(path: str | os.PathLike, data: bytes):
    """Write a file atomically: under a temporary name beside it, then moved."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
