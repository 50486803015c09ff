"""Test-time augmentation: one image through a network several times, one answer of all of them.

What the network sees and how its answers become one, for any network that maps an image to an `Output`:

* `resolution` and `scales` say how large it sees the image. Scale 1 is the training scale: "area" resizes every image
  to the area of the training input, "source" multiplies its sides by the factor that made network pixels of source
  pixels in training. Probabilities of several scales are averaged with equal weight, on the grid of the largest.
* `window` covers what is seen by overlapping windows of that size, and blends their answers.
* `flip` does all this on the mirror image too, and averages.

Depth is that of the canonical camera (see `predict`). Scaled by s, an image is what a camera of s times the focal
length takes; the network, which sees only pixels, answers for objects s times as near. So s times its answer is the
depth at scale 1, and only then are scales averaged. All windows of an image are of one scale and need nothing.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from enfilade.errors import UserError
from enfilade.types import Output

Resolution = Literal["area", "source"]

ALIGN = 8  # network pixels: windows begin at multiples of it, so that answers at 1/2, 1/4 and 1/8 meet on one grid
MIN_SIDE = 32  # network pixels, of a window: smaller ones show nothing that could be told apart
FORWARD = 8  # windows that go through the network together
LEAST = 1e-6  # probability: a network that gives a class less says no more by it
FLOOR = 0.01  # of a window's weight, so that what only its edge covers has an answer too


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How a predictor looks at an image.

    Args:
        flip: average over the image and its mirror image, at twice the time.
        scales: factors of the sides at which the network sees the image; s costs s² times the time.
        window: size of the windows in network pixels, (height, width) or "WIDTHxHEIGHT", or a factor of the training
            input's sides; None sends the image through the network whole.
        overlap: share of a window's side that it has in common with the next, at least; 0 to 0.9.
        resolution: what scale 1 is, "area" or "source" (see this module).

    Raises UserError for values out of range.
    """

    flip: bool = True
    scales: Sequence[float] = (1.0,)
    window: float | str | Sequence[int] | None = None
    overlap: float = 0.5
    resolution: Resolution = "area"

    def __post_init__(self):
        scales = tuple(map(float, self.scales))
        object.__setattr__(self, "scales", scales)
        if not scales or not all(0.1 <= s <= 10 for s in scales):
            given = " ".join(f"{s:g}" for s in scales) or "none"
            raise UserError(f"scales are one or more factors between 0.1 and 10, such as 0.75 1 1.25, not {given}")
        if not 0 <= self.overlap <= 0.9:
            raise UserError(f"the overlap of windows is a share of their sides from 0 to 0.9, not {self.overlap:g}")
        if self.resolution not in ("area", "source"):
            raise UserError(f"resolution is area or source, not {self.resolution!r}")
        window = parse_window(self.window) if isinstance(self.window, str) else self.window
        if isinstance(window, Sequence):
            if len(window) != 2 or any(int(side) != side or side < MIN_SIDE for side in window):
                given = " x ".join(map(str, window))
                raise UserError(f"a window has two sides of at least {MIN_SIDE} whole network pixels, not {given}")
            window = int(window[0]), int(window[1])
        elif window is not None and not 0.1 <= window <= 10:
            raise UserError(f"a window is 0.1 to 10 times as wide as the training input, not {window:g} times")
        object.__setattr__(self, "window", window)

    def window_size(self, size: Sequence[int]) -> tuple[int, int] | None:
        """Height and width of the windows for a training input of `size`. Those that `window` gives by a factor are
        rounded to multiples of 8, which answers at a quarter of the image fit without resampling."""
        if self.window is None:
            return None
        if isinstance(self.window, Sequence):
            height, width = map(int, self.window)
        else:
            height, width = (max(MIN_SIDE, round(side * self.window / ALIGN) * ALIGN) for side in size)
        return height, width

    def options(self) -> dict[str, Any]:
        """The fields, checked, as keyword arguments."""
        return asdict(self)

    def describe(self, size: Sequence[int]) -> dict[str, Any]:
        """For a report, in the words of the command line; without windows, nothing is said of their overlap."""
        window = self.window_size(size)
        return {
            "flip": self.flip,
            "scales": " ".join(f"{s:g}" for s in self.scales),
            "resolution": self.resolution,
            "window": None if window is None else f"{window[1]}x{window[0]}",
            "overlap": None if window is None else self.overlap,
        }


def parse_window(text: str) -> float | tuple[int, int]:
    """A window in words: "320x240" (width x height), or a factor such as "0.75"."""
    try:
        if "x" not in text.lower():
            return float(text)
        width, height = map(int, text.lower().split("x"))
        return height, width
    except ValueError as error:
        words = "WIDTHxHEIGHT in network pixels, such as 320x240, or a factor of the training input, such as 0.75"
        raise UserError(f"a window is {words}, not {text!r}") from error


def unflip(both: Float[Tensor, "b2 ..."]) -> Float[Tensor, "b ..."]:
    """The mean over images (first half) and their mirror images (second half)."""
    straight, mirrored = both.chunk(2)
    return (straight + mirrored.flip(-1)) / 2


@torch.inference_mode()
def average(answers: Iterable[tuple[Output, float]]) -> Output:
    """The mean over scales and networks of probabilities (in `logits`), depth and its spread, each with its own grid:
    that of the first answer which has it. Of one network's scales that should be the largest: to enlarge a coarse
    answer loses nothing; to shrink a fine one would drop what it alone shows. What an answer lacks is the mean of the
    others.

    `answers` holds each answer and the factor of its depth: by how much larger the image was than at scale 1.
    """
    probabilities, depth, spread = _Mean(), _Mean(), _Mean()
    for answer, factor in answers:
        if answer.logits is not None:
            probabilities.add(answer.logits)
        if answer.depth is not None:
            depth.add(answer.depth[:, None] * factor)
        if answer.depth_spread is not None:
            spread.add(answer.depth_spread[:, None] * factor)
    metres, deviation = depth.result(), spread.result()
    return Output(
        logits=probabilities.result(),
        depth=None if metres is None else metres[:, 0],
        depth_spread=None if deviation is None else deviation[:, 0],
    )


@torch.inference_mode()
def together(answers: Iterable[tuple[Output, float]]) -> Output:
    """As `average`, for the answers of several networks: probabilities by their geometric mean, so that a class which
    one of them rules out is not chosen; depth and its spread by the mean."""

    def logarithms(output: Output) -> Output:
        return output if output.logits is None else replace(output, logits=output.logits.clamp(min=LEAST).log())

    mean = average((logarithms(output), factor) for output, factor in answers)
    return mean if mean.logits is None else replace(mean, logits=mean.logits.softmax(1))


class _Mean:
    """A mean of maps on the grid of the first."""

    def __init__(self):
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        if self.total is not None:
            x = self.total + F.interpolate(x, self.total.shape[-2:], mode="bilinear", align_corners=False)
        self.total, self.count = x, self.count + 1

    def result(self) -> Tensor | None:
        return None if self.total is None else self.total / self.count


def cover(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along a side of `size` pixels: spread evenly from 0, as few as overlap by `overlap` at least.
    All are multiples of 8, so that the last may reach up to 7 pixels beyond the image."""
    stride = max(ALIGN, int(window * (1 - overlap)) // ALIGN * ALIGN)
    last = -(-max(0, size - window) // ALIGN)
    count = -(-last * ALIGN // stride)
    return [0] + [round(i * last / count) * ALIGN for i in range(1, count + 1)]


def fitted(size: int, window: int) -> int:
    """A window's side for an image's side of `size` pixels: not longer than the image, but for a multiple of 8."""
    return min(window, -(-size // ALIGN) * ALIGN)


def hann(window: int) -> Float[Tensor, "w"]:
    """A window's weight across its side: it rises from near nothing at the edge, where the network lacks context and a
    seam would show, to 1 in the middle."""
    across = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    return FLOOR + (1 - FLOOR) * torch.sin(math.pi * across).square()


def blend(starts: Sequence[int], window: int) -> Float[Tensor, "n w"]:
    """Each window's share of the answer across its side: `hann`, divided so that the shares of a pixel add up to 1."""
    weight = hann(window)
    total = torch.zeros(starts[-1] + window, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += weight
    return torch.stack([weight / total[start : start + window] for start in starts]).float()


def slide(
    forward: Callable[[Tensor], Output], image: Float[Tensor, "b c h w"], window: tuple[int, int], overlap: float
) -> Output:
    """Blend what `forward` (probabilities in `logits`, and depth) answers for windows that cover the images.

    At most 8 windows go through the network at once; their answers are added up on a grid of 1, 2, 4 or 8 pixels, no
    coarser than they are, and forgotten. An image that a window can hold is not padded to it but goes through whole,
    for the network takes invented pixels for part of the room; a longer one is continued by up to 7 pixels at its last
    row and column.
    """
    height, width = image.shape[-2:]
    if height <= window[0] and width <= window[1]:
        return forward(image)
    window = fitted(height, window[0]), fitted(width, window[1])
    tops, lefts = cover(height, window[0], overlap), cover(width, window[1], overlap)
    image = F.pad(image, (0, lefts[-1] + window[1] - width, 0, tops[-1] + window[0] - height), mode="replicate")
    places = list(itertools.product(range(len(image)), range(len(tops)), range(len(lefts))))
    sums: dict[str, _Sum] = {}
    for first in range(0, len(places), FORWARD):
        some = places[first : first + FORWARD]
        windows = [image[i, :, tops[y] : tops[y] + window[0], lefts[x] : lefts[x] + window[1]] for i, y, x in some]
        output = forward(torch.stack(windows))
        answers = {"logits": output.logits, "depth": output.depth, "depth_spread": output.depth_spread}
        for name, answer in answers.items():
            if answer is not None:
                answer = answer if answer.ndim == 4 else answer[:, None]
                if name not in sums:
                    sums[name] = _Sum(answer, len(image), tops, lefts, window)
                sums[name].add(answer, some)
    means = {name: total.within(height, width) for name, total in sums.items()}
    depth, spread = (means[name][:, 0] if name in means else None for name in ("depth", "depth_spread"))
    return Output(logits=means.get("logits"), depth=depth, depth_spread=spread)


class _Sum:
    """The windows' answers, weighted and added up on a grid whose cells are `step` x `step` network pixels."""

    def __init__(self, like: Tensor, images: int, tops: Sequence[int], lefts: Sequence[int], window: tuple[int, int]):
        self.step = grid_step(window, (like.shape[2], like.shape[3]))
        self.size = [side // self.step for side in window]
        self.tops, self.lefts = ([start // self.step for start in starts] for starts in (tops, lefts))
        self.down = blend(self.tops, self.size[0]).to(like.device)
        self.across = blend(self.lefts, self.size[1]).to(like.device)
        grid = self.tops[-1] + self.size[0], self.lefts[-1] + self.size[1]
        self.total = torch.zeros(images, like.shape[1], *grid, device=like.device)

    def add(self, answers: Float[Tensor, "n k h w"], places: Sequence[tuple[int, int, int]]) -> None:
        if list(answers.shape[-2:]) != self.size:
            answers = F.interpolate(answers, self.size, mode="bilinear", align_corners=False)
        for answer, (i, y, x) in zip(answers, places):
            top, left = self.tops[y], self.lefts[x]
            part = self.total[i, :, top : top + self.size[0], left : left + self.size[1]]
            part += answer * (self.down[y, :, None] * self.across[x])

    def within(self, height: int, width: int) -> Float[Tensor, "b k _ _"]:
        """The part that covers an image of this size, which what was padded reaches beyond."""
        return _cut(_cut(self.total, 2, self.step, height), 3, self.step, width)


def grid_step(window: tuple[int, int], answer: tuple[int, int]) -> int:
    """Network pixels to a cell of the grid on which windows are blended: as many as divide the window, and no more
    than the network's own answer has."""
    for step in (ALIGN, 4, 2):
        if all(side % step == 0 and step * cells <= side for side, cells in zip(window, answer)):
            return step
    return 1


def _cut(x: Tensor, dim: int, step: int, size: int) -> Tensor:
    """The first `size` pixels along `dim` of a map with cells of `step` pixels, as a map of equal cells that end where
    the image ends: `Output` has it so. Where `step` divides `size`, nothing is resampled."""
    cells = -(-size // step)
    if size % step == 0:
        return x.narrow(dim, 0, cells)
    position = ((torch.arange(cells, device=x.device) + 0.5) * (size / cells / step) - 0.5).clamp(min=0)
    first = position.long()
    shape = [1] * x.ndim
    shape[dim] = cells
    weight = (position - first).to(x.dtype).view(shape)
    second = (first + 1).clamp(max=x.shape[dim] - 1)
    return torch.lerp(x.index_select(dim, first), x.index_select(dim, second), weight)


def slide_reference(
    forward: Callable[[Tensor], Output], image: Float[Tensor, "b c h w"], window: tuple[int, int], overlap: float
) -> Output:
    """`slide` as the definition has it, at every network pixel and for one window after the other: the sum of weighted
    answers, each resized to its window, over the sum of weights."""
    height, width = image.shape[-2:]
    window = fitted(height, window[0]), fitted(width, window[1])
    tops, lefts = cover(height, window[0], overlap), cover(width, window[1], overlap)
    rows = torch.arange(tops[-1] + window[0], device=image.device).clamp(max=height - 1)
    columns = torch.arange(lefts[-1] + window[1], device=image.device).clamp(max=width - 1)
    padded = image[:, :, rows][:, :, :, columns]
    weight = (hann(window[0])[:, None] * hann(window[1])).to(image.device)
    sums: dict[str, Tensor] = {}
    for top, left in itertools.product(tops, lefts):
        here = ..., slice(top, top + window[0]), slice(left, left + window[1])
        output = forward(padded[here])
        answers = {"weight": weight.expand(len(image), 1, -1, -1)}
        for name, x in (("logits", output.logits), ("depth", None if output.depth is None else output.depth[:, None])):
            if x is not None:
                answers[name] = weight * F.interpolate(x.double(), window, mode="bilinear", align_corners=False)
        for name, x in answers.items():
            total = sums.setdefault(name, x.new_zeros(*x.shape[:2], len(rows), len(columns)))
            total[here] += x
    means = {name: (x / sums["weight"])[..., :height, :width].float() for name, x in sums.items()}
    return Output(logits=means.get("logits"), depth=means["depth"][:, 0] if "depth" in means else None)
