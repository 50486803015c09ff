"""Photos and frames come in here, and files go out: the border to the disk.

`read` turns anything that holds one picture into upright RGB floats, `find` turns what a user types into a list of
files, `frames` walks a video, and `write_atomic` and `write_png` write files that are either whole or absent.
Nothing here knows of networks; importing this module does not import torch.
"""

import glob
import io
import math
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from enfilade.errors import UserError

# Only decoders that photos need: each one more is more code that reads untrusted bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
PIXEL_LIMIT = 100_000_000
FILM_DIAGONAL = math.hypot(36, 24)  # mm, of the 35 mm frame

# EXIF tags (Exif 2.32, tables 3-8)
_ORIENTATION, _EXIF_IFD = 0x0112, 0x8769
_FOCAL_35MM, _FOCAL_MM, _PLANE_X, _PLANE_UNIT, _EXIF_WIDTH, _EXIF_HEIGHT = (
    0xA405,
    0x920A,
    0xA20E,
    0xA210,
    0xA002,
    0xA003,
)
_UNIT_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_open_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Image:
    """One upright picture."""

    rgb: Float32[np.ndarray, "h w 3"]  # in [0, 1]
    focal: float | None = None  # pixels, from EXIF
    name: str = "image"  # the file's stem
    path: Path | None = None


Source = str | os.PathLike | bytes | bytearray | memoryview | IO[bytes] | PIL.Image.Image | np.ndarray | Image


def read(source, *, name: str | None = None, limit: int = PIXEL_LIMIT) -> Image:
    """Read one picture as upright RGB in [0, 1].

    `source` is a path, encoded bytes, a binary file object, a `PIL.Image`, a numpy array of shape [h, w], [h, w, 1],
    [h, w, 3] or [h, w, 4] (uint8, uint16, bool, or float in [0, 1]), or an `Image`, which is returned as it is.

    EXIF orientation is applied. Transparent pixels are laid over white. Grey is repeated over the three channels;
    16-bit grey keeps its 16 bits, 16-bit RGB files come with 8. CMYK is converted without its colour profile. Of an
    animation the first frame is taken. The focal length comes from EXIF, see `focal_from_exif`.

    Raises UserError, in one sentence, for what is missing, no image, empty, cut off, or larger than `limit` pixels.
    A limit beyond twice `PIL.Image.MAX_IMAGE_PIXELS` needs that raised too.
    """
    if isinstance(source, Image):
        return source
    if isinstance(source, np.ndarray):
        return Image(_rgb_from_array(source), None, name or "image")
    if isinstance(source, PIL.Image.Image):
        return _finish(source, name or Path(getattr(source, "filename", "") or "image").stem, None, "the image", limit)
    if isinstance(source, bytes | bytearray | memoryview):
        return _read_stream(io.BytesIO(source), name or "image", None, "the image", limit)
    if hasattr(source, "read"):
        label = source.name if isinstance(getattr(source, "name", None), str) else "the image"
        stem = Path(label).stem if label != "the image" else "image"
        return _read_stream(_seekable(source, label), name or stem, None, label, limit)
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"cannot read an image from a {type(source).__name__}: give a path, bytes, a PIL image or array"
        )

    path = Path(source)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not an image: give one of its files, or let predict_many walk it")
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file: give an image file")
    try:
        with path.open("rb") as stream:
            return _read_stream(stream, name or path.stem, path, str(path), limit)
    except OSError as error:  # what the decoders raise is a UserError by now, so this is the file system
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _seekable(stream, label: str):
    """The stream itself where Pillow can move in it, else its contents."""
    if hasattr(stream, "seekable") and stream.seekable() and not isinstance(stream, io.TextIOBase):
        return stream
    data = stream.read()
    if not isinstance(data, bytes):
        raise UserError(f"{label} was opened as text: open it in binary mode, 'rb'")
    return io.BytesIO(data)


@cache
def _formats() -> tuple[str, ...]:
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def _read_stream(stream, name: str, path: Path | None, label: str, limit: int) -> Image:
    start = stream.tell()
    if not stream.read(1):
        raise UserError(f"{label} is empty (0 bytes)")
    stream.seek(start)
    try:
        # Pillow only warns between 1 and 2 times its own limit; `limit` is checked before any pixel is decoded.
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(stream, formats=_formats())
    except PIL.UnidentifiedImageError as error:
        hint = "; install pillow-heif for HEIC" if label.lower().endswith((".heic", ".heif")) else ""
        raise UserError(f"{label} is not an image of a known format ({', '.join(_formats())}){hint}") from error
    except PIL.Image.DecompressionBombError as error:
        raise UserError(_too_large(label, None, limit)) from error
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise UserError(f"{label} is damaged: {_reason(error)}") from error
    with image:
        return _finish(image, name, path, label, limit)


def _too_large(label: str, size: tuple[int, int] | None, limit: int) -> str:
    what = f"{size[0]} x {size[1]} pixels" if size else "far"
    return f"{label} is {what}, too large to decode safely (limit {limit / 1e6:g} megapixels): scale it down first"


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _finish(image: PIL.Image.Image, name: str, path: Path | None, label: str, limit: int) -> Image:
    if image.width * image.height > limit:
        raise UserError(_too_large(label, image.size, limit))
    if image.width * image.height == 0:
        raise UserError(f"{label} has no pixels ({image.width} x {image.height})")
    try:
        image.load()
    except Exception as error:
        raise UserError(f"{label} is cut off or damaged: {_reason(error)}") from error
    # After load(), because Pillow's TIFF reader turns its image there and drops the tag.
    orientation, focal = _exif(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    try:
        return Image(_rgb_from_pil(image), focal, name, path)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error


def _exif(image: PIL.Image.Image) -> tuple[int, float | None]:
    """Orientation and focal length; broken EXIF is no reason to refuse a good picture."""
    try:
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
        return orientation, focal_from_exif({**exif, **exif.get_ifd(_EXIF_IFD)}, image.width, image.height)
    except Exception:
        return 1, None


def focal_from_exif(exif: dict, width: int, height: int) -> float | None:
    """Focal length in pixels of an image of `width` x `height`, from its EXIF tags by number, or None.

    FocalLengthIn35mmFilm f35 is an equivalence of *diagonals* (CIPA DCG-001): f = f35 * diagonal / 43.27 mm. Without
    it, FocalLength times FocalPlaneXResolution, which counts pixels of the original, scaled to this image. An image
    whose aspect ratio is not the one that EXIF states was cropped, and nothing is known of its focal length.
    """

    def number(tag: int) -> float:
        try:
            value = float(exif[tag])
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return 0.0
        return value if math.isfinite(value) and value > 0 else 0.0

    # Sides by length, since some programs turn the pixels and leave these two tags.
    long, short = max(width, height), min(width, height)
    stated = sorted((number(_EXIF_WIDTH), number(_EXIF_HEIGHT)))
    if stated[0] > 0 and abs(math.log(stated[1] / stated[0] * short / long)) > 0.02 + 1 / short:  # + rounding
        return None
    diagonal = math.hypot(width, height)
    if number(_FOCAL_35MM):
        focal = number(_FOCAL_35MM) * diagonal / FILM_DIAGONAL
    else:
        unit = _UNIT_MM.get(int(number(_PLANE_UNIT)) or 2, 25.4)  # the standard's default is inches
        focal = number(_FOCAL_MM) * number(_PLANE_X) / unit * (long / stated[1] if stated[1] else 1.0)
    return focal if 0.05 * diagonal < focal < 100 * diagonal else None  # else no lens that exists


def _rgb_from_pil(image: PIL.Image.Image) -> Float32[np.ndarray, "h w 3"]:
    # convert("L") or ("RGB") would clip these three to 0..255 instead of scaling them.
    if image.mode.startswith("I;16"):
        return _rgb_from_array(np.asarray(image).astype(np.uint16))
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError("its 32-bit integers have no known range: convert it to 8 or 16 bits")
        return _rgb_from_array(values.astype(np.uint16))
    if image.mode == "F":
        return _rgb_from_array(np.asarray(image))
    return _rgb_from_array(np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")))


def _rgb_from_array(array: np.ndarray) -> Float32[np.ndarray, "h w 3"]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise UserError(f"an image array is [h, w], [h, w, 3] or [h, w, 4], not {list(array.shape)}{hint}")
    if array.size == 0:
        raise UserError(f"an image array needs at least one pixel, its shape is {list(array.shape)}")
    if array.dtype in (np.uint8, np.uint16):
        most = np.iinfo(array.dtype).max
    elif array.dtype == bool:
        most = 1
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also NaN; interpolation may overshoot by a hair
            raise UserError(f"a float image lies in [0, 1], this one in [{low:g}, {high:g}]: scale it first")
        most = None
    else:
        raise UserError(f"an image array holds uint8, uint16, bool or float, not {array.dtype}")

    def scaled(part: np.ndarray) -> np.ndarray:
        if most is None:
            return np.clip(part, 0, 1, dtype=np.float32, casting="unsafe")
        return np.divide(part, most, dtype=np.float32)

    values = scaled(array[..., :3])
    if array.shape[2] == 4:  # in place: 12 bytes a pixel are many
        alpha = scaled(array[..., 3:])
        values *= alpha
        values += np.subtract(1, alpha, out=alpha)
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))


class Found(NamedTuple):
    path: Path
    relative: Path  # below the folder that the user named; the file's name where a file was named
    named: bool  # by itself, not found in a folder or by a pattern


def is_video(path: str | os.PathLike) -> bool:
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def find(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The image and video files that `paths` name: see `find_relative`."""
    return [found.path for found in find_relative(paths)]


def find_relative(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Found]:
    """The image and video files that `paths` name, each with its place below the folder it was found in.

    A file is taken whatever its suffix; a folder is walked (sorted, without hidden files and without following links
    to folders) and a pattern such as `shots/**/*.jpg` expanded, both for known suffixes. Each file comes once. Raises
    UserError that names what does not exist, or the folders and patterns that hold no image.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: list[Found] = []
    missing, barren = [], []
    for path in paths:
        given, here = os.fspath(path), Path(path)
        if here.is_dir():
            new = _walk(here)
        elif here.exists():  # before patterns: a file may be called "room [1].jpg"
            new = [Found(here, Path(here.name), True)]
        elif glob.has_magic(given):
            matches = sorted(Path(match) for match in glob.iglob(given, recursive=True))
            files = [m for m in matches if m.is_file() and _known(m)]
            root = Path(os.path.commonpath([m.parent for m in files])) if files else here
            new = [Found(m, m.relative_to(root), False) for m in files]
        else:
            missing.append(given)
            continue
        if not new:
            barren.append(given)
        found += new
    if missing:
        raise UserError(f"no such file or folder: {', '.join(missing)}")
    if barren:
        raise UserError(
            f"no images or videos in {', '.join(barren)} (known: {' '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)})"
        )
    first: dict[str, Found] = {}
    for f in found:
        first.setdefault(os.path.abspath(f.path), f)
    return list(first.values())


def _known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _walk(root: Path) -> list[Found]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            if not file.startswith(".") and _known(path):
                found.append(Found(path, path.relative_to(root), False))
    return found


def frames(path: str | os.PathLike, every: int = 1) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """Each `every`-th frame of a video as (frame number from 0, RGB). Raises UserError at the call, not at the first
    frame, for a file that is missing or that OpenCV cannot decode."""
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every}")
    if not Path(path).is_file():
        raise UserError(f"{path} is {'a folder, not a video' if Path(path).is_dir() else 'no file: check the path'}")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: our one sentence says it
    capture = cv2.VideoCapture(os.fspath(path))
    ok, first = capture.read() if capture.isOpened() else (False, None)
    if not ok or first is None:
        capture.release()
        raise UserError(f"{path} is not a video that can be decoded: re-encode it, for example as H.264 in mp4")

    def walk():
        try:
            index, frame = 0, first
            while frame is not None:
                yield index, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                for _ in range(every - 1):
                    capture.grab()  # decodes no colours, so skipping is cheap
                frame = capture.read()[1]
                index += every
        finally:
            capture.release()

    return walk()


def frame_count(path: str | os.PathLike) -> int:
    """Number of frames that the video's header states, 0 where it does not say; for progress bars."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    capture = cv2.VideoCapture(os.fspath(path))
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    capture.release()
    return max(0, int(count)) if math.isfinite(count) else 0


def make_folder(folder: str | os.PathLike) -> Path:
    """Create a folder and its parents. Raises UserError that names it where that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror or error}") from error
    return Path(folder)


def write_atomic(path: str | os.PathLike, data: bytes | memoryview | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: to a temporary name in the same folder, then renamed over `path`. `data` is
    the contents, or a function that writes them to the open file. Raises UserError that names the folder."""
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(6)}.part"
    try:
        try:
            with temporary.open("xb") as file:
                if callable(data):
                    data(file)
                else:
                    file.write(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path.name} to {path.parent}: {error.strerror or error}") from error


def write_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write a grey [h, w] or RGB [h, w, 3] array of uint8 or uint16 as PNG, losslessly and atomically."""
    if array.dtype not in (np.uint8, np.uint16) or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"a PNG holds uint8 or uint16 of [h, w] or [h, w, 3], not {array.dtype} {list(array.shape)}")
    ok, data = cv2.imencode(".png", array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR))
    if not ok:
        raise ValueError(f"could not encode {path} as PNG: {array.shape[1]} x {array.shape[0]} is too large")
    write_atomic(path, data.data)
