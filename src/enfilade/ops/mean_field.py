"""Mean field on the lattices of an image, for float32 on CPUs: what `ops.crf.mean_field` runs there.

Points and vertices are rows of channels, padded to whole vectors. All kernels share one table of vertices and one
list of corners of a point, so a sweep over the points does not know how many kernels there are. Messages are
multiplied by -mu w on the vertices, of which there are several times fewer than points. A sweep takes a few points
from the messages to Q and on to the next splat while their rows are in the first-level cache; Q goes to memory for a
point's message to itself and for the backward pass only.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import once_differentiable

from enfilade.ops.lattice import Lattice, Normalise, blur_rows, run_parts
from enfilade.ops.mean_field_loops import (
    END,
    RESUME,
    START,
    STEP,
    correlate,
    from_rows,
    move,
    multiply,
    place,
    scale,
    sweep,
    sweep_back,
    to_rows,
)
from enfilade.ops.vectors import LANES


def own_weight(lattice: Lattice, normalise: Normalise) -> Float[Tensor, "b 1 h w"]:
    """K_ii after normalisation, which is the same for "row" and "symmetric". No more than the whole sum of the kernel,
    which it comes to for a pixel that is alone."""
    own = torch.minimum(lattice.self_weight, lattice.norm)
    return own if normalise == "none" else own / lattice.norm


@dataclass(frozen=True)
class Joint:
    """Several lattices as one: n points with `corners` vertices each."""

    size: tuple[int, int, int]
    corners: int
    offsets: np.ndarray  # n * corners, numbers of rows
    inner: np.ndarray  # n * corners, the weights of the splat
    outer: np.ndarray  # and those of the slice, normalised, with the gain
    own: np.ndarray  # n k: K_ii; n 0 where it stays in
    rows: list[tuple[int, int]]  # of each kernel, the first and the one after the last
    neighbours: list[np.ndarray]  # as in Lattice, counted from the kernel's first row

    def points(self, function: Callable[[int, int, int], Any]) -> None:
        """function(thread, start, stop) over the points."""
        b, h, w = self.size
        run_parts(function, b * h * w)

    def spread(self, function: Callable[[int, int, int, int], Any]) -> None:
        """function(thread, kernel, start, stop) over the rows, where each thread takes its share of every kernel."""
        threads = torch.get_num_threads()

        def part(thread, i, j):
            for k, (start, stop) in enumerate(self.rows):
                function(thread, k, start + (stop - start) * i // threads, start + (stop - start) * j // threads)

        run_parts(part, threads)


def join(lattices: Sequence[Lattice], normalise: Normalise, remove_self: bool) -> Joint:
    b, h, w = lattices[0].size
    n, corners = b * h * w, sum(lattice.dimension + 1 for lattice in lattices)
    offsets, inner = np.empty((n, corners), np.int32), np.empty((n, corners), np.float32)
    outer = np.empty_like(inner) if normalise == "row" else inner
    own = np.empty((n, len(lattices) if remove_self else 0), np.float32)
    rows, corner, row = [], 0, 0
    for k, lattice in enumerate(lattices):
        norm = torch.ones(n) if normalise == "none" else lattice.norm.reshape(-1)
        after = lattice.gain / norm
        before = torch.ones(n) if normalise == "row" else after.sqrt()
        after = after if normalise == "row" else before
        lists = lattice.offsets.numpy(), lattice.weights.numpy(), before.numpy(), after.numpy(), corner, row
        run_parts(lambda _, i, j, lists=lists: place(*lists, offsets, inner, outer, i, j), n)
        if remove_self:
            own[:, k] = own_weight(lattice, normalise).reshape(-1).numpy()
        rows.append((row, row + lattice.vertices))
        corner, row = corner + lattice.dimension + 1, row + lattice.vertices
    neighbours = [lattice.neighbours.numpy() for lattice in lattices]
    return Joint((b, h, w), corners, offsets.reshape(-1), inner.reshape(-1), outer.reshape(-1), own, rows, neighbours)


class MeanField(torch.autograd.Function):
    """`ops.crf._mean_field_torch` as compiled loops, once differentiable."""

    @staticmethod
    @no_type_check
    def forward(ctx, unary, matrices, joint, iterations, keep, checkpoint):
        work = _Forward(unary, matrices, joint)
        # What the backward pass computes again at a time, from the Q at its start.
        segment = math.isqrt(max(iterations - 1, 0)) + 1 if checkpoint else 1
        before = scratch = None
        states = []
        for t in range(iterations):
            if keep and t % segment == 0:
                after = np.empty_like(work.unary)
            else:
                after = scratch = _empty(len(work.unary)) if scratch is None else scratch
            blurred = work.step(STEP if t else START, before, after, keep=keep and not checkpoint)
            if after is not scratch:
                states.append((after, blurred))
            before = after
        if keep:
            ctx.save_for_backward(unary, matrices)
            ctx.work = states, joint, iterations, segment, checkpoint
        scratch = _empty(len(before)) if scratch is None else scratch
        out = work.end(before, scratch)
        work.release(scratch, None if keep and not checkpoint else work.tables.blurred)
        return out

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx, gradient):
        unary, matrices = ctx.saved_tensors
        states, joint, iterations, segment, checkpoint = ctx.work
        back = _Backward(gradient, matrices, joint, learn=ctx.needs_input_grad[1])
        for i in reversed(range(len(states))):
            part = states[i : i + 1]
            if checkpoint:
                again, q = _Forward(unary, matrices, joint), states[i][0]
                part = [(q, again.step(RESUME, q, q, keep=True))]
                for _ in range(min(segment, iterations - i * segment) - 1):
                    after = np.empty_like(q)
                    part.append((after, again.step(STEP, part[-1][0], after, keep=True)))
            while part:
                back.step(*part.pop(), last=i == 0 and not part)
        return back.unary(), back.matrices(), None, None, None, None


class _Tables:
    """Rows of the vertices: splatted onto, blurred, and multiplied by matrices."""

    def __init__(self, joint: Joint, channels: int):
        self.joint, self.channels, self.width = joint, channels, -(-channels // LANES) * LANES
        self.size = joint.rows[-1][1] * self.width
        self.splat = [_empty(self.size) for _ in range(torch.get_num_threads())]
        for table in self.splat:
            table[:] = 0
        self.spare, self.result = _empty(self.size), _empty(self.size)
        self.blurred = None

    def blur(self, *, keep: bool = False, reverse: bool = False) -> np.ndarray:
        """The rows after all blurs, with `keep` in an array of their own. Overwrites splat[0]."""
        if keep or self.blurred is None:
            self.blurred = np.empty(self.size, np.float32) if keep else _empty(self.size)
        blurred = self.blurred
        for i in range(max(map(len, self.joint.neighbours))):
            source, other = (self.splat[0], self.spare) if i % 2 == 0 else (self.spare, self.splat[0])

            def part(_, k, start, stop, i=i, source=source, other=other):
                neighbours, (first, end) = self.joint.neighbours[k], self.joint.rows[k]
                if (left := len(neighbours) - 1 - i) >= 0:
                    rows, target = slice(first * self.width, end * self.width), other if left else blurred
                    along = neighbours[left if reverse else i]
                    blur_rows(source[rows], target[rows], along, self.width, start - first, stop - first)

            self.joint.spread(part)
        return blurred

    def collect(self) -> None:
        """Adds the threads' splats up in splat[0] and clears the others."""
        for other in self.splat[1:]:
            run_parts(lambda _, start, stop, other=other: move(self.splat[0], other, start, stop), self.size)

    def multiply(self, matrices: np.ndarray, simple: tuple[np.ndarray, np.ndarray] | None) -> None:
        """result = blurred rows times their kernel's matrix, -(a I + b 1 1^T) where it is `simple`. Clears splat[0]."""

        def part(_, k, start, stop):
            if simple is None:
                multiply(self.blurred, matrices[k].reshape(-1), self.channels, self.width, start, stop, self.result)
            else:
                scale(self.blurred, -simple[0][k], -simple[1][k], self.width, start, stop, self.result)
            self.splat[0][start * self.width : stop * self.width] = 0

        self.joint.spread(part)


class _Matrices:
    """M = mu w = a I + b 1 1^T + rest. There is no rest from multiples of the identity and Potts."""

    def __init__(self, matrices: Tensor, width: int):
        m = matrices.detach().numpy()
        c = m.shape[-1]
        self.count, self.width = len(m), width
        diagonal = m.diagonal(axis1=1, axis2=2)
        self.b = (m.sum((1, 2)) - diagonal.sum(1)) / np.float32(max(c * (c - 1), 1))
        self.a = diagonal.mean(1) - self.b
        rest = m - self.a[:, None, None] * np.eye(c, dtype=np.float32) - self.b[:, None, None]
        rest[np.abs(rest).max((1, 2)) <= 1e-6 * np.abs(m).max((1, 2))] = 0
        self.reach = np.abs(rest).max((1, 2))
        self.simple = None if rest.any() else (self.a, self.b)
        self.columns, self.rest = self._padded(-m.transpose(0, 2, 1)), self._padded(-rest.transpose(0, 2, 1))
        self.rows, self.rest_rows = self._padded(-m), self._padded(-rest)

    def _padded(self, m: np.ndarray) -> np.ndarray:
        return np.pad(m, ((0, 0), (0, self.width - m.shape[1]), (0, self.width - m.shape[2])))


class _Forward:
    def __init__(self, unary: Tensor, matrices: Tensor, joint: Joint):
        self.joint, self.shape = joint, unary.shape
        self.tables = _Tables(joint, unary.shape[1])
        self.m = _Matrices(matrices, self.tables.width)
        self.unary = _rows(unary, joint, -math.inf)

    def _sweep(self, mode: int, before: np.ndarray, after: np.ndarray) -> None:
        joint, tables, m = self.joint, self.tables, self.m

        def part(thread, start, stop):
            sweep(
                *(mode, self.unary, before, after, tables.result, tables.splat[thread], self.shape[1]),
                *(joint.offsets, joint.inner, joint.outer, joint.corners, joint.own),
                *(m.a, m.b, m.rest.reshape(-1), m.reach, start, stop),
            )

        joint.points(part)

    def step(self, mode: int, before: np.ndarray | None, after: np.ndarray, *, keep: bool) -> np.ndarray:
        """To the next Q, `after`, from the one before and its messages, and to the messages of the next. Returns the
        blurred rows, in an array of their own with `keep`."""
        self._sweep(mode, after if before is None else before, after)
        self.tables.collect()
        blurred = self.tables.blur(keep=keep)
        self.tables.multiply(self.m.columns, self.m.simple)
        return blurred

    def end(self, before: np.ndarray, after: np.ndarray) -> Tensor:
        """The logits. `after` is overwritten."""
        self._sweep(END, before, after)
        return _image(after, self.shape, self.joint)

    def release(self, *others: np.ndarray | None) -> None:
        """Keeps the work memory for the next call."""
        t = self.tables
        _release(self.unary, *t.splat, t.spare, t.result, *others)


class _Backward:
    def __init__(self, gradient: Tensor, matrices: Tensor, joint: Joint, learn: bool):
        self.joint, self.shape, self.learn = joint, gradient.shape, learn
        self.tables = _Tables(joint, gradient.shape[1])
        self.m = _Matrices(matrices, self.tables.width)
        self.gradient = _rows(gradient, joint, 0.0)  # of the logits, then of those one iteration before, ...
        self.sum = self.gradient.copy()
        shape = len(self.tables.splat), self.m.count, self.tables.width, self.tables.width
        self.products = np.zeros(shape, np.float32)  # of each thread; of each M the transposed gradient
        self._sweep(RESUME, self.gradient)

    def _sweep(self, mode: int, q: np.ndarray) -> None:
        joint, tables, m = self.joint, self.tables, self.m

        def part(thread, start, stop):
            sweep_back(
                *(mode, self.gradient, self.sum, q, tables.result, tables.splat[thread], self.shape[1]),
                *(joint.offsets, joint.inner, joint.outer, joint.corners, joint.own),
                *(
                    m.a,
                    m.b,
                    m.rest.reshape(-1),
                    m.rest_rows.reshape(-1),
                    m.reach,
                    self.learn,
                    self.products[thread].reshape(-1),
                    start,
                    stop,
                ),
            )

        joint.points(part)

    def step(self, q: np.ndarray, blurred: np.ndarray, last: bool) -> None:
        """From the gradient of the logits to that of the logits before, whose softmax is `q`."""
        tables, width = self.tables, self.tables.width
        tables.collect()
        if self.learn:

            def part(thread, k, start, stop):
                correlate(blurred, tables.splat[0], width, start, stop, self.products[thread, k].reshape(-1))

            self.joint.spread(part)
        tables.blur(reverse=True)
        tables.multiply(self.m.rows, self.m.simple)
        self._sweep(END if last else STEP, q)

    def unary(self) -> Tensor:
        return _image(self.sum, self.shape, self.joint)

    def matrices(self) -> Tensor | None:
        c = self.shape[1]
        return torch.from_numpy(self.products.sum(0)[:, :c, :c].transpose(0, 2, 1).copy()) if self.learn else None


_kept: list[np.ndarray] = []  # the work memory of the last call: fresh pages cost a tenth of an inference


def _empty(size: int) -> np.ndarray:
    for i, array in enumerate(_kept):
        if len(array) == size:
            with contextlib.suppress(IndexError):  # where another thread was faster
                taken = _kept.pop(i)
                if len(taken) == size:
                    return taken
    return np.empty(size, np.float32)


def _release(*arrays: np.ndarray | None) -> None:
    _kept[:] = [array for array in arrays if array is not None]


def _rows(values: Tensor, joint: Joint, padding: float) -> Float32[np.ndarray, "_"]:
    """b c h w as rows of channels."""
    b, c, h, w = values.shape
    array = np.ascontiguousarray(values.detach().reshape(b, c, h * w).numpy())
    out = _empty(b * h * w * (-(-c // LANES) * LANES))
    joint.points(lambda _, start, stop: to_rows(array, np.float32(padding), out, start, stop))
    return out


def _image(rows: np.ndarray, shape: torch.Size, joint: Joint) -> Tensor:
    """Rows of channels as b c h w."""
    b, c, h, w = shape
    out = np.empty((b, c, h * w), np.float32)
    joint.points(lambda _, start, stop: from_rows(rows, out, start, stop))
    return torch.from_numpy(out).view(shape)
