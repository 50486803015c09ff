"""Label spaces: what the numbers in a label image mean, how they are drawn, and how one space maps to another.

Inside the library labels are 0..C-1 and 255 is ignored, whatever the files of a data set hold. The indoor spaces
(nyu40, nyu13, sun37, ssc12) give the same class the same colour. Everything is in two visible dicts: `SPACES` and
`MAPPINGS`.

Classes of one's own need no entry there, because such a space is written in its name: "own:wall,mug,night stand", or
with a colour, "own:wall,mug#ff8000". Wherever a space is named (a model file, a prediction, a recipe, an option of a
reader) such a name will do, in any process, and `own` makes it.

This module imports NumPy and the standard library only, so that the command line can use it at start.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

import numpy as np
from jaxtyping import Float, UInt8

from enfilade.errors import UserError, unknown

IGNORE = 255
OWN = "own:"  # what the names of one's own spaces begin with
MOST = 254  # classes of a space: 255 is ignored, and 254 is left free


@dataclass(frozen=True, slots=True, eq=False)
class LabelSpace:
    """The classes of a label image: class i is called `names[i]` and drawn in `colours[i]` (RGB)."""

    name: str
    names: tuple[str, ...]
    colours: UInt8[np.ndarray, "k 3"]

    def __post_init__(self):
        if len(self.names) != len(self.colours):
            raise ValueError(f"label space {self.name!r} has {len(self.names)} names and {len(self.colours)} colours")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """The number of the class called `name`; an unknown name raises `UserError` and names the nearest one."""
        if name not in self.names:
            raise unknown(f"{short(self.name)} class", name, self.names)
        return self.names.index(name)

    def colourise(self, labels: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
        """The label image in colour; 255, and any other value that is no class, is black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.colours
        return table[labels]


# --- names and colours ------------------------------------------------------------------------------------------------

# The indoor classes, in the order and spelling of classMapping40.mat. The colours are at least 25 CIELAB units apart.
_NYU40 = {
    "wall": "aec7e8",
    "floor": "98df8a",
    "cabinet": "1f77b4",
    "bed": "ffbb78",
    "chair": "bcbd22",
    "sofa": "8c564b",
    "table": "ff9896",
    "door": "d62728",
    "window": "17becf",
    "bookshelf": "9467bd",
    "picture": "f7b6d2",
    "counter": "2ca02c",
    "blinds": "87d2b4",
    "desk": "ff7f0e",
    "shelves": "b41eff",
    "curtain": "dbdb8d",
    "dresser": "b45a1e",
    "pillow": "ff78d2",
    "mirror": "1effe1",
    "floor mat": "1e9669",
    "clothes": "961e5a",
    "ceiling": "f0f0e0",
    "books": "ff1e87",
    "refridgerator": "1e87ff",
    "television": "4b3fe0",
    "paper": "d2b4ff",
    "towel": "ffb41e",
    "shower curtain": "1eff87",
    "box": "87782d",
    "whiteboard": "c3ff1e",
    "person": "ff1ee1",
    "night stand": "871e1e",
    "toilet": "1e1eff",
    "sink": "1eff1e",
    "lamp": "d278ff",
    "bathtub": "3c3c5a",
    "bag": "a51ea5",
    "otherstructure": "1e4b1e",
    "otherfurniture": "5a3200",
    "otherprop": "7f7f7f",
}

# Classes of the coarser indoor spaces that go by another name there; "empty" exists in the voxel space only.
_SAME_COLOUR = {"furniture": "otherfurniture", "objects": "otherprop", "tv": "television", "tvs": "television"}
_EMPTY = "282828"


def _indoor(name: str, names: Iterable[str]) -> LabelSpace:
    names = tuple(names)
    colours = [_EMPTY if n == "empty" else _NYU40[_SAME_COLOUR.get(n, n)] for n in names]
    return _space(name, names, [tuple(bytes.fromhex(c)) for c in colours])


def _space(name: str, names: Iterable[str], colours) -> LabelSpace:
    table = np.array(colours, np.uint8)
    table.setflags(write=False)
    return LabelSpace(name, tuple(names), table)


def _voc_palette(count: int) -> list[tuple[int, ...]]:
    """The PASCAL VOC palette: bits 0, 1, 2 of each base-8 digit of i are the next lower bits of red, green, blue."""
    return [
        tuple(sum((i >> (3 * digit + channel) & 1) << (7 - digit) for digit in range(3)) for channel in range(3))
        for i in range(count)
    ]


_CAMVID11 = {  # SegNet's order and colours
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "cyclist": (0, 128, 192),
}

_VOC21 = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

_NYU13 = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects"),
    *("picture", "sofa", "table", "tv", "wall", "window"),
)

_SSC12 = (
    *("empty", "ceiling", "floor", "wall", "window", "chair"),
    *("bed", "sofa", "table", "tvs", "furniture", "objects"),
)

SPACES: dict[str, LabelSpace] = {
    "nyu40": _indoor("nyu40", _NYU40),  # Gupta et al. 2013, from the 894 raw names of NYUv2
    "nyu13": _indoor("nyu13", _NYU13),  # Couprie et al. 2013
    "sun37": _indoor("sun37", list(_NYU40)[:37]),  # Song et al. 2015: nyu40 without its last three, spelled as there
    "ssc12": _indoor("ssc12", _SSC12),  # Song et al. 2017 (SSCNet)
    "camvid11": _space("camvid11", _CAMVID11, list(_CAMVID11.values())),  # Badrinarayanan et al. 2017 (SegNet)
    "voc21": _space("voc21", _VOC21, _voc_palette(21)),  # PASCAL VOC 2012
}


def get(name: str) -> LabelSpace:
    """The label space called `name`: a key of `SPACES`, or classes of one's own, "own:wall,mug,plate". An unknown name
    raises `UserError` and names the nearest one."""
    if name.startswith(OWN):
        return _own(name)
    if name not in SPACES:
        raise unknown("label space", name, SPACES)
    return SPACES[name]


# --- classes of one's own ---------------------------------------------------------------------------------------------


def own(names: Sequence[str], colours: Sequence[str | None] | None = None) -> LabelSpace:
    """The label space of these classes, called "own:" and what they are.

    `colours` are "#rrggbb", or None for a class that may be drawn in any: one of an indoor class then has that class's
    colour, others are as far from each other as they can be.

    Raises:
        UserError: no class, more than 254, an empty name, a name twice (case and underscores do not tell names apart),
            something that is no colour, a colour twice.
    """
    given = [None] * len(names) if colours is None else list(colours)
    if len(given) != len(names):
        raise ValueError(f"{len(names)} classes have {len(given)} colours")
    if not 1 <= len(names) <= MOST:
        raise UserError(f"a label space has 1 to {MOST} classes, not {len(names)}")
    seen: dict[str, str] = {}
    for name, colour in zip(names, given):
        if not plain(name):
            raise UserError("a class has an empty name: give every class one")
        if plain(name) in seen:
            raise UserError(f"two classes are called {seen[plain(name)]!r} and {name!r}: give each its own name")
        seen[plain(name)] = name
        if colour is not None and not re.fullmatch("#[0-9a-fA-F]{6}", colour):
            raise UserError(f"class {name!r} has the colour {colour!r}: write it as #rrggbb, for example #ff8000")
    wanted = [None if c is None else c.lower() for c in given]
    table = _colours(names, [None if c is None else tuple(bytes.fromhex(c[1:])) for c in wanted])
    parts = (re.sub("[%,#]", lambda m: f"%{ord(m[0]):02X}", n.strip()) + (c or "") for n, c in zip(names, wanted))
    return _space(OWN + ",".join(parts), [n.strip() for n in names], table)


@lru_cache(maxsize=64)
def _own(name: str) -> LabelSpace:
    parts = [part.partition("#") for part in name.removeprefix(OWN).split(",")]
    return own([unquote(n) for n, _, _ in parts], ["#" + colour if mark else None for _, mark, colour in parts])


def plain(name: str) -> str:
    """A class's name as it is compared: "Night_Stand" is "night stand"."""
    return " ".join(re.split(r"[\s_-]+", name.casefold())).strip()


def short(space: str) -> str:
    """The name of a label space for a sentence: of many classes of one's own, the first three."""
    names = space.removeprefix(OWN).split(",")
    return space if len(names) <= 4 else f"{OWN}{','.join(names[:3])} and {len(names) - 3} more"


def counterparts(source: LabelSpace, target: LabelSpace) -> dict[int, int]:
    """The classes of `source` that are called as one of `target`, by their numbers in both."""
    of = {plain(name): i for i, name in enumerate(target.names)}
    return {i: of[plain(name)] for i, name in enumerate(source.names) if plain(name) in of}


def _colours(names: Sequence[str], given: Sequence[tuple[int, ...] | None]) -> list[tuple[int, ...]]:
    """What is given; then the colours of the indoor classes; then, one after the other, the candidate farthest from all
    that are taken, black among them (it is "ignored")."""
    chosen = list(given)
    if len({c for c in chosen if c is not None}) < sum(c is not None for c in chosen):
        twice = next(c for c in chosen if c is not None and chosen.count(c) > 1)
        first, second = [name for name, c in zip(names, chosen) if c == twice][:2]
        raise UserError(f"classes {first!r} and {second!r} both have the colour #{bytes(twice).hex()}: change one")
    grid = np.stack(np.meshgrid(*[np.linspace(20, 255, 9).round()] * 3, indexing="ij"), -1).reshape(-1, 3)
    candidates, nearest = _lab(grid), np.full(len(grid), np.inf)

    def take(colour: tuple[int, ...]) -> None:
        nearest[:] = np.minimum(nearest, np.linalg.norm(candidates - _lab(np.array([colour], float)), axis=1))

    for colour in [(0, 0, 0), *(c for c in chosen if c is not None)]:
        take(colour)
    for i, name in enumerate(names):
        usual = _NYU40.get(_SAME_COLOUR.get(plain(name), plain(name)))
        colour = None if usual is None else tuple(bytes.fromhex(usual))
        if chosen[i] is None and colour is not None and colour not in chosen:
            chosen[i] = colour
            take(colour)
    filled = []
    for colour in chosen:
        filled.append(colour or tuple(int(v) for v in grid[nearest.argmax()]))
        if colour is None:
            take(filled[-1])
    return filled


def _lab(rgb: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """CIELAB (D65) of sRGB colours of 0 to 255."""
    c = rgb / 255
    linear = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    t = xyz / [0.9505, 1.0, 1.089]
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


# --- mappings ---------------------------------------------------------------------------------------------------------

# class13Mapping.mat: what is not named here is "objects".
_NYU40_IN_NYU13 = {
    "bed": ("bed",),
    "books": ("books",),
    "ceiling": ("ceiling",),
    "chair": ("chair",),
    "floor": ("floor", "floor mat"),
    "furniture": (
        *("cabinet", "bookshelf", "counter", "shelves"),
        *("dresser", "refridgerator", "night stand", "otherfurniture"),
    ),
    "picture": ("picture",),
    "sofa": ("sofa",),
    "table": ("table", "desk"),
    "tv": ("television",),
    "wall": ("wall", "door"),
    "window": ("window", "blinds", "curtain"),
}

# ClassMapping.mat of SSCNet, mapNYU40to36 and then map36to11: what is not named here is "objects".
_NYU40_IN_SSC12 = {
    "ceiling": ("ceiling",),
    "floor": ("floor", "floor mat"),
    "wall": ("wall",),
    "window": ("window", "blinds", "curtain"),
    "chair": ("chair",),
    "bed": ("bed",),
    "sofa": ("sofa",),
    "table": ("table", "desk"),
    "tvs": ("television",),
    "furniture": (
        *("cabinet", "bookshelf", "counter", "shelves", "dresser"),
        *("night stand", "toilet", "bathtub", "otherfurniture"),
    ),
}


def _table(source: str, target: str, members: Mapping[str, tuple[str, ...]], rest: str | None = None) -> np.ndarray:
    """The table that sends each name in `members[t]` to t, and other classes of `source` to `rest` (None: 255)."""
    to = SPACES[target]
    of = {name: t for t, names in members.items() for name in names}
    table = np.full(256, IGNORE, np.uint8)
    for i, name in enumerate(SPACES[source].names):
        counterpart = of.get(name, rest)
        if counterpart is not None:
            table[i] = to.index(counterpart)
    table.setflags(write=False)
    return table


def _same(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


MAPPINGS: dict[tuple[str, str], np.ndarray] = {
    ("nyu40", "nyu13"): _table("nyu40", "nyu13", _NYU40_IN_NYU13, rest="objects"),
    ("sun37", "nyu13"): _table("sun37", "nyu13", _NYU40_IN_NYU13, rest="objects"),
    ("nyu40", "sun37"): _table("nyu40", "sun37", _same(SPACES["sun37"].names)),
    ("sun37", "nyu40"): _table("sun37", "nyu40", _same(SPACES["sun37"].names)),
    ("nyu40", "ssc12"): _table("nyu40", "ssc12", _NYU40_IN_SSC12, rest="objects"),
    ("sun37", "ssc12"): _table("sun37", "ssc12", _NYU40_IN_SSC12, rest="objects"),
    **{(name, name): _table(name, name, _same(space.names)) for name, space in SPACES.items()},
}


def mapping(source: str, target: str) -> UInt8[np.ndarray, "256"]:
    """A look-up table: `mapping("nyu40", "nyu13")[labels]` are the labels in the coarser space. 255 stays 255; a class
    without a counterpart becomes 255. Tables are read-only. A pair without a mapping raises `UserError`.

    * classes of one's own -> any space, and the other way: by name; a pair of spaces without a common name has no
      mapping.
    * nyu40 -> nyu13 follows class13Mapping.mat.
    * nyu40 -> sun37 keeps the first 37 classes; otherstructure, otherfurniture and otherprop have no counterpart.
    * nyu40 -> ssc12 and sun37 -> ssc12 follow the two tables of SSCNet's ClassMapping.mat, one after the other (nyu40
      to the 36 SUNCG classes, those to 11), and are shifted by one for "empty", which no pixel has. Their less obvious
      decisions: blinds and curtains are windows, a floor mat is floor, a desk is a table; doors, pictures, pillows,
      mirrors, whiteboards, refrigerators, lamps, sinks, persons and shower curtains are objects; toilets and bathtubs
      are furniture; otherstructure is objects.
    """
    source, target = get(source).name, get(target).name
    if OWN in (source[: len(OWN)], target[: len(OWN)]):
        return _by_name(source, target)
    if (source, target) not in MAPPINGS:
        known = ", ".join(f"{a} -> {b}" for a, b in MAPPINGS if a != b)
        raise UserError(f"no mapping from label space {source!r} to {target!r}; there are {known}")
    return MAPPINGS[source, target]


@lru_cache(maxsize=64)
def _by_name(source: str, target: str) -> np.ndarray:
    common = counterparts(get(source), get(target))
    if not common:
        raise UserError(f"no class of label space {short(source)!r} is called as one of {short(target)!r}")
    table = np.full(256, IGNORE, np.uint8)
    table[list(common)] = list(common.values())
    table.setflags(write=False)
    return table


def nyu894_to_40(path: str | os.PathLike) -> UInt8[np.ndarray, "895"]:
    """The table from NYUv2's raw labels to nyu40, of the official `classMapping40.mat`: raw 0 (unlabelled) -> 255,
    raw i in 1..894 -> 0..39.

    Raises FileNotFoundError where the file is missing and `UserError` where it holds no such table.
    """
    import scipy.io

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found: it is the official 894-to-40 class mapping of NYUv2")
    try:
        raw = scipy.io.loadmat(path, variable_names=["mapClass"])["mapClass"].reshape(-1)
    except Exception as error:  # scipy raises many kinds on a damaged file
        raise UserError(f"{path} is no readable classMapping40.mat ({error})") from error
    if raw.shape != (894,) or raw.min() < 1 or raw.max() > 40:
        raise UserError(
            f"{path}: mapClass should hold 894 numbers in 1..40, not {raw.size} in {raw.min()}..{raw.max()}"
        )
    return np.concatenate([[IGNORE], raw - 1]).astype(np.uint8)
