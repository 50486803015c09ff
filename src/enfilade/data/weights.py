"""How often the classes of a data set occur, and the weights that make up for it in a loss.

Median frequency balancing (Eigen & Fergus 2015, Section 6.3.2): the weight of class c is median_freq / freq_c, where
freq_c is the number of pixels of c over all pixels of the images that contain c, and median_freq the median of these
over the classes that occur (of an even number, the mean of the two in the middle). "All pixels" is read in one of two
ways: those with a label (the default here, and what training does), or all of the image, void included.

    counts = count(reader, len(reader.space))
    weights = median_frequency(counts)
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from enfilade.errors import UserError
from enfilade.images import write_atomic
from enfilade.labels import IGNORE, LabelSpace


@dataclass(frozen=True, slots=True, eq=False)
class ClassCounts:
    """Numbers of pixels and images for each of k classes. `broken` holds (id, reason) of what could not be read."""

    pixels: Int64[np.ndarray, "k"]
    images: Int64[np.ndarray, "k"]  # that contain the class
    labelled_pixels: Int64[np.ndarray, "k"]  # of these images, without void
    image_pixels: Int64[np.ndarray, "k"]  # of these images, with void
    void: int  # pixels, of all images
    total: int  # images, also those that are all void
    broken: tuple[tuple[str, str], ...] = ()


def count(reader: Any, classes: int, *, tolerant: bool = False, quiet: bool = True) -> ClassCounts:
    """Read the labels of every sample once; a reader's `labels(index)`, where it has one, spares the images.

    A sample that cannot be read, has no labels or labels beyond the classes raises its error; `tolerant` lists it as
    broken and passes it over. `quiet=False` shows the progress on the error stream.
    """
    pixels, images, labelled_pixels, image_pixels = np.zeros((4, classes), np.int64)
    void = total = 0
    broken = []
    for index in _progress(len(reader), quiet):
        try:
            counts = _histogram(reader, index, classes)
        except Exception as error:
            if not tolerant:
                raise
            known = isinstance(error, (UserError, OSError))
            broken.append((reader.names[index], str(error) if known else f"{type(error).__name__}: {error}"))
            continue
        here, outside = counts[:classes], int(counts[IGNORE])
        pixels += here
        images += here > 0
        labelled_pixels += (here > 0) * here.sum()
        image_pixels += (here > 0) * (here.sum() + outside)
        void += outside
        total += 1
    return ClassCounts(pixels, images, labelled_pixels, image_pixels, void, total, tuple(broken))


def _histogram(reader: Any, index: int, classes: int) -> Int64[np.ndarray, "256"]:
    labels = reader.labels(index) if hasattr(reader, "labels") else reader[index].labels
    name = reader.names[index] if hasattr(reader, "names") else index
    if labels is None:
        raise UserError(f"sample {name} has no labels to count")
    counts = np.bincount(labels.reshape(-1), minlength=256)
    if (beyond := np.flatnonzero(counts[classes:IGNORE])).size:
        raise UserError(f"sample {name} holds label {classes + beyond[-1]}, beyond the {classes} classes")
    return counts


def _progress(count: int, quiet: bool) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return range(count) if quiet else track(range(count), "labels", console=Console(stderr=True))


def frequencies(counts: ClassCounts, *, count_void: bool = False) -> Float64[np.ndarray, "k"]:
    """Pixels of each class over all pixels of the images that contain it, with or without void; 0 for one that never
    occurs."""
    return counts.pixels / np.maximum(counts.image_pixels if count_void else counts.labelled_pixels, 1)


def median_frequency(counts: ClassCounts, power: float = 1.0, *, count_void: bool = False) -> Float64[np.ndarray, "k"]:
    """(median_freq / freq_c) ** power. Classes that never occur have no part in the median and get 0; `UserError` where
    none occurs."""
    if not (math.isfinite(power) and power >= 0):
        raise UserError(f"the power of class weights is 0 or more, not {power:g}")
    frequency = frequencies(counts, count_void=count_void)
    seen = frequency > 0
    if not seen.any():
        raise UserError(f"none of the {counts.total} images that could be read has a labelled pixel: nothing to weigh")
    return np.where(seen, (np.median(frequency[seen]) / np.where(seen, frequency, 1)) ** power, 0)


# --- as a document ----------------------------------------------------------------------------------------------------


def describe(
    counts: ClassCounts, data: str, split: str, space: LabelSpace, power: float = 1.0, *, count_void: bool = False
) -> dict[str, Any]:
    """Counts, frequencies and weights as a document for JSON; `read` reads it back."""
    weights = median_frequency(counts, power, count_void=count_void)
    shares = frequencies(counts, count_void=count_void)
    divisor = "image_pixels" if count_void else "labelled_pixels"
    return {
        "data": data,
        "split": split,
        "space": space.name,
        "images": counts.total,
        "void_pixels": counts.void,
        "formula": f"weight = (median frequency / frequency) ** power; frequency = pixels / {divisor}",
        "power": power,
        "count_void": count_void,
        "classes": [
            {
                "name": name,
                "pixels": int(counts.pixels[i]),
                "images": int(counts.images[i]),
                "labelled_pixels": int(counts.labelled_pixels[i]),
                "image_pixels": int(counts.image_pixels[i]),
                "frequency": float(shares[i]),
                "weight": float(weights[i]),
            }
            for i, name in enumerate(space.names)
        ],
        "broken": [{"name": name, "error": why} for name, why in counts.broken],
    }


def write(document: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the document of `describe` as a JSON file, whole or not at all."""
    write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())


def text(document: dict[str, Any]) -> str:
    """The document as a table to read."""
    counted = "with void" if document["count_void"] else "without void"
    lines = [
        f"{document['data']}/{document['split']}: {document['images']} images, {len(document['broken'])} broken",
        f"  {document['formula']}",
        f"  power {document['power']:g}; the pixels of an image are counted {counted}",
        "",
        f"  {'class':<20}{'pixels':>14}{'images':>9}{'frequency':>12}{'weight':>10}",
    ]
    for row in document["classes"]:
        lines.append(
            f"  {row['name']:<20}{row['pixels']:>14}{row['images']:>9}{row['frequency']:>12.4%}{row['weight']:>10.4f}"
        )
    return "\n".join(lines)


def read(path: str | os.PathLike, space: LabelSpace | None = None) -> dict[str, float]:
    """The weights of a file that `write` wrote, by class name in the order of its label space.

    Raises FileNotFoundError where there is no file, and `UserError` for a damaged one or one of another label space
    than `space`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: 'enfilade data weights' writes such a file")
    try:
        document = json.loads(path.read_text())
        of = document["space"]
        weights = {row["name"]: float(row["weight"]) for row in document["classes"]}
        repeated = len(weights) != len(document["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no class weights ({error!r}): write it again by 'enfilade data weights'"
        ) from error
    if space is not None and (of != space.name or tuple(weights) != space.names):
        raise UserError(f"{path} holds the {len(weights)} class weights of {of}, not the {len(space)} of {space.name}")
    bad = [name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
    if bad or repeated or not any(weights.values()):
        why = f"the weight of {bad[0]} is {weights[bad[0]]:g}" if bad else "a class twice" if repeated else "no weight"
        raise UserError(f"{path} holds no class weights ({why}): write it again by 'enfilade data weights'")
    return weights
