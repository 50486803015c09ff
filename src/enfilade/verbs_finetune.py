"""The verb finetune: one's own classes from one's own labels."""

import re
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from enfilade.errors import UserError
from enfilade.options import Count, Flag, Folder, MaybeCount, MaybeFile, Model, Precision, positive, use_threads
from enfilade.shipped import START


@dataclass(frozen=True)
class Finetune:
    """Teach a shipped model your own classes; run again, it goes on where it stopped.

    FOLDER holds images/, labels/ (PNGs of the same stems) and classes.txt; docs/own-classes.md is the page about it.
    """

    folder: Annotated[Positional[str], arg(metavar="FOLDER", help_behavior_hint="")]
    """Images, label PNGs and a class list."""
    out: Folder
    """Run folder: model.safetensors, report.txt, report.json, confusion.png, comparison.png, and the training."""
    model: Model = START
    """What to start from: a shipped model, a model file, or the folder of a training run."""
    epochs: MaybeCount = None
    """Passes over the images; default: 60 for 100 images or fewer, 6 for 1000 or more."""
    size: Annotated[str | None, arg(metavar="WIDTHxHEIGHT", help_behavior_hint="")] = None
    """Of the network's input; default: the area of the model's own, in the shape of most images."""
    batch: Count = 8
    """Images in an update."""
    lr: Annotated[float, arg(metavar="X")] = 5e-4
    """Peak learning rate."""
    encoder_lr: Annotated[float, arg(metavar="SHARE")] = 0.2
    """The encoder's, as a share of it."""
    freeze: Annotated[tuple[str, ...], arg(metavar="PART [PART ...]", help_behavior_hint="")] = ()
    """What does not learn: encoder, or another part of the network. For very few images."""
    class_weighting: Annotated[float, arg(metavar="POWER")] = 0.5
    """How much rare classes count: 0 as they come, 1 all alike."""
    classes: MaybeFile = None
    """Class list, instead of the one in FOLDER."""
    val_share: Annotated[float, arg(metavar="SHARE")] = 0.2
    """Of the images that are scored, not learned, where FOLDER has no val/."""
    seed: Count = 0
    """Of that draw and of the training."""
    precision: Precision = "auto"
    """Of the training; auto is bf16 where the processor has it."""
    resume: Flag = True
    """Start anew; without it a run in DIR is continued."""
    workers: Count = 1
    """Processes that load data; 0 loads in the training process."""
    threads: MaybeCount = None
    """Threads of the network; default: OMP_NUM_THREADS, or all cores."""
    quiet: Flag = False
    """Print nothing."""

    def run(self) -> int:
        size = None
        if self.size is not None:
            if not re.fullmatch(r"\d+x\d+", self.size):
                raise UserError(f"--size is WIDTHxHEIGHT, for example 416x320, not {self.size!r}")
            width, height = map(int, self.size.split("x"))
            size = height, width
        positive("--epochs", self.epochs)
        positive("--batch", self.batch)
        use_threads(self.threads)
        from enfilade.finetune import finetune

        finetune(
            self.folder,
            out=self.out,
            model=self.model,
            epochs=self.epochs,
            size=size,
            batch=self.batch,
            lr=self.lr,
            encoder_lr=self.encoder_lr,
            freeze=self.freeze,
            class_weighting=self.class_weighting,
            classes=self.classes,
            val_share=self.val_share,
            seed=self.seed,
            precision=self.precision,
            resume=self.resume,
            workers=self.workers,
            quiet=self.quiet,
        )
        return 0
