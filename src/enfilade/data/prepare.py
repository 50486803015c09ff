"""From a data set as it is distributed to the folder its reader wants."""

import json
import os
from pathlib import Path

import cv2
import numpy as np

from enfilade.data.nyuv2 import MatFrame, open_mat, read_mat, read_splits
from enfilade.errors import UserError
from enfilade.images import make_folder, write_atomic, write_png
from enfilade.labels import IGNORE, nyu894_to_40


def prepare_nyuv2(
    mat: str | os.PathLike,
    out: str | os.PathLike,
    *,
    splits: str | os.PathLike | None = None,
    mapping: str | os.PathLike | None = None,
    raw_depth: bool = False,
    image: str = "jpg",
) -> Path:
    """Write the folder that `data.nyuv2.NYUv2` reads from the official nyu_depth_v2_labeled.mat; returns the folder.

    Depth becomes 16-bit PNG in millimetres, labels 8-bit PNG (0 void, 1..40), colour JPEG of quality 95. The lists
    train.txt and test.txt and dataset.json come last, so that a folder with them is complete. Run again after an
    interruption, it goes on where it stopped.

    Args:
        mat: nyu_depth_v2_labeled.mat.
        out: the folder to fill.
        splits: the official splits.mat; default: beside `mat`.
        mapping: the official classMapping40.mat; default: beside `mat`.
        raw_depth: the sensor's depth, 0 where it saw none, instead of the in-painted one.
        image: "jpg", or "png" for lossless colour (five times the space).

    Raises FileNotFoundError for a missing file; `UserError` for a damaged or different .mat, for a folder that holds
    other files, or that was prepared with other options.
    """
    from rich.console import Console
    from rich.progress import track

    if image not in ("jpg", "png"):
        raise UserError(f"image format {image!r} is not 'jpg' or 'png'")
    mat, out = Path(mat), Path(out)
    with open_mat(mat) as file:
        count = len(file["images"])
    train, test = read_splits(splits or mat.with_name("splits.mat"), count)
    to40 = nyu894_to_40(mapping or mat.with_name("classMapping40.mat"))

    _claim(out, {"depth": "mm", "depth_source": "raw" if raw_depth else "in-painted", "image": image, "void": "exact"})
    missing = [i for i in sorted({*train, *test}) if not all(p.is_file() for p in _paths(out, i, image))]
    frames = read_mat(mat, missing, raw=raw_depth)
    progress = track(frames, f"nyuv2 -> {out}", len(missing), console=Console(stderr=True), disable=not missing)
    for frame in progress:
        _write(frame, _paths(out, frame.index, image), to40)

    for name, indices in (("train", train), ("test", test)):
        write_atomic(out / f"{name}.txt", "".join(f"{i:04d}\n" for i in indices).encode())
    (out / _STARTED).replace(out / "dataset.json")
    return out


_STARTED = "dataset.json.started"


def _claim(out: Path, options: dict[str, str]):
    """Make the folder ours, or see that it is: files of other origin or options must not get mixed."""
    marks = [out / name for name in ("dataset.json", _STARTED) if (out / name).is_file()]
    if not marks and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder: choose another one to write to")
    for mark in marks:
        if json.loads(mark.read_text()) != options:
            raise UserError(f"{mark} tells of other options ({mark.read_text().strip()}): choose another folder")
    for kind in ("rgb", "depth", "label40"):
        make_folder(out / kind)
    write_atomic(out / _STARTED, json.dumps(options, indent=1).encode() + b"\n")


def _paths(out: Path, index: int, image: str) -> tuple[Path, Path, Path]:
    name = f"{index:04d}"
    return out / "rgb" / f"{name}.{image}", out / "depth" / f"{name}.png", out / "label40" / f"{name}.png"


def _write(frame: MatFrame, paths: tuple[Path, Path, Path], to40: np.ndarray):
    if frame.labels.max() > 894:
        raise UserError(f"frame {frame.index} holds label {frame.labels.max()}, beyond the 894 of NYUv2")
    rgb, depth, label = paths
    if rgb.suffix == ".png":
        write_png(rgb, frame.image)
    else:
        bgr = cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)
        write_atomic(rgb, cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    # 0 stays "missing", a NaN becomes it; 65.5 m is beyond any indoor depth.
    metres = np.nan_to_num(frame.depth, nan=0.0, posinf=0.0, neginf=0.0)
    write_png(depth, np.clip(np.rint(metres * 1000), 0, 65535).astype(np.uint16))
    labels = to40[frame.labels]
    write_png(label, np.where(labels == IGNORE, 0, labels + 1).astype(np.uint8))


def prepare_hha(root: str | os.PathLike) -> int:
    """Fill `root`/hha with the HHA image of every listed frame that has none, from its depth; returns how many were
    written. `NYUv2(root, hha=True)` then reads them. About 0.2 s a frame; run again after an interruption.

    Raises FileNotFoundError or `UserError` for a folder that `NYUv2` cannot read.
    """
    from rich.console import Console
    from rich.progress import track

    from enfilade.data.nyuv2 import NYUv2
    from enfilade.ops.hha import hha

    root = Path(root)
    splits = [s for s in ("trainval", "test") if s != "test" or (root / "test.txt").is_file()]
    todo = [(r, i) for r in (NYUv2(root, s) for s in splits) for i in range(len(r))]
    todo = [(r, i) for r, i in todo if not (root / "hha" / f"{r.names[i]}.png").is_file()]
    make_folder(root / "hha")
    for reader, i in track(todo, f"hha -> {root / 'hha'}", console=Console(stderr=True), disable=not todo):
        sample = reader[i]
        assert sample.depth is not None
        assert sample.camera is not None
        write_png(root / "hha" / f"{sample.name}.png", hha(sample.depth, sample.camera))
    return len(todo)
