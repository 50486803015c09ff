"""Pictures of predictions: colour maps, overlays, the RGB | labels | depth panel, contact sheets and point clouds.

Drawn with OpenCV and Pillow's built-in font, so that a picture looks the same on every machine. Arrays are uint8 RGB
[h, w, 3]; what carries text is a `PIL.Image`. Depth is metres, and 0 or NaN is "unknown", drawn in dark grey.
"""

import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from enfilade import labels as label_spaces
from enfilade.errors import UserError
from enfilade.images import write_atomic
from enfilade.labels import LabelSpace
from enfilade.types import IGNORE, Prediction, Sample

UNKNOWN = (52, 52, 56)
INK, FAINT, FRAME, PAPER = (32, 33, 36), (112, 115, 122), (222, 224, 228), (255, 255, 255)
MARGIN, GAP = 24, 16  # pixels, round a panel and between its parts


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


def _fitted(text: str, size: int, width: int) -> str:
    """`text`, shortened with an ellipsis until it fits `width` pixels."""
    if _text_width(text, size) <= width:
        return text
    while text and _text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def as_uint8(image: Shaped[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Floats in [0, 1] to uint8, rounded; uint8 is returned as it is."""
    if image.dtype == np.uint8:
        return image
    return cv2.convertScaleAbs(np.ascontiguousarray(image.clip(0, 1)), alpha=255).reshape(image.shape)


def _known(depth: Float[np.ndarray, "*s"]) -> Bool[np.ndarray, "*s"]:
    return np.isfinite(depth) & (depth > 0)


def depth_range(depth: Float[np.ndarray, "h w"]) -> tuple[float, float]:
    """The depths that `colour_depth` spans: all but the nearest and farthest percent, so that a few stray pixels do
    not flatten the picture; at least 5 % wide, so that a flat wall does not show its noise. (0, 1) if none is known."""
    known = depth[_known(depth)]
    if not known.size:
        return 0.0, 1.0
    near, far = (float(v) for v in np.percentile(known[:: max(1, known.size // 100_000)], (1, 99)))
    middle, half = (near + far) / 2, max((far - near) / 2, 0.025 * (near + far))
    return middle - half, middle + half


@cache
def _ramp() -> UInt8[np.ndarray, "256 3"]:
    """Near is warm, far is cool. Turbo without its dark ends, where neighbouring colours cannot be told apart."""
    turbo = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1]
    at = np.linspace(0.93, 0.07, 256) * 255
    return np.stack([np.interp(at, np.arange(256), turbo[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def colour_depth(
    depth: Float[np.ndarray, "h w"], near: float | None = None, far: float | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Depth in colour, red at `near` to blue at `far` metres (default `depth_range`); unknown depth is dark grey."""
    if near is None or far is None:
        low, high = depth_range(depth)
        near, far = low if near is None else near, high if far is None else far
    known = _known(depth)
    position = (np.where(known, depth, near) - near) * (255 / max(far - near, 1e-6))
    coloured = _ramp()[position.clip(0, 255).round().astype(np.uint8)]
    coloured[~known] = UNKNOWN
    return coloured


def overlay(
    image: Float32[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w 3"],
    labels: UInt8[np.ndarray, "h w"],
    space: LabelSpace,
    alpha: float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image tinted by its labels, with thin dark lines between classes; ignored pixels (255) stay as they are."""
    picture = as_uint8(image)
    tinted = cv2.addWeighted(picture, 1 - alpha, space.colourise(labels), alpha, 0).reshape(picture.shape)
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    tinted[edge] = tinted[edge] // 5 * 3
    ignored = labels == IGNORE
    tinted[ignored] = picture[ignored]
    return tinted


def shares(labels: UInt8[np.ndarray, "h w"], space: LabelSpace) -> list[tuple[int, float]]:
    """The classes present, largest first, each with its share of the pixels that carry a label."""
    counts = np.bincount(labels.reshape(-1), minlength=256)[: len(space.names)]
    order = np.argsort(-counts, kind="stable")
    return [(int(k), float(counts[k] / counts.sum())) for k in order if counts[k]]


def legend(labels: UInt8[np.ndarray, "h w"], space: LabelSpace, width: int = 640, size: int = 15) -> Image.Image:
    """Swatch, name and share of each class present, largest first, in as many columns as fit `width` pixels. What
    covers less than half a percent is summed up at the end. `size` is that of the letters."""
    present = shares(labels, space)
    shown = [(k, s) for k, s in present if s >= 0.005]
    entries: list[tuple[tuple[int, ...] | None, str, str]] = [
        (tuple(map(int, space.colours[k])), space.names[k], f"{100 * s:.0f} %") for k, s in shown
    ]
    if rest := present[len(shown) :]:
        entries.append(
            (None, f"{len(rest)} more", "< 0.5 %" if len(rest) == 1 else f"{100 * sum(s for _, s in rest):.1f} %")
        )
    if not entries:
        entries = [(None, "no labels", "")]

    swatch, pad, row = size, round(0.5 * size), round(1.7 * size)
    cell = max(swatch + _text_width(f"{name}  {share}", size) + 3 * pad for _, name, share in entries) + pad
    columns = min(len(entries), max(1, (width + 2 * pad) // cell))
    rows = math.ceil(len(entries) / columns)
    columns = math.ceil(len(entries) / rows)  # no empty last column
    cell = min(width // columns, cell + 3 * pad)  # wide pictures do not tear name and next swatch apart

    picture = Image.new("RGB", (width, rows * row), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (colour, name, share) in enumerate(entries):
        x, y = i // rows * cell, i % rows * row
        top = y + (row - swatch) // 2
        if colour is not None:
            draw.rounded_rectangle((x, top, x + swatch, top + swatch), size // 5, colour, FAINT)
        room = cell - swatch - pad - _text_width(f"  {share}", size) - pad
        name = _fitted(name, size, room)
        left, middle = x + swatch + pad, y + row / 2
        draw.text((left, middle), name, INK if colour else FAINT, _font(size), anchor="lm")
        draw.text((left + _text_width(f"{name}  ", size), middle), share, FAINT, _font(size), anchor="lm")
    return picture


def _ticks(near: float, far: float, count: int) -> list[float]:
    """At most about `count` round numbers (1, 2 or 5 times a power of ten apart) within [near, far]."""
    rough = max(far - near, 1e-9) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(near / step - 1e-6), math.floor(far / step + 1e-6) + 1)]


def depth_bar(near: float, far: float, width: int = 320, size: int = 15) -> Image.Image:
    """The colours of `colour_depth` from `near` to `far`, with round ticks in metres."""
    height, bar = round(2.5 * size), size
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    ramp = cv2.resize(_ramp()[None], (width, bar), interpolation=cv2.INTER_LINEAR)
    picture.paste(Image.fromarray(ramp), (0, 0))
    ticks = _ticks(near, far, max(1, width // (4 * size)))
    if not ticks:
        ticks = [near]
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 2
    for i, tick in enumerate(ticks):
        x = (tick - near) / max(far - near, 1e-9) * (width - 1)
        text = f"{tick:.{digits}f}" + (" m" if i == len(ticks) - 1 else "")
        draw.line((x, bar, x, bar + size // 3), FAINT)
        half = _text_width(text, size) / 2
        draw.text((min(max(x, half), width - 1 - half), height), text, FAINT, _font(size), anchor="md")
    return picture


def _scaled(picture: UInt8[np.ndarray, "h w 3"], width: int, height: int, smooth: bool = True) -> Image.Image:
    shrinks = width < picture.shape[1]
    how = (cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC) if smooth else cv2.INTER_NEAREST
    return Image.fromarray(cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=how))


def _cell_size(width: int, height: int) -> tuple[int, int]:
    """The size at which a panel shows a picture: about the area of 480 x 360, small ones no more than 8-fold (one
    pixel is then still a square of 120), no side beyond 960, none below 12."""
    scale = math.sqrt(480 * 360 / (width * height))
    scale = max(min(scale, 8.0), 120 / max(width, height))
    scale = min(scale, 960 / max(width, height))
    return max(12, round(width * scale)), max(12, round(height * scale))


def panel(prediction: Prediction) -> Image.Image:
    """RGB | labels | depth side by side, or one below the other where the image is wide, with the classes and their
    shares underneath, a bar of metres, and where the camera came from. What the prediction lacks is left out."""
    space = label_spaces.get(prediction.space)
    height, width = prediction.image.shape[:2]
    w, h = _cell_size(width, height)
    enlarges = w > width  # a few pixels are shown as the squares they are
    cells = [("Photo", _scaled(as_uint8(prediction.image), w, h, smooth=not (enlarges and max(width, height) < 32)))]
    if prediction.labels is not None:
        # Nearest, since a blend of two classes' colours would be a third class.
        cells.append(("Labels", _scaled(space.colourise(prediction.labels), w, h, smooth=False)))
    near, far = 0.0, 1.0
    if prediction.depth is not None:
        near, far = depth_range(prediction.depth)
        # Coloured first, scaled then: unknown depth must not bleed into its neighbours' metres.
        cells.append(("Depth", _scaled(colour_depth(prediction.depth, near, far), w, h, smooth=not enlarges)))

    title, size = 19, 15
    head = title + 11
    stacked = width > 2.2 * height
    slot = max(w, 150)  # narrow pictures still leave room for their titles and the bar
    step_x, step_y = (0, head + h + GAP) if stacked else (slot + GAP, 0)
    across = max(slot + (len(cells) - 1) * step_x, 300)
    below = MARGIN + head + h + (len(cells) - 1) * step_y + GAP

    # The bar stands under the depth picture if that leaves the legend a good width, else under the legend.
    last = (len(cells) - 1) * step_x
    beside = last - 2 * GAP >= 300 and prediction.depth is not None
    parts: list[tuple[Image.Image, int, int]] = []
    y = below
    if prediction.labels is not None:
        key = legend(prediction.labels, space, last - 2 * GAP if beside else across, size)
        parts.append((key, MARGIN, y))
        y += 0 if beside else key.height + GAP
    if prediction.depth is not None:
        room = slot if beside else min(across, max(slot, 300))
        parts.append((_depth_footer(prediction, near, far, room, size), MARGIN + (last if beside else 0), y + 4))
    bottom = max([below - GAP] + [top + part.height for part, _, top in parts])

    picture = Image.new("RGB", (across + 2 * MARGIN, bottom + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (text, cell) in enumerate(cells):
        x, top = MARGIN + i * step_x, MARGIN + i * step_y
        draw.text((x, top + title // 2), text, INK, _font(title), anchor="lm")
        picture.paste(cell, (x, top + head))
        draw.rectangle((x - 1, top + head - 1, x + w, top + head + h), outline=FRAME)  # white walls end somewhere
    for part, x, top in parts:
        picture.paste(part, (x, top))
    return picture


def _depth_footer(prediction: Prediction, near: float, far: float, width: int, size: int) -> Image.Image:
    """The bar, and under it where the metres come from: they are only as good as the camera."""
    bar = depth_bar(near, far, width, size)
    camera, lines = prediction.camera, []
    if camera is not None:
        focal = f"f\u00a0=\u00a0{camera.fx:.0f}\u00a0px"
        source = {"exif": "from EXIF"}.get(prediction.camera_source, prediction.camera_source)
        note = f"camera {source}: {camera.fov_degrees:.0f}° across, {focal}"
        lines = _wrapped(note, size - 2, width)
    picture = Image.new("RGB", (width, bar.height + size // 2 + len(lines) * (size + 3)), PAPER)
    picture.paste(bar, (0, 0))
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((0, bar.height + size // 2 + i * (size + 3)), line, FAINT, _font(size - 2))
    return picture


def _wrapped(text: str, size: int, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split(" "):  # not at the no-break spaces, which keep number and unit together
        if lines and _text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [line.replace("\u00a0", " ") for line in lines]  # the font has no glyph for it


def contact_sheet(
    pictures: Sequence[np.ndarray | Image.Image],
    columns: int = 4,
    titles: Sequence[str] | None = None,
    width: int = 320,
) -> Image.Image:
    """Pictures (uint8 or float RGB arrays, or `PIL.Image`) in rows of `columns`, each scaled to `width` pixels and
    centred in its row; `titles` stand above."""
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures have {len(titles)} titles")
    columns, size = min(columns, len(pictures)), 15
    head = size + 9 if titles is not None else 0
    scaled = []
    for picture in pictures:
        array = as_uint8(np.asarray(picture.convert("RGB")) if isinstance(picture, Image.Image) else picture)
        scaled.append(_scaled(array, width, max(1, round(width * array.shape[0] / array.shape[1]))))
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    heights = [max(p.height for p in row) for row in rows]
    gap = GAP // 2
    across = columns * width + (columns + 1) * gap
    sheet = Image.new("RGB", (across, sum(heights) + len(rows) * (head + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = gap
    for r, (row, height) in enumerate(zip(rows, heights)):
        for c, picture in enumerate(row):
            x = gap + c * (width + gap)
            if titles is not None:
                text = _fitted(titles[r * columns + c], size, width)
                draw.text((x, top + head / 2), text, INK, _font(size), anchor="lm")
            sheet.paste(picture, (x, top + head + (height - picture.height) // 2))
        top += head + height + gap
    return sheet


def sheet(
    titles: Sequence[str],
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
    width: int = 240,
    feet: Sequence[Image.Image | None] = (),
) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of pictures under one line of titles, each `width` pixels wide; the first of a row is a photo, the others
    have colours that must not blend. `feet` go below their row, at the right."""
    heights = [round(width * row[0].shape[0] / row[0].shape[1]) for row in rows]
    below = [0 if foot is None else foot.height + GAP for foot in feet] or [0] * len(rows)
    size, head = 15, 26
    across = MARGIN * 2 + len(titles) * (width + GAP) - GAP
    picture = Image.new("RGB", (across, MARGIN + head + sum(heights) + sum(below) + GAP * len(rows)), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, title in enumerate(titles):
        draw.text((MARGIN + i * (width + GAP), (MARGIN + head) / 2), title, INK, _font(size), anchor="lm")
    top = MARGIN + head - GAP // 2
    for k, (row, height) in enumerate(zip(rows, heights)):
        for i, cell in enumerate(row):
            picture.paste(_scaled(cell, width, height, smooth=i == 0), (MARGIN + i * (width + GAP), top))
        foot = feet[k] if feet else None
        if foot is not None:
            picture.paste(foot, (across - MARGIN - foot.width, top + height + GAP // 2))
        top += height + below[k] + GAP
    return np.asarray(picture)


def strips(
    rows: Sequence[tuple[Float[np.ndarray, "_ _ 3"], dict[str, UInt8[np.ndarray, "_ _"]]]],
    space: LabelSpace,
    width: int = 240,
) -> UInt8[np.ndarray, "h w 3"]:
    """One row a photo: the photo, then each of its label maps in colour under its title, `width` pixels wide each."""
    pictures = [[as_uint8(photo), *map(space.colourise, maps.values())] for photo, maps in rows]
    return sheet(["Photo", *rows[0][1]], pictures, width)


def depth_strips(
    rows: Sequence[tuple[Float[np.ndarray, "_ _ 3"], dict[str, Float[np.ndarray, "_ _"]]]], width: int = 240
) -> UInt8[np.ndarray, "h w 3"]:
    """One row a photo: the photo, then each of its depth maps under its title, all of a row in the colours of one bar
    of metres: the range of its last map, the truth."""
    pictures, bars = [], []
    for photo, maps in rows:
        near, far = depth_range(list(maps.values())[-1])
        pictures.append([as_uint8(photo), *(colour_depth(depth, near, far) for depth in maps.values())])
        bars.append(depth_bar(near, far, 2 * width))
    return sheet(["Photo", *rows[0][1]], pictures, width, bars)


def depth_picture(depth: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Depth in colour at its own size, at least 240 pixels wide, above a bar of metres."""
    near, far = depth_range(depth)
    height, width = depth.shape
    across = max(width, 240)
    bar = depth_bar(near, far, across - 2 * GAP, max(15, across // 50))
    picture = Image.new("RGB", (across, round(height * across / width) + bar.height + 2 * GAP), PAPER)
    picture.paste(_scaled(colour_depth(depth, near, far), across, round(height * across / width), smooth=False), (0, 0))
    picture.paste(bar, (GAP, picture.height - bar.height - GAP))
    return np.asarray(picture)


def comparison(
    rows: Sequence[tuple[Sample, Prediction]], space: LabelSpace, width: int = 240
) -> UInt8[np.ndarray, "h w 3"]:
    """Predictions beside the truth, one row a frame: labels, true labels and mistakes; depth, true depth and error, of
    what both have. Labels are of `space`. The bar is that of the depths; errors go from white, 0 m, to dark red, 1 m
    and more."""
    with_labels = all(s.labels is not None and p.labels is not None for s, p in rows)
    with_depth = all(s.depth is not None and p.depth is not None for s, p in rows)
    titles = ["Photo", *["Labels", "truth", "mistakes"] * with_labels, *["Depth", "truth", "error"] * with_depth]
    pictures, bars = [], []
    for sample, prediction in rows:
        row, bar = [as_uint8(sample.image)], None
        found, labels = prediction.labels, sample.labels
        if with_labels and found is not None and labels is not None:
            row += [space.colourise(found), space.colourise(labels), mistakes(found, labels)]
        metres, depth = prediction.depth, sample.depth
        if with_depth and metres is not None and depth is not None:
            near, far = depth_range(depth)
            row += [colour_depth(metres, near, far), colour_depth(depth, near, far), error_map(metres, depth)]
            bar = depth_bar(near, far, 3 * width)
        pictures.append(row)
        bars.append(bar)
    return sheet(titles, pictures, width, bars)


def error_map(
    predicted: Float[np.ndarray, "h w"], truth: Float[np.ndarray, "h w"], worst: float = 1.0
) -> UInt8[np.ndarray, "h w 3"]:
    """`|predicted - truth|` in metres: white where exact, through orange to dark red at `worst` and beyond; dark grey
    where either is unknown."""
    known = _known(predicted) & _known(truth)
    error = np.where(known, np.abs(predicted - truth), 0) / worst
    stops = np.array([(255, 255, 255), (254, 217, 142), (244, 109, 67), (128, 0, 38)], np.float32)
    position = error.clip(0, 1) * (len(stops) - 1)
    coloured = np.stack([np.interp(position, range(len(stops)), stops[:, c]) for c in range(3)], -1)
    coloured = coloured.round().astype(np.uint8)
    coloured[~known] = UNKNOWN
    return coloured


def mistakes(predicted: Integer[np.ndarray, "h w"], truth: Integer[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Where labels are wrong: right is light grey, wrong is red, and dark grey is ignored by the truth (255)."""
    table = np.array([(214, 39, 40), (226, 228, 230), UNKNOWN], np.uint8)
    return table[np.where(truth == IGNORE, 2, (predicted == truth).astype(int))]


def flying_pixels(
    depth: Float[np.ndarray, "h w"], focal: float, grazing_degrees: float = 6.0
) -> Bool[np.ndarray, "h w"]:
    """Pixels that hang in the air between a near and a far surface, where interpolation has smeared the edge.

    There the "surface" runs almost along the line of sight: from a pixel to its neighbour, depth z changes by more
    than (z / focal) / tan(grazing angle). A pixel is dropped where it does so towards *both* neighbours in its row
    or column, so that a sharp edge between two surfaces loses nothing. `focal` is in pixels.
    """
    # How much depth changes from pixel to pixel on a surface seen at the grazing angle: a floor 1.4 m below the camera
    # gets there 13 m away, an edge smeared over 8 pixels between 2 and 3 m is at 2 degrees.
    limit = depth / (focal * math.tan(math.radians(grazing_degrees)))
    known = _known(depth)
    flying = np.zeros(depth.shape, bool)
    for z, ok, allowed, hit in ((depth, known, limit, flying), (depth.T, known.T, limit.T, flying.T)):
        if len(z) < 3:
            continue
        both = ok[1:] & ok[:-1]
        jump = np.where(both, np.abs(np.diff(np.where(ok, z, 0), axis=0)), 0)
        hit[1:-1] |= np.minimum(jump[1:], jump[:-1]) > allowed[1:-1]
    return flying


def points(
    prediction: Prediction, stride: int = 1, drop_flying: bool = True
) -> tuple[Float32[np.ndarray, "n 3"], Float32[np.ndarray, "n 3"]]:
    """Points in metres in the camera frame (x right, y down, z forward) and their RGB in [0, 1], of every `stride`-th
    row and column. Unknown depth is left out, and so are `flying_pixels` unless asked for. Raises ValueError where
    the prediction has no depth or no camera."""
    depth, camera = prediction.depth, prediction.camera
    if depth is None or camera is None:
        raise ValueError(f"points need {'depth' if depth is None else 'a camera'}, which this prediction lacks")
    keep = _known(depth)
    if drop_flying:
        keep &= ~flying_pixels(depth, math.sqrt(camera.fx * camera.fy))
    rows = max(1, 2**18 // camera.width) * stride
    xyz = []
    for top in range(0, camera.height, rows):  # in strips: the rays of a 12-megapixel photo alone are 300 MB
        strip = depth[top : top + rows]
        placed = camera.cropped(0, top, camera.width, len(strip)).unproject(strip)
        xyz.append(placed[::stride, ::stride][keep[top : top + rows : stride, ::stride]])
    return np.concatenate(xyz), prediction.image[::stride, ::stride][keep[::stride, ::stride]]


def write_ply(
    path: str | os.PathLike,
    xyz: Float[np.ndarray, "n 3"],
    rgb: Float[np.ndarray, "n 3"] | UInt8[np.ndarray, "n 3"] | None = None,
    normals: Float[np.ndarray, "n 3"] | None = None,
) -> None:
    """Write a point cloud as binary little-endian PLY, atomically: float x y z, float nx ny nz if given, uchar red
    green blue if given (floats are in [0, 1]). Raises UserError for an unwritable folder."""
    if Path(path).suffix.lower() != ".ply":
        raise UserError(f"a point cloud is written as .ply, not as {Path(path).name}")
    columns: list[tuple[str, np.ndarray]] = list(zip(("x", "y", "z"), np.asarray(xyz, "<f4").T))
    if normals is not None:
        columns += zip(("nx", "ny", "nz"), np.asarray(normals, "<f4").T)
    if rgb is not None:
        colours = rgb if rgb.dtype == np.uint8 else (rgb.clip(0, 1) * 255).round().astype(np.uint8)
        columns += zip(("red", "green", "blue"), colours.T)
    vertices = np.empty(len(xyz), [(name, values.dtype) for name, values in columns])
    for name, values in columns:
        vertices[name] = values
    kinds = {"<f4": "float", "|u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", "comment metres; x right, y down, z forward"]
    header += [
        f"element vertex {len(xyz)}",
        *(f"property {kinds[v.dtype.str]} {n}" for n, v in columns),
        "end_header\n",
    ]

    def write(file):
        file.write("\n".join(header).encode())
        file.write(vertices.data)

    write_atomic(path, write)
