"""The pictures of the documentation that no other command makes.

python docs/figures.py            # writes docs/images/crf.png and region-support.png
"""

from pathlib import Path

import numpy as np

import enfilade
from enfilade import viz
from enfilade.images import write_png
from enfilade.labels import SPACES
from enfilade.ops import regions

SEEDS = (12, 16)


def crf(path: Path) -> None:
    """Two rendered rooms: what the default model says, the same after the CRF, and the truth."""
    plain, refined = enfilade.load(), enfilade.load(crf=True)
    rows = []
    for seed in SEEDS:
        sample = enfilade.open_dataset("rooms", split="test", seed=seed, length=1)[0]
        answers = {
            "gad-nyuv2": plain.predict(sample.image, camera=sample.camera).labels,
            "gad-nyuv2, crf=True": refined.predict(sample.image, camera=sample.camera).labels,
            "truth": sample.labels,
        }
        for name, found in answers.items():
            right = np.mean(found[sample.labels < 40] == sample.labels[sample.labels < 40])
            print(f"room {seed}, {name}: {100 * right:.1f} % of the pixels")
        rows.append((sample.image, answers))
    write_png(path, viz.strips(rows, SPACES["nyu40"], width=360))


def region_support(path: Path) -> None:
    """Two rendered rooms: depth, and the region support that it makes with the labels."""
    rows = []
    for seed in SEEDS:
        sample = enfilade.open_dataset("rooms", split="test", seed=seed, length=1)[0]
        support = regions.region_support(sample.labels, sample.depth)
        rows.append((sample.image, {"region support": support, "depth": sample.depth}))
    write_png(path, viz.depth_strips(rows, width=360))


if __name__ == "__main__":
    images = Path(__file__).parent / "images"
    crf(images / "crf.png")
    region_support(images / "region-support.png")
