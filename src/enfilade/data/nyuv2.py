"""NYUv2 (Silberman et al. 2012): 1449 indoor frames, 640x480, with depth and labels.

Two readers with one result: `NYUv2` reads a folder of images (written by `data.prepare`, or handed out as such),
`NYUv2Mat` reads the official `nyu_depth_v2_labeled.mat`.

The folder:

    rgb/NNNN.jpg (or .png)   NNNN is the official 1-based index
    depth/NNNN.png           16 bits: millimetres, 0 is missing; 8 bits: metres = (v + 0.5) / 25.5
    label40/NNNN.png         0 is void, 1..40 are the classes of nyu40
    hha/NNNN.png             optional: red disparity, green height, blue angle
    train.txt [val.txt] [test.txt]   one id per line
    dataset.json             optional: {"void": "exact"} if void and class 40 are told apart in all splits

Splits: "test" is test.txt, "trainval" all training frames. Without a val.txt, "val" is the end of train.txt and
"train" what is before it: the last 145 of the official 795, the last 18 % of any other number. Neighbouring frames
show one scene, so a cut through the middle of the list separates scenes and a random draw would not.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8, UInt16

from enfilade.camera import Camera
from enfilade.data.files import demand_size, read_map, read_rgb
from enfilade.errors import UserError, unknown
from enfilade.labels import IGNORE, SPACES, nyu894_to_40
from enfilade.types import Sample

SPLITS = ("train", "val", "trainval", "test")

# The calibration in the data set's toolbox was made with RGBDemo, that is OpenCV, whose pixels count from 0 at the
# centre of the first pixel like ours. (The toolbox's MATLAB code puts the same numbers to pixels counted from 1; the
# difference is one pixel, 0.1 degrees.)
CAMERA = Camera(518.8579, 519.4696, 325.5824, 253.7362, 640, 480)

# The frames keep a white border from undistortion; the field scores inside it.
SCORE_CROP = (slice(45, 471), slice(41, 601))

_OTHERPROP = SPACES["nyu40"].index("otherprop")


def split_ids(ids: Sequence[str], split: str, val: Sequence[str] | None = None) -> tuple[str, ...]:
    """The "train", "val" or "trainval" part of the training ids, by the rule in this module's docstring."""
    if val is None:
        held_out = 145 if len(ids) == 795 else max(1, round(0.18 * len(ids)))
        cut = len(ids) - held_out
        ids, val = ids[:cut], ids[cut:]
    return tuple({"train": [*ids], "val": [*val], "trainval": [*ids, *val]}[split])


def _check_split(split: str):
    if split not in SPLITS:
        raise unknown("nyuv2 split", split, SPLITS)


class NYUv2:
    """A folder of NYUv2 frames.

    Args:
        root: the folder described above.
        split: "train", "val", "trainval" or "test".
        hha: also read hha/.
        ignored: classes turned to 255. Default: none if dataset.json says `"void": "exact"` and for "test"; else
            otherprop (39), which such training files do not tell from void.

    Every file is looked for at once: FileNotFoundError names the first that is missing and how many are. A sample whose
    files differ in size or hold labels above 40 raises `UserError` when it is read.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "train", *, hha: bool = False, ignored: Sequence[int] | None = None
    ):
        _check_split(split)
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"nyuv2: there is no folder {self.root}")
        self.name = f"nyuv2/{split}"
        self.space = SPACES["nyu40"]
        self.names = self._ids(split)
        if not self.names:
            raise UserError(f"{self.root}: split {split!r} lists no frames")
        if ignored is None:
            ignored = () if split == "test" or self._void_is_exact() else (_OTHERPROP,)
        self.ignored = tuple(ignored)
        self._labels = np.concatenate([[IGNORE], np.arange(40), np.full(215, IGNORE)]).astype(np.uint8)
        for label in self.ignored:
            if not 0 <= label < 40:
                raise UserError(f"ignored label {label} is not in 0..39")
            self._labels[label + 1] = IGNORE
        self._files = self._find(("rgb", "depth", "label40", "hha") if hha else ("rgb", "depth", "label40"))
        self.score_crop = SCORE_CROP if self._full_size() else None

    def _ids(self, split: str) -> tuple[str, ...]:
        if split == "test":
            return tuple(self._list("test.txt"))
        val = self._list("val.txt") if (self.root / "val.txt").is_file() else None
        return split_ids(self._list("train.txt"), split, val)

    def _list(self, name: str) -> list[str]:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: it lists the ids of the split, one a line; an interrupted "
                "'enfilade data prepare nyuv2' writes it when run again"
            )
        return path.read_text().split()

    def _void_is_exact(self) -> bool:
        path = self.root / "dataset.json"
        if not path.is_file():
            return False
        try:
            return json.loads(path.read_text())["void"] == "exact"
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}: expected JSON with a "void" field ({error!r})') from error

    def _find(self, kinds: tuple[str, ...]) -> list[dict[str, Path]]:
        """The files of each id. Folders are listed once: asking for each file alone is slow on network drives."""
        present = {kind: set(os.listdir(self.root / kind) if (self.root / kind).is_dir() else ()) for kind in kinds}
        found, missing = [], []
        for name in self.names:
            files = {}
            for kind in kinds:
                file = f"{name}.png" if kind != "rgb" or f"{name}.png" in present["rgb"] else f"{name}.jpg"
                files[kind] = self.root / kind / file
                if file not in present[kind]:
                    missing.append(files[kind])
            found.append(files)
        if missing:
            raise FileNotFoundError(
                f"{missing[0]} not found ({len(missing)} of the {len(kinds) * len(found)} files of {self.name} are "
                "missing): complete the folder, or take the id out of the list"
            )
        return found

    def _full_size(self) -> bool:
        from PIL import Image

        try:
            with Image.open(self._files[0]["rgb"]) as image:
                return image.size == (CAMERA.width, CAMERA.height)
        except OSError:
            return True  # reported, with its name, when the sample is read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        files = self._files[index]
        image = read_rgb(files["rgb"])
        depth = read_map(files["depth"])
        labels = read_map(files["label40"])
        hha = read_rgb(files["hha"]) if "hha" in files else None
        height, width = image.shape[:2]
        for kind, array in (("depth", depth), ("label40", labels), ("hha", hha)):
            if array is not None:
                demand_size(array, files[kind], image, files["rgb"])
        if labels.dtype != np.uint8 or labels.max() > 40:
            raise UserError(f"{files['label40']} holds label {labels.max()}: expected 8 bits, 0 (void) and 1..40")
        return Sample(
            image=image,
            name=self.names[index],
            labels=self._labels[labels],
            depth=_metres(depth, files["depth"]),
            camera=CAMERA if (width, height) == (CAMERA.width, CAMERA.height) else CAMERA.resized(width, height),
            hha=hha,
        )


# 8 bits span 10 m. A depth of 2 cm is below any sensor's range: 0 is taken for missing, as with 16 bits.
_METRES_8 = ((np.arange(256) + 0.5) / 25.5).astype(np.float32)
_METRES_8[0] = 0


def _metres(depth: np.ndarray, path: Path) -> Float32[np.ndarray, "h w"]:
    if depth.dtype == np.uint8:
        return _METRES_8[depth]
    if depth.dtype == np.uint16:
        return depth * np.float32(0.001)
    raise UserError(f"{path} has {depth.dtype} depth: expected a PNG of 8 or 16 bits")


# --- the official .mat ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MatFrame:
    """One frame of the official file, with the axes put right."""

    index: int  # 1-based, as in splits.mat
    image: UInt8[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"]  # metres; in-painted, or with raw=True as the sensor saw it, 0 where missing
    labels: UInt16[np.ndarray, "h w"]  # 0 is unlabelled, 1..894
    instances: UInt8[np.ndarray, "h w"]  # counts the objects of one label


def open_mat(path: str | os.PathLike) -> Any:
    """The official file as an open `h5py.File`, checked; it is MATLAB 7.3, which is HDF5 with its axes reversed."""
    import h5py

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found: it is the labelled data set of NYUv2, nyu_depth_v2_labeled.mat")
    try:
        file: Any = h5py.File(path, "r")
    except OSError as error:
        raise UserError(
            f"{path} is truncated or no MATLAB 7.3 file ({error}): compare its size with the original, fetch it again"
        ) from error
    shapes = {}
    for key in ("images", "depths", "rawDepths", "labels", "instances"):
        if key not in file:
            file.close()
            raise UserError(f"{path} lacks the variable {key!r}: is it nyu_depth_v2_labeled.mat?")
        shape = file[key].shape
        shapes[key] = (shape[0], *shape[2:]) if key == "images" else shape
    if len(set(shapes.values())) != 1:
        file.close()
        raise UserError(f"{path}: the variables differ in size: {shapes}")
    return file


def _read_frame(file: Any, path, index: int, raw: bool) -> MatFrame:
    def upright(key):
        return np.ascontiguousarray(file[key][index - 1].T)

    try:
        return MatFrame(
            index=index,
            image=upright("images"),
            depth=upright("rawDepths" if raw else "depths").astype(np.float32),
            labels=upright("labels").astype(np.uint16),
            instances=upright("instances").astype(np.uint8),
        )
    except OSError as error:  # HDF5 finds damage in the data itself only now
        raise UserError(f"{path} cannot be read at frame {index} ({error}): it is damaged, fetch it again") from error


def read_mat(path: str | os.PathLike, indices: Sequence[int] | None = None, *, raw: bool = False) -> Iterator[MatFrame]:
    """The frames of the official file, one at a time; `indices` (1-based) chooses some, `raw` the sensor's depth."""
    with open_mat(path) as file:
        for index in range(1, len(file["images"]) + 1) if indices is None else indices:
            yield _read_frame(file, path, index, raw)


def read_splits(path: str | os.PathLike, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The 1-based indices (training, test) of the official splits.mat, for a file of `count` frames."""
    import scipy.io

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found: it is the official list of training and test frames")
    try:
        content = scipy.io.loadmat(path)
        train, test = (tuple(int(i) for i in content[key].reshape(-1)) for key in ("trainNdxs", "testNdxs"))
    except Exception as error:  # scipy raises many kinds on a damaged file
        raise UserError(f"{path} is no readable splits.mat ({error!r})") from error
    if not train or not all(1 <= i <= count for i in (*train, *test)):
        raise UserError(f"{path} does not fit a file of {count} frames")
    return train, test


class NYUv2Mat:
    """The official .mat, read directly; the same splits and samples as `NYUv2`, with exact void and depth.

    Args:
        root: nyu_depth_v2_labeled.mat.
        split: "train", "val", "trainval" or "test".
        splits: splits.mat; default: beside the .mat.
        mapping: classMapping40.mat; default: beside the .mat.
        raw: the sensor's depth with its holes instead of the in-painted one.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        *,
        splits: str | os.PathLike | None = None,
        mapping: str | os.PathLike | None = None,
        raw: bool = False,
    ):
        _check_split(split)
        self.root = Path(root)
        self.raw = raw
        self._opened: tuple[int, Any] | None = (
            None  # (process, file): HDF5 handles must not be shared with a loader's workers
        )
        train, test = read_splits(splits or self.root.with_name("splits.mat"), len(self._file()["images"]))
        ids = [f"{i:04d}" for i in (test if split == "test" else train)]
        self._to40 = nyu894_to_40(mapping or self.root.with_name("classMapping40.mat"))
        self.name = f"nyuv2/{split}"
        self.space = SPACES["nyu40"]
        self.names = tuple(ids) if split == "test" else split_ids(ids, split)
        self.ignored: tuple[int, ...] = ()
        self.score_crop = SCORE_CROP if self._file()["depths"].shape[1:] == (640, 480) else None

    def _file(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), open_mat(self.root))
        return self._opened[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        frame = _read_frame(self._file(), self.root, int(name), self.raw)
        height, width = frame.depth.shape
        if frame.labels.max() > 894:
            raise UserError(f"{self.root}: frame {name} holds label {frame.labels.max()}, beyond the 894 of NYUv2")
        return Sample(
            image=np.multiply(frame.image, np.float32(1 / 255), dtype=np.float32),
            name=name,
            labels=self._to40[frame.labels],
            depth=frame.depth,
            camera=CAMERA if (width, height) == (CAMERA.width, CAMERA.height) else CAMERA.resized(width, height),
        )
