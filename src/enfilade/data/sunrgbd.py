"""SUN RGB-D (Song, Lichtenberg & Xiao 2015): 10335 indoor frames of four sensors, with depth, camera and labels.

The folder is SUNRGBD.zip as it unpacks, and for splits and official labels SUNRGBDtoolbox.zip beside it:

    SUNRGBD/SENSOR/SOURCE/.../FRAME/   SENSOR is kv1, kv2, realsense or xtion
        image/*.jpg                    colour
        depth/*.png                    depth as the sensor saw it, 16 bits
        depth_bfx/*.png                the same with its holes painted in
        intrinsics.txt                 3x3
        extrinsics/*.txt               3x4, turns the camera upright; of several the last counts
        seg.mat                        labels: `seglabel`, and the `names` of its numbers; optional
    SUNRGBDtoolbox/
        traintestSUNRGBD/allsplit.mat  the official lists of training and test frames
        Metadata/SUNRGBD2Dseg.mat      the official labels of all frames

A frame is called after its path below SUNRGBD/.

Splits: "test" is the official list of 5050 frames, "trainval" that of 5285. "val" is the last tenth of each source's
training frames (kv1/NYUdata, xtion/sun3ddata ...) and "train" what is before it: the list goes sensor by sensor, so
that the end of the whole list would be one sensor, and neighbouring frames show one scene, so that a random draw would
leak. "all" is every frame that is found, and needs no list.

Depth: the PNG holds millimetres, its bits rotated by three; what is beyond 8 m becomes 8 m, as in the toolbox. 0 is
missing.

Labels: those of SUNRGBD2Dseg.mat, or without that file those of each seg.mat. There `names` are what annotators typed;
a name is one of the 37 classes if it is spelled like it (floor_mat, fridge, tv; also shelf), capitals aside, and void
otherwise: "sofas" or "floor mat" are void. As far as published tables of both show, the official labels follow the
same rule.

Pose: the world's X is right, Y ahead and Z up, with the origin at the camera: SUN knows the tilt only, not the height.

**The 1449 frames of NYUv2 are among these (kv1/NYUdata). A model trained on SUN RGB-D must not be tested on NYUv2.**
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8, UInt16

from enfilade.camera import Camera
from enfilade.data.files import read_map, read_rgb
from enfilade.errors import UserError, unknown
from enfilade.labels import IGNORE, SPACES
from enfilade.types import Sample

SPLITS = ("train", "val", "trainval", "test", "all")
FAR = 8.0  # metres

_SPACE = SPACES["sun37"]
_ALLSPLIT = "traintestSUNRGBD/allsplit.mat"
_SEG2D = "Metadata/SUNRGBD2Dseg.mat"

# The spelling of seg37list.mat; "shelf" is the one other name that the official labels count to a class.
_SPELLED = {"refridgerator": "fridge", "television": "tv"}
_CLASSES = {_SPELLED.get(name, name).replace(" ", "_"): i for i, name in enumerate(_SPACE.names)}
_CLASSES["shelf"] = _CLASSES["shelves"]

_FROM_FILE = np.concatenate([[IGNORE], np.arange(len(_SPACE))]).astype(np.uint8)

# extrinsics/ turns camera axes (x right, y down, z ahead) into the same axes upright; this makes Z up of them.
_Z_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def cut(names: Sequence[str], split: str) -> tuple[str, ...]:
    """The "train", "val" or "trainval" part of the training frames, by the rule in this module's docstring."""
    sources: dict[str, list[str]] = {}
    for name in names:
        sources.setdefault("/".join(name.split("/")[:2]), []).append(name)
    held_out = {name for source in sources.values() for name in source[len(source) - round(len(source) / 10) :]}
    return tuple(name for name in names if split == "trainval" or (name in held_out) == (split == "val"))


def metres(stored: UInt16[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Depth in metres of the numbers in the PNG: rotated right by three bits they are millimetres (the toolbox's
    read3dPoints.m)."""
    millimetres = stored >> 3 | stored << 13
    return np.minimum(millimetres * np.float32(0.001), np.float32(FAR))


class SUNRGBD:
    """SUN RGB-D in its own layout.

    Args:
        root: the folder that holds SUNRGBD/, or SUNRGBD/ itself, or any folder of frames.
        split: "train", "val", "trainval", "test" or "all".
        inpainted: depth_bfx/ instead of depth/. Off by default: painted depth is a guess, to be learnt from or scored
            only by choice.
        splits: allsplit.mat; default: in SUNRGBDtoolbox/, in `root` or beside it.
        seg2d: SUNRGBD2Dseg.mat; default: likewise, if it is there. Its frames are in the order of allsplit.mat (test,
            then training), which it needs.

    Every file is looked for at once: FileNotFoundError names the first that is missing and how many frames are
    incomplete. All frames of a split have labels or none; of "all" some may. A frame whose files differ in size, or
    do not hold what the layout says, raises `UserError` when it is read.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        *,
        inpainted: bool = False,
        splits: str | os.PathLike | None = None,
        seg2d: str | os.PathLike | None = None,
    ):
        if split not in SPLITS:
            raise unknown("sunrgbd split", split, SPLITS)
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"sunrgbd: there is no folder {self.root}")
        self.name = f"sunrgbd/{split}"
        self.space = _SPACE
        self.ignored: tuple[int, ...] = ()
        self.score_crop: tuple[slice, slice] | None = None
        self._opened: tuple[int, Any] | None = None  # (process, file): HDF5 handles must not be shared with workers
        self._tree = self.root / "SUNRGBD" if (self.root / "SUNRGBD").is_dir() else self.root
        allsplit = self._toolbox(_ALLSPLIT, splits)
        self._seg2d = self._toolbox(_SEG2D, seg2d)
        train, test = read_splits(allsplit) if allsplit else ((), ())
        if split == "all":
            self.names = _frames(self._tree)
        elif allsplit is None:
            raise FileNotFoundError(
                f"no SUNRGBDtoolbox/{_ALLSPLIT} in {self.root} or beside it: it lists the frames of split {split!r}; "
                "unpack the toolbox there, give the file as splits, or take split 'all'"
            )
        else:
            self.names = test if split == "test" else cut(train, split)
        if not self.names:
            raise UserError(f"{self._tree}: split {split!r} has no frames: a frame is a folder with image/ in it")
        if self._seg2d is not None and allsplit is None:
            raise FileNotFoundError(
                f"no {_ALLSPLIT} for {self._seg2d}, whose frames are in its order: give it as splits"
            )
        self._count = len(test) + len(train)
        self._entries = {name: i for i, name in enumerate((*test, *train))} if self._seg2d else {}
        self._files = self._find("depth_bfx" if inpainted else "depth")
        self._demand_labels(split)

    def _toolbox(self, name: str, given: str | os.PathLike | None) -> Path | None:
        """The file given, or the toolbox's own where there is one."""
        if given is not None:
            if not os.path.isfile(given):
                raise FileNotFoundError(f"{given} not found: it should be the toolbox's {name}")
            return Path(given)
        beside = (folder / "SUNRGBDtoolbox" / name for folder in (self.root, self.root.resolve().parent))
        return next((path for path in beside if path.is_file()), None)

    def _find(self, depth: str) -> list[dict[str, Path]]:
        found, missing = [], []
        for name in self.names:
            folder = self._tree / name
            present = _listed(folder)
            files, lacking = {}, []
            for kind, inside, ending, which in (
                ("image", "image", ".jpg", 0),
                ("depth", depth, ".png", 0),
                ("extrinsics", "extrinsics", ".txt", -1),
            ):
                candidates = [file for file in _listed(folder / inside) if file.lower().endswith(ending)]
                if candidates:
                    files[kind] = folder / inside / candidates[which]
                else:
                    lacking.append(folder / inside / f"*{ending}")
            files["intrinsics"] = folder / "intrinsics.txt"
            if "intrinsics.txt" not in present:
                lacking.append(files["intrinsics"])
            if "seg.mat" in present:
                files["seg"] = folder / "seg.mat"
            if lacking:
                missing.append(lacking[0])
            found.append(files)
        if missing:
            raise FileNotFoundError(
                f"{missing[0]} not found ({len(missing)} of the {len(found)} frames of {self.name} are incomplete): "
                "unpack SUNRGBD.zip again"
            )
        return found

    def _demand_labels(self, split: str):
        without = [
            i for i, files in enumerate(self._files) if "seg" not in files and self.names[i] not in self._entries
        ]
        if split != "all" and 0 < len(without) < len(self.names):
            raise FileNotFoundError(
                f"{self._tree / self.names[without[0]] / 'seg.mat'} not found ({len(without)} of the "
                f"{len(self.names)} frames of {self.name} have no labels): unpack SUNRGBD.zip again, or add the "
                f"toolbox's {_SEG2D}"
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        files = self._files[index]
        image = read_rgb(files["image"])
        height, width = image.shape[:2]
        depth, labels = read_map(files["depth"]), self._read_labels(index)
        if depth.dtype != np.uint16:
            raise UserError(f"{files['depth']} has {depth.dtype} depth: expected a PNG of 16 bits")
        for path, array in ((files["depth"], depth), (self._labels_file(index), labels)):
            if array is not None and array.shape != (height, width):
                raise UserError(
                    f"{path} is {array.shape[1]}x{array.shape[0]} at frame {self.names[index]}, but "
                    f"{files['image'].name} {width}x{height}: the files of one frame have one size"
                )
        return Sample(
            image=image,
            name=self.names[index],
            labels=labels,
            depth=metres(depth),
            camera=Camera(*_intrinsics(files["intrinsics"]), width, height, _pose(files["extrinsics"])),
        )

    def labels(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """The labels alone, 255 where void; the image is not read. A frame without labels raises `UserError`."""
        labels = self._read_labels(index)
        if labels is None:
            raise UserError(
                f"{self._tree / self.names[index]} has no labels: neither seg.mat nor the toolbox's {_SEG2D}"
            )
        return labels

    def _labels_file(self, index: int) -> Path | None:
        return self._seg2d if self.names[index] in self._entries else self._files[index].get("seg")

    def _read_labels(self, index: int) -> UInt8[np.ndarray, "h w"] | None:
        if self.names[index] in self._entries:
            return self._official(index)
        path = self._files[index].get("seg")
        return None if path is None else read_seg(path)

    def _official(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """A frame of SUNRGBD2Dseg.mat. MATLAB 7.3 is HDF5 with its axes reversed; a struct array keeps a column of
        references for each field."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open_seg2d(self._seg2d, self._count))
        file = self._opened[1]
        try:
            stored = file[file["SUNRGBD2Dseg/seglabel"][self._entries[self.names[index]], 0]][...].T
        except (OSError, ValueError, KeyError) as error:  # HDF5 finds damage in the data itself only now
            raise UserError(
                f"{self._seg2d} cannot be read at frame {self.names[index]} ({error}): it is damaged, fetch it again"
            ) from error
        if stored.ndim != 2 or not ((stored >= 0) & (stored <= len(_SPACE))).all():
            raise UserError(
                f"{self._seg2d} should hold a map of 0 (void) and 1..{len(_SPACE)} at frame {self.names[index]}, not "
                f"{_described(stored)}"
            )
        return np.ascontiguousarray(_FROM_FILE[stored.astype(np.uint8)])


# --- what lies in the folder ------------------------------------------------------------------------------------------


def _listed(folder: Path) -> list[str]:
    """The names in a folder, sorted, without the leftovers of file systems; none where there is no such folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _frames(tree: Path) -> tuple[str, ...]:
    """Every folder below `tree` that holds an image/, by its path. Nothing is looked for inside a frame."""
    found = []
    for folder, inside, _ in os.walk(tree):
        if "image" in inside and Path(folder) != tree:
            found.append(Path(folder).relative_to(tree).as_posix())
            inside.clear()
        inside.sort()
    return tuple(found)


def read_splits(path: str | os.PathLike) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The frames of training and test in the official allsplit.mat, in its order. (Its own division of the training
    frames, `trainvalsplit`, halves them, and is not used.)"""
    import scipy.io

    try:
        content = scipy.io.loadmat(path, variable_names=["alltrain", "alltest"], squeeze_me=True)
        train, test = (
            tuple(_below_sunrgbd(str(frame)) for frame in np.atleast_1d(content[key]))
            for key in ("alltrain", "alltest")
        )
    except Exception as error:  # scipy raises many kinds on a damaged file
        raise UserError(f"{path} is no readable allsplit.mat ({error!r})") from error
    return train, test


def _below_sunrgbd(path: str) -> str:
    """The frame at a path of the authors' machine; some of them end in a slash."""
    return "/".join(part for part in path.rpartition("SUNRGBD/")[2].split("/") if part)


# --- one file each ----------------------------------------------------------------------------------------------------


def read_seg(path: str | os.PathLike) -> UInt8[np.ndarray, "h w"]:
    """The labels of a frame's seg.mat, 255 where the name is none of the 37."""
    import scipy.io

    try:
        content = scipy.io.loadmat(path, variable_names=["names", "seglabel"])
        # A row of names in some sensors' files and a column in others', each name a cell.
        names = [str(np.squeeze(cell)) for cell in content["names"].reshape(-1)]
        stored = content["seglabel"].astype(np.int64)
    except Exception as error:  # scipy raises many kinds on a damaged file
        raise UserError(f"{path} is no readable seg.mat ({error!r})") from error
    if stored.ndim != 2 or not ((stored >= 0) & (stored <= len(names))).all():
        raise UserError(
            f"{path} should hold a map of 0 (void) and 1..{len(names)}, one for each name, not {_described(stored)}"
        )
    table = [IGNORE, *(_CLASSES.get(name.strip().lower(), IGNORE) for name in names)]
    return np.array(table, np.uint8)[stored]


def _described(stored: np.ndarray) -> str:
    return f"{stored.min():g}..{stored.max():g} in {stored.ndim} dimensions" if stored.size else "nothing"


def _open_seg2d(path: str | os.PathLike | None, count: int) -> Any:
    import h5py

    try:
        file: Any = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is truncated or no MATLAB 7.3 file ({error}): fetch it again") from error
    if "SUNRGBD2Dseg/seglabel" not in file or file["SUNRGBD2Dseg/seglabel"].shape != (count, 1):
        file.close()
        raise UserError(
            f"{path} lacks SUNRGBD2Dseg.seglabel for the {count} frames of allsplit.mat: is it SUNRGBD2Dseg.mat?"
        )
    return file


def _numbers(path: Path, rows: int, columns: int) -> Float[np.ndarray, "_ _"]:
    try:
        values = np.array(path.read_text().split(), np.float64)
    except ValueError as error:
        raise UserError(f"{path} holds something that is no number ({error})") from error
    if values.size != rows * columns:
        raise UserError(f"{path} holds {values.size} numbers: expected a {rows}x{columns} matrix")
    return values.reshape(rows, columns)


def _intrinsics(path: Path) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy. (The toolbox's MATLAB code puts them to pixels counted from 1, which may be a pixel too many;
    those of kv1/NYUdata are NYUv2's, less the border that was cut off, and count from 0.)"""
    matrix = _numbers(path, 3, 3)
    fx, fy, cx, cy = (float(v) for v in matrix[[0, 1, 0, 1], [0, 1, 2, 2]])
    rest = np.abs(matrix[[0, 1, 2, 2, 2], [1, 0, 0, 1, 2]] - [0, 0, 0, 0, 1]).max()
    if not (np.isfinite(matrix).all() and fx > 0 and fy > 0 and rest < 1e-6):
        raise UserError(f"{path}: expected the rows fx 0 cx, 0 fy cy, 0 0 1, with positive focal lengths")
    return fx, fy, cx, cy


def _pose(path: Path) -> Float[np.ndarray, "4 4"]:
    """Camera-to-world. Like the toolbox this leaves out the fourth column of the file."""
    tilt = _numbers(path, 3, 4)[:, :3]
    # The files carry six digits; a hundredth catches what is scaled, mirrored or not finite.
    if not (np.abs(tilt @ tilt.T - np.eye(3)).max() < 0.01 and np.linalg.det(tilt) > 0):
        raise UserError(f"{path}: the first three columns are no rotation")
    pose = np.eye(4)
    pose[:3, :3] = _Z_UP @ tilt
    return pose
