"""Your own labels: a folder of images, label PNGs of the same stems, and a list of the classes.

    images/   STEM.jpg, png, ...     or image/, rgb/, JPEGImages/
    labels/   STEM.png               or label/, masks/, mask/, annotations/, SegmentationClass/
    depth/    STEM.png               optional: 16 bit, millimetres, 0 unknown
    classes.txt                      or classes.json, or labelmap.txt
    camera.json                      optional: {"fx", "fy", "cx", "cy"} of all images, with "width" and "height"

Splits, where there are any, lie above (train/images/, train/labels/, val/images/, ...) or below (images/train/,
labels/train/, ...); val/ may be called valid/ or validation/. Without val/ a share of the train images is drawn by a
hash of their names. Images may lie in folders of their own (images/kitchen/01.jpg, labels/kitchen/01.png): a folder is
then a scene, and whole scenes are drawn, because two frames of one scene look alike.

Class lists, and what is void: see `data.class_list`.

Label PNGs: grey of 8 or 16 bits holds numbers. In colour, or with a palette whose colours are all in the list, the
list's colours tell the classes; another palette is read by its numbers. Photos are turned upright by their EXIF tag
where the labels then fit, since that is how annotation tools show them.
"""

import hashlib
import logging
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Float32, Int64, UInt8

from enfilade import images
from enfilade.camera import Camera
from enfilade.data.class_list import find_list, read_classes, space_of
from enfilade.data.files import read_map, read_rgb
from enfilade.errors import UserError, unknown
from enfilade.labels import IGNORE
from enfilade.types import Sample

log = logging.getLogger(__name__)

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}

_FOLDERS = {
    "images": ("images", "image", "rgb", "JPEGImages"),
    "labels": ("labels", "label", "masks", "mask", "annotations", "SegmentationClass"),
    "depth": ("depth",),
}
_UNKNOWN = 254  # in tables: a number or colour of no class


class Folder:
    """Images and label PNGs of one's own classes.

    Args:
        root: the folder described above.
        split: "train", "val", "test" (where the folder has one) or "all".
        classes: the class list, instead of the one in the folder.
        val_share: of the images (or scenes) without a val folder: how many of them are "val"; at least one is.
        seed: another draw for another seed.

    `left_out` holds the names of the images of the split that have no labels. Raises FileNotFoundError for what is
    missing and `UserError` for what does not fit: when it is opened the folder and the class list, when a sample is
    read its own files.
    """

    ignored: tuple[int, ...] = ()
    score_crop: tuple[slice, slice] | None = None

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        *,
        classes: str | os.PathLike | None = None,
        val_share: float = 0.2,
        seed: int = 0,
    ):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root}")
        if split not in (*SPLITS, "all"):
            raise unknown("split", split, [*SPLITS, "all"])
        if not 0 < val_share < 1:
            raise UserError(f"val_share is a share between 0 and 1, not {val_share:g}")
        self.class_list = find_list(self.root) if classes is None else Path(classes)
        self.entries = read_classes(self.class_list)
        self.space = space_of(self.entries, self.class_list)
        self.name = f"{self.root.resolve().name}/{split}"
        frames, self.left_out = _frames(self.root, split, val_share, int(seed))
        if self.left_out:
            first, count = self.left_out[0], len(self.left_out)
            log.warning("%s: %d images have no label PNG and are left out, the first is %s", self.name, count, first)
        self.names = tuple(name for name, _ in frames)
        self._files = [files for _, files in frames]
        self._numbers = np.full(65536, _UNKNOWN, np.uint8)
        self._numbers[[IGNORE, 65535]] = IGNORE
        kept = (e for e in self.entries if not e.void)
        self._class_of = {e.value: IGNORE for e in self.entries if e.void} | {e.value: i for i, e in enumerate(kept)}
        for value, number in self._class_of.items():
            self._numbers[value] = number
        coloured = sorted((_code(e.colour), self._class_of[e.value]) for e in self.entries if e.colour is not None)
        self._codes = np.array([code for code, _ in coloured], np.int64)
        self._class_of_code = np.array([number for _, number in coloured], np.uint8)
        self._camera_file = self.root / "camera.json" if (self.root / "camera.json").is_file() else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        files, found = self._files[index], self.labels(index)
        depth = self._depth(files)
        photo = images.read(files["images"])
        rgb, focal = photo.rgb, photo.focal
        if rgb.shape[:2] != found.shape and rgb.shape[1::-1] == found.shape:
            rgb, focal = read_rgb(files["images"]), None  # labels of the picture as it is stored, not upright
        for kind, array in (("labels", found), ("depth", depth)):
            if array is not None and array.shape != rgb.shape[:2]:
                raise UserError(
                    f"{files[kind]} is {array.shape[1]}x{array.shape[0]}, but {files['images'].name} "
                    f"{rgb.shape[1]}x{rgb.shape[0]}: the files of one image have one size"
                )
        camera = self._camera(rgb.shape[1], rgb.shape[0], focal)
        return Sample(image=rgb, name=self.names[index], labels=found, depth=depth, camera=camera)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a sample; only the label PNG's header is read."""
        with _png(self._files[index]["labels"]) as picture:
            return picture.height, picture.width

    def files(self, index: int) -> dict[str, Path]:
        """The paths of a sample's "images", "labels" and, where there is one, "depth"."""
        return dict(self._files[index])

    def labels(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """The labels alone, 255 where void; the image is not read.

        Raises:
            UserError: no readable PNG, or a number or colour that is in no line of the class list.
        """
        path = self._files[index]["labels"]
        with _png(path) as picture:
            try:
                picture.load()
            except (OSError, SyntaxError) as error:
                raise UserError(f"{path} is damaged or cut off ({error})") from error
            if picture.mode == "P":
                numbers = np.asarray(picture)
                colours = np.asarray(picture.convert("RGB"))
                return self._by_colour(colours, path) if self._in_list(colours) else self._by_number(numbers, path)
            if picture.mode in ("1", "L", "I", "I;16", "I;16B", "LA"):
                return self._by_number(np.asarray(picture.getchannel(0) if picture.mode == "LA" else picture), path)
            colours = np.asarray(picture.convert("RGB"))
        grey = (colours == colours[..., :1]).all()
        if grey and not self._in_list(colours):  # numbers, saved in colour
            return self._by_number(colours[..., 0], path)
        if not self._codes.size:
            raise UserError(
                f"{path} is in colour, and {self.class_list} gives no class a colour: write #rrggbb behind each name"
            )
        return self._by_colour(colours, path)

    def _by_number(self, numbers: np.ndarray, path: Path) -> UInt8[np.ndarray, "h w"]:
        found = self._numbers[np.minimum(numbers.astype(np.int64), 65535)]
        if (wrong := found == _UNKNOWN).any():
            values, counts = np.unique(numbers[wrong], return_counts=True)
            listed = f"{min(self._class_of)} to {max(self._class_of)}"
            raise UserError(
                f"{path} holds the value {values[0]} in {counts[0]} pixels{_more(values)}, but {self.class_list.name} "
                f"lists {listed}: correct the labels or add the class (255 is void)"
            )
        return found

    def _by_colour(self, colours: UInt8[np.ndarray, "h w 3"], path: Path) -> UInt8[np.ndarray, "h w"]:
        codes, known = _codes(colours), self._codes
        place = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        if (wrong := known[place] != codes).any():
            values, counts = np.unique(codes[wrong], return_counts=True)
            most = counts.argmax()
            raise UserError(
                f"{path} holds the colour #{values[most]:06x} in {counts[most]} pixels{_more(values, 'colours')}, "
                f"which is no class's in {self.class_list.name}: add it, or save the labels as PNG, without smoothing"
            )
        return self._class_of_code[place]

    def _in_list(self, colours: UInt8[np.ndarray, "h w 3"]) -> bool:
        return bool(np.isin(_codes(colours), self._codes).all())

    def _depth(self, files: dict[str, Path]) -> Float32[np.ndarray, "h w"] | None:
        if "depth" not in files:
            return None
        stored = read_map(files["depth"])
        if stored.dtype != np.uint16:
            raise UserError(f"{files['depth']} holds {stored.dtype}: depth is a PNG of 16 bits, in millimetres")
        return np.where(stored == 65535, 0, stored).astype(np.float32) * np.float32(0.001)

    def _camera(self, width: int, height: int, focal: float | None) -> Camera | None:
        if self._camera_file is not None:
            from enfilade.options import camera_of, read_camera

            camera = camera_of(read_camera(self._camera_file), width, height)
            return camera if (camera.width, camera.height) == (width, height) else camera.resized(width, height)
        if focal is not None:
            return Camera(focal, focal, (width - 1) / 2, (height - 1) / 2, width, height)
        return None


def _more(values: np.ndarray, what: str = "values") -> str:
    return f" ({len(values)} such {what})" if len(values) > 1 else ""


def _code(colour: tuple[int, int, int]) -> int:
    return int.from_bytes(bytes(colour), "big")


def _codes(colours: UInt8[np.ndarray, "h w 3"]) -> Int64[np.ndarray, "h w"]:
    c = colours.astype(np.int64)
    return c[..., 0] << 16 | c[..., 1] << 8 | c[..., 2]


def _png(path: Path) -> PIL.Image.Image:
    try:
        return PIL.Image.open(path, formats=("PNG",))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no readable PNG ({error})") from error


# --- what lies in the folder ------------------------------------------------------------------------------------------

_Files = dict[str, Path]


def _frames(root: Path, split: str, share: float, seed: int) -> tuple[list[tuple[str, _Files]], tuple[str, ...]]:
    """Names and files of the split's samples, and the names of its images without labels."""
    places = _places(root)
    if split == "val" and "val" not in places and "train" in places:
        places, drawn = {"train": places["train"]}, "val"
    else:
        drawn = "train" if split == "train" and "val" not in places else None
        if split != "all":
            if split not in places:
                raise FileNotFoundError(f"{root} has no split {split!r}: it has {', '.join(places)}")
            places = {split: places[split]}
    frames: dict[str, _Files] = {}
    left_out: list[str] = []
    for part, folders in places.items():
        for name, files in _pair(folders).items():
            name = f"{part}/{name}" if len(places) > 1 else name
            if "labels" in files:
                frames[name] = files
            else:
                left_out.append(name)
    if not frames:
        raise UserError(f"{root}: no image of split {split!r} has a label PNG of its stem ({len(left_out)} images)")
    if drawn is not None:
        val = draw(list(frames), share, seed)
        if drawn == "val":
            return [(name, files) for name, files in frames.items() if name in val], ()
        if len(val) == len(frames):
            raise UserError(f"{root} has one labelled image: two are needed, one to learn from and one to score")
        frames = {name: files for name, files in frames.items() if name not in val}
    return list(frames.items()), tuple(left_out)


def draw(names: list[str], share: float, seed: int = 0) -> set[str]:
    """The names that are set aside: those whose scene (their folder; without folders each name is one) has the smallest
    hash, until `share` of all is reached. One scene at least is drawn, and of several one is left."""
    scene = {name: name.rpartition("/")[0] for name in names}
    if len(set(scene.values())) < 2:
        scene = {name: name for name in names}
    order = sorted(set(scene.values()), key=lambda s: hashlib.sha256(f"{seed}:{s}".encode()).digest())
    drawn: set[str] = set()
    for unit in order[: max(1, len(order) - 1)]:
        members = {name for name in names if scene[name] == unit}
        if drawn and len(drawn) + len(members) / 2 > share * len(names):
            break
        drawn |= members
    return drawn


def _places(root: Path) -> dict[str, dict[str, Path]]:
    """For each split the folders of images, labels and depth. A folder without splits is all "train"."""

    def folders(above: str = ".", below: str = ".") -> dict[str, Path]:
        found = {}
        for kind, names in _FOLDERS.items():
            paths = [path for name in names if (path := root / above / name / below).is_dir()]
            found |= {kind: paths[0]} if paths else {}
        return found

    def parts(where: str) -> dict[str, dict[str, Path]]:
        """Of each split's names the first that has images."""
        found = {}
        for split, names in SPLITS.items():
            for name in reversed(names):
                if "images" in (here := folders(**{where: name})):
                    found[split] = here
        return found

    places = parts("above") or parts("below") or {"train": folders()}
    if "images" not in next(iter(places.values())):
        choices = ", ".join(f"{name}/" for name in _FOLDERS["images"])
        raise FileNotFoundError(f"{root} holds no folder of images ({choices}), neither itself nor under train/")
    for found in places.values():
        if "labels" not in found:
            choices = ", ".join(f"{name}/" for name in _FOLDERS["labels"])
            raise FileNotFoundError(f"{root}: beside {found['images']} there is no folder of labels ({choices})")
    return places


def _pair(folders: dict[str, Path]) -> dict[str, _Files]:
    """Files by name, in the order of the images.

    Raises:
        UserError: label or depth files without an image; two files of one name; labels that are not PNGs.
    """
    found = {kind: _stems(path, images.IMAGE_SUFFIXES) for kind, path in folders.items()}
    if not found["images"]:
        raise FileNotFoundError(f"{folders['images']} holds no images")
    for kind in ("labels", "depth"):
        of = found.get(kind, {})
        if others := [path for path in of.values() if path.suffix.lower() != ".png"]:
            raise UserError(f"{others[0]}: {kind} are PNG files, because other formats change the numbers: convert it")
        if lost := sorted(of.keys() - found["images"].keys()):
            raise UserError(
                f"{of[lost[0]]} has no image of its name in {folders['images']} ({len(lost)} such files): "
                "add it, or take the file away"
            )
    return {
        name: {kind: of[name] for kind, of in found.items() if name in of}
        for name in sorted(found["images"], key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])
    }


def _stems(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The image files under a folder by their path in it, without ending. What starts with a dot is passed over."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in endings or any(part.startswith(".") for part in inside.parts):
            continue
        name = inside.with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {path.name} are one image twice: keep one of them")
        found[name] = path
    return found
