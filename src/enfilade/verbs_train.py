"""The verbs of training and scoring: train, evaluate and reproduce."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

import enfilade
from enfilade.errors import UserError
from enfilade.options import (
    Answering,
    Count,
    Flag,
    Folder,
    MaybeCount,
    MaybeFolder,
    Name,
    Options,
    Weights,
    open_reader,
    parse_options,
    positive,
    use_threads,
)


@dataclass(frozen=True)
class Train:
    """Train a recipe; run again, it goes on where it stopped.

    On many processes: torchrun --nproc-per-node 2 -m enfilade train ... One process uses all cores (--threads or
    OMP_NUM_THREADS for fewer) for the network, and --workers more to load the data.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help_behavior_hint="")]
    """What to train; `enfilade info` lists the recipes."""
    data: Name
    """The data set: nyuv2, camvid, sunrgbd, voc2012, frames, folder, rooms, room-files or ssc."""
    out: Folder
    """Run folder: its state, models and logs."""
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
    extra: Annotated[str | None, arg(metavar="NAME")] = None
    """Another data set, mixed into stages that want a share of it (--set stages.0.extra=0.5): rooms beside photos."""
    extra_root: MaybeFolder = None
    """Folder of the extra data; its split is train."""
    init: Annotated[tuple[str, ...], arg(metavar="NAME|FILE|RUN [...]", help_behavior_hint="")] = ()
    """Start from this model's weights, as far as they fit, instead of from the encoder's alone; of several models, each
    gives what fits, and later ones win."""
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
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "none"], ...] = ("tensorboard",)
    """Where the curves go, beside log.jsonl; several may be named."""
    quiet: Flag = False
    """Print only the result."""

    def run(self) -> int:
        from enfilade import recipes, trackers
        from enfilade.overrides import override

        trackers.check(self.track)  # rather now than after the data is open
        recipe = override(recipes.get(self.recipe, self.encoder_weights), self.set)
        options = parse_options(self.option)
        if recipe.arguments.get("hha"):
            options.setdefault("hha", True)
        train_data = open_reader(self.data, self.root, self.split, options)
        val_data = None
        if self.val_split != "none":
            val_data = open_reader(self.data, self.root, self.val_split, options)
        extra_data = None if self.extra is None else open_reader(self.extra, self.extra_root, "train", {})
        use_threads(self.threads)
        result = enfilade.train(
            recipe,
            train_data,
            val_data,
            out=self.out,
            extra_data=extra_data,
            init=self.init or None,
            resume=self.resume,
            skip_nonfinite=self.skip_nonfinite,
            save_every=self.save_every,
            workers=self.workers,
            track=self.track,
            quiet=self.quiet,
        )
        told = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.items()}
        print(f"in {self.out}  " + "  ".join(f"{k} {v}" for k, v in told.items()))
        return 0


@dataclass(frozen=True, kw_only=True)
class Evaluate(Answering):
    """Score a model on a data set, at the truth's own size; prints a table and writes a report."""

    data: Name
    """The data set: nyuv2, camvid, sunrgbd, voc2012, frames, folder, rooms, room-files or ssc."""
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
    limit: MaybeCount = None
    """Score only the first N samples."""
    guidance: Literal["truth", "predicted"] = "truth"
    """What guides a model that needs labels or region support: the data's own, or the answer of gad-nyuv2."""
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
        from enfilade.info import completes

        if self.out is not None:
            make_folder(self.out)  # rather now than after an hour of scoring
        elif self.pictures:
            raise UserError("--pictures needs a folder for them: give --out DIR")
        use_threads()
        if completes(self.model):
            return self._rooms(reader)
        predictor = self.predictor(guidance=self.guidance)
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
        if self.also:
            raise UserError(f"{self.model} completes rooms, and such a model answers alone: leave --also out")
        if self.crf:
            raise UserError(f"a CRF refines the labels of pixels, and {self.model} completes rooms: leave --crf out")
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


@dataclass(frozen=True)
class Reproduce:
    """Train and score the rows of a paper's table, the paper's numbers beside ours; goes on where it stopped."""

    table: Annotated[Positional[str], arg(metavar="TABLE", help_behavior_hint="")]
    """gad-table4, gad-table5, joint-table2, joint-table3, rsn-table3, imenet-table3, imenet-fig9, lrn-table2 or
    lrn-table4."""
    data: Name
    """The data set: nyuv2, camvid, sunrgbd, voc2012, frames, folder, rooms, room-files or ssc."""
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
    """Only the first N samples of each split; the table says so."""
    seed: Count = 0
    """Of everything random."""
    workers: Count = 1
    """Processes that load data."""
    threads: MaybeCount = None
    """Threads of the network; default: OMP_NUM_THREADS, or all cores."""

    def run(self) -> int:
        from enfilade import experiments, tables

        tables.get(self.table)
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
