"""Region support of a data set, as files: 16-bit PNG in millimetres, 0 where there is no label.

    found = write_region_support(open_dataset("nyuv2", "data", split="trainval"), "data/region_support")
    show_region_support(open_dataset("nyuv2", "data", split="val"), "sheet.png")

A frame takes milliseconds (`ops.regions`); reading it takes longer.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt16
from PIL import Image, ImageDraw, ImageFont

from enfilade.data import Reader
from enfilade.errors import UserError
from enfilade.images import make_folder, write_atomic, write_png
from enfilade.labels import IGNORE
from enfilade.ops.regions import region_support
from enfilade.types import Sample

ABOUT = "region_support.json"  # in the folder: what its files were made from
_FAR = 65.534  # metres; the largest 16-bit number stands for missing depth in many readers


@dataclass(frozen=True, slots=True)
class Written:
    """How many files were written and how many were there before; `broken` holds (id, reason) of the other samples."""

    written: int
    present: int
    broken: tuple[tuple[str, str], ...] = ()


def write_region_support(reader: Reader, folder: str | os.PathLike, *, quiet: bool = True) -> Written:
    """Write `folder`/NAME.png for every sample of a data set with labels and depth.

    A file is written whole or not at all, and one that is there is kept, so that an interrupted run goes on when it is
    started again. Several splits may share a folder. A sample that cannot be read, or has no labels or no depth, is
    listed and passed over. `quiet=False` shows the progress on the error stream.

    Raises UserError where the first sample that can be read has no labels or no depth, for a folder that was filled
    from another label space or with other ignored classes (`region_support.json` in it tells), and for one that cannot
    be written to.
    """
    folder = Path(folder)
    files = [folder / f"{name}.png" for name in reader.names]
    todo = [index for index, file in enumerate(files) if not file.is_file()]
    _claim(folder, reader)
    broken, read = [], len(todo) < len(files)
    for index in _progress(todo, reader.name, quiet):
        name = reader.names[index]
        try:
            sample = reader[index]
            lacks = _lacks(sample)
            millimetres = None if lacks else _millimetres(_support(sample))
        except Exception as error:  # whatever it is, the other samples still count
            broken.append((name, _reason(error)))
            continue
        if millimetres is None:
            if not read:
                raise UserError(f"{reader.name} has no {lacks} (sample {name}): region support needs labels and depth")
            broken.append((name, f"has no {lacks}"))
            continue
        read = True
        make_folder(files[index].parent)  # names may hold folders
        write_png(files[index], millimetres)
    return Written(len(todo) - len(broken), len(files) - len(todo), tuple(broken))


def _support(sample: Sample) -> Float32[np.ndarray, "h w"]:
    assert sample.labels is not None
    assert sample.depth is not None
    support = region_support(sample.labels, sample.depth, void=IGNORE)
    if not support.any():
        raise UserError(f"not a pixel has {'a label' if (sample.labels == IGNORE).all() else 'depth'}")
    return support


def _lacks(sample: Sample) -> str:
    missing = [kind for kind in ("labels", "depth") if getattr(sample, kind) is None]
    return " and no ".join(missing)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: {error}"


def _millimetres(support: Float32[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    if support.max() > _FAR:
        raise UserError(f"its region support reaches {support.max():.1f} m, beyond the {_FAR} m of a 16-bit image")
    rounded = np.rint(support * 1000).astype(np.uint16)
    return np.where(support > 0, np.maximum(rounded, 1), 0).astype(np.uint16)  # a labelled pixel does not become void


def _claim(folder: Path, reader: Reader) -> None:
    """See that the folder is new or was filled in the same way: other labels make other regions."""
    about = {"unit": "mm", "space": reader.space.name, "ignored": list(reader.ignored)}
    mark = folder / ABOUT
    if folder.is_dir() and any(folder.rglob("*.png")):
        if not mark.is_file():
            raise UserError(f"{folder} holds images but no {ABOUT}: choose another folder")
        try:
            there = json.loads(mark.read_text())
        except (OSError, ValueError):
            there = None
        if there != about:
            raise UserError(f"{mark} tells of other labels than {json.dumps(about)}: choose another folder")
    make_folder(folder)
    write_atomic(mark, (json.dumps(about, indent=1) + "\n").encode())


def _progress(indices: list[int], name: str, quiet: bool) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return track(indices, name, console=Console(stderr=True)) if indices and not quiet else indices


# --- contact sheet ----------------------------------------------------------------------------------------------------

_TILE = 320  # pixels wide
_TITLES = ("labels", "depth", "region support")


def show_region_support(reader: Reader, path: str | os.PathLike, *, count: int = 6, seed: int = 0) -> Image.Image:
    """Write a PNG sheet of `count` samples (drawn by `seed`), one a row: RGB | labels | depth | region support. The
    last two share their colours. A sample that cannot be read is a row with the reason.

    Raises UserError where there is nothing to show, and for a file that cannot be written.
    """
    from enfilade.viz import contact_sheet

    if len(reader) == 0 or count < 1:
        raise UserError(f"nothing to show: {reader.name} has {len(reader)} samples, {count} were asked for")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(reader))[:count]).tolist()
    pictures, titles = [], []
    for index in chosen:
        try:
            row = _row(reader[index], reader)
        except Exception as error:  # shown in its place
            row = [_message(_reason(error))] + [_message("")] * len(_TITLES)
        pictures += row
        titles += [reader.names[index], *_TITLES]
    sheet = contact_sheet(pictures, columns=1 + len(_TITLES), titles=titles, width=_TILE)
    buffer = BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
    return sheet


def _row(sample: Sample, reader: Reader) -> list[np.ndarray]:
    from enfilade.viz import as_uint8, colour_depth, depth_range

    if lacks := _lacks(sample):
        raise UserError(f"has no {lacks}")
    assert sample.labels is not None
    assert sample.depth is not None
    near, far = depth_range(sample.depth)
    return [
        as_uint8(sample.image),
        reader.space.colourise(sample.labels),
        colour_depth(sample.depth, near, far),
        colour_depth(_support(sample), near, far),
    ]


def _message(text: str) -> np.ndarray:
    tile = Image.new("RGB", (_TILE, _TILE * 3 // 4), (48, 48, 48))
    wrapped = "\n".join(text[k : k + 44] for k in range(0, min(len(text), 440), 44))
    ImageDraw.Draw(tile).multiline_text((8, 8), wrapped, fill=(255, 120, 120), font=ImageFont.load_default(13))
    return np.asarray(tile)
