"""The verbs that answer for images: predict, refine and demo."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from tyro.conf import Positional, arg

from enfilade.errors import UserError
from enfilade.options import (
    Answering,
    Count,
    File,
    Flag,
    Folder,
    MaybeFile,
    MaybeNumber,
    Model,
    camera_of,
    complain,
    describe_line,
    image_size,
    read_camera,
    use_threads,
)


@dataclass(frozen=True, kw_only=True)
class Predict(Answering):
    """Label and measure images, folders, patterns and videos.

    Each image gets labels, metric depth, pictures, arrays and a coloured point cloud. Metres need a camera: give it,
    or the focal length in the photo's EXIF is taken, or one is assumed (and said so).
    """

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH [PATH ...]", help_behavior_hint="")]
    """Images, folders, quoted patterns such as 'shots/**/*.jpg', or videos."""
    out: Folder = "out"
    """Folder for the results."""
    files: tuple[File, ...] = get_args(File)
    """What to write: labels (PNG); depth and, where a network iterates, its spread (16-bit PNG, mm); colour (depth with
    a bar of metres), overlay and panel (pictures); arrays (NPZ); points (PLY)."""
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
    json: Flag = False
    """Print the results as JSON, and nothing else, on stdout."""

    def run(self) -> int:
        if not self.paths:
            raise UserError("predict needs at least one PATH: an image, a folder, a pattern or a video")
        if self.every < 1:
            raise UserError(f"--every must be at least 1, not {self.every}")
        from enfilade.predict_files import predict_many

        camera = self._camera()
        use_threads()
        predictor = self.predictor()

        def tell(path: str, result: dict[str, Any] | UserError) -> None:
            if isinstance(result, UserError):
                complain(str(result) if path in str(result) else f"{path}: {result}")
            elif not self.json:
                print(describe_line(path, result), flush=True)

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
        )
        if self.json:
            failed = [{"source": path, "error": error} for path, error in summary.failed]
            print(json.dumps({"out": self.out, "done": summary.done, "failed": failed}, indent=1))
        elif summary.done:
            print(f"{len(summary.done)} done, in {self.out}")
        return 0 if not summary.failed else 1 if summary.done else 2

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
    xy: Annotated[tuple[float, float, float], arg(metavar="PX PX PX")] = (160.0, 100.0, 3.0)
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
    model: Model = "gad-nyuv2"
    """A shipped model, a model file, or the folder of a training run."""

    def run(self) -> int:
        from enfilade.demo import demo

        use_threads()
        demo(self.image, out=self.out, seed=self.seed, model=self.model)
        return 0
