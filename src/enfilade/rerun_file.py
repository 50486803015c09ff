"""Predictions, pose sequences and completed rooms as Rerun recordings (.rrd), to be turned around in its viewer.

    with RerunFile("out.rrd") as recording:
        recording.frame(enfilade.predict("photo.jpg"))

Entities, all lengths in metres:

* `world`: the axes, and the names and colours of the classes. Without poses the world is the camera's frame.
* `world/camera`: the camera's pose, where it is known. `world/camera/image` is its pinhole, and below that lie `rgb`
  (JPEG), `labels`, `depth`, and `measured`, the depth of a sensor.
* `world/points`: the pixels in space, in their colours and with their classes.
* `world/room/seen/<class>` and `world/room/completed/<class>`: the voxels of a completed room.
* `world/source`: the name of the image.

Timelines: `frame`, a number, and `time` where it is known. Needs the extra `rerun`.
"""

import math
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32

from enfilade import images, labels, viz
from enfilade.camera import Camera
from enfilade.complete import SPACE, Room
from enfilade.data import Reader
from enfilade.data.frames import Frames
from enfilade.errors import UserError
from enfilade.labels import LabelSpace
from enfilade.predict import Predictor
from enfilade.types import IGNORE, Prediction

POINTS = 50_000  # of a frame, or so: the viewer draws all frames of a sequence at once
JPEG_QUALITY = 90
IMAGE = "world/camera/image"
HIDDEN = "ceiling"  # not drawn at first, so that one can look in
_SECONDS, _NANOSECONDS = re.compile(r"(\d{9,10})\.(\d{1,9})"), re.compile(r"\d{18,19}")  # since 1970: TUM, EuRoC


class RerunFile:
    """A recording that is open for writing, in a `with` block. The file appears, whole, when the block ends; after an
    exception, and without a single frame, nothing is left.

    Args:
        path: the file to write; its name ends in .rrd.
        poses: the cameras' poses place the frames in one world, and the viewer gathers their points over time. A frame
            without a pose, whose tracker had lost its way, then has no place in space. Otherwise such a frame's camera
            stands at the origin.
        points: about as many points a frame at most, by a stride.

    Raises UserError, at once, without `rerun-sdk`, for another name and for an unwritable folder.
    """

    def __init__(self, path: str | os.PathLike, *, poses: bool = False, points: int = POINTS):
        self.path, self.poses, self.points = Path(path), poses, points
        if self.path.suffix.lower() != ".rrd":
            raise UserError(f"a Rerun recording is written as .rrd, not as {self.path.name}")
        if points < 1:
            raise UserError(f"a frame has at least 1 point, not {points}")
        self._rerun = _sdk()
        images.make_folder(self.path.parent)
        self._part = self.path.parent / f".{secrets.token_hex(6)}.part"
        self._recording: Any = None
        self._space = ""
        self._shown: set[str] = set()  # entities that hold something at the current frame
        self._up = np.array([0.0, -1e-6, 0.0])  # sum over the cameras; without any, y points down
        self._next = 0  # frame number
        # The video that `add` is in: its path, its rate, where it began; and where the next one begins
        self._clip, self._rate, self._clip_frame, self._clip_time, self._clock = "", None, 0, 0.0, 0.0

    def __enter__(self) -> "RerunFile":
        rr = self._rerun
        recording = rr.RecordingStream("enfilade")
        if not rr.is_enabled(recording):
            raise UserError("the environment switches Rerun off (RERUN=off): unset it")
        rr.set_log_time_enabled(False, recording=recording)  # when a line was written says nothing about the scene
        rr.set_log_tick_enabled(False, recording=recording)
        try:
            recording.save(self._part, default_blueprint=_layout(self.poses))
        except RuntimeError as error:
            raise self._unwritable(error) from error
        recording.send_recording_name(self.path.stem)
        self._recording = recording
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        whole = kind is None and self._next > 0
        try:
            if whole:
                self._log("world", self._axes(), static=True)
                self._recording.flush()
            self._recording.disconnect()
            if whole:
                self._rerun.chunk.RrdReader(self._part).store()  # reads the end, and complains where it is cut off
                os.replace(self._part, self.path)
        except (RuntimeError, ValueError, OSError) as problem:
            raise self._unwritable(problem) from problem
        finally:
            self._recording = None
            self._part.unlink(missing_ok=True)

    def frame(
        self,
        prediction: Prediction,
        *,
        number: int | None = None,
        time: float | np.datetime64 | None = None,
        measured: Float32[np.ndarray, "h w"] | None = None,
    ) -> None:
        """Add what a prediction holds.

        Args:
            number: on the timeline `frame`; default: the one after the last.
            time: seconds since the beginning, or a moment; one kind in one file.
            measured: the depth of a sensor, of the image's size, 0 where unknown.
        """
        self._at(number, time)
        shown = self._frame(prediction)
        if measured is not None:
            shown |= self._log(f"{IMAGE}/measured", self._depth(measured))
        self._clear(shown)

    def add(self, label: str, prediction: Prediction) -> None:
        """A frame as `predict_many` names it: a photo's path, or "clip.mp4#12". A video's frames keep their numbers
        and get their time; a second video follows on the first."""
        path, _, index = label.rpartition("#")
        if not (images.is_video(path) and index.isdigit()):
            self.frame(prediction)
            return
        if path != self._clip:
            self._clip, self._rate = path, _frame_rate(path)
            self._clip_frame, self._clip_time = self._next, self._clock
        time = None
        if self._rate is not None:
            time = self._clip_time + int(index) / self._rate
            self._clock = time + 1 / self._rate
        self.frame(prediction, number=self._clip_frame + int(index), time=time)

    def room(self, room: Room, *, number: int | None = None) -> None:
        """Add a completed room: its frame, and its full voxels as boxes in the world (Z up)."""
        rr = self._rerun
        self._at(number, None)
        answer = Prediction(
            image=room.image,
            labels=room.labels,
            depth=room.depth,
            camera=room.camera,
            camera_source=room.camera_source,
            space=SPACE,
            name=room.name,
        )
        shown = self._frame(answer)
        self._up = np.array([0.0, 0.0, np.inf])  # known, whatever the camera's tilt
        space, volume = labels.get(SPACE), room.volume
        self._log("world/room", _context(rr, space), static=True)
        for part, chosen in (("seen", room.observed), ("completed", ~room.observed)):
            for k in range(1, len(space)):  # 0 is empty
                voxels = np.argwhere(chosen & (volume.labels == k))[:, [0, 2, 1]]  # as the world's X, Y, Z
                if len(voxels):
                    boxes = rr.Boxes3D(
                        centers=volume.origin + volume.size * (voxels + 0.5),
                        half_sizes=np.full((len(voxels), 3), volume.size / 2),
                        class_ids=[k],
                        fill_mode="solid",
                    )
                    shown |= self._log(f"world/room/{part}/{space.names[k]}", boxes)
        self._clear(shown)

    def _at(self, number: int | None, time: float | np.datetime64 | None) -> None:
        number = self._next if number is None else number
        self._next = number + 1
        self._recording.reset_time()
        self._recording.set_time("frame", sequence=number)
        if isinstance(time, np.datetime64):
            self._recording.set_time("time", timestamp=time)
        elif time is not None:
            self._recording.set_time("time", duration=time)

    def _frame(self, p: Prediction) -> set[str]:
        """Logs a prediction, and returns the entities that it is now at."""
        rr, camera, shown = self._rerun, p.camera, set()
        if p.labels is not None and p.space != self._space:
            if self._space:
                raise UserError(
                    f"a recording holds labels of one space, this one {self._space}: write those of {p.space} to "
                    "another file, or map them by Prediction.in_space"
                )
            self._space = p.space
            self._log("world", _context(rr, labels.get(p.space)), static=True)
        pose = None if camera is None else camera.pose
        placed = camera is not None and (pose is not None or not self.poses)
        if placed:
            self._up -= np.array([0.0, 1.0, 0.0]) if pose is None else pose[:3, 1]
        shown |= self._log("world/source", rr.TextDocument(p.name or "image"))
        if camera is not None and placed:
            size = [camera.width, camera.height]
            pinhole = rr.Pinhole(image_from_camera=camera.matrix, resolution=size, camera_xyz=rr.ViewCoordinates.RDF)
            shown |= self._log(IMAGE, pinhole)
        if pose is not None:
            shown |= self._log("world/camera", rr.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]))
        shown |= self._log(f"{IMAGE}/rgb", rr.Image(viz.as_uint8(p.image)).compress(jpeg_quality=JPEG_QUALITY))
        if p.labels is not None:
            shown |= self._log(f"{IMAGE}/labels", rr.SegmentationImage(p.labels))
        if p.depth is not None:
            shown |= self._log(f"{IMAGE}/depth", self._depth(p.depth))
            if camera is not None and placed:
                shown |= self._log("world/points", self._cloud(p, p.depth, camera))
        return shown

    def _cloud(self, p: Prediction, depth: Float32[np.ndarray, "h w"], camera: Camera) -> Any:
        """Points in the world, each `stride`-th of a row and of a column; what flies between two surfaces is none."""
        stride = math.ceil(math.sqrt(depth.size / self.points))
        known = np.isfinite(depth) & (depth > 0)
        known &= ~viz.flying_pixels(depth, math.sqrt(camera.fx * camera.fy))
        v, u = (stride * at for at in np.nonzero(known[::stride, ::stride]))
        z = depth[v, u]
        xyz = np.stack([(u - camera.cx) / camera.fx * z, (v - camera.cy) / camera.fy * z, z], -1)
        return self._rerun.Points3D(
            camera.to_world(xyz) if camera.pose is not None else xyz,
            colors=viz.as_uint8(p.image)[v, u],
            class_ids=None if p.labels is None else p.labels[v, u].astype(np.uint16),
        )

    def _depth(self, metres: Float32[np.ndarray, "h w"]) -> Any:
        known = np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32)
        return self._rerun.DepthImage(known, meter=1.0)

    def _axes(self) -> Any:
        """Up is the axis of the world that most points upwards in the cameras' pictures."""
        axis = int(np.abs(self._up).argmax())
        name = f"RIGHT_HAND_{'XYZ'[axis]}_{'UP' if self._up[axis] > 0 else 'DOWN'}"
        return getattr(self._rerun.ViewCoordinates, name)

    def _log(self, entity: str, what: Any, static: bool = False) -> set[str]:
        self._recording.log(entity, what, static=static, strict=True)
        return {entity}

    def _clear(self, shown: set[str]) -> None:
        """Entities keep what they were given until they are told otherwise."""
        for entity in self._shown - shown:
            self._log(entity, self._rerun.Clear(recursive=False))
        self._shown = shown

    def _unwritable(self, error: Exception) -> UserError:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return UserError(f"cannot write {self.path.name} to {self.path.parent}: {reason}")


def _sdk() -> Any:
    try:
        import rerun  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("Rerun recordings need rerun-sdk: pip install 'enfilade[rerun]'") from error
    return rerun


def _context(rr: Any, space: LabelSpace) -> Any:
    """The classes' names and colours, and black for what has none."""
    known = [(k, name, tuple(int(c) for c in space.colours[k])) for k, name in enumerate(space.names)]
    return rr.AnnotationContext([*known, (IGNORE, "unlabelled", (0, 0, 0))])


def _layout(poses: bool) -> Any:
    """What the viewer shows at first: the scene, and the image, its labels and its depth beside it."""
    rr = _sdk()
    blueprint = rr.blueprint
    overrides: dict[str, Any] = {
        f"world/room/{part}/{HIDDEN}": blueprint.EntityBehavior(visible=False) for part in ("seen", "completed")
    }
    if poses:
        begin, now = rr.TimeRangeBoundary.infinite(), rr.TimeRangeBoundary.cursor_relative()
        overrides["world/points"] = blueprint.VisibleTimeRanges(timeline="frame", start=begin, end=now)
    flat = [f"- /{IMAGE}/{name}" for name in ("labels", "depth", "measured")]  # they would hide the points
    scene = blueprint.Spatial3DView(
        origin="world", contents=["+ /world/**", *flat, "- /world/source"], name="scene", overrides=overrides
    )

    def view(name: str, *shown: str) -> Any:
        return blueprint.Spatial2DView(origin=IMAGE, contents=[f"+ /{IMAGE}/{s}" for s in shown], name=name)

    flat_views = view("image", "rgb"), view("labels", "rgb", "labels"), view("depth", "depth")
    rows = blueprint.Horizontal(scene, blueprint.Vertical(*flat_views), column_shares=[2, 1])
    panels = blueprint.BlueprintPanel(state="collapsed"), blueprint.SelectionPanel(state="collapsed")
    return blueprint.Blueprint(rows, *panels)


def _frame_rate(path: str) -> float | None:
    """Frames a second that the video's header states, None where it does not."""
    capture = cv2.VideoCapture(path)
    rate = capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    return float(rate) if 0 < rate < 1e4 else None


# --- sequences with poses ---------------------------------------------------------------------------------------------


def wants_poses(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder of frames (`data.frames`) with poses and intrinsics, which `log_sequence` can place
    in one world. Raises what `Frames` raises for a folder with poses in which something else is amiss."""
    root = Path(path)
    if not root.is_dir():
        return False
    if not (any((root / name).is_dir() for name in ("poses", "pose")) or any(root.glob("*.pose.txt"))):
        return False
    return Frames(root)[0].camera is not None


def log_sequence(
    reader: Reader,
    predictor: Predictor,
    path: str | os.PathLike,
    *,
    every: int = 1,
    points: int = POINTS,
    quiet: bool = False,
    on_prediction: Callable[[str, Prediction], object] | None = None,
) -> int:
    """Predict on the frames of a reader whose cameras have poses, and write them to one recording: the scene grows as
    the viewer's time runs. `frame` is the number in the reader; `time` is there where all frames are named by their
    time since 1970 (seconds with a decimal point, as in TUM RGB-D, or nanoseconds, as in EuRoC). A sensor's depth is
    logged beside the predicted one.

    Args:
        every: take each so many-th frame.
        on_prediction: called with the name and the prediction of each frame.

    Returns the number of frames written. Raises UserError where a frame has no camera at all, and whatever stops a
    prediction: there is no recording then.
    """
    from enfilade.report import progress

    if every < 1:
        raise UserError(f"every must be at least 1, not {every}")
    times = [moment(name) for name in reader.names]
    known = all(time is not None for time in times)
    done = 0
    with RerunFile(path, poses=True, points=points) as recording:
        for i in progress(range(0, len(reader), every), "predicting", quiet):
            sample = reader[i]
            if sample.camera is None:
                raise UserError(f"{reader.name}: {sample.name} has no camera: a sequence needs intrinsics and poses")
            prediction = predictor.predict(images.Image(sample.image, name=sample.name), camera=sample.camera)
            recording.frame(prediction, number=i, time=times[i] if known else None, measured=sample.depth)
            done += 1
            if on_prediction is not None:
                on_prediction(sample.name, prediction)
    return done


def moment(name: str) -> np.datetime64 | None:
    """The time that a frame is named by, None for any other name."""
    if match := _SECONDS.fullmatch(name):
        return np.datetime64(int(match[1]) * 10**9 + int(match[2].ljust(9, "0")), "ns")
    return np.datetime64(int(name), "ns") if _NANOSECONDS.fullmatch(name) else None
