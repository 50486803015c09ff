"""The staged training loop.

Resume is bit-exact because nothing random has a state: the order of an epoch, each sample's augmentation and each
step's dropout are functions of (seed, stage, epoch or step, index). What remains, weights, optimiser, moving average
and counters, lies in one file, `last.safetensors`, replaced atomically.

One process, or many under `torchrun` or `accelerate launch`: each takes its slice of every global batch.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from enfilade import checkpoint
from enfilade.data.transforms import Augment
from enfilade.errors import UserError
from enfilade.losses import objective
from enfilade.stages import Recipe, Stage
from enfilade.types import Batch, Sample, collate

log = logging.getLogger(__name__)


class Augmented(Dataset):
    """A reader's samples, augmented as a pure function of (seed, stage, epoch, index)."""

    def __init__(self, reader, recipe: Recipe, stage_index: int):
        stage = recipe.stages[stage_index]
        self.reader, self.key = reader, (recipe.seed, stage_index)
        self.augment = Augment(
            stage.size, scale=recipe.scale, focal=recipe.focal, zoom=stage.zoom, flip=stage.flip, colour=stage.colour
        )
        self.with_depth = supervised(len(reader), recipe.depth_fraction, recipe.seed)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        sample = self.reader[index]
        if not self.with_depth[index]:
            sample = sample.replace(depth=None)
        return self.augment(sample, np.random.default_rng((*self.key, epoch, index)))


def supervised(count: int, fraction: float, seed: int) -> np.ndarray:
    """Which of `count` samples keep their depth: a random subset, the same in every epoch (GAD Section 4.5)."""
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng((seed, 5)).permutation(count)[: round(fraction * count)]] = True
    return chosen


class Order(Sampler):
    """Batches of (epoch, index) of this process, from micro-batch `start` to the end of the stage."""

    def __init__(self, count: int, recipe: Recipe, stage_index: int, start: int, rank: int, world: int):
        stage = recipe.stages[stage_index]
        self.seed, self.stage = (recipe.seed, stage_index, 1), stage
        self.count, self.start, self.rank, self.world = count, start, rank, world
        self.per_epoch = steps_per_epoch(count, stage, world) * stage.accumulate

    def __len__(self) -> int:
        return self.per_epoch * self.stage.epochs - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch = self.stage.batch
        for epoch in range(self.start // self.per_epoch, self.stage.epochs):
            order = np.random.default_rng((*self.seed, epoch)).permutation(self.count)
            needed = self.per_epoch * batch * self.world
            order = np.resize(order, needed)  # a data set smaller than one batch is repeated
            first = max(0, self.start - epoch * self.per_epoch)
            for k in range(first, self.per_epoch):
                at = (k * self.world + self.rank) * batch
                yield [(epoch, int(i)) for i in order[at : at + batch]]


def steps_per_epoch(count: int, stage: Stage, world: int) -> int:
    """Updates in an epoch; the remainder of an epoch that fills no batch is dropped (another one in each epoch)."""
    return max(1, count // (stage.batch * stage.accumulate * world))


def learning_rate(stage: Stage, step: int, total: int, per_epoch: int) -> float:
    """Factor of the peak rate at update `step` of `total`."""
    t = step / max(1, total)
    if stage.schedule == "onecycle":
        if t < stage.warmup:
            return max(0.02, t / stage.warmup)
        return 0.5 * (1 + math.cos(math.pi * (t - stage.warmup) / (1 - stage.warmup))) + 1e-4
    if stage.schedule == "poly":
        return (1 - t) ** 0.9
    if stage.schedule == "step":
        return 0.1 ** (step // (per_epoch * stage.step_epochs))
    return 1.0


def class_weights(reader, power: float, classes: int) -> Tensor | None:
    """Median-frequency weights (median_freq / freq_c) to the given power; freq_c counts c's pixels over all pixels of
    the images that contain c (Eigen & Fergus 2015, Section 6.3.2). Classes that never occur get 0."""
    if power == 0:
        return None
    pixels, area = np.zeros(classes), np.zeros(classes)
    for i in range(len(reader)):
        labels = reader.labels(i) if hasattr(reader, "labels") else reader[i].labels
        counts = np.bincount(labels.ravel(), minlength=256)[:classes]
        pixels += counts
        area += (counts > 0) * counts.sum()
    frequency = pixels / np.maximum(area, 1)
    seen = frequency > 0
    weights = np.where(seen, np.median(frequency[seen]) / np.where(seen, frequency, 1), 0) ** power
    return torch.tensor(weights, dtype=torch.float32)


class MovingAverage:
    """Exponential moving average of weights; buffers (batch-norm statistics) are copied."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # a young average must forget its random start
        now = network.state_dict()
        floats = [k for k, v in now.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.state[k] for k in floats], [now[k] for k in floats], 1 - decay)
        for k, v in now.items():
            if not v.is_floating_point():
                self.state[k].copy_(v)


def part_of(network: nn.Module) -> dict[str, str]:
    """Parameter name -> part name."""
    owner = {}
    ids = {id(p): n for n, p in network.named_parameters()}
    for part, modules in network.parts.items():  # type: ignore[attr-defined]
        for module in modules:
            owner |= {ids[id(p)]: part for p in module.parameters()}
    lost = set(ids.values()) - owner.keys()
    if lost:
        raise ValueError(f"{type(network).__name__}.parts leaves out {sorted(lost)[:3]}")
    return owner


def freeze(network: nn.Module, stage: Stage) -> None:
    """Training mode, but for frozen parts: their parameters take no gradient and their batch norms do not move."""
    network.train()
    parts: dict[str, list[nn.Module]] = network.parts  # type: ignore[assignment]
    unknown = set(stage.train) - {"*"} - parts.keys()
    if unknown:
        raise UserError(f"stage {stage.name!r} trains {sorted(unknown)}, which the model lacks: it has {sorted(parts)}")
    for part, modules in parts.items():
        learns = "*" in stage.train or part in stage.train
        for module in modules:
            module.requires_grad_(learns)
            if not learns:
                module.eval()


def make_optimiser(network: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    owner = part_of(network)
    groups: dict[tuple[str, bool], dict] = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1  # no weight decay on biases and batch norms
            group = groups.setdefault((owner[name], decays), {"params": [], "part": owner[name]})
            group["params"].append(p)
            group["weight_decay"] = stage.weight_decay if decays else 0.0
            group["lr"] = group["peak"] = stage.lr * stage.lr_parts.get(owner[name], 1.0)
    if not groups:
        raise UserError(f"stage {stage.name!r} trains nothing: its parts {stage.train} have no parameters")
    make = {
        "adamw": lambda g: torch.optim.AdamW(g, lr=stage.lr),
        "adam": lambda g: torch.optim.Adam(g, lr=stage.lr),
        "sgd": lambda g: torch.optim.SGD(g, lr=stage.lr, momentum=stage.momentum),
    }
    return make[stage.optimiser](list(groups.values()))


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


def model_meta(recipe: Recipe, stage: Stage, ignored: tuple[int, ...], extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": recipe.model,
        "arguments": recipe.arguments,
        "recipe": recipe.name,
        "space": recipe.space,
        "scale": recipe.scale,
        "size": [round(480 * recipe.scale), round(640 * recipe.scale)],
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
    resume: bool = True,
    skip_nonfinite: bool = False,
    save_every: int = 0,
    stop_after: int | None = None,
    workers: int = 1,
    log_every: int = 20,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train `recipe` on a reader; returns the last validation's scores and the throughput.

    Args:
        train_data, val_data: readers (`enfilade.data.open_dataset`); without `val_data` nothing is validated and the
            final weights count as best.
        out: run folder. Gets recipe.json, last.safetensors (to resume), best.safetensors and final.safetensors
            (models, `enfilade.load` takes them), TensorBoard events and log.jsonl.
        resume: go on from `out`/last.safetensors where it exists; a finished run returns at once.
        skip_nonfinite: drop an update whose gradient is NaN or infinite, instead of stopping.
        save_every: updates between saves of the state; 0 saves after each epoch.
        stop_after: stop (saved) after so many updates of this call.
        workers: loader processes; 0 loads in the training process.

    Raises:
        UserError: the run folder holds another recipe; a loss that is not finite (the last good state is kept).
    """
    from accelerate import Accelerator

    out = Path(out)
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=recipe.precision, cpu=cpu, log_with="tensorboard", project_dir=str(out))
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    with accelerator.main_process_first():
        claim(out, recipe, resume, main)

    torch.manual_seed(recipe.seed)
    last = out / "last.safetensors"
    saved = checkpoint.read(last) if resume and last.is_file() else None
    arguments = recipe.arguments | ({"weights": None} if saved else {})  # the state holds the encoder's weights
    network = checkpoint.build(recipe.model, arguments).to(memory_format=torch.channels_last)
    if main and not quiet:
        trunk = getattr(network, "trunk", network)
        print(f"{recipe.name}: {'resumed from ' + str(last) if saved else getattr(trunk, 'loaded', 'random weights')}")
    weights = class_weights(train_data, recipe.class_weighting, recipe.arguments.get("classes", 40))
    if weights is not None:
        weights = weights.to(accelerator.device)
    progress = saved[1]["progress"] if saved else {"stage": 0, "step": 0, "update": 0, "best": -1.0, "scores": {}}
    ignored = tuple(getattr(train_data, "ignored", ()))
    accelerator.init_trackers("events")

    updates_here, images_here, waited, begun = 0, 0, 0.0, time.perf_counter()
    finished = False
    for stage_index in range(progress["stage"], len(recipe.stages)):
        stage = recipe.stages[stage_index]
        freeze(network, stage)
        optimiser = make_optimiser(network, stage)
        model, optimiser = accelerator.prepare(network, optimiser)
        average = MovingAverage(network, stage.ema) if stage.ema else None
        same = saved is not None and saved[1]["progress"]["stage"] == stage_index
        if saved is not None:
            # A state saved at a stage's end already points at the next stage: its optimiser is not ours
            within = same and progress["step"] > 0
            load_state(*saved, network, optimiser if within else None, average if within else None)
            if average is not None and not within:
                average = MovingAverage(network, stage.ema)
            saved = None
        per_epoch = steps_per_epoch(len(train_data), stage, world)
        total = per_epoch * stage.epochs
        order = Order(len(train_data), recipe, stage_index, progress["step"] * stage.accumulate, rank, world)
        loader = iter(
            DataLoader(
                Augmented(train_data, recipe, stage_index),
                batch_sampler=order,
                collate_fn=collate,
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                generator=torch.Generator().manual_seed(0),  # else the loader draws from the global generator
                worker_init_fn=one_thread,
            )
        )
        owner = part_of(network)
        trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        for step in range(progress["step"], total):
            update = progress["update"]
            torch.manual_seed(recipe.seed * 1_000_003 + update * 1009 + rank)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * learning_rate(stage, step, total, per_epoch)
            buffers = {k: v.clone() for k, v in network.named_buffers()} if skip_nonfinite else {}
            parts: dict[str, Tensor] = {}
            for micro in range(stage.accumulate):
                waiting = time.perf_counter()
                batch: Batch = next(loader).to(accelerator.device)
                waited += time.perf_counter() - waiting
                images_here += len(batch) * world
                partial = micro < stage.accumulate - 1
                context = accelerator.no_sync(model) if partial else accelerator.autocast()
                with context, accelerator.autocast():
                    output = model(batch.image, **extra_inputs(network, batch))
                    loss, values = objective(output, batch, stage.losses, weights)
                    accelerator.backward(loss / stage.accumulate)
                parts = {k: parts.get(k, 0) + v / stage.accumulate for k, v in values.items()}
            norms = clip(trained, owner, stage.clip)
            if not math.isfinite(sum(norms.values())):
                # Gradients are reduced over the processes by now, so all of them come to the same decision
                message = f"stage {stage.name!r}, update {update}: " + describe_nonfinite(parts, norms)
                optimiser.zero_grad()
                if not skip_nonfinite:
                    accelerator.end_training()
                    kept = f"the last good state is {last}" if last.is_file() else "no state was saved yet"
                    raise UserError(f"training diverged at {message}; {kept}; lower lr, clip, or skip such updates")
                for k, v in network.named_buffers():
                    v.copy_(buffers[k])
                if main:
                    log.warning("skipped %s", message)
            else:
                optimiser.step()
                optimiser.zero_grad()
                if average is not None:
                    average.update(network, update)
            updates_here += 1
            progress |= {"stage": stage_index, "step": step + 1, "update": update + 1}
            epoch_ends = (step + 1) % per_epoch == 0
            epoch = (step + 1) // per_epoch

            if main and ((update + 1) % log_every == 0 or step + 1 == total):
                elapsed = time.perf_counter() - begun
                rates = {"images_per_second": images_here / elapsed, "data_waiting": waited / elapsed}
                values = {k: float(v) for k, v in parts.items()}
                record = {"stage": stage.name, "epoch": step / per_epoch, **values, **rates}
                accelerator.log({k: v for k, v in record.items() if k != "stage"}, step=update + 1)
                accelerator.log({f"norm/{k}": v for k, v in norms.items()}, step=update + 1)
                append(out / "log.jsonl", {"update": update + 1, **record})
                if not quiet:
                    losses = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
                    print(
                        f"{stage.name} {step + 1}/{total}  epoch {step / per_epoch:.1f}/{stage.epochs}  {losses}  "
                        f"{rates['images_per_second']:.2f} images/s, waiting for data {rates['data_waiting']:.1%}",
                        flush=True,
                    )

            at_end = step + 1 == total
            if val_data is not None and epoch_ends and (epoch % stage.evaluate_every == 0 or at_end):
                if main:
                    pause = time.perf_counter()
                    with swapped(network, average):
                        scores = validate(network, recipe, val_data, ignored, accelerator.device)
                        meta = model_meta(recipe, stage, ignored, {"scores": scores, "epoch": epoch, "stage": stage.name})
                        if scores["miou"] > progress["best"]:
                            progress["best"] = scores["miou"]
                            checkpoint.save_model(out / "best.safetensors", network, meta)
                    freeze(network, stage)
                    progress["scores"] = scores
                    accelerator.log({f"val/{k}": v for k, v in scores.items()}, step=update + 1)
                    append(out / "log.jsonl", {"update": update + 1, "stage": stage.name, "epoch": epoch, "val": scores})
                    if not quiet:
                        print("validation  " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()), flush=True)
                    begun += time.perf_counter() - pause
                accelerator.wait_for_everyone()
            if at_end:
                progress |= {"stage": stage_index + 1, "step": 0}
                if average is not None:
                    network.load_state_dict(average.state)  # the next stage goes on from the averaged weights
            if main and (at_end or (epoch_ends if save_every == 0 else (update + 1) % save_every == 0)):
                save_state(last, network, optimiser, average, progress)
            if stop_after is not None and updates_here >= stop_after and not at_end:
                if main:
                    save_state(last, network, optimiser, average, progress)
                finished = True
                break
        del loader
        progress["step"] = 0 if not finished else progress["step"]
        if finished:
            break
    complete = progress["stage"] == len(recipe.stages)
    if main and complete:
        meta = model_meta(recipe, recipe.stages[-1], ignored, {"scores": progress["scores"], "stage": "final"})
        if saved is not None:
            load_state(*saved, network, None, None)
        checkpoint.save_model(out / "final.safetensors", network, meta)
        if val_data is None:
            checkpoint.save_model(out / "best.safetensors", network, meta)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    elapsed = max(time.perf_counter() - begun, 1e-9)
    return {
        "recipe": recipe.name,
        "complete": complete,
        "updates": progress["update"],
        "images_per_second": images_here / elapsed,
        "data_waiting": waited / elapsed,
        "seconds": elapsed,
        "best_miou": progress["best"],
        **progress["scores"],
    }


def claim(out: Path, recipe: Recipe, resume: bool, main: bool) -> None:
    """Take the run folder for this recipe, or say why not."""
    path = out / "recipe.json"
    text = json.dumps(asdict(recipe), indent=1)
    if path.is_file() and resume and (out / "last.safetensors").is_file():
        if json.loads(path.read_text()) != json.loads(text):
            raise UserError(f"{out} holds a run of another recipe (see {path}): choose another folder, or resume=False")
        return
    if main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}; choose a folder that you may write to") from error


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def extra_inputs(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What a model takes beside RGB: the fields of the batch that it names in `uses`, and, if it can take it, which
    samples have depth."""
    inputs = {name: getattr(batch, name) for name in getattr(network, "uses", ())}
    missing = [k for k, v in inputs.items() if v is None]
    if missing:
        raise UserError(f"this recipe needs {missing[0]} in its data: open the data set with {missing[0]}=True")
    if getattr(network, "depth", None) is not None and batch.depth is not None:
        inputs["has_depth"] = batch.has_depth
    return inputs


def clip(trained, owner: dict[str, str], limits: dict[str, float]) -> dict[str, float]:
    """Clip each part's gradient to its norm; returns all parts' norms before clipping."""
    gradients: dict[str, list[Tensor]] = {}
    for name, p in trained:
        if p.grad is not None:
            gradients.setdefault(owner[name], []).append(p.grad)
    norms = {}
    for part, grads in gradients.items():
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        norms[part] = float(norm)
        if part in limits and math.isfinite(norms[part]) and norms[part] > limits[part]:
            torch._foreach_mul_(grads, limits[part] / norms[part])
    return norms


def describe_nonfinite(parts: dict[str, Tensor], norms: dict[str, float]) -> str:
    bad = [k for k, v in parts.items() if not math.isfinite(float(v))]
    if bad:
        return f"the loss {' and '.join(bad)} is NaN or infinite"
    return f"the gradient of {' and '.join(k for k, v in norms.items() if not math.isfinite(v))} is NaN or infinite"


class swapped:
    """Within it, the network holds the averaged weights."""

    def __init__(self, network: nn.Module, average: MovingAverage | None):
        self.network, self.average = network, average

    def __enter__(self) -> nn.Module:
        self.kept = {k: v.clone() for k, v in self.network.state_dict().items()}
        if self.average is not None:
            self.network.load_state_dict(self.average.state)
        return self.network

    def __exit__(self, *_) -> None:
        self.network.load_state_dict(self.kept)


def validate(network: nn.Module, recipe: Recipe, reader, ignored: tuple[int, ...], device) -> dict[str, float]:
    """Scores of one validation pass, without test-time augmentation: miou, pixel_accuracy, ..., rmse."""
    from enfilade.evaluate import score
    from enfilade.predict import Predictor

    meta = model_meta(recipe, recipe.stages[-1], ignored, {})
    precision = "bf16" if recipe.precision == "bf16" else "fp32"
    predictor = Predictor(checkpoint.Loaded(network.eval(), meta), flip=False, precision=precision, device=device)
    result = score(predictor, reader, quiet=True)
    keep = ("miou", "pixel_accuracy", "mean_accuracy", "rmse", "abs_rel", "delta1")
    return {k: v for part in result.values() if isinstance(part, dict) for k, v in part.items() if k in keep}


def append(path: Path, record: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
