"""What a training step sees: order, augmentation and depth supervision as pure functions of (seed, epoch, index).

Nothing here keeps a state, so a training that starts again in the middle of an epoch sees what it would have seen.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from enfilade.data.transforms import Augment, jitter, paste
from enfilade.data.weights import count, median_frequency
from enfilade.errors import UserError
from enfilade.labels import IGNORE
from enfilade.ops.regions import region_support, regions
from enfilade.stages import Recipe, Stage
from enfilade.types import Batch, Sample, collate

OFFLINE = 6  # pictures of each sample: itself, its mirror image, four crops


class Augmented(Dataset):
    """A reader's samples, augmented as a pure function of (seed, stage, epoch, index); offline, of (seed, index), with
    `OFFLINE` indices to each sample. The samples of an `extra` reader follow them."""

    def __init__(self, reader, recipe: Recipe, stage_index: int, extra: Any = None):
        stage = recipe.stages[stage_index]
        self.reader, self.extra, self.key = reader, extra, (recipe.seed, stage_index)
        self.augment = Augment(
            stage.size, scale=recipe.scale, focal=recipe.focal, zoom=stage.zoom, flip=stage.flip, colour=stage.colour
        )
        self.offline = stage.augmentation == "offline"
        self.length = pictures(len(reader), stage) + (0 if extra is None else len(extra))
        self.regions, self.stage = recipe.regions, stage
        self.volumes = recipe.volumes
        self.with_depth = supervised(len(reader), recipe.depth_fraction, recipe.seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        augment, key = self.augment, (*self.key, epoch, index)
        if self.offline:
            key = (self.key[0], index)
            index, which = divmod(index, OFFLINE)
            augment = replace(augment, flip=0.0)
            if which < 2:  # whole, as far as the size of the crop allows
                augment = replace(augment, zoom=(1.0, 1.0), crop="centre", flip=float(which))
        if self.volumes:
            return completed(self.told(index), self.stage, self.reader.space.name, np.random.default_rng(key))
        sample = augment(self.told(index), np.random.default_rng(key))
        rng = np.random.default_rng((*key, 1))
        if rng.random() < self.stage.paste:
            sample = paste(sample, augment(self.told(int(rng.integers(len(self.reader)))), rng), rng)
        return with_regions(sample) if self.regions else sample

    def told(self, index: int) -> Sample:
        """A sample with what training may know: the depth of some, and no class that the reader ignores."""
        if index < len(self.reader):
            sample = self.reader[index]
            return sample if self.with_depth[index] else sample.replace(depth=None)
        sample = self.extra[index - len(self.reader)]
        ignored = getattr(self.reader, "ignored", ())
        if sample.labels is None or not ignored:
            return sample
        void = np.isin(sample.labels, ignored)
        return sample.replace(labels=np.where(void, np.uint8(IGNORE), sample.labels))


def completed(sample: Sample, stage: Stage, space: str, rng: np.random.Generator) -> Sample:
    """The sample as completion networks take it, mirrored in 3-D or not, with the stage's changes of colour."""
    from enfilade.data.volumes import encode, mirror

    if rng.random() < stage.flip:
        sample = mirror(sample)
    sample = encode(sample, image_size=stage.size, space=space)
    return sample.replace(image=jitter(sample.image, rng, stage.colour)) if stage.colour > 0 else sample


def with_regions(sample: Sample) -> Sample:
    """The sample with its regions and their support (RSN Algorithm 1).

    # Differs from paper: what is void has depth as well, and no support to tell of it. Its connected pixels are regions
    to losses of depth, which would otherwise leave a sixth of NYUv2's pixels to chance.

    Raises:
        UserError: no labels, or no depth.
    """
    if sample.labels is None or sample.depth is None:
        raise UserError(f"{sample.name}: region support is made from labels and depth, and one of them is missing")
    ids, _ = regions(sample.labels, void=-1)
    return sample.replace(regions=ids, support=region_support(sample.labels, sample.depth))


def supervised(count: int, fraction: float, seed: int) -> np.ndarray:
    """Which of `count` samples keep their depth: a random subset, the same in every epoch (GAD Section 4.5)."""
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng((seed, 5)).permutation(count)[: round(fraction * count)]] = True
    return chosen


class Order(Sampler):
    """Batches of (epoch, index) of this process, from micro-batch `start` to the end of the stage. The indices of
    `extra` samples follow those of the reader's own `count`."""

    def __init__(self, count: int, recipe: Recipe, stage_index: int, start: int, rank: int, world: int, extra: int = 0):
        stage = recipe.stages[stage_index]
        self.seed, self.stage = (recipe.seed, stage_index, 1), stage
        self.pool, self.own, self.extra = pictures(count, stage), own_samples(count, stage), extra
        self.more = samples(count, stage) - self.own
        self.start, self.rank, self.world = start, rank, world
        self.per_epoch = steps_per_epoch(count, stage, world) * stage.accumulate

    def __len__(self) -> int:
        return self.per_epoch * self.stage.epochs - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch = self.stage.batch
        for epoch in range(self.start // self.per_epoch, self.stage.epochs):
            shuffle = 0 if self.stage.augmentation == "offline" else epoch  # "shuffled randomly once"
            rng = np.random.default_rng((*self.seed, shuffle))
            order = rng.permutation(self.pool)[: self.own]
            if self.more:
                added = self.pool + np.resize(rng.permutation(self.extra), self.more)
                order = rng.permutation(np.concatenate([order, added]))
            needed = self.per_epoch * batch * self.world
            order = np.resize(order, needed)  # a data set smaller than one batch is repeated
            first = max(0, self.start - epoch * self.per_epoch)
            for k in range(first, self.per_epoch):
                at = (k * self.world + self.rank) * batch
                yield [(epoch, int(i)) for i in order[at : at + batch]]


def pictures(count: int, stage: Stage) -> int:
    """What there is to draw from a reader of `count` samples."""
    return count * (OFFLINE if stage.augmentation == "offline" else 1)


def own_samples(count: int, stage: Stage) -> int:
    """What an epoch takes of a reader of `count` samples."""
    return min(stage.samples or sys.maxsize, pictures(count, stage))


def samples(count: int, stage: Stage) -> int:
    """What an epoch over a reader of `count` samples holds, with its share of extra ones."""
    return round(own_samples(count, stage) / (1 - stage.extra))


def steps_per_epoch(count: int, stage: Stage, world: int) -> int:
    """Updates in an epoch; the remainder of an epoch that fills no batch is dropped (another one in each epoch, but for
    offline augmentation)."""
    return max(1, samples(count, stage) // (stage.batch * stage.accumulate * world))


def batches(
    reader, recipe: Recipe, stage_index: int, start: int, rank: int, world: int, workers: int, extra=None
) -> Iterator[Batch]:
    """The rest of a stage, from micro-batch `start`, for one of `world` processes."""
    more = 0 if extra is None else len(extra)
    return iter(
        DataLoader(
            Augmented(reader, recipe, stage_index, extra),
            batch_sampler=Order(len(reader), recipe, stage_index, start, rank, world, more),
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator().manual_seed(0),  # else the loader draws from the global generator
            worker_init_fn=one_thread,
        )
    )


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def class_weights(reader, power: float, classes: int) -> Tensor | None:
    """Median-frequency weights to the given power, void not counted (`data.weights`); None for power 0. Classes that
    never occur get 0."""
    if power == 0:
        return None
    return torch.tensor(median_frequency(count(reader, classes), power), dtype=torch.float32)
