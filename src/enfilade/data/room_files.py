"""Procedural rooms on disk: rendered once, read as often as a training needs them.

    render_rooms("rooms", split="train", count=1000)
    reader = open_dataset("room-files", "rooms", split="train")

A room takes about a second to render on one core and some hundredths to read. The folder::

    rooms/
        rooms.json              what the files were made with
        train/                  and likewise val/, test/
            rgb/room00000000.jpg          quality 95, or png
            depth/room00000000.png        16 bits, millimetres, 0 missing: as a Kinect would give it (`kinect_noise`)
            depth_exact/room00000000.png  likewise, without noise; only if asked for
            labels/room00000000.png       8 bits, nyu40 counted from 0
            volume/room00000000.npz       `labels`: ssc12 of 240 x 144 x 240 voxels, 0 empty, 255 unknown
            camera/room00000000.json      fx, fy, cx, cy, width, height, pose (camera-to-world), and the volume's
                                          origin (world X, Y, Z in metres) and voxel size

The number is the room's seed. Each split draws from its own million of seeds (`data.ROOM_SEEDS`), so that no room is in
two of them. A frame's camera is written last: a frame that has one is complete.
"""

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float32

from enfilade import labels
from enfilade.camera import Camera
from enfilade.data import ROOM_SEEDS
from enfilade.data.files import demand_files, demand_size, read_map, read_rgb
from enfilade.data.region_files import Written
from enfilade.errors import UserError, unknown
from enfilade.images import make_folder, write_atomic, write_png
from enfilade.types import LabelVolume, Sample

ABOUT = "rooms.json"
MILLION = 1_000_000  # seeds of a split
_FAR = 65.535  # metres that 16 bits of millimetres hold


# ------------------------------------------------------------------------------------------------------------ to write


def render_rooms(
    folder: str | os.PathLike,
    *,
    split: str = "train",
    count: int | None = None,
    seed: int = 0,
    width: int = 640,
    height: int = 480,
    noise: bool = True,
    exact: bool = False,
    image: Literal["jpg", "png"] = "jpg",
    workers: int = 1,
    quiet: bool = True,
) -> Written:
    """Render `count` rooms of a split into `folder` (default: as many as `open_dataset("rooms")` has).

    A frame that is complete is kept, so that an interrupted run goes on when it is started again, and a larger count
    adds to what is there. A room that fails is listed and passed over. `noise` gives depth a Kinect's holes and steps;
    `exact` writes exact depth beside it. `seed` moves all splits. Each of `workers` processes renders on one thread.
    `quiet=False` shows the progress on the error stream.

    Raises UserError for an unknown split, numbers that cannot be, a folder with rooms made with other options, and one
    that cannot be written to.
    """
    from enfilade.data.rooms import room

    if split not in ROOM_SEEDS:
        raise unknown("split of rooms", split, ROOM_SEEDS)
    if image not in ("jpg", "png"):
        raise UserError(f"images are jpg or png, not {image!r}")
    first, default = ROOM_SEEDS[split]
    count = default if count is None else count
    if count < 1 or seed < 0 or workers < 1:
        raise UserError(f"count and workers are at least 1 and seed at least 0, not {count}, {workers} and {seed}")
    if min(width, height) < 8:
        raise UserError(f"a room's picture is at least 8x8 pixels, not {width}x{height}")
    if seed + count > MILLION:
        raise UserError(
            f"{count} rooms from seed {seed} reach beyond the {MILLION} of a split and into the next one: take fewer"
        )
    folder = Path(folder)
    about = {"width": width, "height": height, "noise": noise, "exact": exact, "image": image}
    _claim(folder, {**about, "depth": "mm", "labels": "nyu40", "volume": "ssc12"})
    place = folder / split
    for kind in _kinds(about):
        make_folder(place / kind)
    there = {path.stem for path in (place / "camera").glob("room*.json")}
    todo = [s for s in range(first + seed, first + seed + count) if f"room{s:08d}" not in there]
    work = partial(_write, place=place, about=about, render=room)
    broken = []
    for number, problem in _progress(_results(work, todo, workers), len(todo), f"rooms/{split}", quiet):
        if problem:
            broken.append((f"room{number:08d}", problem))
    return Written(len(todo) - len(broken), count - len(todo), tuple(sorted(broken)))


def _kinds(about: dict) -> tuple[str, ...]:
    return ("rgb", "depth", *(("depth_exact",) if about["exact"] else ()), "labels", "volume", "camera")


def _results(work, todo: list[int], workers: int) -> Iterator[tuple[int, str]]:
    """(seed, what went wrong or nothing), as they come."""
    if workers == 1 or len(todo) < 2:
        for number in todo:
            yield number, work(number)
        return
    # Not forked: a copy of a process whose threads hold locks can hang.
    with ProcessPoolExecutor(min(workers, len(todo)), multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(work, number): number for number in todo}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that rendered rooms was ended from outside, perhaps for want of memory: start again with "
                "fewer workers, what is complete is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write(number: int, *, place: Path, about: dict, render) -> str:
    """Render a room and write its frame. Returns what was wrong with the room; a folder that cannot be written to
    raises UserError, since it will not do for the next room either."""
    from enfilade.data.rooms import kinect_noise

    try:
        sample: Sample = render(number, width=about["width"], height=about["height"], voxels=True, threads=1)
        assert sample.depth is not None
        assert sample.labels is not None
        assert sample.normals is not None
        assert sample.camera is not None
        assert sample.camera.pose is not None
        assert sample.voxels is not None
        depth = exact = sample.depth
        if about["noise"]:  # as `room(noise=True)` does
            depth = kinect_noise(exact, sample.camera, sample.normals, np.random.default_rng([number, 2]))
        millimetres = {"depth": _millimetres(depth)}
        if about["exact"]:
            millimetres["depth_exact"] = _millimetres(exact)
    except Exception as error:  # whatever it is, the other rooms still count
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    name = sample.name
    picture = np.rint(255 * sample.image).astype(np.uint8)
    if about["image"] == "png":
        write_png(place / f"rgb/{name}.png", picture)
    else:
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        write_atomic(place / f"rgb/{name}.jpg", cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    for kind, array in millimetres.items():
        write_png(place / kind / f"{name}.png", array)
    write_png(place / f"labels/{name}.png", sample.labels)
    volume, camera = sample.voxels, sample.camera
    write_atomic(place / f"volume/{name}.npz", lambda file: np.savez_compressed(file, labels=volume.labels))
    content = {key: getattr(camera, key) for key in ("fx", "fy", "cx", "cy", "width", "height")}
    content |= {"pose": np.asarray(camera.pose).tolist(), "origin": volume.origin.tolist(), "voxel": volume.size}
    write_atomic(place / f"camera/{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    return ""


def _millimetres(depth: Float32[np.ndarray, "h w"]) -> np.ndarray:
    if depth.max() > _FAR:
        raise UserError(f"its depth reaches {depth.max():.1f} m, beyond the {_FAR} m of a 16-bit image")
    return np.rint(depth.astype(np.float64) * 1000).astype(np.uint16)


def _claim(folder: Path, about: dict) -> None:
    """See that the folder is new, or was filled with the same options: rooms of two kinds must not get mixed."""
    mark = folder / ABOUT
    if mark.is_file():
        if _about(folder) != about:
            raise UserError(
                f"{mark} tells of rooms made with other options than {json.dumps(about)}: choose another folder"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder and holds no {ABOUT}: choose another one to write to")
    make_folder(folder)
    write_atomic(mark, (json.dumps(about, indent=1) + "\n").encode())


def _about(folder: Path) -> dict:
    path = folder / ABOUT
    try:
        found = json.loads(path.read_text())
        assert isinstance(found, dict)
        assert {"exact", "noise", "image"} <= found.keys()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} not found: give the folder that `enfilade data render rooms` wrote, not one of its splits"
        ) from None
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(f"{path} does not tell how its rooms were made: render them again") from error
    return found


def _progress(results: Iterable, total: int, name: str, quiet: bool) -> Iterable:
    from rich.console import Console
    from rich.progress import track

    return track(results, name, total, console=Console(stderr=True)) if total and not quiet else results


# ------------------------------------------------------------------------------------------------------------- to read


class RoomFiles:
    """Rooms that `render_rooms` wrote.

    Args:
        root: the folder given to `render_rooms`.
        split: "train", "val" or "test".
        length: the first so many rooms only (a training of part of the data); default all.
        exact: depth without noise, if the rooms were rendered with it.
        space: the label space of the pixels' labels: "nyu40", or one that it maps to.
        voxels: read the volumes; they are ssc12 whatever `space` is.

    A sample holds image, labels, depth, camera with pose, and voxels. Instances and normals are not on disk. Frames
    that were not finished are left out. Raises FileNotFoundError that names the first missing file, and `UserError` for
    what does not fit; a damaged file is named when it is read.
    """

    ignored: tuple[int, ...] = ()
    score_crop: tuple[slice, slice] | None = None

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        *,
        length: int | None = None,
        exact: bool = False,
        space: str = "nyu40",
        voxels: bool = True,
    ):
        if split not in ROOM_SEEDS:
            raise unknown("split of rooms", split, ROOM_SEEDS)
        self.root, self.voxels = Path(root), voxels
        if not self.root.is_dir():
            raise FileNotFoundError(f"room-files: there is no folder {self.root}")
        about = _about(self.root)
        if exact and not about["exact"] and about["noise"]:
            raise UserError(f"{self.root} holds no exact depth: render it with --exact")
        self.name, self.space = f"room-files/{split}", labels.get(space)
        self._table = labels.mapping("nyu40", space)
        self._folder, self._image = self.root / split, about["image"]
        self._depth = "depth_exact" if exact and about["exact"] else "depth"
        names = sorted(path.stem for path in (self._folder / "camera").glob("room*.json"))
        if not names:
            raise UserError(f"{self._folder} holds no finished room: render some with `enfilade data render rooms`")
        if length is not None and not 1 <= length <= len(names):
            raise UserError(f"{self.name} has {len(names)} rooms: length {length} cannot be")
        self.names = tuple(names[:length])
        kinds = ["rgb", self._depth, "labels", *["volume"] * voxels]
        demand_files([self._path(kind, name) for kind in kinds for name in self.names], self.name, "render it again")

    def _path(self, kind: str, name: str) -> Path:
        ending = {"rgb": self._image, "volume": "npz", "camera": "json"}.get(kind, "png")
        return self._folder / kind / f"{name}.{ending}"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        paths = {kind: self._path(kind, name) for kind in ("rgb", self._depth, "labels", "volume", "camera")}
        image, classes, depth = read_rgb(paths["rgb"]), read_map(paths["labels"]), read_map(paths[self._depth])
        for kind, array, dtype in (("labels", classes, np.uint8), (self._depth, depth, np.uint16)):
            demand_size(array, paths[kind], image, paths["rgb"])
            if array.dtype != dtype:
                raise UserError(f"{paths[kind]} holds {array.dtype}, expected {np.dtype(dtype)}: render the room again")
        camera, origin, size = _read_camera(paths["camera"])
        if (camera.height, camera.width) != image.shape[:2]:
            raise UserError(
                f"{paths['camera']} is of {camera.width}x{camera.height}, but {paths['rgb'].name} "
                f"{image.shape[1]}x{image.shape[0]}: render the room again"
            )
        return Sample(
            image=image,
            name=name,
            labels=self._table[classes],
            depth=depth * np.float32(0.001),
            camera=camera,
            voxels=LabelVolume(_read_volume(paths["volume"]), origin, size) if self.voxels else None,
        )


def _read_camera(path: Path) -> tuple[Camera, np.ndarray, float]:
    """The camera with its pose, and the volume's origin and voxel size."""
    try:
        content = json.loads(path.read_text())
        numbers = [float(content[key]) for key in ("fx", "fy", "cx", "cy")]
        pose, origin = np.array(content["pose"], np.float64), np.array(content["origin"], np.float64)
        size = float(content["voxel"])
        if pose.shape != (4, 4) or origin.shape != (3,) or not (np.isfinite(pose).all() and np.isfinite(origin).all()):
            raise ValueError("a pose is 4x4 numbers and an origin three")
        fx, fy, cx, cy = numbers
        return Camera(fx, fy, cx, cy, int(content["width"]), int(content["height"]), pose), origin, size
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} holds no camera with pose and origin ({error!r}): render the room again") from error


def _read_volume(path: Path) -> np.ndarray:
    import zipfile
    import zlib

    from enfilade.data.ssc import SHAPE

    try:
        with np.load(path, allow_pickle=False) as file:
            found = file["labels"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} holds no label volume ({error}): render the room again") from error
    if found.shape != SHAPE or found.dtype != np.uint8:
        raise UserError(f"{path} holds {found.dtype} {list(found.shape)}, expected uint8 {list(SHAPE)}")
    return found
