"""The verbs of the command line: one dataclass each, whose fields are its options and which calls one public function.

Nothing heavy is imported before a verb runs, so that help is instant.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import Positional, arg

import enfilade
from enfilade.errors import UserError
from enfilade.options import (
    Count,
    Device,
    File,
    Flag,
    Folder,
    MaybeCount,
    MaybeFile,
    MaybeFolder,
    MaybeNumber,
    Model,
    Name,
    Options,
    Precision,
    Weights,
    camera_of,
    complain,
    describe_line,
    image_size,
    open_reader,
    parse_options,
    positive,
    read_camera,
    use_threads,
)
from enfilade.verbs_complete import Complete
from enfilade.verbs_data import (
    DataCheck,
    DataHHA,
    DataPrepare,
    DataRegions,
    DataRender,
    DataShow,
    DataVoxels,
    DataWeights,
)
from enfilade.verbs_serve import Serve


@dataclass(frozen=True)
class Predict:
    """Label and measure images, folders, patterns and videos.

    Each image gets labels, metric depth, pictures, arrays and a coloured point cloud. Metres need a camera: give it,
    or the focal length in the photo's EXIF is taken, or one is assumed (and said so).
    """

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH [PATH ...]", help_behavior_hint="")]
    """Images, folders, quoted patterns such as 'shots/**/*.jpg', or videos."""
    out: Folder = "out"
    """Folder for the results."""
    model: Model = "gad-nyuv2"
    """A shipped model, a model file, or the folder of a training run."""
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
    flip: Flag = True
    """Without it the answers for the image and its mirror image are averaged: better, at twice the time."""
    scales: Annotated[tuple[float, ...], arg(metavar="S [S ...]")] = (1.0,)
    """Average over these factors of the training scale; S costs S times S the time."""
    window: Annotated[str | None, arg(metavar="WIDTHxHEIGHT|FACTOR", help_behavior_hint="")] = None
    """Cover the image by windows of so many network pixels, or of so many training inputs, and blend their answers."""
    overlap: Annotated[float, arg(metavar="SHARE")] = 0.5
    """Share of a window's side that it has in common with the next."""
    resolution: Literal["area", "source"] = "area"
    """What scale 1 is: the area of the training input, or the image's own pixels times the training's factor."""
    every: Count = 1
    """Of a video, take each N-th frame."""
    device: Device = None
    """cpu, cuda, cuda:1 ...; default: a GPU where there is one."""
    precision: Precision = "auto"
    """Of the network's arithmetic; auto is bf16 on a GPU."""
    crf: Flag = False
    """Refine the labels by colours and depth (a dense CRF)."""
    json: Flag = False
    """Print the results as JSON, and nothing else, on stdout."""

    def run(self) -> int:
        if not self.paths:
            raise UserError("predict needs at least one PATH: an image, a folder, a pattern or a video")
        if self.every < 1:
            raise UserError(f"--every must be at least 1, not {self.every}")
        from enfilade.predict import load, predict_many

        camera = self._camera()
        use_threads()
        predictor = load(
            self.model,
            self.device,
            flip=self.flip,
            scales=self.scales,
            window=self.window,
            overlap=self.overlap,
            resolution=self.resolution,
            precision=self.precision,
            crf=self.crf,
        )

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
class Train:
    """Train a recipe; run again, it goes on where it stopped.

    On many processes: torchrun --nproc-per-node 2 -m enfilade train ... One process uses all cores (--threads or
    OMP_NUM_THREADS for fewer) for the network, and --workers more to load the data.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help_behavior_hint="")]
    """What to train; `enfilade info` lists the recipes."""
    data: Name
    """The data set: nyuv2, camvid, sunrgbd, voc2012, frames, rooms, room-files or ssc."""
    out: Folder
    """Run folder: its state, models, logs and TensorBoard events."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    encoder_weights: Weights = None
    """Pretrained weights of the encoder: a safetensors file, or timm to fetch them by name."""
    set: Options = ()
    """Change the recipe: --set seed=1 --set stages.0.epochs=3 --set stages.*.batch=4 --set arguments.dropout=0.2."""
    split: Name = "train"
    """Split to train on."""
    val_split: Name = "val"
    """Split to validate on; none for no validation."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=200 for rooms."""
    init: Annotated[str | None, arg(metavar="NAME|FILE|RUN", help_behavior_hint="")] = None
    """Start from this model's weights, as far as they fit, instead of from the encoder's alone."""
    resume: Flag = True
    """Start anew; without it a run in DIR is continued."""
    skip_nonfinite: Flag = False
    """Drop an update whose gradient is NaN or infinite, instead of stopping."""
    save_every: Count = 0
    """Updates between saves of the state; 0 is each epoch."""
    workers: Count = 1
    """Processes that load data; 0 loads in the training process."""
    threads: MaybeCount = None
    """Threads of the network; default: OMP_NUM_THREADS, or all cores."""
    quiet: Flag = False
    """Print only the result."""

    def run(self) -> int:
        from enfilade import recipes
        from enfilade.overrides import override

        recipe = override(recipes.get(self.recipe, self.encoder_weights), self.set)
        options = parse_options(self.option)
        if recipe.arguments.get("hha"):
            options.setdefault("hha", True)
        train_data = open_reader(self.data, self.root, self.split, options)
        val_data = None
        if self.val_split != "none":
            val_data = open_reader(self.data, self.root, self.val_split, options)
        use_threads(self.threads)
        result = enfilade.train(
            recipe,
            train_data,
            val_data,
            out=self.out,
            init=self.init,
            resume=self.resume,
            skip_nonfinite=self.skip_nonfinite,
            save_every=self.save_every,
            workers=self.workers,
            quiet=self.quiet,
        )
        told = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.items()}
        print(f"in {self.out}  " + "  ".join(f"{k} {v}" for k, v in told.items()))
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Score a model on a data set, at the truth's own size; prints a table and writes a report."""

    data: Name
    """The data set: nyuv2, camvid, sunrgbd, voc2012, frames, rooms, room-files or ssc."""
    model: Model = "gad-nyuv2"
    """A shipped model, a model file, or the folder of a training run."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    split: Name = "val"
    """Split to score."""
    out: MaybeFolder = None
    """Folder for report.json, report.txt and confusion.png."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=20 for rooms."""
    crop: Name = "auto"
    """Part of the image that counts: auto (what is usual for the data), nyu (rows 45:471, columns 41:601), or none."""
    depth_average: Literal["image", "pixel"] = "image"
    """Average depth errors per image first, or over all pixels."""
    depth_cap: Annotated[float, arg(metavar="METRES")] = 10.0
    """Truth beyond this does not count."""
    flip: Flag = True
    """Without it the answers for the image and its mirror image are averaged: better, at twice the time."""
    scales: Annotated[tuple[float, ...], arg(metavar="S [S ...]")] = (1.0,)
    """Average over these factors of the training scale; S costs S times S the time."""
    window: Annotated[str | None, arg(metavar="WIDTHxHEIGHT|FACTOR", help_behavior_hint="")] = None
    """Cover the image by windows of so many network pixels, or of so many training inputs, and blend their answers."""
    overlap: Annotated[float, arg(metavar="SHARE")] = 0.5
    """Share of a window's side that it has in common with the next."""
    resolution: Literal["area", "source"] = "area"
    """What scale 1 is: the area of the training input, or the image's own pixels times the training's factor."""
    limit: MaybeCount = None
    """Score only the first N samples."""
    device: Device = None
    """cpu, cuda, cuda:1 ...; default: a GPU where there is one."""
    precision: Precision = "auto"
    """Of the network's arithmetic; auto is bf16 on a GPU."""
    crf: Flag = False
    """Refine the labels by colours and depth (a dense CRF)."""
    guidance: Literal["truth", "predicted"] = "truth"
    """What guides a model that needs labels or region support: the data's own, or the default model's answer."""
    given: tuple[Literal["support"], ...] = ()
    """Tell the model the true region support of each frame in place of the one it generates."""
    convention: Literal["torchssc", "sscnet", "image"] = "torchssc"
    """How a completion model is scored, see `enfilade.metrics_volume`."""
    iterations: MaybeCount = None
    """Of a completion model that iterates, instead of its own."""
    pictures: Count = 0
    """Write comparison.png with so many frames, evenly spread: answer, truth, and where they differ; needs --out."""
    json: Flag = False
    """Print the report as JSON, and nothing else, on stdout."""

    def run(self) -> int:
        reader = open_reader(self.data, self.root, self.split, parse_options(self.option))
        positive("--limit", self.limit)
        from enfilade import report
        from enfilade.images import make_folder, write_atomic

        if self.out is not None:
            make_folder(self.out)  # rather now than after an hour of scoring
        elif self.pictures:
            raise UserError("--pictures needs a folder for them: give --out DIR")
        use_threads()
        if completes(self.model):
            return self._rooms(reader)
        predictor = enfilade.load(
            self.model,
            self.device,
            flip=self.flip,
            scales=self.scales,
            window=self.window,
            overlap=self.overlap,
            resolution=self.resolution,
            precision=self.precision,
            crf=self.crf,
            guidance=self.guidance,
        )
        frames = len(reader) if self.limit is None else min(self.limit, len(reader))
        chosen = {(2 * i + 1) * frames // (2 * self.pictures) for i in range(self.pictures)}
        shown: list[tuple[Any, Any]] = []

        def keep(index: int, sample, prediction) -> None:
            if index in chosen:
                shown.append((sample, prediction.in_space(reader.space.name)))

        result = enfilade.evaluate(
            predictor,
            reader,
            crop=self.crop,
            depth_average=self.depth_average,
            depth_cap=self.depth_cap,
            limit=self.limit,
            given=self.given,
            on_frame=keep,
        )
        confusion = result.pop("confusion", None)
        result["protocol"]["model"] = self.model
        table = report.table(result["protocol"] | {k: result[k] for k in ("segmentation", "depth") if k in result})
        print(json.dumps(result, indent=1) if self.json else table)
        if self.out is not None:
            report.write_report(result | {"confusion": confusion}, Path(self.out, "report.json"))
            write_atomic(Path(self.out, "report.txt"), table.encode())
            if confusion is not None:
                report.confusion_picture(confusion, result["names"], Path(self.out, "confusion.png"))
            if shown:
                from enfilade.images import write_png
                from enfilade.viz import comparison

                write_png(Path(self.out, "comparison.png"), comparison(shown, reader.space))
        return 0

    def _rooms(self, reader) -> int:
        """Score a completion model on label volumes."""
        from enfilade import report
        from enfilade.checkpoint import load
        from enfilade.complete import score
        from enfilade.images import write_atomic

        positive("--iterations", self.iterations)
        loaded = load(self.model)
        result = score(
            loaded.network,
            loaded.meta,
            reader,
            convention=self.convention,
            iterations=self.iterations,
            limit=self.limit,
            device=self.device,
        )
        result["protocol"]["model"] = self.model
        table = report.table(result["protocol"] | {k: v for k, v in result.items() if k != "protocol"})
        print(json.dumps(result, indent=1) if self.json else table)
        if self.out is not None:
            report.write_report(result, Path(self.out, "report.json"))
            write_atomic(Path(self.out, "report.txt"), table.encode())
        return 0


def completes(model: str) -> bool:
    """Whether a model file is of a network that completes rooms."""
    from enfilade.checkpoint import resolve
    from enfilade.info import header

    return header(resolve(model)).get("model") in ("completion", "imenet")


@dataclass(frozen=True)
class Reproduce:
    """Train and score the rows of a paper's table, the paper's numbers beside ours; goes on where it stopped."""

    table: Annotated[Positional[str], arg(metavar="TABLE", help_behavior_hint="")]
    """gad-table4, gad-table5, joint-table2, joint-table3, rsn-table3, imenet-table3, imenet-fig9, lrn-table2 or
    lrn-table4."""
    data: Name
    """The data set: nyuv2, camvid, sunrgbd, voc2012, frames, rooms, room-files or ssc."""
    out: Folder
    """Folder for the runs and the table."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    encoder_weights: Weights = None
    """Pretrained weights of the encoder: a safetensors file, or timm to fetch them by name."""
    epochs: MaybeCount = None
    """Passes over the data in each stage, instead of the recipe's."""
    rows: Annotated[tuple[str, ...], arg(metavar="ROW [ROW ...]", help_behavior_hint="")] = ()
    """Only these rows, by recipe or label; default: all."""
    model: Annotated[str | None, arg(metavar="NAME|FILE|RUN", help_behavior_hint="")] = None
    """Score this trained model in every row instead of training (lrn-table4: all rows are one model's maps)."""
    limit: MaybeCount = None
    """Only the first N samples: a smoke run."""
    seed: Count = 0
    """Of everything random."""
    workers: Count = 1
    """Processes that load data."""
    threads: MaybeCount = None
    """Threads of the network; default: OMP_NUM_THREADS, or all cores."""

    def run(self) -> int:
        from enfilade import experiments

        experiments.get(self.table)
        positive("--epochs", self.epochs)
        positive("--limit", self.limit)
        use_threads(self.threads)
        text = experiments.reproduce(
            self.table,
            data=self.data,
            root=self.root,
            out=self.out,
            encoder_weights=self.encoder_weights,
            epochs=self.epochs,
            rows=self.rows,
            limit=self.limit,
            seed=self.seed,
            workers=self.workers,
            model=self.model,
        )
        print(text)
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


@dataclass(frozen=True)
class Export:
    """Write a model as one file that runs without Enfilade and torch, compare it with torch, and time both."""

    out: Annotated[str, arg(metavar="FILE")]
    """The file to write."""
    model: Model = "gad-nyuv2"
    """A shipped model, a model file, or the folder of a training run."""
    format: Name = "onnx"
    """Of the file: onnx."""
    opset: Count = 20
    """Version of ONNX's operators, 19 to 23."""
    size: Annotated[str | None, arg(metavar="WIDTHxHEIGHT", help_behavior_hint="")] = None
    """Image to time by; default: the training's. The file takes any size."""
    check: Flag = True
    """Neither compare nor time; without it both are done, and a file that differs from torch is not written."""
    crf: Flag = True
    """Leave out the dense CRF of a network that ends in one (joint-nyuv2), for which ONNX has no operators."""
    threads: MaybeCount = None
    """Threads to time with; default: OMP_NUM_THREADS, or all cores."""
    json: Flag = False
    """Print the report as JSON."""

    def run(self) -> int:
        size = None
        if self.size is not None:
            sides = self.size.lower().split("x")
            if len(sides) != 2 or not all(side.isdecimal() for side in sides):
                raise UserError(f"--size is WIDTHxHEIGHT in pixels, such as 320x240, not {self.size!r}")
            size = int(sides[1]), int(sides[0])
        from enfilade import export

        use_threads(self.threads)
        options = {"format": self.format, "opset": self.opset, "check": self.check, "crf": self.crf}
        report = export.export(self.model, self.out, size=size, **options)
        print(json.dumps(report.as_dict(), indent=1) if self.json else export.table(report))
        return 0


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
class Info:
    """Say what is installed and on which machine; list models, recipes, tables and data sets."""

    model: Annotated[str | None, arg(metavar="NAME|FILE|RUN", help_behavior_hint="")] = None
    """Tell of this model only: how it was built and trained, and its scores."""
    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        from enfilade.info import info, text

        if self.model is None:
            use_threads()
        found = info(self.model)
        print(json.dumps(found, indent=1) if self.json else text(found))
        return 0


Verb = (
    Predict
    | Train
    | Evaluate
    | Reproduce
    | DataPrepare
    | DataHHA
    | DataCheck
    | DataShow
    | DataWeights
    | DataRegions
    | DataRender
    | DataVoxels
    | Export
    | Refine
    | Complete
    | Serve
    | Demo
    | Info
)

VERBS: dict[str, type[Verb]] = {
    "predict": Predict,
    "train": Train,
    "evaluate": Evaluate,
    "reproduce": Reproduce,
    "data prepare": DataPrepare,
    "data hha": DataHHA,
    "data check": DataCheck,
    "data show": DataShow,
    "data weights": DataWeights,
    "data regions": DataRegions,
    "data render": DataRender,
    "data voxels": DataVoxels,
    "export": Export,
    "refine": Refine,
    "complete": Complete,
    "serve": Serve,
    "demo": Demo,
    "info": Info,
}
