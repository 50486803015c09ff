"""The verbs that answer for images: predict, refine and demo."""

import contextlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import Positional, arg

from enfilade.errors import UserError
from enfilade.options import (
    Answering,
    Count,
    File,
    Flag,
    Folder,
    Kind,
    MaybeCount,
    MaybeFile,
    MaybeNumber,
    Model,
    camera_of,
    complain,
    describe_line,
    image_size,
    positive,
    read_camera,
    use_threads,
)
from enfilade.shipped import DEFAULT


@dataclass(frozen=True, kw_only=True)
class Predict(Answering):
    """Label and measure images, folders, patterns and videos.

    Each image gets labels, metric depth, pictures, arrays and a coloured point cloud. Metres need a camera: give it,
    or the focal length in the photo's EXIF is taken, or one is assumed (and said so). Run again with the same options,
    it goes on where it stopped: what is done stays, what failed is tried again.
    """

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH [PATH ...]", help_behavior_hint="")]
    """Images, folders, quoted patterns such as 'shots/**/*.jpg', or videos."""
    out: Folder = "out"
    """Folder for the results."""
    files: tuple[Kind, ...] = get_args(File)
    """What to write: labels (PNG); depth and, where a network iterates, its spread (16-bit PNG, mm); colour (depth with
    a bar of metres), overlay and panel (pictures); arrays (NPZ); points (PLY). Where asked for, ros (depth in metres,
    camera and classes as ROS 2 takes them)."""
    fx: MaybeNumber = None
    """Focal length in pixels of the images, which all are of one camera."""
    fy: MaybeNumber = None
    """The vertical one; default: fx."""
    cx: MaybeNumber = None
    """Principal point; default: the centre."""
    cy: MaybeNumber = None
    """Principal point; default: the centre."""
    fov: Annotated[float | None, arg(metavar="DEGREES", help_behavior_hint="")] = None
    """Horizontal field of view instead."""
    camera: MaybeFile = None
    """JSON file instead: {"fx", "fy", "cx", "cy"} and optionally "width", "height" of the image they belong to."""
    every: Count = 1
    """Of a video, take each N-th frame."""
    resume: Flag = True
    """Start anew; without it what is done is not done again, by the manifest in DIR."""
    shard: Annotated[str | None, arg(metavar="I/N", help_behavior_hint="")] = None
    """Take each N-th file from the I-th, such as 2/8; shards may share one DIR."""
    workers: MaybeCount = None
    """Processes, which share the cores; default: one, or of Ray's cluster one a GPU or 4 cores."""
    engine: Literal["local", "ray"] = "local"
    """Where they run: on this machine, or as actors of a Ray cluster."""
    address: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """Of the Ray cluster; default: RAY_ADDRESS, or a Ray of this machine's, for this run."""
    index: Flag = False
    """Write DIR/index.parquet: a row for each image with its numbers."""
    rerun: Annotated[str | None, arg(metavar="FILE.rrd", help_behavior_hint="")] = None
    """Also write a Rerun recording of all images, which are then all predicted anew; of one folder of frames with poses
    it is one world."""
    json: Flag = False
    """Print the results as JSON, and nothing else, on stdout."""

    def run(self) -> int:
        if not self.paths:
            raise UserError("predict needs at least one PATH: an image, a folder, a pattern or a video")
        if self.every < 1:
            raise UserError(f"--every must be at least 1, not {self.every}")
        from enfilade.predict_files import predict_many

        positive("--workers", self.workers)
        recording = None
        if self.rerun is not None:
            from enfilade.rerun_file import RerunFile, wants_poses

            recording = RerunFile(self.rerun)  # complains before a model is loaded
            if len(self.paths) == 1 and wants_poses(self.paths[0]):
                return self._sequence()
        shard = None if self.shard is None else _shard(self.shard)
        camera = self._camera()
        use_threads()
        # Of a cluster's devices this machine need have none
        predictor = (replace(self, device="cpu") if self.engine == "ray" else self).predictor()

        def tell(path: str, result: dict[str, Any] | UserError) -> None:
            if isinstance(result, UserError):
                complain(str(result) if path in str(result) else f"{path}: {result}")
            elif not self.json:
                print(describe_line(path, result), flush=True)

        with recording or contextlib.nullcontext():
            summary = predict_many(
                self.paths,
                self.out,
                predictor,
                files=self.files,
                camera=camera,
                fov=self.fov,
                every=self.every,
                # On a terminal the bar keeps clear of the lines; where stdout goes elsewhere it would swallow them
                quiet=self.json or not sys.stdout.isatty(),
                on_result=tell,
                on_prediction=recording.add if recording else None,
                on_note=None if self.json else print,
                resume=self.resume and recording is None,
                shard=shard,
                workers=self.workers,
                index=self.index,
                engine=self.engine,
                address=self.address,
                device=self.device,
                collect=self.json,
            )
        made, before = summary.made, summary.before
        if self.json:
            failed = [{"source": path, "error": error} for path, error in summary.failed]
            print(json.dumps({"out": self.out, "before": before, "done": summary.done, "failed": failed}, indent=1))
        elif before and not (made or summary.failed):
            print(f"{before} done before, in {self.out}: nothing left to do (--no-resume starts anew)")
        elif made:
            print(f"{made} done{f', {before} before' if before else ''}, in {self.out}")
        return 0 if not summary.failed else 1 if made or before else 2

    def _sequence(self) -> int:
        """A folder of frames with poses: each with its own camera, all in one recording."""
        from enfilade.data.frames import Frames
        from enfilade.outputs import describe, save
        from enfilade.rerun_file import log_sequence

        if self._camera() is not None or self.fov is not None:
            raise UserError(f"{self.paths[0]} tells its cameras itself: leave --fx, --fov and --camera out")
        if self.engine != "local" or (self.workers or 1) > 1 or self.shard is not None:
            raise UserError("a recording is written by one process: leave --rerun out, or --engine, --workers, --shard")
        use_threads()
        done: list[dict[str, Any]] = []

        def keep(name: str, prediction) -> None:
            done.append(
                describe(prediction, source=name, files=save(prediction, self.out, stem=name, files=self.files))
            )
            if not self.json:
                print(describe_line(name, done[-1]), flush=True)

        reader = Frames(self.paths[0])
        quiet = self.json or not sys.stdout.isatty()
        log_sequence(reader, self.predictor(), str(self.rerun), every=self.every, quiet=quiet, on_prediction=keep)
        if self.json:
            print(json.dumps({"out": self.out, "before": 0, "done": done, "failed": []}, indent=1))
        else:
            print(f"{len(done)} done, in {self.out}; the recording is {self.rerun}")
        return 0

    def _camera(self):
        """The camera that the options tell of, or None."""
        numbers = {"fx": self.fx, "fy": self.fy, "cx": self.cx, "cy": self.cy}
        given = {k: v for k, v in numbers.items() if v is not None}
        if sum(map(bool, (given, self.camera is not None, self.fov is not None))) > 1:
            raise UserError("give the camera once: by --fx --fy --cx --cy, by --fov, or by --camera")
        if self.camera is not None:
            given = read_camera(Path(self.camera))
        elif not given:
            return None
        if "fx" not in given:
            raise UserError("a camera needs --fx, its focal length in pixels")
        if "width" not in given or "height" not in given:
            given["width"], given["height"] = image_size(self.paths)
        return camera_of(given, int(given["width"]), int(given["height"]))


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
        raise UserError(f"--shard is I/N, such as 2/8, not {text!r}")
    return int(number), int(count)


@dataclass(frozen=True)
class Refine:
    """Refine any network's class probabilities for one image by its colours and, if given, depth: a dense CRF."""

    labels_prob: Annotated[str, arg(metavar="FILE")]
    """Probabilities, .npy or .npz: classes x height x width or height x width x classes, of any size."""
    image: Annotated[str, arg(metavar="FILE")]
    """The photo."""
    depth: MaybeFile = None
    """16-bit PNG in millimetres, 0 unknown."""
    out: Folder = "out"
    """Folder for the label map, its overlay, and arrays (NPZ: labels, confidence, probabilities)."""
    space: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Label space of the classes, for the overlay: nyu40, camvid11 ..."""
    iterations: Count = 5
    """Of mean field."""
    weights: Annotated[tuple[float, float, float], arg(metavar="W W W")] = (4.0, 1.0, 1.0)
    """Of the kernels: colour and place, depth and place, place alone."""
    xy: Annotated[tuple[float, float, float], arg(metavar="PX PX PX")] = (80.0, 100.0, 3.0)
    """Their widths in pixels of a 640x480 image."""
    rgb: Annotated[float, arg(metavar="LEVELS")] = 8.0
    """Width of the first in colours of 0 to 255."""
    metres: Annotated[float, arg(metavar="METRES")] = 0.2
    """Width of the second in depth."""

    def run(self) -> int:
        from enfilade import labels
        from enfilade.ops.crf import Kernel
        from enfilade.refine import CRF, refine_files

        if self.iterations < 0:
            raise UserError(f"--iterations is 0 or more, not {self.iterations}")
        use_threads()
        a, b, c = self.xy
        crf = CRF((Kernel(a, rgb=self.rgb), Kernel(b, depth=self.metres), Kernel(c)), self.weights, self.iterations)
        space = None if self.space is None else labels.get(self.space)
        for path in refine_files(self.labels_prob, self.image, self.out, depth=self.depth, space=space, crf=crf):
            print(path)
        return 0


@dataclass(frozen=True)
class Demo:
    """Render a room, predict on it (and on your image), and write the pictures beside the truth."""

    image: Annotated[Positional[str | None], arg(metavar="[IMAGE]", help_behavior_hint="")] = None
    """A photo of a room."""
    out: Folder = "demo"
    """Folder for the results."""
    seed: Count = 12
    """Another room for another seed."""
    model: Model = DEFAULT
    """A shipped model, a model file, or the folder of a training run."""

    def run(self) -> int:
        from enfilade.demo import demo

        use_threads()
        demo(self.image, out=self.out, seed=self.seed, model=self.model)
        return 0
