"""Your own RGB-D frames: a folder of images, with whatever there is of depth, labels, poses and intrinsics.

Two layouts are recognised::

    7-Scenes                          folders
    frame-000000.color.jpg (png)      rgb/ (or color/, colour/, image/, images/)   jpg, png, bmp, webp
    frame-000000.depth.png            depth/                  png, npy or tiff; optional
    frame-000000.pose.txt             poses/ (or pose/)       txt; optional
                                      labels/ (or label/)     png; optional
    camera-intrinsics.txt             camera-intrinsics.txt, intrinsics.txt or camera.json; optional

Files of one frame have one stem. A kind that is there at all must be there for every frame.

Depth: whole numbers are millimetres, floats metres; `depth_unit` says otherwise. 0, the largest 16-bit number (65535),
NaN and infinity are missing. Depth that is smaller or larger than the colour image, with the same proportions, is
resized to it (nearest pixel); it must already be seen from the colour camera.

Intrinsics: a text file with the 3x3 matrix or with "fx fy cx cy", or JSON {"fx": ., "fy": ., "cx": ., "cy": .} with
optional "width" and "height" of the image they belong to (default: the colour image as it is). Without intrinsics
samples have no camera. Poses are camera-to-world 4x4 matrices; one that is not finite (a tracker that lost its way)
gives a camera without a pose.
"""

import difflib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from enfilade import labels
from enfilade.camera import Camera
from enfilade.data.files import read_map, read_rgb
from enfilade.errors import UserError
from enfilade.labels import IGNORE
from enfilade.types import Sample

SPLITS = ("all", "train", "val", "test")
UNITS = {"m": 1.0, "mm": 0.001}

_COLOUR_FOLDERS = ("rgb", "color", "colour", "image", "images")
_FOLDERS = {"depth": ("depth",), "pose": ("poses", "pose"), "label": ("labels", "label")}
_ENDINGS = {
    "colour": (".jpg", ".jpeg", ".png", ".bmp", ".webp"),
    "depth": (".png", ".npy", ".tif", ".tiff"),
    "pose": (".txt",),
    "label": (".png",),
}
_INTRINSICS = ("camera-intrinsics.txt", "intrinsics.txt", "camera.json")


class Frames:
    """A folder of RGB-D frames.

    Args:
        root: a folder in one of the layouts above.
        split: "all", or "train", "val" or "test": the stems in train.txt and so on. Without these files "val" is the
            last 18 % of the frames and "train" the rest (a scan's neighbours look alike: no random draw).
        depth_unit: "mm", "m", or metres per stored unit (TUM RGB-D: 1 / 5000). Default: see above.
        space: the label space of labels/.
        label_offset: what the files add to the labels: 1 if 0 is void and classes count from 1. With 0 (default),
            255 is void.

    Raises FileNotFoundError, naming the file, for what is missing; `UserError` for what does not fit.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "all",
        *,
        depth_unit: str | float | None = None,
        space: str = "nyu40",
        label_offset: int = 0,
    ):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root}")
        self._metres_per_unit = _metres_per_unit(depth_unit)
        self.space = labels.get(space)
        self._labels = np.full(256, IGNORE, np.uint8)
        self._labels[label_offset : label_offset + len(self.space)] = np.arange(len(self.space))
        self._void = 0 if label_offset else IGNORE
        files = _seven_scenes(self.root) or _folders(self.root)
        self.names = self._split(sorted(files["colour"], key=_natural), split)
        self._files = self._complete(files)
        self._intrinsics = _intrinsics(self.root)
        self.name = f"{self.root.resolve().name}/{split}"
        self.ignored: tuple[int, ...] = ()
        self.score_crop: tuple[slice, slice] | None = None

    def _split(self, stems: list[str], split: str) -> tuple[str, ...]:
        if split not in SPLITS:
            close = difflib.get_close_matches(split, SPLITS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(SPLITS)}"
            raise UserError(f"{self.root}: no split {split!r}: {hint}")
        listed = self.root / f"{split}.txt"
        if split == "all":
            chosen = stems
        elif listed.is_file():
            chosen = listed.read_text().split()
            if unknown := sorted(set(chosen) - set(stems)):
                raise FileNotFoundError(f"{listed} lists {unknown[0]!r}, which has no image ({len(unknown)} such ids)")
        elif split == "test" or any((self.root / f"{other}.txt").is_file() for other in SPLITS[1:]):
            raise FileNotFoundError(f"{listed} not found: it lists the frames of split {split!r}, one stem a line")
        else:
            cut = len(stems) - max(1, round(0.18 * len(stems)))
            chosen = stems[:cut] if split == "train" else stems[cut:]
        if not chosen:
            raise UserError(f"{self.root}: split {split!r} has no frames")
        return tuple(chosen)

    def _complete(self, files: dict[str, dict[str, Path]]) -> list[dict[str, Path]]:
        for kind, of in files.items():
            missing = [name for name in self.names if name not in of]
            if missing and of:
                raise FileNotFoundError(
                    f"{self.root}: frame {missing[0]!r} has no {kind} file ({len(missing)} of {len(self.names)} frames "
                    f"lack one): add them, or take the {kind} files away altogether"
                )
        return [{kind: of[name] for kind, of in files.items() if of} for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        files = self._files[index]
        image = read_rgb(files["colour"])
        height, width = image.shape[:2]
        camera = self._camera(width, height)
        if camera is not None and "pose" in files:
            camera = replace(camera, pose=_pose(files["pose"]))
        return Sample(
            image=image,
            name=self.names[index],
            labels=self._read_labels(files["label"], width, height) if "label" in files else None,
            depth=self._read_depth(files["depth"], width, height) if "depth" in files else None,
            camera=camera,
        )

    def _camera(self, width: int, height: int) -> Camera | None:
        if self._intrinsics is None:
            return None
        fx, fy, cx, cy, own_width, own_height = self._intrinsics
        camera = Camera(fx, fy, cx, cy, own_width or width, own_height or height)
        return camera if (camera.width, camera.height) == (width, height) else camera.resized(width, height)

    def _read_labels(self, path: Path, width: int, height: int) -> UInt8[np.ndarray, "h w"]:
        stored = read_map(path)
        if stored.shape != (height, width):
            raise UserError(f"{path} is {stored.shape[1]}x{stored.shape[0]}, but its colour image {width}x{height}")
        if stored.dtype != np.uint8:
            raise UserError(f"{path} has {stored.dtype} labels: expected a PNG of 8 bits")
        result = self._labels[stored]
        wrong = (result == IGNORE) & (stored != IGNORE) & (stored != self._void)
        if wrong.any():
            raise UserError(
                f"{path} holds label {stored[wrong].max()}, which is none of the {len(self.space)} of {self.space.name}"
            )
        return result

    def _read_depth(self, path: Path, width: int, height: int) -> Float32[np.ndarray, "h w"]:
        depth = _metres(path, self._metres_per_unit)
        if depth.shape == (height, width):
            return depth
        if abs(depth.shape[1] * height / (depth.shape[0] * width) - 1) > 0.02:
            raise UserError(
                f"{path} is {depth.shape[1]}x{depth.shape[0]} and its colour image {width}x{height}: other proportions "
                "mean another camera; register depth to the colour image first"
            )
        return cv2.resize(depth, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


# --- what lies in the folder ------------------------------------------------------------------------------------------


def _natural(stem: str) -> list:
    """Sort key: frame 2 before frame 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", stem) if part]


def _seven_scenes(root: Path) -> dict[str, dict[str, Path]] | None:
    """Files by kind and stem, or None if there is no `*.color.*` file."""
    files = {"colour": {}, "depth": {}, "pose": {}}
    for path in sorted(root.iterdir()):
        stem, _, kind = path.stem.rpartition(".")
        kind = {"color": "colour"}.get(kind, kind)
        if stem and kind in files and path.suffix.lower() in _ENDINGS[kind]:
            _put(files[kind], stem, path)
    return files if files["colour"] else None


def _folders(root: Path) -> dict[str, dict[str, Path]]:
    colour = next((root / name for name in _COLOUR_FOLDERS if (root / name).is_dir()), None)
    if colour is None:
        raise FileNotFoundError(
            f"{root} holds neither a folder of images ({', '.join(f'{name}/' for name in _COLOUR_FOLDERS)}) "
            "nor files like frame-000000.color.png"
        )
    files = {"colour": _stems(colour, "colour")}
    if not files["colour"]:
        raise FileNotFoundError(f"{colour} holds no images ({', '.join(_ENDINGS['colour'])})")
    for kind, names in _FOLDERS.items():
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is not None:
            files[kind] = _stems(folder, kind)
            if not files[kind]:
                raise FileNotFoundError(f"{folder} holds no {kind} files ({', '.join(_ENDINGS[kind])})")
    return files


def _stems(folder: Path, kind: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _ENDINGS[kind] and not path.name.startswith("."):
            _put(found, path.stem, path)
    return found


def _put(found: dict[str, Path], stem: str, path: Path):
    if stem in found:
        raise UserError(f"{found[stem]} and {path.name} are one frame twice: keep one of them")
    found[stem] = path


# --- one file each ----------------------------------------------------------------------------------------------------


def _metres_per_unit(unit: str | float | None) -> float | None:
    if unit is None:
        return None
    try:
        scale = UNITS[unit] if unit in UNITS else float(unit)
    except ValueError:
        scale = 0.0
    if not 0 < scale < np.inf:
        raise UserError(f"depth_unit {unit!r} is not 'mm', 'm' or a positive number (metres per stored unit)")
    return scale


def _metres(path: Path, metres_per_unit: float | None) -> Float32[np.ndarray, "h w"]:
    if path.suffix.lower() == ".npy":
        try:
            stored = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no readable NumPy array ({error})") from error
        if stored.ndim != 2:
            raise UserError(f"{path} has shape {stored.shape}: a depth image has two dimensions")
    else:
        stored = read_map(path)
    if stored.dtype.kind == "f":
        metres = np.nan_to_num(stored.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        metres = np.maximum(metres, 0) * np.float32(metres_per_unit or UNITS["m"])
    elif stored.dtype == np.uint8 and metres_per_unit is None:
        raise UserError(f"{path} has 8 bits, too few for millimetres: say by depth_unit how many metres a step is")
    elif stored.dtype.kind in "iu":
        missing = (stored <= 0) | (stored == 65535)
        metres = np.where(missing, 0, stored).astype(np.float32) * np.float32(metres_per_unit or UNITS["mm"])
    else:
        raise UserError(f"{path} has {stored.dtype} depth: expected whole numbers or floats")
    return metres


def _numbers(path: Path) -> np.ndarray:
    try:
        return np.array(path.read_text().replace(",", " ").split(), np.float64)
    except ValueError as error:
        raise UserError(f"{path} holds something that is no number ({error})") from error


def _pose(path: Path) -> Float[np.ndarray, "4 4"] | None:
    values = _numbers(path)
    if values.size != 16:
        raise UserError(f"{path} holds {values.size} numbers: a pose is a 4x4 matrix")
    pose = values.reshape(4, 4)
    if not np.isfinite(pose).all():
        return None
    # Files carry a handful of digits, and some trackers drift: a hundredth catches scaled and transposed matrices.
    rotation = pose[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 0.01 or np.linalg.det(rotation) < 0:
        raise UserError(f"{path}: the 3x3 part is no rotation; expected camera-to-world, rows first, in metres")
    if np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise UserError(f"{path}: the last row is {pose[3].tolist()}, not 0 0 0 1; is the matrix transposed?")
    return pose


def _intrinsics(root: Path) -> tuple[float, float, float, float, int | None, int | None] | None:
    """fx, fy, cx, cy and the image size they belong to, where known."""
    path = next((root / name for name in _INTRINSICS if (root / name).is_file()), None)
    if path is None:
        return None
    width = height = None
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text())
            values = np.array([content[key] for key in ("fx", "fy", "cx", "cy")], np.float64)
            if "width" in content or "height" in content:
                width, height = int(content["width"]), int(content["height"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: expected JSON with numbers fx, fy, cx and cy ({error!r})") from error
    else:
        values = _numbers(path)
        if values.size == 9:
            matrix = values.reshape(3, 3)
            if np.abs(matrix[[0, 1, 2, 2, 2], [1, 0, 0, 1, 2]] - [0, 0, 0, 0, 1]).max() > 1e-6:
                raise UserError(f"{path}: expected the rows fx 0 cx, 0 fy cy, 0 0 1")
            values = matrix[[0, 1, 0, 1], [0, 1, 2, 2]]
        elif values.size != 4:
            raise UserError(f"{path} holds {values.size} numbers: expected a 3x3 matrix or fx fy cx cy")
    fx, fy, cx, cy = (float(v) for v in values)
    if not (np.isfinite(values).all() and fx > 0 and fy > 0):
        raise UserError(f"{path}: focal lengths must be positive, not {fx:g} and {fy:g}")
    return fx, fy, cx, cy, width, height
