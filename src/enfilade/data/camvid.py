"""CamVid (Brostow, Fauqueur & Cipolla 2009): 701 street frames from a driving car, with labels; no depth, no camera.

Two layouts are recognised:

    SegNet's, 480x360, 11 classes        the original, 960x720, 32 colours
    train/       STEM.png (or .jpg)      701_StillsRaw_full/STEM.png
    trainannot/  STEM.png                LabeledApproved_full/STEM_L.png
    val/ valannot/ test/ testannot/      train.txt val.txt test.txt   optional: one stem per line

SegNet's label images hold 0..10 for the classes of camvid11 and 11 for void. The 32 colours of the original are grouped
into the same classes (`COLOURS`); that SegNet's own images were made by this very grouping is not proven.

Splits: "train", "val", "test" and "trainval", which is train and then val. SegNet's have 367, 101 and 233 frames. The
original comes without splits: "all" is every frame of it, and the others want their lists.
"""

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from enfilade.data.files import demand_files, demand_size, read_map, read_rgb
from enfilade.errors import UserError, unknown
from enfilade.labels import IGNORE, SPACES
from enfilade.types import Sample

SPLITS = ("train", "val", "trainval", "test", "all")
STILLS, LABELLED = "701_StillsRaw_full", "LabeledApproved_full"

_SPACE = SPACES["camvid11"]
_VOID = len(_SPACE)

# The names and colours of the data set's label_colors.txt. SegNet's authors published label images but no table of the
# grouping; this is the one that MathWorks gives in its example of SegNet on CamVid, with "Void" alone as void.
COLOURS: dict[str, tuple[tuple[int, int, int], str | None]] = {
    "Animal": ((64, 128, 64), "pedestrian"),
    "Archway": ((192, 0, 128), "building"),
    "Bicyclist": ((0, 128, 192), "cyclist"),
    "Bridge": ((0, 128, 64), "building"),
    "Building": ((128, 0, 0), "building"),
    "Car": ((64, 0, 128), "car"),
    "CartLuggagePram": ((64, 0, 192), "pedestrian"),
    "Child": ((192, 128, 64), "pedestrian"),
    "Column_Pole": ((192, 192, 128), "pole"),
    "Fence": ((64, 64, 128), "fence"),
    "LaneMkgsDriv": ((128, 0, 192), "road"),
    "LaneMkgsNonDriv": ((192, 0, 64), "road"),
    "Misc_Text": ((128, 128, 64), "sign"),
    "MotorcycleScooter": ((192, 0, 192), "cyclist"),
    "OtherMoving": ((128, 64, 64), "car"),
    "ParkingBlock": ((64, 192, 128), "pavement"),
    "Pedestrian": ((64, 64, 0), "pedestrian"),
    "Road": ((128, 64, 128), "road"),
    "RoadShoulder": ((128, 128, 192), "pavement"),
    "Sidewalk": ((0, 0, 192), "pavement"),
    "SignSymbol": ((192, 128, 128), "sign"),
    "Sky": ((128, 128, 128), "sky"),
    "SUVPickupTruck": ((64, 128, 192), "car"),
    "TrafficCone": ((0, 0, 64), "pole"),
    "TrafficLight": ((0, 64, 64), "sign"),
    "Train": ((192, 64, 128), "car"),
    "Tree": ((128, 128, 0), "tree"),
    "Truck_Bus": ((192, 128, 192), "car"),
    "Tunnel": ((64, 0, 64), "building"),
    "VegetationMisc": ((192, 192, 0), "tree"),
    "Void": ((0, 0, 0), None),
    "Wall": ((64, 192, 0), "building"),
}

# The painters left single pixels of other colours. More of them than this share means another kind of picture.
_STRAY = 0.01


class CamVid:
    """CamVid frames in one of the two layouts.

    Args:
        root: the folder described above.
        split: "train", "val", "trainval" or "test"; "all" of the original layout.

    Every file is looked for at once: FileNotFoundError names the first that is missing and how many are. A sample whose
    files differ in size, or whose labels are beyond 11 or in colours that are not CamVid's, raises `UserError` when it
    is read.
    """

    def __init__(self, root: str | os.PathLike, split: str = "train"):
        if split not in SPLITS:
            raise unknown("camvid split", split, SPLITS)
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"camvid: there is no folder {self.root}")
        self.name = f"camvid/{split}"
        self.space = _SPACE
        self.ignored: tuple[int, ...] = ()
        self.score_crop = None
        parts = ("train", "val") if split == "trainval" else (split,)
        if any((self.root / f"{part}{kind}").is_dir() for part in ("train", "val", "test") for kind in ("", "annot")):
            self.original = False
            files = _folders(self.root, parts)
        elif (self.root / STILLS).is_dir() or (self.root / LABELLED).is_dir():
            self.original = True
            files = _original(self.root, parts)
        else:
            raise FileNotFoundError(
                f"{self.root} holds neither SegNet's folders (train/, trainannot/ ...) nor {STILLS}/ and {LABELLED}/"
            )
        if not files:
            raise UserError(f"{self.root}: split {split!r} has no frames")
        demand_files([path for _, pair in files for path in pair], self.name, "take the other file of the frame away")
        self.names = tuple(name for name, _ in files)
        self._files = [pair for _, pair in files]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        picture, annotation = self._files[index]
        image, labels = read_rgb(picture), self.labels(index)
        demand_size(labels, annotation, image, picture)
        return Sample(image=image, name=self.names[index], labels=labels)

    def labels(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """The labels alone, 255 where void; the image is not read."""
        path = self._files[index][1]
        if self.original:
            return _from_colours(path)
        labels = read_map(path)
        if labels.dtype != np.uint8 or labels.max() > _VOID:
            raise UserError(f"{path} holds label {labels.max()}: expected 8 bits, 0..{_VOID - 1} and {_VOID} (void)")
        return np.where(labels == _VOID, np.uint8(IGNORE), labels)


# Id, and the paths of the image and of its labels, which need not exist
_Files = list[tuple[str, tuple[Path, Path]]]


def _folders(root: Path, parts: tuple[str, ...]) -> _Files:
    """The frames of SegNet's layout: every stem that is in either of the two folders of a split."""
    if parts == ("all",):
        raise UserError(f"{root} is in SegNet's layout, which has the splits train, val, trainval and test, not 'all'")
    files: _Files = []
    for part in parts:
        image, annotation = root / part, root / f"{part}annot"
        for folder in (image, annotation):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} not found: SegNet's layout keeps the {part} frames there")
        pictures, labelled = _stems(image, (".png", ".jpg", ".jpeg")), _stems(annotation, (".png",))
        for stem in sorted(pictures.keys() | labelled.keys()):
            files.append(
                (stem, (pictures.get(stem, image / f"{stem}.png"), labelled.get(stem, annotation / f"{stem}.png")))
            )
    return files


def _original(root: Path, parts: tuple[str, ...]) -> _Files:
    """The frames of the original layout: those of the lists, or every stem in either of the two folders."""
    stills, labelled = root / STILLS, root / LABELLED
    for folder in (stills, labelled):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} not found: the original CamVid has {STILLS}/ and {LABELLED}/")
    if parts == ("all",):
        names = sorted({*_stems(stills, (".png",)), *(s.removesuffix("_L") for s in _stems(labelled, (".png",)))})
    else:
        names = [name for part in parts for name in _list(root / f"{part}.txt")]
    return [(name, (stills / f"{name}.png", labelled / f"{name}_L.png")) for name in names]


def _list(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: it lists the stems of the split, one a line; without lists the original CamVid has "
            "the split 'all' only"
        )
    return [line.strip().removesuffix(".png") for line in path.read_text().splitlines() if line.strip()]


def _stems(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The image files of a folder by stem. Files that start with a dot are leftovers of file systems."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in endings and not path.name.startswith("."):
            if path.stem in found:
                raise UserError(f"{found[path.stem]} and {path.name} are one frame twice: keep one of them")
            found[path.stem] = path
    return found


# --- the 32 colours ---------------------------------------------------------------------------------------------------


def _colour_table() -> UInt8[np.ndarray, "64"]:
    """Classes by colour: every channel is a multiple of 64, so that its two upper bits tell all. `_VOID` is no colour
    of CamVid."""
    table = np.full(64, _VOID, np.uint8)
    for (red, green, blue), target in COLOURS.values():
        table[red >> 2 | green >> 4 | blue >> 6] = IGNORE if target is None else _SPACE.index(target)
    return table


_TABLE = _colour_table()


def _from_colours(path: Path) -> UInt8[np.ndarray, "h w"]:
    colours = np.rint(read_rgb(path) * 255).astype(np.uint8)
    red, green, blue = np.moveaxis(colours, -1, 0)
    labels = _TABLE[red >> 2 & 48 | green >> 4 & 12 | blue >> 6]
    labels[((red | green | blue) & 63) != 0] = _VOID
    stray = labels == _VOID
    if stray.mean() > _STRAY:
        first = colours[stray][0].tolist()
        raise UserError(
            f"{path}: {stray.mean():.0%} of the pixels are in colours that are not CamVid's, for example {first}: is "
            "it the label image as distributed?"
        )
    labels[stray] = IGNORE
    return labels
