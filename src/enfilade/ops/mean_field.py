"""Mean field on the lattices of an image, for float32 on CPUs: what `ops.crf.mean_field` runs there.

Points and vertices are rows of channels, padded to whole vectors. All kernels share one table of vertices and one
list of corners of a point, so a sweep over the points does not know how many kernels there are. Messages are
multiplied by -mu w on the vertices, of which there are several times fewer than points. A sweep takes a few points
from the messages to Q and on to the next splat while their rows are in the first-level cache; Q goes to memory for a
point's message to itself and for the backward pass only, and there in 16 bits, within 2^-12 of each number.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from enfilade.ops.lattice import Lattice, Normalise, blur_rows, run_parts
from enfilade.ops.mean_field_loops import (
    END,
    RESUME,
    START,
    STEP,
    correlate,
    move,
    multiply,
    place,
    scale,
    survey,
    sweep,
    sweep_back,
)
from enfilade.ops.vectors import LANES


@dataclass(frozen=True)
class Joint:
    """Several lattices as one: n points with `corners` vertices each."""

    size: tuple[int, int, int]
    corners: int
    offsets: np.ndarray  # n * corners, numbers of rows
    inner: np.ndarray  # n * corners, the weights of the splat
    outer: np.ndarray  # and those of the slice, normalised, with the gain
    own: np.ndarray  # k n: K_ii; 0 n where it stays in
    rows: list[tuple[int, int]]  # of each kernel, the first and the one after the last
    neighbours: list[np.ndarray]  # as in Lattice, counted from the kernel's first row

    @property
    def lists(self) -> tuple:
        """What a sweep takes of the points; the last is their number in an image."""
        return self.offsets, self.inner, self.outer, self.corners, self.own, self.size[1] * self.size[2]

    def points(self, function: Callable[[int, int, int], Any]) -> list:
        """function(thread, start, stop) over the points."""
        return run_parts(function, math.prod(self.size))

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
    own, none = np.empty((len(lattices) if remove_self else 0, n), np.float32), np.empty(0, np.float32)
    rows, corner, row = [], 0, 0
    for k, lattice in enumerate(lattices):
        divide, by_row = normalise != "none", normalise == "row"
        norm = lattice.norm.reshape(-1).numpy() if divide or remove_self else none
        given = lattice.offsets.numpy(), lattice.weights.numpy(), norm, np.float32(lattice.gain)
        lists = *given, divide, by_row, corner, row
        into = offsets, inner, outer, own[k] if remove_self else none
        run_parts(lambda _, i, j, lists=lists, into=into: place(*lists, *into, i, j), n)
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
        states, q = [], work.shorts()
        for t in range(iterations):
            after, full = q, None
            if keep and checkpoint and t % segment == 0:
                full = work.rows()
            elif keep and not checkpoint:
                after = work.shorts()
            blurred = work.step(STEP if t else START, q, after, full, keep=keep and not checkpoint)
            if keep and (full is not None or not checkpoint):
                states.append((after, blurred) if full is None else full)
            q = after
        if keep:
            ctx.save_for_backward(unary, matrices)
            ctx.work = states, joint, iterations, segment, checkpoint
        out = work.end(q)
        # What has been kept for the backward pass must not be written to.
        if keep:
            _release(work.unary, *work.tables.work)
        else:
            _release(work.unary, q, work.tables.blurred, *work.tables.work)
        return out

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx, gradient):
        unary, matrices = ctx.saved_tensors
        states, joint, iterations, segment, checkpoint = ctx.work
        back = _Backward(gradient, matrices, joint, learn=ctx.needs_input_grad[1])
        again = _Forward(unary, matrices, joint) if checkpoint else None
        for i in reversed(range(len(states))):
            part = states[i : i + 1]
            if checkpoint:
                part, mode, q = [], RESUME, None
                for _ in range(min(segment, iterations - i * segment)):
                    after = again.shorts()
                    full = states[i] if mode == RESUME else None
                    blurred = again.step(mode, after if q is None else q, after, full, keep=True)
                    part.append((after, blurred))
                    mode, q = STEP, after
            while part:
                back.step(*part.pop(), last=i == 0 and not part)
        _release(back.g, back.sums, back.tables.blurred, *back.tables.work)
        return back.unary, back.matrices(), None, None, None, None


class _Tables:
    """Rows of the vertices: splatted onto, blurred, and multiplied by matrices."""

    def __init__(self, joint: Joint, channels: int):
        self.joint, self.channels, self.width = joint, channels, -(-channels // LANES) * LANES
        self.size = joint.rows[-1][1] * self.width
        self.splat = [_empty(self.size) for _ in range(torch.get_num_threads())]
        for table in self.splat:
            table[:] = 0
        # After the rows there is room for columns of matrices.
        self.spare, self.result = _empty(self.size), _empty(self.size + len(joint.rows) * self.width**2)
        self.work = *self.splat, self.spare, self.result
        self.blurred = None  # where nobody keeps it

    def blur(self, *, keep: bool = False, reverse: bool = False) -> np.ndarray:
        """The rows after all blurs, with `keep` in an array of their own. Overwrites splat[0]."""
        if keep or self.blurred is None:
            self.blurred = _empty(self.size)
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
        reach = np.abs(rest).max((1, 2))
        self.simple = None if rest.any() else (self.a, self.b)
        self.columns, self.rows, whole = (
            self._padded(-m.transpose(0, 2, 1)),
            self._padded(-m),
            m - self.b[:, None, None],
        )
        parts = -rest.transpose(0, 2, 1), -rest, whole.transpose(0, 2, 1)
        rest_columns, rest_rows, self.whole = (self._padded(part).reshape(-1) for part in parts)
        # What a sweep takes
        self.lists = self.a, self.b, reach, rest_columns, rest_rows, np.abs(whole).max((1, 2)), self.whole

    def _padded(self, m: np.ndarray) -> np.ndarray:
        return np.pad(m, ((0, 0), (0, self.width - m.shape[1]), (0, self.width - m.shape[2])))


class _Forward:
    def __init__(self, unary: Tensor, matrices: Tensor, joint: Joint):
        self.joint, self.shape, self.planes = joint, unary.shape, _planes(unary)
        self.tables = _Tables(joint, unary.shape[1])
        self.m = _Matrices(matrices, self.tables.width)
        self.tables.result[self.tables.size :] = self.m.whole
        self.unary, self.none = self.rows(), np.empty(0, np.float32)
        points = joint.own.shape[1] if len(joint.own) else 0
        self.marks = np.empty(points * -(-self.tables.width // 64), np.int64)
        self.known = np.empty(points, np.float32), np.zeros(math.prod(joint.size), np.float32)
        b, reach = self.m.b, self.m.lists[5]
        run_parts(lambda _, start, stop: survey(joint.own, b, reach, *self.known, start, stop), points)

    def rows(self) -> np.ndarray:
        return _empty(math.prod(self.joint.size) * self.tables.width)

    def shorts(self) -> np.ndarray:
        return _empty(math.prod(self.joint.size) * self.tables.width, np.uint16)

    def _sweep(self, mode: int, planes: np.ndarray, before: np.ndarray, after: np.ndarray, full: np.ndarray) -> None:
        joint, tables, m = self.joint, self.tables, self.m

        def part(thread, start, stop):
            arrays = planes, full, self.unary, before, after, self.marks, tables.result, joint.rows[-1][1]
            where = tables.splat[thread], self.shape[1], joint.lists, m.lists, self.known, start, stop
            sweep(mode, *arrays, *where)

        joint.points(part)

    def step(
        self, mode: int, before: np.ndarray, after: np.ndarray, full: np.ndarray | None, *, keep: bool
    ) -> np.ndarray:
        """To the next Q, `after`, from the one before and its messages, and to the messages of the next. `full` is what
        to RESUME from, else the next Q once more. Returns the blurred rows, in an array of their own with `keep`."""
        self._sweep(mode, self.planes, before, after, self.none if full is None else full)
        self.tables.collect()
        blurred = self.tables.blur(keep=keep)
        self.tables.multiply(self.m.columns, self.m.simple)
        return blurred

    def end(self, q: np.ndarray) -> Tensor:
        """The logits."""
        planes = np.empty(math.prod(self.shape), np.float32)
        self._sweep(END, planes, q, q, self.none)
        return torch.from_numpy(planes).view(self.shape)


class _Backward:
    def __init__(self, gradient: Tensor, matrices: Tensor, joint: Joint, learn: bool):
        self.joint, self.shape, self.learn = joint, gradient.shape, learn
        self.tables = _Tables(joint, gradient.shape[1])
        self.m = _Matrices(matrices, self.tables.width)
        # The gradient of the logits, then of those one iteration before, ..., and the sum of some of them
        points = math.prod(joint.size)
        self.g, self.sums = (_empty(points * self.tables.width) for _ in range(2))
        self.steps = 0
        shape = len(self.tables.splat), self.m.count, self.tables.width, self.tables.width
        self.products = np.zeros(shape, np.float32)  # of each thread; of each M the transposed gradient
        self.mean = 0.0
        self.mean = sum(self._sweep(RESUME, _planes(gradient), _empty(0, np.uint16))) / points

    def _sweep(self, mode: int, planes: np.ndarray, q: np.ndarray) -> list:
        joint, tables, m = self.joint, self.tables, self.m
        old, earlier = self.steps % 2 == 1, self.steps > 1
        # So that no gradient at all divides by something
        mean = np.float32(max(self.mean, 1e-30))

        def part(thread, start, stop):
            arrays = q, tables.result, tables.splat[thread]
            where = self.shape[1], joint.lists, m.lists, self.learn, self.products[thread].reshape(-1), start, stop
            return sweep_back(mode, planes, self.g, self.sums, old, earlier, mean, *arrays, *where)

        return joint.points(part)

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
        self.steps += 1
        planes = np.empty(math.prod(self.shape) if last else 0, np.float32)
        self._sweep(END if last else STEP, planes, q)
        if last:
            self.unary = torch.from_numpy(planes).view(self.shape)

    def matrices(self) -> Tensor | None:
        c = self.shape[1]
        return torch.from_numpy(self.products.sum(0)[:, :c, :c].transpose(0, 2, 1).copy()) if self.learn else None


def _planes(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().reshape(-1).numpy())


_kept: list[np.ndarray] = []  # the work memory of the last call: fresh pages cost time


def _empty(size: int, dtype: type = np.float32) -> np.ndarray:
    """An array that begins with a line of the cache, so that no vector lies on two."""
    n = size * np.dtype(dtype).itemsize
    for i, array in enumerate(_kept):
        if array.nbytes == n:
            with contextlib.suppress(IndexError):  # where another thread was faster
                taken = _kept.pop(i)
                if taken.nbytes == n:
                    return taken.view(dtype)
    raw = np.empty(n + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + n].view(dtype)


def _release(*arrays: np.ndarray | None) -> None:
    """Keeps the work memory for the next call."""
    _kept[:] = [array for array in arrays if array is not None]
