"""An exported network against torch: the same answers at several sizes and batches, and how long each takes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from enfilade.errors import UserError
from enfilade.export_graph import Size, answers, chooses, example
from enfilade.ops.voxels import SHAPE
from enfilade.predict import Predictor

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]  # the exported network: its outputs in order

# Sizes at which torch and the file are compared, beside the training size: whole multiples of the network's stride and
# not, smaller than it, several images, and for a network of volumes grids that 4 divides and 8 does not
CHECKS = (
    Size(1, 64, 96, (24, 16, 32)),
    Size(2, 97, 65, (20, 28, 12)),
    Size(1, 31, 33, (36, 20, 24)),
    Size(3, 50, 131, (32, 32, 32)),
)
# The largest difference that passes; depth in metres. Rounding is a hundredth of it and less; a cut, a padding or an
# interpolation done otherwise is many times as much.
TOLERANCE = {"probabilities": 1e-3, "depth": 5e-3, "depth_spread": 5e-3, "volume_probabilities": 1e-3}
# The share of values that may differ by more, in a network that takes an arg max on its way (`chooses`): noise holds
# some places where two classes are equal but for rounding, and each is seen by its neighbours
TIES = 0.02


@dataclass(frozen=True)
class Difference:
    """The largest difference of each output from torch's, for one size of the inputs. `beyond` is the share of values
    that differ by more than `TOLERANCE`, 0 but for networks that take an arg max on their way."""

    batch: int
    height: int
    width: int
    outputs: dict[str, float]
    grid: tuple[int, int, int] | None = None  # of the TSDF
    beyond: float = 0.0


@dataclass(frozen=True)
class Latency:
    """Median milliseconds for one frame, in turns: of torch in Python, fp32, and of the exported file, on the CPU."""

    height: int
    width: int
    torch: float
    exported: float
    runs: int
    threads: int
    grid: tuple[int, int, int] | None = None  # of the TSDF


def verify(
    predictor: Predictor, run: Run, name: str, height: int, width: int, runs: int
) -> tuple[tuple[Difference, ...], Latency]:
    """Compare `run` (for people: `name`) with torch at `CHECKS`, and also time both at `height` x `width` and the full
    grid. Raises UserError where an answer differs by more than `TOLERANCE`."""
    full = Size(1, height, width, SHAPE)
    differences = tuple(compare(predictor, run, name, size) for size in (full, *CHECKS))
    feed = example(predictor, full)
    torch_ms, own_ms = median_ms((lambda: answers(predictor.network, feed), lambda: run(feed)), runs)
    grid = full.grid if "tsdf" in feed else None
    return differences, Latency(height, width, torch_ms, own_ms, runs, torch.get_num_threads(), grid)


def compare(predictor: Predictor, run: Run, name: str, size: Size) -> Difference:
    """Torch and `run` on noise. Raises UserError where they differ."""
    feed = example(predictor, size)
    grid = size.grid if "tsdf" in feed else None
    where = f"for {size.batch} x {size.width}x{size.height} pixels" if "image" in feed else f"for {size.batch} volumes"
    differences, count, beyond, worst = {}, 0, 0, ""
    for (key, want), have in zip(answers(predictor.network, feed).items(), run(feed), strict=True):
        if have.shape != want.shape:
            sizes = f"{list(have.shape)} instead of {list(want.shape)}"
            raise UserError(f"{name}'s {key} {where} is {sizes}; the file was not written: please report this")
        difference = np.abs(have - want)
        differences[key] = float(difference.max())
        far = int((~(difference <= TOLERANCE[key])).sum())  # NaN too
        count, beyond = count + difference.size, beyond + far
        if far and not worst:
            worst = (
                f"{name}'s {key} {where} differs from torch's by {differences[key]:.2g}, more than {TOLERANCE[key]:g}"
            )
    if beyond > (TIES * count if chooses(predictor.network) else 0):
        raise UserError(f"{worst}; the file was not written: please report this")
    return Difference(size.batch, size.height, size.width, differences, grid, beyond / count)


def median_ms(calls: tuple[Callable[[], object], ...], runs: int) -> list[float]:
    """Median milliseconds of each call. They take turns, so that what else the machine does meets all alike."""
    times = [[] for _ in calls]
    for turn in range(runs + 2):
        for call, taken in zip(calls, times):
            start = time.perf_counter()
            call()
            if turn > 1:  # two to warm up
                taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]
