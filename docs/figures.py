"""The pictures of the documentation that no other command makes.

python docs/figures.py             # all of them, into docs/images
python docs/figures.py networks    # gad.svg, lrn.svg, joint.svg, rsn.svg, imenet.svg alone: no network runs for these
python docs/figures.py rooms       # crf.png and region-support.png alone

A block diagram is text: boxes and arrows at places that are written down here, in one palette, with a ground of its
own and a second palette for readers whose system is dark. The same script gives the same bytes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np

SEEDS = (12, 16)
IMAGES = Path(__file__).parent / "images"

# What a box is: fill in the light and in the dark. Text keeps a contrast of more than 7 to 1 on each.
PALETTE = {
    "ground": ("#fcfcfa", "#191c20"),
    "data": ("#e9ebee", "#30353c"),  # what goes in
    "net": ("#d8e6f8", "#1f3656"),  # an ordinary network
    "new": ("#fde0ae", "#5c4412"),  # what the paper adds
    "label": ("#d0eed9", "#1c4a30"),  # labels, of pixels or voxels
    "depth": ("#e5dcfb", "#3c2d66"),  # depth
}
TEXT, LINE = ("#16191d", "#eef0f2"), ("#59626d", "#a3acb6")
FONT = 13  # pixels
LETTER = 0.53  # mean width of a letter, in heights: a little more than that of common sans-serif fonts


def crf(path: Path) -> None:
    """Two rendered rooms: what gad-nyuv2 says, the same after the CRF, and the truth."""
    import enfilade
    from enfilade import viz
    from enfilade.images import write_png
    from enfilade.labels import SPACES

    plain, refined = enfilade.load("gad-nyuv2"), enfilade.load("gad-nyuv2", crf=True)
    rows = []
    for seed in SEEDS:
        sample = enfilade.open_dataset("rooms", split="test", seed=seed, length=1)[0]
        assert sample.labels is not None
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
    import enfilade
    from enfilade import viz
    from enfilade.images import write_png
    from enfilade.ops import regions

    rows = []
    for seed in SEEDS:
        sample = enfilade.open_dataset("rooms", split="test", seed=seed, length=1)[0]
        assert sample.labels is not None
        assert sample.depth is not None
        support = regions.region_support(sample.labels, sample.depth)
        rows.append((sample.image, {"region support": support, "depth": sample.depth}))
    write_png(path, viz.depth_strips(rows, width=360))


# ------------------------------------------------------------------------------------------------------ block diagrams


@dataclass(frozen=True)
class Box:
    """A block at (x, y), the upper left corner, and the places where arrows meet it."""

    x: float
    y: float
    w: float
    h: float

    def left(self, at: float = 0.5) -> tuple[float, float]:
        return self.x, self.y + at * self.h

    def right(self, at: float = 0.5) -> tuple[float, float]:
        return self.x + self.w, self.y + at * self.h

    def top(self, at: float = 0.5) -> tuple[float, float]:
        return self.x + at * self.w, self.y

    def bottom(self, at: float = 0.5) -> tuple[float, float]:
        return self.x + at * self.w, self.y + self.h


class Diagram:
    """An SVG of boxes, arrows and notes. `words` is what a screen reader says."""

    def __init__(self, width: int, height: int, words: str):
        self.width, self.height, self.words = width, height, words
        self.parts: list[str] = []

    def box(self, kind: str, x: float, y: float, w: float, text: str, h: float = 38) -> Box:
        """Raises ValueError where the text is too wide or too high for the box, or the box leaves the picture."""
        lines = text.split("\n")
        if max(map(len, lines)) * LETTER * FONT > w - 8 or len(lines) * 16 > h:
            raise ValueError(f"{text!r} does not fit into {w} x {h} pixels")
        if min(x, y) < 0 or x + w > self.width or y + h > self.height:
            raise ValueError(f"{text!r} leaves the picture")
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6"/>')
        self.lines(x + w / 2, y + h / 2, lines, "middle")
        return Box(x, y, w, h)

    def lines(self, x: float, y: float, lines: list[str], anchor: str, style: str = "") -> None:
        first = y - 8 * (len(lines) - 1) + 4.5
        for k, line in enumerate(lines):
            place = f'x="{x:g}" y="{first + 16 * k:g}" text-anchor="{anchor}"{style}'
            self.parts.append(f"<text {place}>{escape(line)}</text>")

    def note(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Small text, its middle at height y."""
        self.lines(x, y, text.split("\n"), anchor, ' class="note"')

    def arrow(self, *points: tuple[float, float]) -> None:
        """Along straight lines, with its head at the last point."""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="{path}" marker-end="url(#head)"/>')

    def svg(self) -> str:
        def style(shade: int) -> str:
            fills = "".join(f".{kind}{{fill:{colours[shade]}}}" for kind, colours in PALETTE.items())
            return f"{fills}text{{fill:{TEXT[shade]}}}path{{stroke:{LINE[shade]}}}#head path{{fill:{LINE[shade]}}}"

        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img">',
                f"<title>{escape(self.words)}</title>",
                "<style>",
                f"text{{font:{FONT}px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}}"
                f".note{{font-size:{FONT - 2}px}}path{{fill:none;stroke-width:1.4}}"
                "#head path{stroke:none}",
                style(0),
                f"@media (prefers-color-scheme:dark){{{style(1)}}}",
                "</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z"/></marker></defs>',
                f'<rect class="ground" width="{self.width}" height="{self.height}" rx="10"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def gad() -> Diagram:
    d = Diagram(
        760,
        300,
        "GAD: RGB goes through a trunk to a depth decoder and a semantic decoder. FeatProp adds the depth decoder's "
        "features to the semantic decoder's. GAP propagates label features by the depth embedding, and four SPF blocks "
        "bring back the trunk's features, deep to shallow.",
    )
    rgb = d.box("data", 20, 131, 60, "RGB")
    trunk = d.box("net", 112, 131, 80, "trunk")
    depth = d.box("net", 264, 36, 176, "depth decoder")
    semantic = d.box("net", 264, 131, 176, "semantic decoder")
    gap = d.box("new", 514, 131, 84, "GAP")
    spf = d.box("new", 514, 226, 84, "SPF x 4")
    metres = d.box("depth", 650, 36, 90, "depth")
    side = d.box("label", 650, 131, 90, "side maps")
    labels = d.box("label", 650, 226, 90, "labels")
    d.arrow(rgb.right(), trunk.left())
    d.arrow(trunk.right(), semantic.left())
    d.arrow((226, 150), (226, 55), depth.left())
    d.arrow(trunk.bottom(), (152, 245), spf.left())
    for at in (0.1, 0.2, 0.3):
        d.arrow(depth.bottom(at), semantic.top(at))
    d.arrow(depth.right(), metres.left())
    d.arrow((556, 55), gap.top())
    d.arrow(semantic.right(), gap.left())
    d.arrow(gap.right(), side.left())
    d.arrow(gap.bottom(), spf.top())
    d.arrow(spf.right(), labels.left())
    d.arrow(spf.right(0.2), (624, 233.6), (624, 160), side.left(0.76))
    d.note(330, 102, "FeatProp: added\nat three levels")
    d.note(564, 102, "embedding: where\nthe geometry is alike")
    d.note(330, 235, "features, deep to shallow", "middle")
    return d


def lrn() -> Diagram:
    d = Diagram(
        760,
        270,
        "LRN: an encoder halves the image five times. A first label map is made of its deepest map, at stride 32. Five "
        "refinements each double the label map and correct it by the encoder's map of that size, down to stride 1.",
    )
    rgb = d.box("data", 16, 32, 62, "RGB")
    at = [112 + 108 * k for k in range(6)]
    names = ("f1", "f2", "f3", "f4", "f5", "top")
    features = [d.box("net", x, 32, 72, name) for x, name in zip(at, names)]
    refine = [d.box("new", x, 118, 72, "RE", h=34) for x in at[:5]]
    maps = [d.box("label", x, 196, 72, f"s{6 - k}") for k, x in enumerate(at)]
    d.arrow(rgb.right(), features[0].left())
    for a, b in pairwise(features):
        d.arrow(a.right(), b.left())
    for feature, unit, label in zip(features, refine, maps):
        d.arrow(feature.bottom(), unit.top())
        d.arrow(unit.bottom(), label.top())
    d.arrow(features[5].bottom(), maps[5].top())
    for k in range(5):
        coarse = maps[k + 1]
        d.arrow(coarse.left(0.3), (coarse.x - 18, coarse.y + 11.4), (coarse.x - 18, 135), refine[k].right())
    for x, stride in zip(at, (1, 2, 4, 8, 16, 32)):
        d.note(x + 36, 20, f"stride {stride}", "middle")
    d.note(696, 135, "3x3")
    d.note(47, 135, "twice the size,\ncorrected", "middle")
    d.note(47, 215, "each map\nhas a loss", "middle")
    d.note(112, 252, "the answer")
    return d


def joint() -> Diagram:
    d = Diagram(
        760,
        300,
        "Joint labels and depth: five branches of the network, from fine to coarse, each score the classes and 50 bins "
        "of depth. The scores are resized and summed. The mean of the bins is the depth; a fully connected CRF with "
        "kernels of colour, depth and place refines the labels.",
    )
    rgb = d.box("data", 20, 120, 60, "RGB")
    branches = [d.box("net", 122, 22 + 50 * k, 160, f"branch {k + 1}", h=34) for k in range(5)]
    classes = d.box("net", 334, 72, 136, "scores of classes,\nresized, summed", h=48)
    bins = d.box("net", 334, 172, 136, "scores of 50 bins,\nresized, summed", h=48)
    crf_ = d.box("new", 548, 66, 84, "dense CRF", h=60)
    metres = d.box("depth", 548, 177, 84, "depth")
    labels = d.box("label", 670, 77, 70, "labels")
    for branch in branches:
        d.arrow(rgb.right(), (100, 139), (100, branch.left()[1]), branch.left())
        d.arrow(branch.right(), (311, branch.right()[1]), (311, 96), classes.left())
        d.arrow(branch.right(), (311, branch.right()[1]), (311, 196), bins.left())
    d.arrow(classes.right(), crf_.left())
    d.arrow(bins.right(), metres.left())
    d.arrow(metres.top(), crf_.bottom())
    d.arrow(crf_.right(), labels.left())
    d.arrow(rgb.bottom(), (50, 282), (654, 282), (654, 160), (614, 160), crf_.bottom(66 / 84))
    d.note(508, 186, "their mean", "middle")
    d.note(508, 86, "unaries", "middle")
    d.note(478, 271, "colours, places", "middle")
    d.note(582, 152, "as data", "end")
    return d


def rsn() -> Diagram:
    d = Diagram(
        760,
        290,
        "RSN: the generation module makes one depth for each region from RGB, through a trunk and a pyramid of eight "
        "scales. The refinement module takes RGB, this region support and the depth so far, and gives the next depth, "
        "three times with the same weights.",
    )
    rgb = d.box("data", 20, 131, 60, "RGB")
    trunk = d.box("net", 122, 56, 80, "trunk")
    pyramid = d.box("new", 252, 90, 130, "pyramid unit,\n8 scales", h=44)
    join = d.box("net", 432, 56, 92, "join")
    support = d.box("depth", 590, 52, 150, "region support:\none depth a region", h=46)
    refine = d.box("new", 432, 196, 160, "refinement", h=44)
    metres = d.box("depth", 650, 199, 90, "depth")
    d.arrow(rgb.top(), (50, 75), trunk.left())
    d.arrow(trunk.right(0.25), join.left(0.25))
    d.arrow(trunk.right(0.75), (226, 84.5), (226, 112), pyramid.left())
    d.arrow(pyramid.right(), (408, 112), (408, 84.5), join.left(0.75))
    d.arrow(join.right(), support.left())
    d.arrow(rgb.bottom(), (50, 218), refine.left())
    d.arrow((615, 98), (615, 150), (480, 150), refine.top(0.3))
    d.arrow((690, 98), (690, 168), (544, 168), refine.top(0.7))
    d.arrow(refine.right(), metres.left())
    d.arrow(metres.bottom(), (695, 262), (512, 262), refine.bottom())
    d.note(318, 54, "full resolution", "middle")
    d.note(318, 148, "half resolution", "middle")
    d.note(474, 140, "guidance", "start")
    d.note(622, 178, "first depth", "middle")
    d.note(603, 274, "three times, the same weights", "middle")
    d.note(122, 26, "generation")
    return d


def imenet() -> Diagram:
    d = Diagram(
        760,
        290,
        "IMENet: a 2-D network scores the pixels of RGB, a 3-D network the voxels of a TSDF made from depth. Voxels' "
        "labels are projected into the image and correct the pixels' (DCP); pixels' labels are put into voxels and "
        "correct those (DDA); T times.",
    )
    rgb = d.box("data", 20, 40, 70, "RGB")
    depth = d.box("data", 20, 210, 70, "depth")
    tsdf = d.box("net", 122, 210, 62, "TSDF")
    flat = d.box("net", 222, 40, 116, "2-D network")
    solid = d.box("net", 222, 210, 116, "3-D network")
    dcp = d.box("new", 446, 40, 96, "DCP")
    dda = d.box("new", 446, 210, 96, "DDA")
    pixels = d.box("label", 640, 36, 100, "labels of\npixels", h=46)
    voxels = d.box("label", 640, 206, 100, "labels of\nvoxels", h=46)
    d.arrow(rgb.right(), flat.left())
    d.arrow(depth.right(), tsdf.left())
    d.arrow(tsdf.right(), solid.left())
    d.arrow(flat.right(), dcp.left())
    d.arrow(solid.right(), dda.left())
    d.arrow(dcp.right(), pixels.left())
    d.arrow(dda.right(), voxels.left())
    d.arrow(voxels.top(0.25), (665, 165), (494, 125), dcp.bottom())
    d.arrow(pixels.bottom(0.75), (715, 125), (494, 165), dda.top())
    d.note(392, 49, "scores of pixels", "middle")
    d.note(392, 219, "scores of voxels", "middle")
    d.note(484, 110, "voxels seen at each pixel", "end")
    d.note(484, 180, "pixels' labels in their voxels", "end")
    d.note(748, 146, "T times", "end")
    d.note(494, 26, "Eq. (1)", "middle")
    d.note(494, 264, "Eq. (1) in 3-D, then Eq. (2)", "middle")
    return d


NETWORKS: dict[str, Callable[[], Diagram]] = {"gad": gad, "lrn": lrn, "joint": joint, "rsn": rsn, "imenet": imenet}


def main(what: str = "all") -> None:
    if what not in ("all", "networks", "rooms"):
        raise SystemExit(f"no pictures are called {what!r}: say networks, rooms, or nothing for all")
    if what in ("all", "networks"):
        for name, draw in NETWORKS.items():
            (IMAGES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
    if what in ("all", "rooms"):
        crf(IMAGES / "crf.png")
        region_support(IMAGES / "region-support.png")


if __name__ == "__main__":
    main(*sys.argv[1:2])
