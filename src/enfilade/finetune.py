"""A shipped model taught one's own classes: from a folder of images and label PNGs to a model file and its scores.

The starting model's network is built anew for the classes of the folder (`carry`): all weights are copied but those of
the layers whose size is the number of classes, and of these the rows of every class that has the same name in both.
Then all of it trains on, the encoder gently (`recipe_for`), on small copies of the images (`copies`).

Depth. Labels and depth share the encoder, so learning new labels alone would let go of the depth. Images without a
depth map of their own are therefore given the starting model's answer as the truth (self-distillation), and the report
says how far the new model's depth is from it.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from enfilade import checkpoint, labels, report
from enfilade.checkpoint import Loaded
from enfilade.copies import MARGIN, prepare
from enfilade.data import weights
from enfilade.data.folder import Folder
from enfilade.errors import UserError
from enfilade.evaluate import score
from enfilade.images import make_folder, write_atomic, write_png
from enfilade.labels import LabelSpace
from enfilade.predict import DEFAULTS, Predictor
from enfilade.shipped import START
from enfilade.stages import Recipe, Stage
from enfilade.train import train
from enfilade.types import Prediction, Sample
from enfilade.viz import comparison

# Networks whose label maps are made by layers of as many channels as there are classes, and that need nothing but RGB
TEACHABLE = ("gad", "joint", "lrn", "segnet", "fcn8s", "peer")
PASSES = 6000  # images that a training sees by default, each at most 60 and at least 6 times
FIRST = 5  # updates after which the time is estimated
PICTURES = 6  # frames in comparison.png
DETAILS = "In detail"  # the headline of report.txt's second half


def finetune(
    root: str | Path,
    *,
    out: str | Path,
    model: str | Path = START,
    epochs: int | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 8,
    lr: float = 5e-4,
    encoder_lr: float = 0.2,
    freeze: Sequence[str] = (),
    class_weighting: float = 0.5,
    classes: str | Path | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    resume: bool = True,
    stop_after: int | None = None,
    workers: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fine-tune `model` on the folder `root` (`data.folder`) and score it on the folder's val images.

    Args:
        out: run folder, see `train`. Beside what a training writes it gets model.safetensors (the result, best by
            validation), report.json, report.txt, confusion.png and comparison.png. Called again it goes on.
        model: a shipped model, a model file or a run folder; one of labels (`TEACHABLE`).
        epochs: passes over the training images; default: about `PASSES` images in all.
        size: (height, width) of the network's input; default: the area of the model's own, in the shape of most images.
        batch: images in an update; fewer where there are fewer.
        lr, encoder_lr: peak learning rate, and the encoder's as a share of it.
        freeze: parts of the network that do not learn: "encoder", or a name in its `parts`.
        class_weighting: power of the median-frequency class weights; 0 none, 1 full.
        classes, val_share, seed: see `data.folder.Folder`; the seed is also the training's.
        precision: of the training; "auto" is bf16 where the processor has it.
        stop_after: stop (saved) after so many updates of this call.
        workers: loader processes.

    Returns: what report.json holds, and {"complete": False} alone after `stop_after`.

    Raises:
        UserError, FileNotFoundError: a folder that `data.folder` refuses, a model that cannot be taught, a run folder
            of other data or settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("fine-tuning runs in one process: start it without torchrun")
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision is fp32, bf16 or auto, not {precision!r}")
    if batch < 1 or (epochs is not None and epochs < 1):
        raise UserError(f"epochs and batch are at least 1, not {epochs} and {batch}")

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    data = {s: Folder(root, s, classes=classes, val_share=val_share, seed=seed) for s in ("train", "val")}
    start = demand_teachable(checkpoint.load(model), model)
    counts = {split: counted(reader) for split, reader in data.items()}
    space = data["train"].space
    known = labels.counterparts(labels.get(start.meta["space"]), space)
    carried = [space.names[new] for new in sorted(known.values())]
    images = {split: len(reader) for split, reader in data.items()}
    images["left out"] = sum(len(reader.left_out) for reader in data.values())
    notes = doubts(space, counts)
    say(f"{root}: " + ", ".join(f"{n} {split}" for split, n in images.items() if n) + " images")
    say(
        f"{len(space)} classes; {model} knows {len(carried)} of them by name"
        + f": {', '.join(carried)}" * bool(carried)
    )
    for note in notes:
        say(f"note: {note}")

    recipe = recipe_for(
        start,
        space,
        size or training_size(data["train"], start.meta),
        images["train"],
        epochs=epochs,
        batch=batch,
        lr=lr,
        encoder_lr=encoder_lr,
        freeze=freeze,
        class_weighting=class_weighting,
        seed=seed,
        precision=precision,
    )
    stage = recipe.stages[0]
    updates = stage.epochs * max(1, images["train"] // stage.batch)
    say(f"{stage.epochs} passes: {updates} updates of {stage.batch} images at {stage.size[1]}x{stage.size[0]}")
    if "depth_berhu" in stage.losses:
        say("depth is kept: where an image has no depth map, the starting model's answer is learned")

    out = make_folder(out)
    prepared = prepare(data, out, start, model, recipe, resume=resume, quiet=quiet)
    checkpoint.write(out / "start.safetensors", carry(start, space, seed), {"start": str(model)})
    common: dict[str, Any] = {"out": out, "init": out / "start.safetensors", "workers": workers, "save_every": 50}
    if stop_after is None and updates > 4 * FIRST and not (resume and (out / "last.safetensors").is_file()):
        first = train(recipe, prepared["train"], prepared["val"], **common, resume=resume, stop_after=FIRST, quiet=True)
        seconds = (updates - FIRST) * stage.batch / first["images_per_second"]
        say(f"about {told(seconds)} of training, by its first {FIRST} updates; stopped, it can go on later")
        resume = True
    result = train(
        recipe, prepared["train"], prepared["val"], **common, resume=resume, stop_after=stop_after, quiet=quiet
    )
    if not result["complete"]:
        return {"complete": False}

    final = save_result(out, start, data["train"], model)
    say(f"scoring {model} and the new model on {images['val']} images")
    found = {
        "data": str(root),
        "start": str(model),
        "model": str(final),
        "images": images,
        "carried": carried,
        "notes": notes,
        "training": {"updates": updates, "epochs": stage.epochs, "size": list(stage.size), "lr": lr, "batch": batch},
        "train_pixels": dict(zip(space.names, counts["train"].pixels.tolist())),
        "train_images": dict(zip(space.names, counts["train"].images.tolist())),
        **compare(start, final, data["val"], out, quiet=quiet),
    }
    for when in ("before", "after"):
        found[f"{when}_known"] = mean_iou(found[when]["segmentation"], carried)
    text = described(found)
    report.write_report(found, out / "report.json")
    write_atomic(out / "report.txt", text.encode())
    report.confusion_picture(found["confusion"], space.names, out / "confusion.png")
    say(f"\n{text.partition(DETAILS)[0]}")
    say(f"more in {out}: report.txt, report.json, confusion.png, comparison.png")
    say(f"\nenfilade predict PHOTO.jpg --model {final} --out answers")
    return found | {"complete": True}


# --- what it will be --------------------------------------------------------------------------------------------------


def demand_teachable(start: Loaded, model: str | Path) -> Loaded:
    """The model, with the defaults of its header, if it is one of labels by RGB alone."""
    kind = start.meta["model"]
    if kind not in TEACHABLE or getattr(start.network, "uses", ()):
        needs = "takes more than RGB" if kind in TEACHABLE else f"is of kind {kind}"
        raise UserError(f"{model} {needs} and cannot be taught classes: start from {START} or lrn-camvid, for example")
    return Loaded(start.network, DEFAULTS | start.meta)


def counted(reader: Folder) -> weights.ClassCounts:
    """The classes of all label PNGs; they are all read before anything is trained.

    Raises:
        UserError: the first that is broken, and how many are.
    """
    counts = weights.count(reader, len(reader.space), tolerant=True)
    if counts.broken:
        more = len(counts.broken) - 1
        hint = f"; {more} more are broken: enfilade data check folder --root {reader.root}" if more else ""
        raise UserError(counts.broken[0][1] + hint)
    if not counts.pixels.any():
        raise UserError(f"{reader.name}: not a pixel has a class, all are void: is 255 a class in these labels?")
    return counts


def doubts(space: LabelSpace, counts: dict[str, weights.ClassCounts]) -> list[str]:
    """What a person should know before trusting the scores."""
    found = []
    for split, verb in (("train", "learned"), ("val", "scored")):
        absent = [name for name, n in zip(space.names, counts[split].pixels) if n == 0]
        if absent:
            found.append(f"no pixel of {', '.join(absent)} in the {split} images: it cannot be {verb}")
    rare = [name for name, n in zip(space.names, counts["train"].images) if 0 < n < 5]
    if rare:
        found.append(f"{', '.join(rare)} in fewer than five train images: expect little of it")
    if counts["val"].total < 5:
        found.append(f"scores over {counts['val'].total} val images are rough: label more, or give val_share")
    return found


def training_size(reader: Folder, meta: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the network's input: the area of the model's own, the shape of most images, multiples of
    32."""
    shapes = [reader.size(i) for i in range(len(reader))]
    aspect = float(np.clip(np.median([w / h for h, w in shapes]), 0.5, 2.0))
    area = math.prod(meta["size"])
    height, width = (max(32, 32 * round(side / 32)) for side in (math.sqrt(area / aspect), math.sqrt(area * aspect)))
    return height, width


def recipe_for(
    start: Loaded,
    space: LabelSpace,
    size: tuple[int, int],
    count: int,
    *,
    epochs: int | None,
    batch: int,
    lr: float,
    encoder_lr: float,
    freeze: Sequence[str],
    class_weighting: float,
    seed: int,
    precision: str,
) -> Recipe:
    """One short stage from the starting model's weights, with a loss for each kind of map that its network makes."""
    if min(size) < 32:
        raise UserError(f"the network's input is at least 32 pixels high and wide, not {size[1]}x{size[0]}")
    with torch.inference_mode():
        output = start.network(torch.zeros(1, 3, 64, 96))
    losses = {"cross_entropy": 1.0}
    if output.side_logits:
        losses["side_cross_entropy"] = 0.3
    if output.depth is not None:
        losses |= {"depth_berhu": 1.0, "depth_scale_invariant": 0.5, "depth_gradient": 0.25}
    parts = list(start.network.parts)  # type: ignore[arg-type]
    frozen = {"trunk" if name == "encoder" else name for name in freeze}
    if lost := sorted(frozen - set(parts)):
        raise UserError(f"{lost[0]!r} is no part that can be frozen: choose among encoder, {', '.join(parts[1:])}")
    stage = Stage(
        name="finetune",
        epochs=epochs or min(60, max(6, round(PASSES / count))),
        losses=losses,
        train=tuple(p for p in parts if p not in frozen) if frozen else ("*",),
        size=size,
        zoom=(0.75, 1.5),
        batch=min(batch, count),
        lr=lr,
        lr_parts={"trunk": encoder_lr},
        weight_decay=0.02,
        warmup=0.1,
        clip=dict.fromkeys(parts, 5.0),
        ema=0.998,
    )
    stage = replace(stage, evaluate_every=math.ceil(stage.epochs / 6))
    focal = start.meta.get("focal")
    return Recipe(
        name=f"own-{str(start.meta.get('recipe', start.meta['model'])).removeprefix('own-')}",
        model=start.meta["model"],
        arguments=start.meta["arguments"] | {"classes": len(space), "weights": None},
        stages=(stage,),
        scale=1 / MARGIN,
        source=(round(size[0] * MARGIN), round(size[1] * MARGIN)),
        # the same canonical camera, at another size
        focal=None if focal is None else focal * math.sqrt(math.prod(size) / math.prod(start.meta["size"])),
        space=space.name,
        class_weighting=class_weighting,
        seed=seed,
        precision="bf16" if precision == "bf16" or (precision == "auto" and has_bf16()) else "no",
    )


def has_bf16() -> bool:
    """Whether bf16 is faster here: on a GPU, or a processor with instructions for it."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.cuda.is_available() or bool(found.get("avx512_bf16") or found.get("amx_bf16"))


# --- the layers of the classes ----------------------------------------------------------------------------------------


def carry(start: Loaded, space: LabelSpace, seed: int = 0) -> dict[str, Tensor]:
    """The starting model's tensors for the classes of `space`.

    Which axes count classes is found by building the network with one class more: such an axis holds the classes, and
    perhaps other channels behind them (LRN's refinements). Along it a class of the same name keeps its row, other
    channels stay, and the rows of new classes are as the network initialises them.
    """
    source = labels.get(start.meta["space"])
    known = labels.counterparts(source, space)
    kind, arguments = start.meta["model"], start.meta["arguments"] | {"weights": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = checkpoint.build(kind, arguments | {"classes": len(space)}).state_dict()
        wider = checkpoint.build(kind, arguments | {"classes": len(source) + 1}).state_dict()
    carried = {}
    for key, old in start.network.state_dict().items():
        new = fresh[key].clone()
        grown = [a - b for a, b in zip(wider[key].shape, old.shape)]
        if not any(grown):
            new = old.clone()
        elif set(grown) <= {0, 1} and known:
            pairs = [axis_pairs(*sizes, len(source), len(space), known) for sizes in zip(old.shape, new.shape, grown)]
            here, there = (tuple(map(torch.from_numpy, np.ix_(*indices))) for indices in zip(*pairs))
            new[there] = old[here].to(new)
        carried[key] = new
    return carried


def axis_pairs(
    old: int, new: int, counts_classes: int, source: int, target: int, known: dict[int, int]
) -> tuple[list[int], list[int]]:
    """Which places of an axis are copied, and to which."""
    if not counts_classes:
        return list(range(old)), list(range(new))
    return [*known, *range(source, old)], [*known.values(), *range(target, new)]


# --- afterwards -------------------------------------------------------------------------------------------------------


def save_result(out: Path, start: Loaded, reader: Folder, model: str | Path) -> Path:
    """Write model.safetensors: the best weights in half precision, with a header that tells where they come from."""
    best = checkpoint.load(out / "best.safetensors")
    shapes = [reader.size(i) for i in range(len(reader))]
    # source pixels to network pixels: the recipe's scale is of the copies
    scale = float(np.median([math.sqrt(math.prod(best.meta["size"]) / (h * w)) for h, w in shapes]))
    meta = best.meta | {"scale": scale, "start": str(model)}
    if start.meta.get("license"):
        meta["license"] = start.meta["license"]
    checkpoint.save_model(out / "model.safetensors", best.network, meta, half=True)
    return out / "model.safetensors"


def compare(start: Loaded, final: Path, reader: Folder, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Score the starting model, whose classes are taken by their names, and the new one on a reader, and measure by how
    much their depths differ; writes comparison.png."""
    before, loaded = Predictor(start.network, start.meta), checkpoint.load(final)
    after = Predictor(loaded.network, loaded.meta)
    depths: list[np.ndarray] = []
    changes: list[np.ndarray] = []
    shown: list[tuple[Sample, Prediction]] = []
    step = max(1, len(reader) // PICTURES)

    def keep(index: int, sample: Sample, prediction: Prediction) -> None:
        if prediction.depth is not None:
            depths.append(thin(prediction.depth))

    def differ(index: int, sample: Sample, prediction: Prediction) -> None:
        if prediction.depth is not None and depths:
            changes.append(np.abs(thin(prediction.depth) - depths[index]).reshape(-1) / depths[index].reshape(-1))
        if index % step == 0 and len(shown) < PICTURES:
            shown.append((sample, prediction))

    first: dict[str, Any] = {}
    if labels.counterparts(before.space, reader.space):
        first = score(before, reader, quiet=quiet, on_frame=keep)
    elif loaded.network.parts.get("depth"):  # type: ignore[union-attr]
        for index in report.progress(range(len(reader)), "depth", quiet):
            sample = reader[index]
            keep(index, sample, before.predict(sample.image, camera=sample.camera))
    second = score(after, reader, quiet=quiet, on_frame=differ)
    write_png(out / "comparison.png", comparison(shown, reader.space))
    return {
        "before": {key: first.get(key) for key in ("segmentation", "depth")},
        "after": {key: second.get(key) for key in ("segmentation", "depth")},
        "depth_change": float(np.median(np.concatenate(changes))) if changes else None,
        "protocol": second["protocol"],
        "confusion": second["confusion"],
    }


def mean_iou(segmentation: dict[str, Any] | None, names: Sequence[str]) -> float | None:
    """Over those of these classes that the truth shows."""
    rows = [] if segmentation is None else segmentation["per_class"]
    values = [row["iou"] for row in rows if row["name"] in names and row["iou"] is not None]
    return sum(values) / len(values) if values else None


def thin(depth: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "_ _"]:
    """Some 64 pixels along the longer side."""
    step = max(1, max(depth.shape) // 64)
    return depth[::step, ::step]


def described(found: dict[str, Any]) -> str:
    """The report for reading: what came of it, class by class; then the tables of `report.table`."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    after, before = found["after"]["segmentation"], found["before"]["segmentation"]
    old = {} if before is None else {row["name"]: row["iou"] for row in before["per_class"]}
    images, total = found["images"], sum(found["train_pixels"].values())
    lines = [f"{found['data']}: {images['train']} images to learn from, {images['val']} scored", ""]
    count = len(found["carried"])
    rows = {"mean IoU, %": (before and before["miou"], after["miou"])}
    if 0 < count < len(after["per_class"]):
        rows[f"of the {count} known classes"] = found["before_known"], found["after_known"]
    lines += [f"{'':<24}{'before':>9}{'after':>9}"]
    lines += [f"{title:<24}{percent(a):>9}{percent(b):>9}" for title, (a, b) in rows.items()]
    lines += ["", f"{'class':<24}{'before':>9}{'after':>9}{'images':>9}{'% of pixels':>13}"]
    for row in sorted(after["per_class"], key=lambda row: -found["train_pixels"][row["name"]]):
        name = row["name"]
        told_before = percent(old.get(name)) if name in found["carried"] else "new"
        share = found["train_pixels"][name] / total
        lines.append(
            f"{name:<24}{told_before:>9}{percent(row['iou']):>9}{found['train_images'][name]:>9}{100 * share:>13.2f}"
        )
    lines += ["", f"before: {found['start']}, its answers taken by name; what it calls otherwise is wrong"]
    if (change := found["depth_change"]) is not None:
        lines.append(f"depth: half of the pixels are within {change:.1%} of the starting model's")
        if change > 0.15:
            lines.append("note: that is much; learn more slowly (--lr) or leave the encoder alone (--freeze encoder)")
    lines += [f"note: {note}" for note in found["notes"]]
    tables = found["protocol"] | {k: v for k, v in found["after"].items() if v is not None}
    return "\n".join(lines) + f"\n\n{DETAILS}\n\n{report.table(tables)}"


def told(seconds: float) -> str:
    """A length of time, roughly."""
    if seconds < 90:
        return f"{math.ceil(seconds / 10) * 10} seconds"
    return f"{math.ceil(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
