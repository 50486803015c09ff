"""Scores on paper: a JSON file, a text table, a picture of the confusion matrix; and a bar while they are made.

A result is a dict of the scores' `compute()` under "segmentation" and "depth", either of which may be missing, and
of anything else that names the run (recipe, data, frames, ...); a bare `compute()` dict will do for `table`.
"""

import io
import json
import math
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Integer
from PIL import Image, ImageDraw, ImageFont

from enfilade.images import make_folder, write_atomic

SEGMENTATION_ROWS = {
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "fwiou": "frequency-weighted IoU",
    "mean_image_iou": "mean image IoU (GAD's released evaluation; not mIoU)",
}
DEPTH_ROWS = {  # key: title, whether a percentage
    "delta1": ("delta < 1.25", True),
    "delta2": ("delta < 1.25^2", True),
    "delta3": ("delta < 1.25^3", True),
    "abs_rel": ("abs rel", False),
    "sq_rel": ("sq rel", False),
    "rmse": ("RMSE, m", False),
    "rmse_log": ("RMSE log", False),
    "rmse_log_si": ("RMSE log, scale-invariant", False),
    "log_si": ("log scale-invariant, squared", False),
    "log10": ("log10", False),
}
COMPLETION_ROWS = {
    "sc_iou": "scene completion: IoU",
    "sc_precision": "scene completion: precision",
    "sc_recall": "scene completion: recall",
    "ssc_miou": "semantic scene completion: mean IoU",
}
COMPLETION_COLUMNS = ("score", "left"), ("%", "right")
CLASS_COLUMNS = (
    ("class", "left"),
    ("voxels", "right"),
    ("IoU %", "right"),
    ("", "left"),
    ("precision %", "right"),
    ("recall %", "right"),
)

T = TypeVar("T")


def progress(items: Iterable[T], title: str, quiet: bool = False) -> Iterable[T]:
    """`items`, with a bar on the error stream unless `quiet` or nobody watches; the output stream stays clean."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    total = len(items) if isinstance(items, Sized) else None
    return track(items, title, total, console=console, transient=True, disable=quiet or not console.is_terminal)


def _plain(value):
    """What JSON can hold: numpy numbers and arrays become Python's, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_report(result: dict, path: str | Path) -> None:
    """Write `result` as JSON, whole or not at all. Raises TypeError on values that JSON does not know, and UserError
    where the file cannot be written."""
    text = json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    make_folder(Path(path).parent)
    write_atomic(path, text.encode())


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _bar(fraction: float | None, width: int = 20) -> str:
    """`fraction` of a row of `width` blocks, to an eighth of a block."""
    eighths = round((fraction or 0) * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def table(result: dict) -> str:
    """Readable text: what was run, the summary, the classes from the most frequent to the rarest. No colours."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if "per_class" in result:
        result = {"segmentation": result}
    elif "abs_rel" in result:
        result = {"depth": result}
    text = io.StringIO()
    console = Console(file=text, width=100, color_system=None, force_terminal=False, highlight=False)

    def start(title, *columns):
        console.print(f"\n{title}", markup=False, soft_wrap=True)  # a table's own title wraps at the table's width
        t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, justify in columns:
            t.add_column(name, justify=justify)
        return t

    for key, value in result.items():
        if value is not None and not isinstance(value, dict | list | tuple):
            console.print(f"{key}: {value}", markup=False, soft_wrap=True)

    if seg := result.get("segmentation"):
        total = seg["pixels"] or 1
        summary = start(f"Segmentation, {seg['pixels']:,} pixels", ("score", "left"), ("%", "right"))
        for key, title in SEGMENTATION_ROWS.items():
            summary.add_row(title, _percent(seg[key]))
        console.print(summary)
        classes = start(
            f"{seg['classes_present']} classes, most frequent first",
            ("class", "left"),
            ("share %", "right"),
            ("IoU %", "right"),
            ("", "left"),
            ("accuracy %", "right"),
        )
        for c in sorted(seg["per_class"], key=lambda c: -c["pixels"]):
            if c["pixels"]:
                share = f"{100 * c['pixels'] / total:.2f}"
                classes.add_row(c["name"], share, _percent(c["iou"]), _bar(c["iou"]), _percent(c["accuracy"]))
        console.print(classes)
        for title, names in (("never in the ground truth, left out", seg["left_out"]), ("ignored", seg["ignored"])):
            if names:
                console.print(f"{title}: {', '.join(names)}", markup=False, soft_wrap=True)

    if rooms := result.get("completion"):
        summary = start(f"Completion, {rooms['images']} frames, convention {rooms['convention']}", *COMPLETION_COLUMNS)
        for key, title in COMPLETION_ROWS.items():
            summary.add_row(title, _percent(rooms[key]))
        console.print(summary)
        classes = start("Semantic completion, classes", *CLASS_COLUMNS)
        for c in rooms["per_class"]:
            cells = (_percent(c["iou"]), _bar(c["iou"]), _percent(c["precision"]), _percent(c["recall"]))
            classes.add_row(c["name"], f"{c['voxels']:,}", *cells)
        console.print(classes)
        if rooms["left_out"]:
            console.print(f"never there, left out: {', '.join(rooms['left_out'])}", markup=False, soft_wrap=True)

    if depth := result.get("depth"):
        crop = "" if depth["crop"] == "none" else f", crop {depth['crop']}"
        title = f"Depth, {depth['images']} images, mean per {depth['average']}, up to {depth['cap']:g} m{crop}"
        summary = start(title, ("score", "left"), ("value", "right"), ("better", "left"))
        for key, (name, percentage) in DEPTH_ROWS.items():
            value = "-" if depth[key] is None else _percent(depth[key]) + " %" if percentage else f"{depth[key]:.3f}"
            summary.add_row(name, value, "higher" if percentage else "lower")
        console.print(summary)
        if depth["images_without_depth"]:
            console.print(f"{depth['images_without_depth']} images have no valid depth and are not in these means")
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    return "\n".join(lines).strip("\n") + "\n"


# White to deep blue by way of green: lightness falls evenly, so that the order also shows in grey.
_RAMP = ((255, 255, 255), (214, 239, 208), (141, 211, 190), (67, 162, 202), (8, 104, 172), (8, 48, 107))


def _colour(fraction: float) -> tuple[int, int, int]:
    # The square root spreads the small confusions, which are what one looks for.
    position = math.sqrt(min(max(fraction, 0.0), 1.0)) * (len(_RAMP) - 1)
    low = min(int(position), len(_RAMP) - 2)
    a, b = _RAMP[low], _RAMP[low + 1]
    red, green, blue = (round(p + (q - p) * (position - low)) for p, q in zip(a, b))
    return red, green, blue


def confusion_picture(
    matrix: Integer[np.ndarray, "k k"] | Float[np.ndarray, "k k"], names: Sequence[str], path: str | Path
) -> None:
    """Draw a confusion matrix (rows = truth, columns = prediction; `SegmentationScore.confusion`) as a PNG.

    Each row is divided by its sum: a cell is the share of the class's pixels that got that label, in per cent where it
    is at least one. At the right stands the class's share of all pixels. Rows of classes that never occur are grey.
    Raises ValueError where the names are not one per class."""
    k, path = len(matrix), Path(path)
    if len(names) != k:
        raise ValueError(f"a confusion matrix of {k} classes needs {k} names, not {len(names)}")
    pixels = matrix.sum(1).astype(np.float64)
    shares = matrix / np.maximum(pixels, 1)[:, None]

    cell = max(24, min(56, 1000 // max(k, 1)))
    small, body, head = (ImageFont.load_default(size) for size in (max(10, cell * 2 // 5), 14, 20))
    widest = max((math.ceil(body.getlength(n)) for n in names), default=0)
    pad, side = 16, widest + 10
    left, top = pad + 22 + side, pad + 74 + side
    width, height = max(left + k * cell + 70 + pad, 560), top + k * cell + 62 + pad
    ink, faint, grey = (32, 32, 36), (120, 120, 128), (226, 226, 230)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    def upright(text, font, x, y, fill):
        """Text that runs upwards, its foot at (x, y), centred on x."""
        box = font.getbbox(text)
        strip = Image.new("L", (math.ceil(font.getlength(text)) + 2, box[3] + 4), 0)
        ImageDraw.Draw(strip).text((0, 0), text, fill=255, font=font)
        strip = strip.rotate(90, expand=True)
        picture.paste(Image.new("RGB", strip.size, fill), (round(x - strip.width / 2), y - strip.height), strip)

    draw.text((pad, pad), "Confusion", fill=ink, font=head)
    draw.text((pad, pad + 26), "per cent of each true class's pixels", fill=faint, font=body)
    draw.text((left + k * cell / 2, top - side - 8), "predicted", fill=faint, font=body, anchor="mb")
    upright("true", body, pad + 8, top + k * cell // 2 + 14, faint)
    draw.text((left + k * cell + 8, top - 6), "share %", fill=faint, font=body, anchor="lb")
    for i in range(k):
        y, x = top + i * cell, left + i * cell
        absent = pixels[i] == 0
        draw.text((left - 8, y + cell / 2), names[i], fill=faint if absent else ink, font=body, anchor="rm")
        upright(names[i], body, x + cell / 2, top - 6, ink)
        share = "-" if absent else f"{100 * pixels[i] / pixels.sum():.1f}"
        draw.text((left + k * cell + 50, y + cell / 2), share, fill=faint, font=body, anchor="rm")
        for j in range(k):
            x, value = left + j * cell, float(shares[i, j])
            colour = grey if absent else _colour(value)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
            if value >= 0.01:
                dark = sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour)) < 140
                text = f"{100 * value:.0f}"
                centre = (x + cell / 2 - 1, y + cell / 2 - 1)
                draw.text(centre, text, fill="white" if dark else ink, font=small, anchor="mm")

    # The key: the same colours, from 0 to 100 %.
    y, length = top + k * cell + 22, min(k * cell, 320)
    for x in range(length):
        draw.line((left + x, y, left + x, y + 14), fill=_colour(x / max(length - 1, 1)))
    draw.rectangle((left - 1, y - 1, left + length, y + 15), outline=grey)
    for mark in (0, 25, 50, 75, 100):
        draw.text((left + length * mark / 100, y + 20), str(mark), fill=faint, font=body, anchor="ma")

    make_folder(Path(path).parent)
    write_atomic(path, lambda file: picture.save(file, format="PNG"))
