"""Training as data: a recipe is a model's arguments and the stages it passes through."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Stage:
    """One stretch of training with one objective.

    Args:
        name: of the stage, in logs and checkpoints.
        epochs: passes over the training set.
        losses: named terms of `enfilade.losses.TERMS` and their weights.
        resize: how the truth is brought to the size of a coarser label map: "nearest", or "majority" (the vote of the
            area). `losses` may name a map: {"cross_entropy/s1": 1.0, ...}, from the coarsest.
        teachers: models whose answers the loss term `distillation` compares with (`enfilade.teachers`).
        train: parts of the model (its `parts`) that learn; the others are frozen, their batch norms too. "*" is all.
        inputs: fields of the batch that the model takes in this stage beside RGB and what it always takes (its `uses`).
        size: (height, width) of a training crop.
        zoom: random scaling around the canonical scale (log-uniform).
        augmentation: "online", drawn anew in each epoch; or "offline", six fixed pictures of each sample: itself, its
            mirror image and four crops, shuffled once (Mousavian et al. 2016, Section 4.1). An epoch is all six.
        samples: in an epoch, drawn anew in each; 0 is all.
        extra: share of an epoch's samples that come from the extra data set (`train(extra_data=...)`), beside those of
            the first, which an epoch passes over as ever: at 0.5 as many again.
        flip, colour: see `data.transforms.Augment`.
        paste: share of the samples into which half of the classes of another one are pasted, where they would stand in
            front (`data.transforms.paste`).
        batch: samples in one forward pass, per process.
        accumulate: forward passes per update.
        lr: peak learning rate; `lr_parts` multiplies it per part.
        schedule: "onecycle" (linear warm-up, then cosine to 0), "poly" (power 0.9), "step" (x0.1 every `step_epochs`)
            or "constant".
        warmup: share of the stage that warms up, for "onecycle".
        clip: largest gradient norm per part; parts not named are not clipped.
        ema: decay of the exponential moving average of the weights that is validated and shipped; 0 for none.
        evaluate_every: epochs between validations (the last epoch is always validated).
        norms: what batch norms go by: the "batch"; or the "running" statistics that they have and keep, as in
            prediction, so that small batches do no harm.
        precision: "no" (fp32) or "bf16"; None is the recipe's. What bf16 makes of the weights is always the same error,
            and networks with small depthwise convolutions learn to live with it: a last, short stage in fp32 takes them
            back.
    """

    name: str
    epochs: int
    losses: dict[str, float]
    resize: Literal["nearest", "majority"] = "nearest"
    teachers: tuple[str, ...] = ()
    train: tuple[str, ...] = ("*",)
    inputs: tuple[str, ...] = ()
    size: tuple[int, int] = (240, 320)
    zoom: tuple[float, float] = (1.0, 1.0)
    augmentation: Literal["online", "offline"] = "online"
    samples: int = 0
    extra: float = 0.0
    flip: float = 0.5
    colour: float = 1.0
    paste: float = 0.0
    batch: int = 8
    accumulate: int = 1
    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_parts: dict[str, float] = field(default_factory=dict)
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["onecycle", "poly", "step", "constant"] = "onecycle"
    warmup: float = 0.05
    step_epochs: int = 40
    clip: dict[str, float] = field(default_factory=dict)
    ema: float = 0.0
    evaluate_every: int = 5
    norms: Literal["batch", "running"] = "batch"
    precision: Literal["no", "bf16"] | None = None


@dataclass(frozen=True)
class Recipe:
    """One training run, whole.

    Args:
        name: what it is called in tables and run folders.
        model: a name in `enfilade.checkpoint.MODELS`.
        arguments: the model's constructor.
        stages: in order; each starts from the last weights of the one before.
        scale: source pixels to network pixels at zoom 1, in training and in validation.
        source: (height, width) of the data's images; times `scale`, they are the size at which images are predicted.
        focal: canonical focal length in network pixels (see `data.transforms`); None leaves depth as it is.
        space: label space of the predictions.
        class_weighting: power of the median-frequency class weights (0 none, 1 full, 0.5 their square root).
        class_weights: a file of `enfilade data weights` to use instead.
        regions: samples carry their regions and region support (`ops.regions`), made after augmentation.
        volumes: samples are encoded for completion (`data.volumes`): whole images at the stage's size, mirrored in 3-D
            with its `flip`. Zoom, paste, scale and focal length do not apply.
        depth_fraction: share of the training samples that keep their depth (GAD Section 4.5).
        seed: of everything random: initial weights, order, augmentation, dropout.
        precision: "no" (fp32) or "bf16".
    """

    name: str
    model: str
    arguments: dict[str, Any]
    stages: tuple[Stage, ...]
    scale: float = 0.5
    source: tuple[int, int] = (480, 640)
    focal: float | None = 518.8579 * 0.5  # NYUv2's camera at half size
    space: str = "nyu40"
    class_weighting: float = 0.0
    class_weights: str | None = None
    regions: bool = False
    volumes: bool = False
    depth_fraction: float = 1.0
    seed: int = 0
    precision: Literal["no", "bf16"] = "bf16"

    def replace(self, **changes) -> "Recipe":
        return replace(self, **changes)

    def with_stages(self, **changes) -> "Recipe":
        """The same changes in every stage, e.g. a short budget: `recipe.with_stages(epochs=3)`."""
        return replace(self, stages=tuple(replace(s, **changes) for s in self.stages))
