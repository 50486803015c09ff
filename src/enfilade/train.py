"""The staged training loop.

Resume is bit-exact because nothing random has a state: the order of an epoch, each sample's augmentation and each
step's dropout are functions of (seed, stage, epoch or step, index). What remains, weights, optimiser, moving average
and counters, lies in one file, `last.safetensors`, replaced atomically.

One process, or many under `torchrun` or `accelerate launch`: each takes its slice of every global batch.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import enfilade
from enfilade import checkpoint, labels, trackers
from enfilade.data.epochs import batches, class_weights, steps_per_epoch
from enfilade.data.weights import read as read_weights
from enfilade.errors import UserError
from enfilade.images import write_atomic
from enfilade.losses import objective
from enfilade.optim import MovingAverage, clip, freeze, learning_rate, make_optimiser, part_of, swapped
from enfilade.stages import Recipe, Stage
from enfilade.teachers import Teachers
from enfilade.types import Batch

log = logging.getLogger(__name__)


def save_state(path: Path, network: nn.Module, optimiser, average: MovingAverage | None, progress: dict) -> None:
    tensors = {f"model.{k}": v for k, v in network.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.state.items()}
    state = optimiser.state_dict()
    for index, values in state["state"].items():
        tensors |= {f"optimiser.{index}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    checkpoint.write(path, tensors, {"progress": progress, "groups": state["param_groups"]})


def load_state(tensors: dict[str, Tensor], meta: dict, network: nn.Module, optimiser, average) -> None:
    def under(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    network.load_state_dict(under("model."))
    if average is not None and (saved := under("average.")):
        for k, v in average.state.items():
            v.copy_(saved[k])
    if optimiser is not None:
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in under("optimiser.").items():
            index, name = key.split(".", 1)
            states.setdefault(int(index), {})[name] = value
        optimiser.load_state_dict({"state": states, "param_groups": meta["groups"]})


def start_from(network: nn.Module, init: str | Path | Sequence[str | Path]) -> str:
    """Fill `network` with the tensors of a model file that fit by name and shape, or of several, one after the other;
    returns a sentence about it. Encoders fit each other wherever a network keeps its own; where it has several side by
    side, each model fills one of them, in order.

    Raises:
        UserError: no such model, or one of which nothing fits.
    """
    own = network.state_dict()
    taken: dict[str, Tensor] = {}
    told = []
    for index, name in enumerate([init] if isinstance(init, str | Path) else init):
        path = checkpoint.resolve(name)
        tensors = {at_home(k, own, index): v for k, v in checkpoint.read(path)[0].items()}
        fitting = {k: v.to(own[k].dtype) for k, v in tensors.items() if k in own and v.shape == own[k].shape}
        if not any(p in fitting for p, _ in network.named_parameters()):
            raise UserError(f"no tensor of {path} fits {type(network).__name__}: start from a model of the same kind")
        taken |= fitting
        told.append(f"{path} ({len(fitting)} of {len(own)} tensors)")
    network.load_state_dict(taken, strict=False)
    fresh = sorted(own.keys() - taken.keys())
    text = f"starts from {' and '.join(told)}"
    return f"{text}; new are {', '.join(fresh[:3])}{' and more' if len(fresh) > 3 else ''}" if fresh else text


def at_home(name: str, own: Collection[str], index: int = 0) -> str:
    """Where a network with the tensors `own` has the tensor of that name: encoders are called trunk, of the network or
    of a part of it. Of several encoders side by side, number `index` takes it, and the first gives it."""
    if name in own or "trunk." not in name:
        return name
    ending = name.rpartition("trunk.")[2].removeprefix("nets.0.")
    homes = f"trunk.{ending}", f"trunk.nets.{index}.{ending}"
    return next((k for k in own if k.endswith(homes)), name)


def model_meta(recipe: Recipe, ignored: tuple[int, ...], extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": recipe.model,
        "arguments": recipe.arguments,
        "recipe": recipe.name,
        "space": recipe.space,
        "scale": recipe.scale,
        "size": [round(side * recipe.scale) for side in recipe.source],
        "focal": recipe.focal,
        "ignored": list(ignored),
        **extra,
    }


def train(
    recipe: Recipe,
    train_data,
    val_data=None,
    *,
    out: str | Path,
    extra_data=None,
    init: str | Path | Sequence[str | Path] | None = None,
    passed: int = 0,
    resume: bool = True,
    skip_nonfinite: bool = False,
    save_every: int = 0,
    stop_after: int | None = None,
    workers: int = 1,
    log_every: int = 20,
    track: str | Sequence[str] = ("tensorboard",),
    quiet: bool = False,
) -> dict[str, Any]:
    """Train `recipe` on a reader; returns the last validation's scores and the throughput.

    Args:
        train_data, val_data: readers (`enfilade.data.open_dataset`); without `val_data` nothing is validated and the
            final weights count as best.
        out: run folder. Gets recipe.json, last.safetensors (to resume), best.safetensors and final.safetensors
            (models, `enfilade.load` takes them), log.jsonl and what the trackers write.
        extra_data: reader of samples that are mixed into the stages that want a share of such (`Stage.extra`): rendered
            rooms beside a few photos, say. Of the label space of `train_data`; classes that are ignored there are
            ignored here. Class weights are those of `train_data`.
        init: a shipped model, a model file or a run folder (or several, of which later ones win) whose weights the run
            starts from, as far as they fit: a classifier for other classes, say, starts anew, and the run says so.
        passed: stages at the recipe's beginning that `init` has been through: training starts after them, with the
            same order and augmentation as if they had been trained here.
        resume: go on from `out`/last.safetensors where it exists; a finished run returns at once.
        skip_nonfinite: drop an update whose gradient is NaN or infinite, instead of stopping.
        save_every: updates between saves of the state; 0 saves after each epoch.
        stop_after: stop (saved) after so many updates of this call.
        workers: loader processes; 0 loads in the training process.
        track: where the curves go: some of tensorboard, wandb and mlflow (`enfilade.trackers`), or none.

    Raises:
        UserError: the run folder holds another recipe; a tracker that is unknown or cannot start; a loss that is not
            finite (the last good state is kept).
    """
    names = trackers.check(track)
    check_extra(recipe, train_data, extra_data)
    run = Run(recipe, train_data, val_data, Path(out), resume, quiet, init, passed)
    run.extra_data = extra_data
    run.skip_nonfinite, run.save_every, run.log_every, run.workers = skip_nonfinite, save_every, log_every, workers
    with run.track(names):
        for index in range(run.progress["stage"], len(recipe.stages)):
            stopped = run.stage(index, stop_after)
            if stopped:
                break
        return run.finish()


class Run:
    """A training in progress. `progress` (JSON) says how far it is: the stage, its next step, updates in all."""

    skip_nonfinite, save_every, log_every, workers = False, 0, 20, 1
    extra_data: Any = None

    def __init__(self, recipe: Recipe, train_data, val_data, out: Path, resume: bool, quiet: bool, init=None, passed=0):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        # A table trains its rows in one process, but accelerate would keep the first one's settings and process group
        AcceleratorState._reset_state(reset_partial_state=True)
        self.recipe, self.train_data, self.val_data, self.out, self.quiet = recipe, train_data, val_data, out, quiet
        self.accelerator = Accelerator(
            mixed_precision="no",  # it is the stage's to say, see `autocast`
            cpu=not torch.cuda.is_available(),
        )
        self.main = self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        with self.accelerator.main_process_first():
            claim(out, recipe, resume, self.main)

        self.last = out / "last.safetensors"
        self.saved = checkpoint.read(self.last) if resume and self.last.is_file() else None
        self.resumed = self.saved is not None
        torch.manual_seed(recipe.seed)
        # A saved state holds the encoder's weights, so that their file is no longer needed
        arguments = recipe.arguments | ({"weights": None} if self.saved or init is not None else {})
        self.network = checkpoint.build(recipe.model, arguments).to(memory_format=torch.channels_last)
        self.progress: dict[str, Any] = {"stage": 0, "step": 0, "update": 0, "best": -1.0, "scores": {}}
        if self.saved:
            self.progress = dict(self.saved[1]["progress"])
            load_state(*self.saved, self.network, None, None)
        elif init is not None:
            world = self.world
            updates = sum(s.epochs * steps_per_epoch(len(train_data), s, world) for s in recipe.stages[:passed])
            self.progress |= {"stage": passed, "update": updates}
            self.network.loaded = start_from(self.network, init)  # type: ignore[assignment]
        loaded = getattr(self.network, "loaded", None) or getattr(self.network.trunk, "loaded", "random weights")
        self.say(f"{recipe.name}: {f'resumed from {self.last}' if self.saved else loaded}")

        if recipe.class_weights is not None:
            weights = torch.tensor([*read_weights(recipe.class_weights, labels.get(recipe.space)).values()])
        else:
            weights = class_weights(train_data, recipe.class_weighting, recipe.arguments.get("classes", 40))
        self.class_weights = None if weights is None else weights.to(self.accelerator.device)
        self.ignored = tuple(getattr(train_data, "ignored", ()))
        self.trackers = trackers.Trackers({})
        self.updates, self.images, self.waited, self.begun = 0, 0, 0.0, time.perf_counter()

    def track(self, names: Sequence[str]) -> trackers.Trackers:
        """Start the trackers, on the first process and where there is something left to train."""
        if self.main and self.progress["stage"] < len(self.recipe.stages):
            told = {"train": self.train_data, "extra": self.extra_data, "val": self.val_data}
            data = {k: getattr(v, "name", type(v).__name__) for k, v in told.items() if v is not None}
            config = asdict(self.recipe) | {"data": data, "processes": self.world, "enfilade": enfilade.__version__}
            self.trackers = trackers.start(names, self.out, config, self.resumed)
            self.begun = time.perf_counter()  # a tracker may take seconds to start
        return self.trackers

    def say(self, text: str) -> None:
        if self.main and not self.quiet:
            print(text, flush=True)

    def bar(self, name: str, first: int, total: int) -> Iterator[int]:
        """The steps from `first`, with a progress bar on a terminal (elsewhere the log lines must do)."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, disable=not self.main or self.quiet or not sys.stdout.isatty()) as progress:
            task = progress.add_task(name, total=total, completed=first)
            for step in range(first, total):
                yield step
                progress.advance(task)

    def stage(self, index: int, stop_after: int | None) -> bool:
        """Run a stage from where `progress` stands; True if `stop_after` ended it early."""
        stage = self.recipe.stages[index]
        freeze(self.network, stage)
        optimiser = make_optimiser(self.network, stage)
        self.model, self.optimiser = self.accelerator.prepare(self.network, optimiser)
        self.average = MovingAverage(self.network, stage.ema) if stage.ema else None
        first = self.progress["step"]
        if self.saved and first > 0:  # a state saved at a stage's end (step 0 of the next) brings only weights
            load_state(*self.saved, self.network, self.optimiser, self.average)
        self.saved = None
        per_epoch = steps_per_epoch(len(self.train_data), stage, self.world)
        total = per_epoch * stage.epochs
        start = first * stage.accumulate
        loader = batches(
            self.train_data, self.recipe, index, start, self.rank, self.world, self.workers, self.extra_data
        )
        self.owner = part_of(self.network)
        self.teachers = Teachers(stage.teachers, self.recipe, self.accelerator.device) if stage.teachers else None
        for step in self.bar(stage.name, first, total):
            for group in self.optimiser.param_groups:
                group["lr"] = group["peak"] * learning_rate(stage, step, total, per_epoch)
            losses, norms = self.update(stage, loader)
            epoch, into_epoch = divmod(step + 1, per_epoch)
            ends_epoch, ends_stage = into_epoch == 0, step + 1 == total
            self.updates += 1
            self.progress |= {"stage": index, "step": step + 1, "update": self.progress["update"] + 1}
            if self.main and (self.progress["update"] % self.log_every == 0 or ends_stage):
                self.log(stage, f"{step + 1}/{total}", (step + 1) / per_epoch, losses, norms)
            if self.val_data is not None and ends_epoch and (epoch % stage.evaluate_every == 0 or ends_stage):
                self.validate(stage, epoch)
            if ends_stage:
                self.progress |= {"stage": index + 1, "step": 0}
                if self.average is not None:
                    self.network.load_state_dict(self.average.state)  # the next stage goes on from the average
            stops = stop_after is not None and self.updates >= stop_after
            due = ends_epoch if self.save_every == 0 else self.progress["update"] % self.save_every == 0
            if self.main and (due or ends_stage or stops):
                save_state(self.last, self.network, self.optimiser, self.average, self.progress)
            if stops:
                return True
        return False

    def update(self, stage: Stage, loader: Iterator[Batch]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """One optimiser step; returns the losses and each part's gradient norm before clipping."""
        # dropout is a function of the update, not of what was drawn before it
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.progress["update"] * 1009 + self.rank)
        buffers = {k: v.clone() for k, v in self.network.named_buffers()} if self.skip_nonfinite else {}
        losses: dict[str, Tensor] = {}
        for micro in range(stage.accumulate):
            asked = time.perf_counter()
            batch = next(loader).to(self.accelerator.device)
            self.waited += time.perf_counter() - asked
            self.images += len(batch) * self.world
            last = micro == stage.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model), self.autocast(stage):
                if self.teachers is not None:
                    batch = replace(batch, taught=self.teachers(batch.image))
                output = self.model(batch.image, **extra_inputs(self.network, batch, stage.inputs))
                loss, terms = objective(output, batch, stage.losses, self.class_weights, stage.resize)
                self.accelerator.backward(loss / stage.accumulate)
            losses = {k: losses.get(k, 0) + v / stage.accumulate for k, v in terms.items()}
        norms = clip(self.network, self.owner, stage.clip)
        # Gradients are reduced over the processes by now, so all of them come to the same decision.
        if math.isfinite(sum(norms.values())):
            self.optimiser.step()
            if self.average is not None:
                self.average.update(self.network, self.progress["update"])
        else:
            self.nonfinite(f"stage {stage.name!r}, update {self.progress['update']}: {what_broke(losses, norms)}")
            for k, v in self.network.named_buffers():
                v.copy_(buffers[k])
        self.optimiser.zero_grad()
        return losses, norms

    def autocast(self, stage: Stage):
        bf16 = (stage.precision or self.recipe.precision) == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16)

    def nonfinite(self, where: str) -> None:
        """Stop, or go on under `skip_nonfinite`."""
        if self.skip_nonfinite:
            if self.main:
                log.warning("skipped %s", where)
            return
        self.accelerator.end_training()
        kept = f"the last good state is {self.last}" if self.last.is_file() else "no state was saved yet"
        raise UserError(f"training diverged at {where}; {kept}; lower lr, clip, or skip such updates")

    def log(self, stage: Stage, count: str, epoch: float, losses: dict[str, Tensor], norms: dict[str, float]) -> None:
        elapsed = time.perf_counter() - self.begun
        rates = {"images_per_second": self.images / elapsed, "data_waiting": self.waited / elapsed}
        values = {k: float(v) for k, v in losses.items()}
        update = self.progress["update"]
        more = {f"norm/{k}": v for k, v in norms.items()}
        more |= {f"lr/{group['part']}": group["lr"] for group in self.optimiser.param_groups}
        self.trackers.log(values | rates | more, update)
        append(self.out / "log.jsonl", {"update": update, "stage": stage.name, "epoch": epoch, **values, **rates})
        terms = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
        speed = f"{rates['images_per_second']:.2f} images/s, waiting for data {rates['data_waiting']:.1%}"
        self.say(f"{stage.name} {count}  epoch {epoch:.1f}/{stage.epochs}  {terms}  {speed}")

    def validate(self, stage: Stage, epoch: int) -> None:
        """Score the averaged weights on the first process; keep them if they are the best so far."""
        if self.main:
            pause = time.perf_counter()
            with swapped(self.network, self.average):
                recipe = self.recipe.replace(precision=stage.precision or self.recipe.precision)
                scores = validate(self.network, recipe, self.val_data, self.ignored, self.accelerator.device)
                merit = next((scores[k] for k in ("ssc_miou", "miou") if k in scores), 1 / (1 + scores.get("rmse", 0)))
                if merit > self.progress["best"]:
                    self.progress["best"] = merit
                    self.save_model("best.safetensors", {"scores": scores, "stage": stage.name, "epoch": epoch})
            freeze(self.network, stage)
            self.progress["scores"] = scores
            update = self.progress["update"]
            self.trackers.log({f"val/{k}": v for k, v in scores.items()}, update)
            append(self.out / "log.jsonl", {"update": update, "stage": stage.name, "epoch": epoch, "val": scores})
            self.say("validation  " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
            self.begun += time.perf_counter() - pause
        self.accelerator.wait_for_everyone()

    def save_model(self, name: str, extra: dict[str, Any]) -> None:
        checkpoint.save_model(self.out / name, self.network, model_meta(self.recipe, self.ignored, extra))

    def finish(self) -> dict[str, Any]:
        complete = self.progress["stage"] == len(self.recipe.stages)
        if self.main and complete and (self.updates or not (self.out / "final.safetensors").is_file()):
            for name in ["final.safetensors"] + ["best.safetensors"] * (self.val_data is None):
                self.save_model(name, {"scores": self.progress["scores"], "stage": "final"})
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        elapsed, scores = max(time.perf_counter() - self.begun, 1e-9), self.progress["scores"]
        return {
            "recipe": self.recipe.name,
            "complete": complete,
            "updates": self.progress["update"],
            "seconds": elapsed,
            "images_per_second": self.images / elapsed,
            "data_waiting": self.waited / elapsed,
            **({"best_miou": self.progress["best"]} if "rmse" not in scores or "miou" in scores else {}),
            **scores,
        }


def check_extra(recipe: Recipe, train_data, extra_data) -> None:
    """That the extra data and the recipe's wish for some go together.

    Raises:
        UserError: one without the other, other labels, or a share that cannot be.
    """
    for stage in recipe.stages:
        if not 0 <= stage.extra < 1:
            raise UserError(f"stage {stage.name!r}: extra is a share from 0 to below 1, not {stage.extra:g}")
        if stage.extra and stage.augmentation == "offline":
            raise UserError(f"stage {stage.name!r}: fixed pictures (augmentation='offline') go without extra data")
    wanted = [stage.name for stage in recipe.stages if stage.extra]
    if wanted and extra_data is None:
        raise UserError(f"stage {wanted[0]!r} mixes extra data in, and there is none: name it, or set extra=0")
    if extra_data is not None:
        if not wanted:
            raise UserError(f"no stage of {recipe.name} mixes extra data in: set extra in one of them, such as 0.5")
        if extra_data.space.name != train_data.space.name:
            raise UserError(
                f"{extra_data.name} has labels of {extra_data.space.name}, {train_data.name} of "
                f"{train_data.space.name}: data that are mixed share a label space"
            )


def claim(out: Path, recipe: Recipe, resume: bool, main: bool) -> None:
    """Take the run folder for this recipe, or say why not."""
    path = out / "recipe.json"
    text = json.dumps(asdict(recipe), indent=1)
    if main:
        for stale in out.glob(".*.safetensors.*.tmp"):  # half-written by a run that was killed
            stale.unlink(missing_ok=True)
    if path.is_file() and resume and (out / "last.safetensors").is_file():
        if completed(json.loads(path.read_text())) != json.loads(text):
            raise UserError(f"{out} holds a run of another recipe (see {path}): choose another folder, or resume=False")
        return
    if main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not resume:  # else an early crash would leave the old recipe's state under the new one's name
                (out / "last.safetensors").unlink(missing_ok=True)
            write_atomic(path, text.encode())
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to {out}: {reason}; choose a folder that you may write to") from error


def finished(out: Path, recipe: Recipe) -> bool:
    """Whether a run folder holds the model that this recipe has been trained to."""
    path = out / "recipe.json"
    if not (path.is_file() and (out / "final.safetensors").is_file()):
        return False
    return completed(json.loads(path.read_text())) == json.loads(json.dumps(asdict(recipe)))


def completed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A run's recipe.json with the defaults of settings that did not exist yet when it was written."""

    def defaults(kind) -> dict[str, Any]:
        found = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
        return json.loads(json.dumps(found))  # tuples become lists

    return defaults(Recipe) | recipe | {"stages": [defaults(Stage) | stage for stage in recipe["stages"]]}


# What to do about an input that a batch lacks.
LACKS = {
    "hha": "open the data set with hha=True",
    "labels": "choose data with labels",
    "support": "choose data with labels and depth, and a recipe with regions=true",
    "tsdf": "choose data with label volumes (room-files, ssc), and a recipe with volumes=true",
}


def extra_inputs(network: nn.Module, batch: Batch, more: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What a model takes beside RGB: the fields of the batch that it names in `uses` or that are named in `more`, and,
    if it can take it, which samples have depth."""
    inputs = {name: getattr(batch, name) for name in (*getattr(network, "uses", ()), *more)}
    missing = [k for k, v in inputs.items() if v is None]
    if missing:
        raise UserError(f"this recipe needs {missing[0]} in its data: {LACKS.get(missing[0], 'choose other data')}")
    if getattr(network, "depth", None) is not None:
        inputs["has_depth"] = batch.has_depth  # also where a whole batch has none
    return inputs


def what_broke(losses: dict[str, Tensor], norms: dict[str, float]) -> str:
    bad = [k for k, v in losses.items() if not math.isfinite(float(v))]
    if bad:
        return f"the loss {' and '.join(bad)} is NaN or infinite"
    return f"the gradient of {' and '.join(k for k, v in norms.items() if not math.isfinite(v))} is NaN or infinite"


def validate(network: nn.Module, recipe: Recipe, reader, ignored: tuple[int, ...], device) -> dict[str, float]:
    """Scores of one validation pass, without test-time augmentation: miou, pixel_accuracy, ..., rmse."""
    from enfilade.evaluate import score
    from enfilade.predict import Predictor

    meta = model_meta(recipe, ignored, {})
    if recipe.volumes:
        from enfilade.complete import score as score_completion

        result = score_completion(network, meta, reader, quiet=True, device=device)
        both = result["completion"] | result.get("segmentation", {})
        return {k: both[k] for k in ("ssc_miou", "sc_iou", "miou") if both.get(k) is not None}
    precision = "bf16" if recipe.precision == "bf16" else "fp32"
    predictor = Predictor(network, meta, flip=False, precision=precision, device=device)
    result = score(predictor, reader, quiet=True)
    keep = ("miou", "pixel_accuracy", "mean_accuracy", "rmse", "abs_rel", "delta1")
    return {k: v for part in result.values() if isinstance(part, dict) for k, v in part.items() if k in keep}


def append(path: Path, record: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
