"""The files of semantic scene completion: SSCNet's frames of NYU and NYUCAD, and the arrays that networks take.

* Song et al.: Semantic scene completion from a single depth image, CVPR 2017 (SSCNet: the files)
* Guo, Zou, Hoiem: Predicting complete 3D models of indoor scenes, 2015 (the volumes)
* Firman et al.: Structured prediction of unobserved voxels from a single depth image, CVPR 2016 (NYUCAD: the same
  frames with depth rendered from the volumes, so that both agree)

The folder is SSCNet's `data`, or its `depthbin`::

    depthbin/
        NYUtrain/      NYU0003_0000.bin   the labelled volume and the camera's pose
                       NYU0003_0000.png   depth, 16 bits
        NYUtest/       likewise; the number is NYUv2's 1-based index
        NYUCADtrain/   the same names, with rendered depth
        NYUCADtest/

Or one folder of such frames without this tree (split "all"), where NYUCAD's depth is NYU0003_0000_cad_depth.png.

Colour is not among SSCNet's files. It is looked for beside them as NYU0003_0000_rgb, NYU0003_0000_colors or NYU0003_rgb
(.png or .jpg), or in a folder `rgb` of NYUv2's frames: 0003.png or 0003.jpg. Nor are labels of pixels: a folder
`labels` of NYUv2's label40/0003.png (0 void, 1..40) gives them; they become ssc12.

A .bin is little-endian: 3 float32, the volume's origin (world X, Y, Z in metres); 16 float32, the camera-to-world pose,
row by row; then pairs of uint32 (value, count), the runs of 240 x 144 x 240 voxels of 0.02 m in the axes of
`ops.voxels`, z fastest. Values are 0 (empty), 1..36 (SUNCG's classes) and 255 (unknown); they become ssc12 here.

A depth .png holds millimetres, their bits rotated left by three; 0 is missing.

Splits: "trainval" are the 795 training frames and "test" the 654 others; "val" is the end of the training list and
"train" what is before it, as in `data.nyuv2`. "all" is every frame.
"""

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8

from enfilade.camera import Camera
from enfilade.data.files import demand_size, read_map, read_rgb
from enfilade.data.nyuv2 import split_ids
from enfilade.errors import UserError, unknown
from enfilade.images import make_folder, write_atomic, write_png
from enfilade.labels import IGNORE, SPACES, mapping
from enfilade.types import LabelVolume, Sample

SPLITS = ("train", "val", "trainval", "test", "all")
SOURCES = {"nyu": "NYU", "nyucad": "NYUCAD"}
SHAPE, SIZE = (240, 144, 240), 0.02
COARSE = (60, 36, 60)

# SSCNet's own numbers for both data sets, which differ from NYUv2's calibration by six and fourteen pixels.
CAMERA = Camera(518.8579, 518.8579, 320.0, 240.0, 640, 480)

# ClassMapping.mat: SUNCG's 36 classes, counted from 1, in ssc12.
SUNCG36 = (
    *("ceiling", "floor", "wall", "window", "objects", "chair", "bed", "sofa", "table", "table", "furniture"),
    *("furniture", "furniture", "objects", "objects", "tvs", "table"),
    *("objects",) * 9,
    *("furniture", "furniture", "objects", "table", "furniture", "objects", "tvs", "objects", "objects", "objects"),
)

_HEADER = np.dtype([("origin", "<f4", 3), ("pose", "<f4", (4, 4))])
_ENDINGS = (".png", ".jpg", ".jpeg")


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """From stored values to ssc12 and back: to the first of several classes."""
    names = SPACES["ssc12"].names
    there = np.full(256, IGNORE, np.uint8)
    there[: 1 + len(SUNCG36)] = [0, *(names.index(name) for name in SUNCG36)]
    back = np.full(256, IGNORE, np.uint8)
    back[: len(names)] = [0, *(1 + SUNCG36.index(name) for name in names[1:])]
    return there, back


_TO_SSC12, _FROM_SSC12 = _tables()


# ---------------------------------------------------------------------------------------------------------- one file


def read_bin(path: str | os.PathLike, *, raw: bool = False) -> tuple[LabelVolume, Float[np.ndarray, "4 4"]]:
    """The volume of a .bin, ssc12 or with `raw` as stored, and the camera-to-world pose.

    Raises FileNotFoundError, and `UserError` that names the file where it is no such file, or damaged."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    body = len(data) - _HEADER.itemsize
    if body < 8 or body % 8:
        raise UserError(
            f"{path} has {len(data)} bytes, not 76 and a multiple of 8: it is cut off, or no .bin of SSCNet; "
            "fetch it again"
        )
    header = np.frombuffer(data, _HEADER, 1)[0]
    origin, pose = header["origin"].astype(np.float64), header["pose"].astype(np.float64)
    rotation = pose[:3, :3]
    if not (np.isfinite(pose).all() and np.isfinite(origin).all()) or (
        # float32 and some drift; a hundredth catches what is scaled, transposed or no header at all
        np.abs(rotation @ rotation.T - np.eye(3)).max() > 0.01 or np.abs(pose[3] - [0, 0, 0, 1]).max() > 0.01
    ):
        raise UserError(f"{path}: its header holds no camera-to-world pose; is it a .bin of SSCNet?")
    values, counts = np.frombuffer(data, "<u4", offset=_HEADER.itemsize).reshape(-1, 2).T
    total = int(counts.sum(dtype=np.uint64))
    if total != np.prod(SHAPE):
        raise UserError(
            f"{path} holds {total} voxels, expected {np.prod(SHAPE)} ({SHAPE[0]}x{SHAPE[1]}x{SHAPE[2]}): "
            "it is damaged, fetch it again"
        )
    if wrong := set(values[(values > len(SUNCG36)) & (values != IGNORE)].tolist()):
        raise UserError(f"{path} holds label {min(wrong)}: expected 0..{len(SUNCG36)} and {IGNORE}")
    table = np.arange(256, dtype=np.uint8) if raw else _TO_SSC12
    return LabelVolume(np.repeat(table[values], counts).reshape(SHAPE), origin, SIZE), pose


def write_bin(
    path: str | os.PathLike, volume: LabelVolume, pose: Float[np.ndarray, "4 4"], *, raw: bool = False
) -> None:
    """Write a .bin that `read_bin` reads back. Labels are ssc12, each stored as the first SUNCG class that maps to it,
    or with `raw` as they are. Raises `UserError` for a volume of another size or other labels."""
    if volume.labels.shape != SHAPE or volume.size != SIZE:
        raise UserError(
            f"a .bin of SSCNet holds {SHAPE[0]}x{SHAPE[1]}x{SHAPE[2]} voxels of {SIZE} m, not "
            f"{'x'.join(map(str, volume.labels.shape))} of {volume.size} m"
        )
    most = len(SUNCG36) if raw else len(SPACES["ssc12"]) - 1
    flat = volume.labels.reshape(-1)
    starts = np.concatenate([[0], 1 + np.flatnonzero(flat[1:] != flat[:-1])])
    values = flat[starts]
    if wrong := set(values[(values > most) & (values != IGNORE)].tolist()):
        raise UserError(f"a volume to be written holds label {min(wrong)}: expected 0..{most} and {IGNORE}")
    header = np.zeros(1, _HEADER)
    header["origin"], header["pose"] = volume.origin, pose
    counts = np.diff(starts, append=flat.size)
    runs = np.stack([values if raw else _FROM_SSC12[values], counts], -1).astype("<u4")
    write_atomic(path, header.tobytes() + runs.tobytes())


def read_depth(path: str | os.PathLike) -> Float32[np.ndarray, "h w"]:
    """Depth in metres of a .png of SSCNet, 0 where missing."""
    stored = read_map(path)
    if stored.dtype != np.uint16:
        raise UserError(f"{path} has {stored.dtype} depth: expected a PNG of 16 bits")
    return (stored >> 3 | stored << 13) * np.float32(0.001)


def write_depth(path: str | os.PathLike, depth: Float[np.ndarray, "h w"]) -> None:
    """Write depth in metres as SSCNet does, rounded to millimetres; what is not finite becomes 0 (missing). Raises
    `UserError` for depth that 16 bits cannot hold."""
    millimetres = np.rint(1000 * np.nan_to_num(depth.astype(np.float64), nan=0, posinf=0, neginf=0))
    if millimetres.min(initial=0) < 0 or millimetres.max(initial=0) > 65535:
        raise UserError(
            f"depth in {depth.min():g}..{depth.max():g} does not fit into a PNG of 16 bits: give metres, 0..65.535"
        )
    whole = millimetres.astype(np.uint16)
    write_png(path, whole << 3 | whole >> 13)


# ------------------------------------------------------------------------------------------------ what networks take


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A frame as completion networks take it and are scored, made beforehand; a field that a file lacks is None."""

    tsdf: Float32[np.ndarray, "_ _ _"] | None = None  # flipped; 240x144x240, in TorchSSC's files 60x36x60
    labels: UInt8[np.ndarray, "60 36 60"] | None = None  # ssc12
    weights: Bool[np.ndarray, "60 36 60"] | None = None  # where it is scored
    pixels: Int32[np.ndarray, "60 36 60"] | None = None  # the flat pixel that lies in each voxel, -1 for none


def read_npz(path: str | os.PathLike) -> Encoded:
    """A file with `tsdf` (240x144x240), and `lbl` and `weights` (60x36x60) if it has them; axes of length 1 go.

    Beware of such files made by others: where SSCNet's labels are unknown (255) theirs may be 0, so that nothing tells
    unknown from empty. Raises `UserError` that names the file where it holds something else."""
    arrays = _load_npz(path, ("tsdf",))
    return Encoded(
        tsdf=_volume(path, "tsdf", arrays["tsdf"], (SHAPE, COARSE)).astype(np.float32),
        labels=_labels(path, "lbl", arrays["lbl"]) if "lbl" in arrays else None,
        weights=_volume(path, "weights", arrays["weights"], (COARSE,)) > 0 if "weights" in arrays else None,
    )


def write_npz(path: str | os.PathLike, encoded: Encoded) -> None:
    """Write what `read_npz` reads; `pixels` has no place there. Raises `UserError` without a TSDF."""
    if encoded.tsdf is None:
        raise UserError(f"{path} cannot be written: a frame without a TSDF has no such file")
    arrays: dict[str, Any] = {"tsdf": encoded.tsdf[..., None]}
    if encoded.labels is not None:
        arrays["lbl"] = encoded.labels[..., None]
    if encoded.weights is not None:
        arrays["weights"] = encoded.weights.astype(np.uint8)
    write_atomic(path, lambda file: np.savez_compressed(file, **arrays))


def read_torchssc(root: str | os.PathLike, name: str) -> Encoded:
    """A frame of TorchSSC's folder, all 60x36x60, stored flat or not: TSDF/NAME.npz (arr_0 the TSDF, arr_1 the
    weights), Label/NAME.npz and Mapping/NAME.npz (arr_0 each); the mapping's 307200 is no pixel. NAME is 0003.

    Raises FileNotFoundError, and `UserError` that names the file where it holds something else."""
    paths = {kind: Path(root, kind, f"{name}.npz") for kind in ("TSDF", "Label", "Mapping")}
    tsdf, labels = _load_npz(paths["TSDF"], ("arr_0", "arr_1")), _load_npz(paths["Label"], ("arr_0",))
    mapping = _load_npz(paths["Mapping"], ("arr_0",))
    pixels = _volume(paths["Mapping"], "arr_0", mapping["arr_0"], (COARSE,)).astype(np.int64)
    none = CAMERA.width * CAMERA.height
    if pixels.min() < 0 or pixels.max() > none:
        raise UserError(f"{paths['Mapping']} holds pixel {pixels.min()}..{pixels.max()}: expected 0..{none}")
    return Encoded(
        tsdf=_volume(paths["TSDF"], "arr_0", tsdf["arr_0"], (COARSE, SHAPE)).astype(np.float32),
        labels=_labels(paths["Label"], "arr_0", labels["arr_0"]),
        weights=_volume(paths["TSDF"], "arr_1", tsdf["arr_1"], (COARSE,)) > 0,
        pixels=np.where(pixels == none, -1, pixels).astype(np.int32),
    )


def write_torchssc(root: str | os.PathLike, name: str, encoded: Encoded) -> None:
    """Write what `read_torchssc` reads. Raises `UserError` where a field is missing."""
    if encoded.tsdf is None or encoded.labels is None or encoded.weights is None or encoded.pixels is None:
        raise UserError(f"frame {name} cannot be written for TorchSSC: it needs tsdf, labels, weights and pixels")
    none = CAMERA.width * CAMERA.height
    content = {
        "TSDF": (encoded.tsdf.reshape(-1), encoded.weights.reshape(-1).astype(np.float32)),
        "Label": (encoded.labels.reshape(-1),),
        "Mapping": (np.where(encoded.pixels < 0, none, encoded.pixels).reshape(-1),),
    }
    for kind, arrays in content.items():
        path = make_folder(Path(root, kind)) / f"{name}.npz"
        write_atomic(path, lambda file, arrays=arrays: np.savez_compressed(file, *arrays))


def _load_npz(path: str | os.PathLike, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found")
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{path} holds one array, expected an .npz with {' and '.join(wanted)}")
            if missing := [key for key in wanted if key not in file]:
                raise UserError(f"{path} lacks {missing[0]!r}: it holds {', '.join(file) or 'nothing'}")
            return {key: file[key] for key in file}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no readable .npz ({error}): fetch it again") from error


def _volume(path, key: str, array: np.ndarray, shapes: Sequence[tuple[int, int, int]]) -> np.ndarray:
    for shape in shapes:
        fits = array.ndim == 1 or tuple(n for n in array.shape if n > 1) == shape
        if array.dtype.kind in "fiub" and array.size == np.prod(shape) and fits:
            return array.reshape(shape)
    expected = " or ".join("x".join(map(str, shape)) for shape in shapes)
    raise UserError(f"{path}: {key} is {array.dtype} {list(array.shape)}, expected numbers of {expected}")


def _labels(path, key: str, array: np.ndarray) -> UInt8[np.ndarray, "60 36 60"]:
    volume = _volume(path, key, array, (COARSE,))
    most = len(SPACES["ssc12"]) - 1
    wrong = ~(((volume >= 0) & (volume <= most)) | (volume == IGNORE))
    if wrong.any():
        raise UserError(f"{path}: {key} holds label {volume[wrong].max()}, expected 0..{most} and {IGNORE}")
    return volume.astype(np.uint8)


# --------------------------------------------------------------------------------------------------------- the reader


class SSC:
    """SSCNet's frames of NYU or NYUCAD.

    Args:
        root: the folder described above.
        split: "train", "val", "trainval", "test" or "all".
        source: "nyu" (depth of the Kinect) or "nyucad" (depth rendered from the volumes).
        rgb: a folder of NYUv2's colour images; default: beside the frames.
        labels: a folder of NYUv2's label40 images; default: samples have no labels. Where void and class 40 share a
            value, in training frames without a dataset.json that says otherwise (`data.nyuv2`), it is ignored.
        depth_only: leave the colour out; images are black then.

    A sample holds image, depth, camera with pose, voxels (ssc12 at 240x144x240), and with `labels` those of its pixels.
    Every file is looked for at once: FileNotFoundError names the first that is missing and how many are. A damaged file
    raises `UserError` that names it when it is read.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        *,
        source: str = "nyu",
        rgb: str | os.PathLike | None = None,
        labels: str | os.PathLike | None = None,
        depth_only: bool = False,
    ):
        if split not in SPLITS:
            raise unknown("ssc split", split, SPLITS)
        if source not in SOURCES:
            raise unknown("ssc source", source, SOURCES)
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"ssc: there is no folder {self.root}")
        self.name, self.space = f"{source}-ssc/{split}", SPACES["ssc12"]
        self.ignored: tuple[int, ...] = ()
        self.score_crop: tuple[slice, slice] | None = None
        bins = self._bins(split, source)
        if not bins:
            raise UserError(f"{self.root}: split {split!r} has no frames, such as NYU0003_0000.bin")
        self.names = tuple(path.stem for path in bins)
        self._files = self._find(bins, source, None if depth_only else rgb, labels, depth_only)
        self._table = np.full(256, IGNORE, np.uint8)  # of label40 files
        self._table[1:41] = mapping("nyu40", "ssc12")[:40]
        if labels is not None and split != "test" and not _void_is_exact(Path(labels).parent):
            self._table[40] = IGNORE

    def _bins(self, split: str, source: str) -> list[Path]:
        trees = [self.root / "depthbin", self.root]
        tree = next(
            (t for t in trees if any((t / f"{SOURCES[source]}{part}").is_dir() for part in ("train", "test"))), None
        )
        if tree is None:
            flat = _bins_in(self.root)
            if flat and split == "all":
                return flat
            raise FileNotFoundError(
                f"{self.root} holds no folder {SOURCES[source]}train or {SOURCES[source]}test: "
                "give SSCNet's data or depthbin"
                + (f"; for the {len(flat)} frames of this folder itself take split 'all'" if flat else "")
            )
        parts = {"test": ("test",), "all": ("train", "test")}.get(split, ("train",))
        found: list[Path] = []
        for part in parts:
            folder = tree / f"{SOURCES[source]}{part}"
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} not found: it holds the frames of split {split!r}")
            found += _bins_in(folder)
        if split in ("train", "val") and found:
            kept = set(split_ids([path.stem for path in found], split))
            found = [path for path in found if path.stem in kept]
        return found

    def _find(self, bins: list[Path], source: str, rgb, labels, depth_only: bool) -> list[dict[str, Path]]:
        listed: dict[Path, set[str]] = {}  # folders are listed once: asking for each file is slow on network drives

        def present(path: Path) -> bool:
            if path.parent not in listed:
                listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            return path.name in listed[path.parent]

        found, missing = [], []
        for path in bins:
            stem, number = path.stem, path.stem.split("_")[0].removeprefix("NYU")
            depth = path.with_suffix(".png")
            if source == "nyucad" and present(cad := path.with_name(f"{stem}_cad_depth.png")):
                depth = cad
            files = {"bin": path, "depth": depth}
            if labels is not None:
                files["labels"] = Path(labels, f"{number}.png")
            if not depth_only:
                stems = [Path(rgb, number)] if rgb is not None else []
                stems += [path.with_name(n) for n in (f"{stem}_rgb", f"{stem}_colors", f"NYU{number}_rgb")]
                candidates = [s.with_name(s.name + ending) for s in stems for ending in _ENDINGS]
                files["rgb"] = next((c for c in candidates if present(c)), candidates[0])
            missing += [file for file in files.values() if not present(file)]
            found.append(files)
        if missing:
            colour = any(files.get("rgb") in missing for files in found)
            raise FileNotFoundError(
                f"{missing[0]} not found ({len(missing)} of the files of {self.name} are missing): "
                + (
                    "colour is not among SSCNet's files, so give NYUv2's rgb folder as rgb, or depth_only=True"
                    if colour
                    else "complete the folder"
                )
            )
        return found

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        files = self._files[index]
        depth = read_depth(files["depth"])
        image = read_rgb(files["rgb"]) if "rgb" in files else np.zeros((*depth.shape, 3), np.float32)
        demand_size(depth, files["depth"], image, files.get("rgb", files["depth"]))
        classes = None
        if "labels" in files:
            stored = read_map(files["labels"])
            demand_size(stored, files["labels"], image, files.get("rgb", files["depth"]))
            if stored.dtype != np.uint8 or stored.max() > 40:
                raise UserError(f"{files['labels']} holds label {stored.max()}: expected 8 bits, 0 (void) and 1..40")
            classes = self._table[stored]
        height, width = depth.shape
        camera = CAMERA if (width, height) == (CAMERA.width, CAMERA.height) else CAMERA.resized(width, height)
        volume, pose = read_bin(files["bin"])
        return Sample(
            image=image,
            name=self.names[index],
            labels=classes,
            depth=depth,
            camera=replace(camera, pose=pose),
            voxels=volume,
        )


def _void_is_exact(folder: Path) -> bool:
    try:
        return json.loads((folder / "dataset.json").read_text()).get("void") == "exact"
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'dataset.json'} cannot be read ({error})") from error


def _bins_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".bin" and not path.name.startswith("."))


def write_frame(folder: str | os.PathLike, sample: Sample) -> None:
    """Write a sample with depth, posed camera and voxels as NAME.bin, NAME.png and NAME_rgb.png: for `SSC` with split
    "all", if its camera is `CAMERA`, which the files do not say. Raises `UserError` where something is missing."""
    if sample.depth is None or sample.voxels is None or sample.camera is None or sample.camera.pose is None:
        raise UserError(
            f"{sample.name} cannot be written as a frame of SSCNet: it needs depth, voxels and a posed camera"
        )
    folder = make_folder(folder)
    write_bin(folder / f"{sample.name}.bin", sample.voxels, sample.camera.pose)
    write_depth(folder / f"{sample.name}.png", sample.depth)
    write_png(folder / f"{sample.name}_rgb.png", np.rint(255 * sample.image).astype(np.uint8))
