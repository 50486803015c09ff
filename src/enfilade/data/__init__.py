"""Readers: everything on disk becomes a `Sample` here, and only here.

A reader is a sequence of samples that also knows what its labels mean. It holds no torch state and can be shared with
the workers of a loader. All borders are converted inside `__getitem__`: RGB float in [0, 1], depth in metres with 0 for
missing, labels 0..C-1 with 255 ignored, a `Camera` in pixels of that image. Augmentation is not a reader's business
(`data.transforms`).

    reader = open_dataset("nyuv2", "folder", split="val")
    sample = reader[0]
"""

import importlib
import os
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from enfilade.errors import UserError, unknown
from enfilade.labels import LabelSpace

if TYPE_CHECKING:
    from enfilade.types import Sample

READERS = {
    "nyuv2": "enfilade.data.nyuv2:NYUv2",
    "folder": "enfilade.data.folder:Folder",
    "frames": "enfilade.data.frames:Frames",
    "rooms": "enfilade.data.rooms:Rooms",
    "room-files": "enfilade.data.room_files:RoomFiles",
    "camvid": "enfilade.data.camvid:CamVid",
    "sunrgbd": "enfilade.data.sunrgbd:SUNRGBD",
    "voc2012": "enfilade.data.voc2012:VOC2012",
    "ssc": "enfilade.data.ssc:SSC",
}

# The first seed and the usual number of rooms of each split. Each draws from its own million of seeds, so that no room
# is in two of them.
ROOM_SEEDS = {"train": (0, 1000), "val": (1_000_000, 100), "test": (2_000_000, 100)}


@runtime_checkable
class Reader(Protocol):
    """What training, scoring and inspection ask of a data set.

    Attributes:
        name: the data set and its split, for reports ("nyuv2/val").
        space: what the labels mean.
        names: one id per sample, in order; also `Sample.name`.
        ignored: classes that are never scored or trained, because the data cannot tell them from void. Their pixels
            are already 255 in the samples; a table of scores leaves them out and says so.
        score_crop: the (rows, columns) on which this data set is usually scored, or None for the whole image.
    """

    name: str
    space: LabelSpace
    names: tuple[str, ...]
    ignored: tuple[int, ...]
    score_crop: tuple[slice, slice] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> "Sample": ...


def open_dataset(name: str, root: str | os.PathLike | None = None, split: str = "train", **options: Any) -> Reader:
    """The reader called `name` (a key of `READERS`) of the data in `root`.

    `root` is the folder, or for nyuv2 also the official .mat file; rooms are rendered and take none. `options` go to
    the reader. Rooms take `length` (default 1000 for train, 100 for val and test) and `seed`, which moves all splits.

    Raises `UserError` for an unknown name, split or option value, FileNotFoundError for missing files.
    """
    if name not in READERS:
        raise unknown("data set", name, READERS)
    target = READERS[name]
    if name == "rooms":
        if root is not None:
            raise UserError(f"rooms are rendered as they are needed and take no folder, not {os.fspath(root)!r}")
        if split not in ROOM_SEEDS:
            raise UserError(f"rooms have no split {split!r}: choose one of {', '.join(ROOM_SEEDS)}")
        first, length = ROOM_SEEDS[split]
        options = {"length": length, **options, "seed": first + options.get("seed", 0)}
    else:
        if root is None:
            raise UserError(f"{name} needs the folder of its data: give it as root")
        if name == "nyuv2" and os.fspath(root).endswith(".mat"):
            target = "enfilade.data.nyuv2:NYUv2Mat"
        options = {"root": root, "split": split, **options}
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)(**options)
