"""Look at a data set before training on it: what is in it, what is broken, and a sheet of samples to look at."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFont

from enfilade.data import Reader
from enfilade.errors import UserError
from enfilade.images import write_atomic
from enfilade.labels import IGNORE
from enfilade.types import Sample


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` found. Counts are of samples that could be read; `broken` holds (id, reason) of the others."""

    name: str
    space: str
    samples: int
    sizes: dict[str, int]  # "640x480": samples
    with_labels: int
    with_depth: int
    with_camera: int
    with_pose: int
    depth_range: tuple[float, float] | None  # metres, of the valid pixels
    depth_median: float | None  # metres, to a centimetre
    depth_missing: float | None  # share of the pixels of samples with depth
    label_pixels: dict[str, int]  # by class name
    label_samples: dict[str, int]  # samples that show the class
    ignored_pixels: int
    ignored_classes: tuple[str, ...]
    broken: tuple[tuple[str, str], ...]

    @property
    def hints(self) -> tuple[str, ...]:
        """What looks like a mistake in files that can be read."""
        hints = []
        if self.depth_median is not None and not 0.2 <= self.depth_median <= 50:
            hints.append(f"half of the depth is below {self.depth_median:g} m: is the unit right?")
        if self.depth_missing is not None and self.depth_missing > 0.5:
            hints.append(f"{self.depth_missing:.0%} of the depth is missing")
        total = sum(self.label_pixels.values()) + self.ignored_pixels
        if total and self.ignored_pixels > 0.5 * total:
            hints.append(
                f"{self.ignored_pixels / total:.0%} of the label pixels are ignored: does the label space fit?"
            )
        if len(self.sizes) > 1:
            hints.append(f"images come in {len(self.sizes)} sizes")
        return tuple(hints)

    def json(self) -> str:
        """Everything, as a JSON document."""
        return json.dumps({**asdict(self), "hints": self.hints}, indent=1)

    def text(self) -> str:
        """Everything, as a table to read."""
        sizes = ", ".join(f"{size} ({n})" for size, n in self.sizes.items()) or "none"
        lines = [
            f"{self.name}: {self.samples} samples, {len(self.broken)} broken",
            f"  sizes    {sizes}",
            f"  labels   {self.with_labels} samples, space {self.space}",
            f"  camera   {self.with_camera} samples, {self.with_pose} with a pose",
            f"  depth    {self.with_depth} samples",
        ]
        if self.depth_range is not None:
            low, high = self.depth_range
            lines[-1] += (
                f", {low:.2f} to {high:.2f} m, median {self.depth_median:.2f} m, {self.depth_missing:.1%} missing"
            )
        if self.with_labels:
            labelled = max(1, sum(self.label_pixels.values()))
            total = labelled + self.ignored_pixels
            never = ", ".join(self.ignored_classes)
            lines.append(f"  ignored  {self.ignored_pixels / total:.1%} of the pixels" + f"; {never}" * bool(never))
            lines += ["", f"  {'class':<20}{'pixels':>9}{'samples':>9}"]
            for label, pixels in sorted(self.label_pixels.items(), key=lambda item: -item[1]):
                lines.append(f"  {label:<20}{pixels / labelled:>9.2%}{self.label_samples[label]:>9}")
        for title, rows in (("hints", self.hints), ("broken", [f"{name}: {why}" for name, why in self.broken])):
            if rows:
                lines += ["", f"  {title}", *(f"    {row}" for row in rows)]
        return "\n".join(lines)


def check(reader: Reader, *, quiet: bool = True) -> Report:
    """Read every sample once. What cannot be read, or breaks the rules of `types.Sample`, is listed and passed over.
    `quiet=False` shows the progress on the error stream."""
    classes = len(reader.space)
    sizes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    pixels, shown, centimetres = np.zeros(256, np.int64), np.zeros(256, np.int64), np.zeros(_FAR + 1, np.int64)
    low, high = np.inf, 0.0
    broken = []
    for index in _progress(len(reader), reader.name, quiet):
        name = reader.names[index]
        try:
            sample = reader[index]
        except Exception as error:  # whatever it is, the other samples are still of interest
            known = isinstance(error, (UserError, OSError))
            broken.append((name, str(error) if known else f"{type(error).__name__}: {error}"))
            continue
        if reasons := _faults(sample, classes):
            broken.append((name, "; ".join(reasons)))
            continue
        height, width = sample.image.shape[:2]
        sizes[f"{width}x{height}"] += 1
        kinds["camera"] += sample.camera is not None
        kinds["pose"] += sample.camera is not None and sample.camera.pose is not None
        if sample.labels is not None:
            kinds["labels"] += 1
            counts = np.bincount(sample.labels.reshape(-1), minlength=256)
            pixels += counts
            shown += counts > 0
        if sample.depth is not None:
            kinds["depth"] += 1
            centimetres += np.bincount(_centimetres(sample.depth), minlength=_FAR + 1)
            valid = sample.depth[sample.depth > 0]
            low, high = min(low, float(valid.min())), max(high, float(valid.max()))
    depths = centimetres.copy()
    depths[0] = 0
    return Report(
        name=reader.name,
        space=reader.space.name,
        samples=sum(sizes.values()),
        sizes=dict(sizes.most_common()),
        with_labels=kinds["labels"],
        with_depth=kinds["depth"],
        with_camera=kinds["camera"],
        with_pose=kinds["pose"],
        depth_range=(low, high) if depths.any() else None,
        depth_median=float(np.searchsorted(depths.cumsum(), depths.sum() / 2)) / 100 if depths.any() else None,
        depth_missing=float(centimetres[0] / centimetres.sum()) if depths.any() else None,
        label_pixels=dict(zip(reader.space.names, pixels.tolist())) if kinds["labels"] else {},
        label_samples=dict(zip(reader.space.names, shown.tolist())) if kinds["labels"] else {},
        ignored_pixels=int(pixels[IGNORE]),
        ignored_classes=tuple(reader.space.names[i] for i in reader.ignored),
        broken=tuple(broken),
    )


_FAR = 10_000  # centimetres; what is deeper counts as this deep in the median


def _centimetres(depth: Float32[np.ndarray, "h w"]) -> np.ndarray:
    """Depth in whole centimetres; 0 only where it is missing."""
    return np.where(depth > 0, np.clip(np.rint(depth * 100), 1, _FAR), 0).astype(np.int64).reshape(-1)


def _faults(sample: Sample, classes: int) -> list[str]:
    """How a sample breaks the rules of `types.Sample`."""
    faults = []
    image, labels, depth = sample.image, sample.labels, sample.depth
    if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        faults.append("colours beyond 0..1")
    for kind, array in (("labels", labels), ("depth", depth), ("hha", sample.hha), ("normals", sample.normals)):
        if array is not None and array.shape[:2] != image.shape[:2]:
            faults.append(f"{kind} {array.shape[1]}x{array.shape[0]}, image {image.shape[1]}x{image.shape[0]}")
    if sample.camera is not None and (sample.camera.height, sample.camera.width) != image.shape[:2]:
        faults.append("camera of another size than the image")
    if labels is not None:
        if (wrong := labels[(labels >= classes) & (labels != IGNORE)]).size:
            faults.append(f"label {wrong.max()} beyond the {classes} classes")
        elif (labels == IGNORE).all():
            faults.append("not a pixel is labelled")
    if depth is not None:
        if not (np.isfinite(depth).all() and depth.min() >= 0):
            faults.append("depth negative or not finite")
        elif not depth.any():
            faults.append("not a pixel has depth")
    return faults


def _progress(count: int, name: str, quiet: bool) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return range(count) if quiet else track(range(count), name, console=Console(stderr=True))


# --- contact sheet ----------------------------------------------------------------------------------------------------

_TILE = 320  # pixels wide
_CAPTION = 20
_GAP = 6


def show(reader: Reader, path: str | os.PathLike, count: int = 12, seed: int = 0) -> Image.Image:
    """Write a PNG sheet of `count` samples (drawn by `seed`): RGB | labels | depth, as far as the data has them. A
    sample that cannot be read is a tile with the reason. Depth is coloured over one range for the whole sheet."""
    if len(reader) == 0 or count < 1:
        raise UserError(f"nothing to show: {reader.name} has {len(reader)} samples, {count} were asked for")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(reader))[:count]).tolist()
    samples: list[Sample | str] = []
    for index in chosen:
        try:
            samples.append(reader[index])
        except Exception as error:  # shown in its place
            samples.append(str(error))
    near_far = _depth_range(samples)
    rows = [_tiles(sample, reader, near_far) for sample in samples]
    wide = max(map(len, rows))
    tall = max(tile.shape[0] for row in rows for tile in row)

    columns = 2 if len(rows) > 3 else 1
    cell_width, cell_height = wide * (_TILE + _GAP) + _GAP, tall + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * cell_width, -(-len(rows) // columns) * cell_height + _GAP), (24, 24, 24))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (index, sample, row) in enumerate(zip(chosen, samples, rows)):
        left, top = (i % columns) * cell_width + _GAP, (i // columns) * cell_height + _GAP
        for j, tile in enumerate(row):
            sheet.paste(Image.fromarray(tile), (left + j * (_TILE + _GAP), top))
        draw.text((left + 2, top + tall + 2), reader.names[index], fill=(220, 220, 220), font=font)
        if isinstance(sample, str):
            wrapped = [sample[k : k + 48] for k in range(0, min(len(sample), 480), 48)]
            draw.multiline_text((left + 8, top + 8), "\n".join(wrapped), fill=(255, 120, 120), font=font)
    buffer = BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
    return sheet


def _depth_range(samples: list[Sample | str]) -> tuple[float, float] | None:
    """The 1st and 99th percentile of all depth on the sheet."""
    depths = [s.depth[s.depth > 0][::97] for s in samples if not isinstance(s, str) and s.depth is not None]
    values = np.concatenate(depths) if depths else np.zeros(0)
    return (float(np.percentile(values, 1)), float(np.percentile(values, 99))) if values.size else None


def _tiles(sample: Sample | str, reader: Reader, near_far: tuple[float, float] | None) -> list[np.ndarray]:
    if isinstance(sample, str):
        return [np.full((_TILE * 3 // 4, _TILE, 3), 48, np.uint8)]
    tiles = [_fit((np.clip(sample.image, 0, 1) * 255 + 0.5).astype(np.uint8), Image.Resampling.BILINEAR)]
    if sample.labels is not None:
        tiles.append(_fit(reader.space.colourise(sample.labels), Image.Resampling.NEAREST))
    if sample.depth is not None:
        from enfilade.viz import colour_depth

        near, far = near_far or (None, None)
        tiles.append(_fit(colour_depth(sample.depth, near, far), Image.Resampling.NEAREST))
    return tiles


def _fit(image: UInt8[np.ndarray, "h w 3"], resampling: Image.Resampling) -> UInt8[np.ndarray, "_ _ 3"]:
    height = max(1, min(2 * _TILE, round(image.shape[0] * _TILE / image.shape[1])))
    return np.asarray(Image.fromarray(image).resize((_TILE, height), resampling))
