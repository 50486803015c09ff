"""What a CRF has learned, to look at: its matrices of class by class (Mousavian et al., Figure 4)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from enfilade.images import write_png

CELL = 15  # pixels


def learned(crf) -> dict[str, Float[np.ndarray, "k k"]]:
    """The matrices of an `ops.crf.DenseCRF` by what they are for: mu, and w of each kernel."""
    found = {"compatibility mu": crf.compatibility}
    for kernel, weight in zip(crf.kernels, crf.weights):
        seen = "colour" if kernel.rgb is not None else "depth" if kernel.depth is not None else "place"
        found[f"w of {seen}"] = weight
    return {name: matrix.detach().cpu().numpy() for name, matrix in found.items()}


def strongest(matrix: Float[np.ndarray, "k k"], names: Sequence[str], count: int = 8) -> list[tuple[str, str, float]]:
    """The pairs of different classes with the largest values, both directions averaged, the largest first."""
    both = (matrix + matrix.T) / 2
    rows, columns = np.triu_indices(len(both), 1)
    order = np.argsort(-both[rows, columns], kind="stable")[:count]
    pairs = zip(rows[order].tolist(), columns[order].tolist())
    return [(str(names[i]), str(names[j]), float(both[i, j])) for i, j in pairs]


def change(learned: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What training has added."""
    return {name: matrix - start[name] for name, matrix in learned.items()}


def colours(values: Float[np.ndarray, "_ _"], limit: float) -> np.ndarray:
    """White at 0, red up to `limit`, blue down to -`limit`."""
    t = np.clip(values / max(limit, 1e-12), -1, 1)[..., None]
    red, blue, white = np.array([178, 24, 43]), np.array([33, 102, 172]), np.array([255, 255, 255])
    return np.where(t >= 0, white + (red - white) * t, white + (blue - white) * -t).round().astype(np.uint8)


def draw(matrices: Mapping[str, Float[np.ndarray, "k k"]], names: Sequence[str]) -> Image.Image:
    """The matrices side by side, rows and columns named, each with its own scale, which is told above it."""
    font, head = ImageFont.load_default(11), ImageFont.load_default(15)
    k, side, pad = len(names), math.ceil(max(font.getlength(n) for n in names)) + 8, 16
    size = k * CELL
    picture = Image.new("RGB", (pad + len(matrices) * (side + size + pad), pad + 24 + side + size + pad), "white")
    pen, ink = ImageDraw.Draw(picture), (32, 32, 36)
    for at, (title, matrix) in enumerate(matrices.items()):
        if matrix.shape != (k, k):
            raise ValueError(f"{title} is {matrix.shape}, and there are {k} names")
        left, top = pad + at * (side + size + pad) + side, pad + 24 + side
        limit = float(np.abs(matrix).max())
        pen.text((left - side, pad), f"{title}   (red {limit:.3g}, blue {-limit:.3g})", fill=ink, font=head)
        cells = Image.fromarray(colours(matrix, limit)).resize((size, size), Image.Resampling.NEAREST)
        picture.paste(cells, (left, top))
        pen.rectangle((left - 1, top - 1, left + size, top + size), outline=(200, 200, 205))
        for i, name in enumerate(names):
            pen.text((left - 5, top + (i + 0.5) * CELL), name, fill=ink, font=font, anchor="rm")
            strip = Image.new("L", (side, CELL), 0)
            ImageDraw.Draw(strip).text((0, CELL / 2), name, fill=255, font=font, anchor="lm")
            strip = strip.rotate(90, expand=True)
            picture.paste(Image.new("RGB", strip.size, ink), (left + i * CELL, top - side - 4), strip)
    return picture


def crf_pictures(crf, names: Sequence[str], path: str | Path) -> str:
    """Write the learned matrices of a `DenseCRF`, less what they started from, as a PNG; returns the strongest pairs of
    classes in each as Markdown.

    What training adds to the first values, multiples of the identity and Potts, is shown: those would drown it."""
    from enfilade.ops.crf import potts

    now = learned(crf)
    start = {name: np.eye(len(names)) * np.diag(m).mean() for name, m in now.items()}
    start["compatibility mu"] = potts(len(names)).numpy()
    added = change(now, start)
    write_png(Path(path), np.asarray(draw(added, names)))
    lines = ["| matrix | strongest pairs of classes (what training added) |", "|---|---|"]
    for name, matrix in added.items():
        pairs = ", ".join(f"{a} - {b} {v:+.3f}" for a, b, v in strongest(matrix, names))
        lines.append(f"| {name} | {pairs} |")
    return "\n".join(lines) + "\n"
