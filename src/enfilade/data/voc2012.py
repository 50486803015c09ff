"""PASCAL VOC 2012 segmentation (Everingham et al.): photographs of 20 kinds of objects, with labels; no depth, no
camera.

The folder, as it unpacks:

    JPEGImages/ID.jpg
    SegmentationClass/ID.png                              palette: 0 background, 1..20, 255 void
    ImageSets/Segmentation/train.txt val.txt trainval.txt one id per line
    SegmentationClassAug/ID.png                           for "aug": the labels that SBD adds (Hariharan et al. 2011)
    ImageSets/Segmentation/trainaug.txt                   for "aug"

Splits: "train" (1464), "val" (1449) and "trainval" (2913) are the official lists. "aug" is the usual training list with
SBD's labels (10582); a line of it is an id, or the two paths "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png". "all"
is every image with a PNG in SegmentationClass/, and needs no list.
"""

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from enfilade.data.files import demand_files, demand_size, read_map, read_rgb
from enfilade.errors import UserError, unknown
from enfilade.labels import IGNORE, SPACES
from enfilade.types import Sample

SPLITS = ("train", "val", "trainval", "aug", "all")

_SPACE = SPACES["voc21"]
_LISTS = "ImageSets/Segmentation"
_AUG_LISTS = ("trainaug.txt", "train_aug.txt")


class VOC2012:
    """VOC 2012 with its segmentation labels.

    Args:
        root: the folder VOC2012 described above, or the VOCdevkit that holds it.
        split: "train", "val", "trainval", "aug" or "all".
        aug_list: the list of split "aug"; default: trainaug.txt or train_aug.txt beside the official lists. A list
            that names frames of val.txt is refused. Where it holds ids, labels are in SegmentationClassAug/, or in
            SegmentationClass/ for those that are missing there.

    Every file is looked for at once: FileNotFoundError names the first that is missing and how many are. A sample whose
    files differ in size or hold labels other than 0..20 and 255 raises `UserError` when it is read.
    """

    def __init__(self, root: str | os.PathLike, split: str = "train", *, aug_list: str | os.PathLike | None = None):
        if split not in SPLITS:
            raise unknown("voc2012 split", split, SPLITS)
        if aug_list is not None and split != "aug":
            raise UserError(f"aug_list is the list of split 'aug', and does nothing for {split!r}: leave it away")
        root = Path(root)
        self.root = root / "VOC2012" if (root / "VOC2012").is_dir() else root
        for kind in ("JPEGImages", "SegmentationClass"):
            if not (self.root / kind).is_dir() and not (split == "aug" and kind == "SegmentationClass"):
                raise FileNotFoundError(f"{self.root / kind} not found: give VOC2012, or the VOCdevkit that holds it")
        self.name = f"voc2012/{split}"
        self.space = _SPACE
        self.ignored: tuple[int, ...] = ()
        self.score_crop: tuple[slice, slice] | None = None
        if split == "all":
            pairs = _pairs(path.stem for path in sorted((self.root / "SegmentationClass").glob("[!.]*.png")))
        elif split == "aug":
            pairs = self._aug(aug_list)
        else:
            pairs = _pairs(_lines(self.root / _LISTS / f"{split}.txt", split))
        if not pairs:
            raise UserError(f"{self.root}: split {split!r} has no frames")
        self.names = tuple(Path(image).stem for image, _ in pairs)
        self._files = [(self.root / image, self.root / labels) for image, labels in pairs]
        demand_files([path for pair in self._files for path in pair], self.name, "take the id out of the list")

    def _aug(self, aug_list: str | os.PathLike | None) -> list[tuple[str, str]]:
        places = [self.root / _LISTS / name for name in _AUG_LISTS] if aug_list is None else [Path(aug_list)]
        path = next((place for place in places if place.is_file()), places[0])
        more = set(_listed(self.root / "SegmentationClassAug"))
        pairs = []
        for line in _lines(path, "aug"):
            words = line.split()
            if len(words) > 2:
                raise UserError(f"{path}: {line!r} is neither an id nor the two paths of an image and its labels")
            if len(words) == 2:
                pairs.append((words[0].lstrip("/"), words[1].lstrip("/")))
            else:
                folder = "SegmentationClassAug" if f"{line}.png" in more else "SegmentationClass"
                pairs += _pairs([line], folder)
        val = self.root / _LISTS / "val.txt"
        if val.is_file():
            held_out = set(_lines(val, "val"))
            leaked = [Path(image).stem for image, _ in pairs if Path(image).stem in held_out]
            if leaked:
                raise UserError(
                    f"{path} lists {leaked[0]!r}, which is in val.txt ({len(leaked)} such ids): the augmented training "
                    "list leaves the validation frames out"
                )
        return pairs

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
        labels = read_map(path)
        if labels.dtype != np.uint8:
            raise UserError(f"{path} has {labels.dtype} labels: expected a PNG of 8 bits")
        wrong = labels[(labels >= len(_SPACE)) & (labels != IGNORE)]
        if wrong.size:
            raise UserError(f"{path} holds label {wrong.max()}: expected 0..{len(_SPACE) - 1} and 255 (void)")
        return labels


def _pairs(ids, folder: str = "SegmentationClass") -> list[tuple[str, str]]:
    """The image and label files of ids, in the data's folder."""
    return [(f"JPEGImages/{name}.jpg", f"{folder}/{name}.png") for name in ids]


def _lines(path: Path, split: str) -> list[str]:
    if not path.is_file():
        hint = "it comes apart from VOC 2012" if split == "aug" else "without lists there is the split 'all' only"
        raise FileNotFoundError(f"{path} not found: it lists the frames of split {split!r}; {hint}")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _listed(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []
