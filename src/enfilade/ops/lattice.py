"""Gaussian filtering in many dimensions on the permutohedral lattice.

* Adams, Baek, Davis: Fast high-dimensional filtering using the permutohedral lattice, Eurographics 2010
* Krähenbühl, Koltun: Efficient inference in fully connected CRFs with Gaussian edge potentials, NeurIPS 2011 (the use)

    lattice = Lattice.build(features)              # b d h w, already divided by the standard deviations
    smooth = filter(values, lattice)               # b c h w, normalise="row": a weighted mean over the image

Every point gets `out_i = sum_j exp(-|f_i - f_j|^2 / 2) value_j`, in time linear in the number of points: it *splats*
its values onto the d + 1 vertices of the simplex that holds it, the vertices are *blurred* along each of d + 1
directions by (1/2, 1, 1/2), and the point *slices* its output from the same vertices. Only vertices that some point
touches exist.
With S the splat and B_j the blurs this is K = a S^T B_d ... B_0 S, so that the adjoint K^T runs the blurs backwards.

The lattice is an approximation: on photographs its row-normalised outputs lie 1 to 3 % (d = 2) and 4 to 8 % (d = 5) off
the exact Gaussian's in relative L2 (`benchmarks/crf.py` measures it), and its unnormalised ones are too small by a
factor of 1.1 to 1.9, so normalise. It is linear in the values and differentiable in them, to any order; features are
data.

float32 tensors on a CPU run compiled loops on `torch.get_num_threads()` threads, on a GPU the kernels of
`ops.lattice_triton` where Triton works; every other type and device runs torch operations. Results of loops (for a
given number of threads) and kernels repeat exactly. Both are compiled at the first call after an installation (some
seconds) and kept on disk.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from numba import njit
from torch import Tensor

from enfilade.errors import UserError
from enfilade.ops.vectors import LANES, add, fill, load, madd, store

Normalise = Literal["row", "symmetric", "none"]

MAX_DIMENSION = 8


@dataclass(frozen=True)
class Lattice:
    """The lattice of a batch of images: n = b * h * w points and m vertices, of which vertex 0 is empty space: every
    missing neighbour is that one, and its values are 0. The images of a batch share no vertex."""

    size: tuple[int, int, int]  # b, h, w
    offsets: Int32[Tensor, "n corners"]  # the vertices of each point's simplex
    weights: Float32[Tensor, "n corners"]  # its barycentric coordinates there
    neighbours: Int32[Tensor, "corners m 2"]  # one step back and forth from each vertex, along each direction

    @staticmethod
    def build(features: Float[Tensor, "*b d h w"]) -> "Lattice":
        """The lattice of `features`, d h w or b d h w with d from 1 to 8, in units of the Gaussian's standard
        deviation: pixel coordinates / theta_xy, colours / theta_rgb and so on. It lands on the device of `features`.

        Raises UserError for another shape, for features that are not finite, and where they span so many standard
        deviations that the vertices cannot be numbered in 64 bits."""
        if features.ndim not in (3, 4) or not 1 <= features.shape[-3] <= MAX_DIMENSION or 0 in features.shape:
            raise UserError(
                f"features of a lattice are d h w or b d h w with d from 1 to {MAX_DIMENSION} and at least one pixel, "
                f"not {tuple(features.shape)}"
            )
        d, h, w = features.shape[-3:]
        array = features.detach().to("cpu", torch.float32).reshape(-1, d, h * w).contiguous().numpy()
        offsets, weights, neighbours = _build(array)
        tensors = (torch.from_numpy(a).to(features.device) for a in (offsets, weights, neighbours))
        return Lattice((len(array), h, w), *tensors)

    @property
    def dimension(self) -> int:
        return self.offsets.shape[1] - 1

    @property
    def vertices(self) -> int:
        """The number of vertices, empty space included."""
        return self.neighbours.shape[1]

    @property
    def gain(self) -> float:
        """The factor a of K, which takes out what the blur adds by going once around all directions."""
        return 1 / (1 + 0.5**self.dimension)

    @cached_property
    def norm(self) -> Float32[Tensor, "b 1 h w"]:
        """K 1: the sum of every point's kernel over its image."""
        b, h, w = self.size
        return _Filter.apply(self.weights.new_ones(b, 1, h, w), self, False)

    @cached_property
    def self_weight(self) -> Float32[Tensor, "b 1 h w"]:
        """K_ii: what a point sends to itself, exp(0) = 1 in the exact Gaussian, for a mean field to take off.

        In closed form: vertices k apart in a simplex exchange 2^-k the short way and 2^-(d + 1 - k) around the others.
        That is exact where the vertices on these ways exist, and else a little too large."""
        d = self.dimension
        steps = torch.arange(d + 1, device=self.weights.device)
        steps = (steps[:, None] - steps[None]).abs()
        blur = 0.5**steps + 0.5 ** (d + 1 - steps)
        blur.fill_diagonal_(1 + 0.5**d)
        b, h, w = self.size
        return self.gain * ((self.weights @ blur) * self.weights).sum(1).view(b, 1, h, w)

    @cached_property
    def corners(self) -> Any:
        """The corners of all points in order of their vertices, for the splat of `ops.lattice_triton`."""
        from enfilade.ops.lattice_triton import sort_corners

        return sort_corners(self.offsets, self.vertices)

    def scaled(self, factor: Float[Tensor, "b 1 h w"]) -> "Lattice":
        """The lattice of diag(factor) K diag(factor), at no cost when filtering. scaled(norm ** -0.5) is the symmetric
        normalisation."""
        return replace(self, weights=self.weights * factor.to(self.weights).reshape(-1, 1))

    def to(self, device: torch.device | str) -> "Lattice":
        moved = {name: getattr(self, name).to(device) for name in ("offsets", "weights", "neighbours")}
        return replace(self, **moved)


def filter(
    values: Float[Tensor, "b c h w"], lattice: Lattice, *, normalise: Normalise = "row", transpose: bool = False
) -> Float[Tensor, "b c h w"]:
    """K values, or K^T values with `transpose`. `normalise` is "row": diag(norm)^-1 K, a weighted mean of the image,
    so constants stay; "symmetric": diag(norm)^-1/2 K diag(norm)^-1/2; "none": K itself.

    Raises UserError where the values are of another size, batch or device than the lattice."""
    if normalise not in ("row", "symmetric", "none"):
        raise UserError(f"normalise is row, symmetric or none, not {normalise!r}")
    b, h, w = lattice.size
    if values.ndim != 4 or (values.shape[0], *values.shape[2:]) != (b, h, w):
        raise UserError(f"values are {tuple(values.shape)}, but the lattice was built for ({b}, channels, {h}, {w})")
    if values.device != lattice.weights.device:
        raise UserError(f"values are on {values.device}, the lattice on {lattice.weights.device}: move it with .to()")
    if normalise == "none":
        return _Filter.apply(values, lattice, transpose)
    factor = lattice.norm.to(values.dtype) ** (-1.0 if normalise == "row" else -0.5)
    if normalise == "symmetric" or transpose:
        values = values * factor
    out = _Filter.apply(values, lattice, transpose)
    return out * factor if normalise == "symmetric" or not transpose else out


def gaussian_reference(
    values: Float[Tensor, "b c h w"], features: Float[Tensor, "b d h w"], *, normalise: Normalise = "row"
) -> Float[Tensor, "b c h w"]:
    """What `filter` approximates, over all pairs of pixels: time and memory grow with their square."""
    f = features.flatten(2).mT
    kernel = torch.exp(-0.5 * (f[:, :, None] - f[:, None]).square().sum(-1)).to(values.dtype)
    norm = kernel.sum(2, keepdim=True)
    if normalise != "none":
        kernel = kernel / norm if normalise == "row" else kernel * (norm * norm.mT) ** -0.5
    return (kernel @ values.flatten(2).mT).mT.reshape(values.shape)


class _Filter(torch.autograd.Function):
    @staticmethod
    @no_type_check
    def forward(ctx, values, lattice, transpose):
        ctx.lattice, ctx.transpose = lattice, transpose
        if values.device.type == "cpu" and values.dtype == torch.float32:
            return _filter_compiled(values, lattice, transpose)
        if values.dtype == torch.float32 and (kernels := _kernels(values.device)):
            return kernels.filter(values, lattice, transpose)
        return _filter_torch(values, lattice, transpose)

    @staticmethod
    @no_type_check
    def backward(ctx, gradient):
        return _Filter.apply(gradient, ctx.lattice, not ctx.transpose), None, None


@lru_cache
def _kernels(device: torch.device) -> Any:
    """`ops.lattice_triton`, or None where its kernels cannot run."""
    if device.type != "cuda":
        return None
    try:
        from enfilade.ops import lattice_triton
    except ImportError:  # Triton comes with torch for GPUs, though not everywhere.
        return None
    return lattice_triton if lattice_triton.available(device) else None


def _filter_torch(values: Tensor, lattice: Lattice, transpose: bool) -> Tensor:
    """The same operator in torch operations: for other devices and types, and to check the compiled loops."""
    rows = values.permute(0, 2, 3, 1).flatten(0, 2)  # n c
    weights = lattice.weights.to(values.dtype)
    table = values.new_zeros(lattice.vertices, rows.shape[1])
    for corner, weight in zip(lattice.offsets.T, weights.T):
        table.index_add_(0, corner, rows * weight[:, None])
    for neighbours in reversed(lattice.neighbours) if transpose else lattice.neighbours:
        table = table + 0.5 * (table[neighbours[:, 0]] + table[neighbours[:, 1]])
    out = torch.zeros_like(rows)
    for corner, weight in zip(lattice.offsets.T, weights.T):
        out = out + table[corner] * weight[:, None]
    b, h, w = lattice.size
    return (lattice.gain * out).view(b, h, w, -1).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------- threads


@lru_cache(1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "lattice")


def run_parts(function: Callable[[int, int, int], Any], n: int, threads: int | None = None) -> list:
    """[function(part, start, stop), ...] over 0..n in `threads` parts (of torch's number), side by side: for compiled
    loops, which release the interpreter's lock. Own threads, because OpenMP's neither survive the fork of a data loader
    nor wait quietly."""
    parts = max(1, min(threads or torch.get_num_threads(), n))
    edges = [n * i // parts for i in range(parts + 1)]
    jobs = list(zip(range(parts), edges, edges[1:]))
    if parts == 1:
        return [function(*jobs[0])]
    pool = _pool(os.getpid(), parts - 1)
    others = [pool.submit(function, *job) for job in jobs[1:]]
    return [function(*jobs[0]), *(other.result() for other in others)]


# ------------------------------------------------------------------------------------------------------------ build


def _build(features: Float32[np.ndarray, "b d p"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """offsets, weights and neighbours as in `Lattice`.

    A vertex is d + 1 integers that sum to 0 and agree modulo d + 1: with their common remainder r it is the d integers
    q_i = (x_i - r) / (d + 1) and r, the digits of its key; the image of the batch is another digit. A step to a
    neighbour adds a constant to the key that depends on r and the direction only."""
    b, d, p = features.shape
    scale = np.array([math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)])
    found = run_parts(lambda _, start, stop: _bounds(features, scale, start, stop), b * p)
    if bad := sum(f[2] for f in found):
        raise UserError(f"features of a lattice must be finite numbers: {bad} of {features.size} are NaN or infinite")
    low, high = np.min([f[0] for f in found], 0) / (d + 1), np.max([f[1] for f in found], 0) / (d + 1)
    # A simplex reaches up to two steps beyond the rounded coordinates, a neighbour a third.
    low = [math.floor(x) - 3 for x in low]
    radix = [math.ceil(x) + 4 - l for x, l in zip(high, low)]
    stride = [(d + 1) * math.prod(radix[:i]) for i in range(d + 1)]
    if stride[-1] * b >= 2**62:
        widest = max(range(d), key=lambda i: np.ptp(features[:, i]))
        raise UserError(
            f"the features span too many standard deviations for a lattice of {d} dimensions: feature {widest} alone "
            f"runs over {np.ptp(features[:, widest]):.3g} of them; divide it by a larger theta"
        )
    low, stride = np.array(low), np.array(stride)

    offsets, weights = np.empty((b * p, d + 1), np.int32), np.empty((b * p, d + 1), np.float32)

    def locate(_, start, stop):
        return start, stop, _locate(features, scale, low, stride, start, stop, offsets, weights)

    parts = run_parts(locate, b * p)
    # Each part has numbered its own vertices; the same ones get the same number now.
    numbers, keys, slots = _number(np.concatenate([keys for *_, keys in parts]))
    edges = np.cumsum([0, *(len(keys) for *_, keys in parts)])
    for (start, stop, _), left, right in zip(parts, edges, edges[1:]):
        part, new = offsets[start:stop], numbers[left:right]
        run_parts(lambda _, i, j, part=part, new=new: _renumber(part, new, i, j), len(part))
    neighbours = np.zeros((d + 1, len(keys), 2), np.int32)
    run_parts(lambda _, i, j: _neighbours(keys, slots, stride, max(i, 1), j, neighbours), len(keys))
    return offsets, weights, neighbours


@njit(cache=True, nogil=True)
@no_type_check
def _elevate(features, image, i, scale, x):
    """The point on the plane sum(x) = 0, at the scale where the whole filter has a standard deviation of 1."""
    d = len(scale)
    total = 0.0
    for j in range(d, 0, -1):
        f = features[image, j - 1, i] * scale[j - 1]
        x[j] = total - j * f
        total += f
    x[0] = total


@njit(cache=True, nogil=True)
@no_type_check
def _bounds(features, scale, start, stop):
    """Extremes of the first d coordinates over points start..stop, and how many features are not finite."""
    d, p = features.shape[1:]
    x, low, high = np.empty(d + 1), np.full(d, np.inf), np.full(d, -np.inf)
    bad = 0
    for point in range(start, stop):
        image = point // p
        for j in range(d):
            bad += not np.isfinite(features[image, j, point - image * p])
        _elevate(features, image, point - image * p, scale, x)
        for j in range(d):
            low[j], high[j] = min(low[j], x[j]), max(high[j], x[j])
    return low, high, bad


@njit(cache=True, nogil=True)
@no_type_check
def _locate(features, scale, low, stride, start, stop, offsets, weights):
    """Simplex and barycentric coordinates of points start..stop; returns the keys of the vertices, in order of their
    first use, with -1 for vertex 0."""
    d, p = features.shape[1:]
    x, whole, rank, order = (
        np.empty(d + 1),
        np.empty(d + 1, np.int64),
        np.empty(d + 1, np.int64),
        np.empty(d + 1, np.int64),
    )
    bary = np.empty(d + 2)
    keys, slots = np.empty(1 << 12, np.int64), np.zeros(1 << 13, np.int32)
    keys[0], m = -1, 1
    last_key, last_ranks = np.int64(-1), np.int64(-1)
    for point in range(start, stop):
        image = point // p
        _elevate(features, image, point - image * p, scale, x)
        # The nearest vertex of remainder 0 is (d + 1) * whole, once whole sums to 0.
        total = 0
        for j in range(d + 1):
            whole[j] = math.floor(x[j] / (d + 1) + 0.5)
            total += whole[j]
            x[j] -= whole[j] * (d + 1)
            rank[j] = 0
        for j in range(d):
            for k in range(j + 1, d + 1):
                if x[j] < x[k]:
                    rank[j] += 1
                else:
                    rank[k] += 1
        for j in range(d + 1):
            rank[j] += total
            turn = (rank[j] < 0) - (rank[j] > d)
            rank[j] += turn * (d + 1)
            whole[j] += turn
            x[j] -= turn * (d + 1)
        bary[:] = 0
        key, ranks = image * stride[d], 0
        for j in range(d + 1):
            share = x[j] / (d + 1)
            bary[d - rank[j]] += share
            bary[d + 1 - rank[j]] -= share
            order[rank[j]] = j
            ranks = ranks << 4 | rank[j]
            if j < d:
                key += (whole[j] - low[j]) * stride[j]
        bary[0] += 1 + bary[d + 1]
        for k in range(d + 1):
            weights[point, k] = bary[k]
        if key == last_key and ranks == last_ranks:  # the simplex of the point before
            offsets[point] = offsets[point - 1]
            continue
        last_key, last_ranks = key, ranks
        if 2 * (m + d + 1) > len(slots):
            keys, slots = _grow(keys, m)
        for k in range(d + 1):
            place = _find(key, keys, slots)
            if slots[place] == 0:
                slots[place] = m
                keys[m] = key
                m += 1
            offsets[point, k] = slots[place]
            # One step on: every coordinate + 1, and the one of rank d - k back by d + 1.
            key += 1
            if order[d - k] < d:
                key -= stride[order[d - k]]
    return keys[:m]


@njit(cache=True, nogil=True)
@no_type_check
def _find(key, keys, slots):
    """The slot that holds the number of `key`, or the free one (0) where it belongs."""
    mask = len(slots) - 1
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: the high half is well mixed
    place = np.int64(mixed >> np.uint64(32)) & mask
    while slots[place] != 0 and keys[slots[place]] != key:
        place = (place + 1) & mask
    return place


@njit(cache=True, nogil=True)
@no_type_check
def _grow(keys, m):
    """Twice the room for keys, and a table of slots twice as long again, which is at most half full."""
    larger, slots = np.empty(2 * len(keys), np.int64), np.zeros(4 * len(keys), np.int32)
    larger[:m] = keys[:m]
    for v in range(1, m):
        slots[_find(keys[v], keys, slots)] = v
    return larger, slots


@njit(cache=True, nogil=True)
@no_type_check
def _number(parts):
    """Numbers of the vertices whose keys some parts have found, which all start with -1; the keys by number; slots."""
    keys, slots = np.empty(1 << 12, np.int64), np.zeros(1 << 13, np.int32)
    while len(keys) < len(parts):
        keys, slots = np.empty(2 * len(keys), np.int64), np.zeros(2 * len(slots), np.int32)
    numbers = np.zeros(len(parts), np.int32)
    keys[0], m = -1, 1
    for i in range(len(parts)):
        if parts[i] >= 0:
            place = _find(parts[i], keys, slots)
            if slots[place] == 0:
                slots[place] = m
                keys[m] = parts[i]
                m += 1
            numbers[i] = slots[place]
    return numbers, keys[:m], slots


@njit(cache=True, nogil=True)
@no_type_check
def _renumber(offsets, numbers, start, stop):
    for i in range(start, stop):
        for k in range(offsets.shape[1]):
            offsets[i, k] = numbers[offsets[i, k]]


@njit(cache=True, nogil=True)
@no_type_check
def _neighbours(keys, slots, stride, start, stop, neighbours):
    d = len(stride) - 1
    wrap = -d + stride[:d].sum()
    for v in range(start, stop):
        ahead = keys[v] + (1 if keys[v] % (d + 1) < d else wrap)
        for j in range(d + 1):
            other = slots[_find(ahead - stride[j] if j < d else ahead, keys, slots)]
            if other:
                # v is the only vertex one step before `other`, so no two threads write to one place.
                neighbours[j, v, 1] = other
                neighbours[j, other, 0] = v


# ------------------------------------------------------------------------------------------------------------ filter

_TILE = 64  # points that are turned from channel-major to point-major at a time, within the first-level cache


def _filter_compiled(values: Tensor, lattice: Lattice, transpose: bool) -> Tensor:
    array = np.ascontiguousarray(values.detach().flatten(2).numpy())
    table = _splat_compiled(array, lattice)
    table = _blur_compiled(table, lattice, transpose)
    return torch.from_numpy(_slice_compiled(table, lattice, array.shape[1])).view(values.shape)


def _splat_compiled(values: Float32[np.ndarray, "b c p"], lattice: Lattice) -> Float32[np.ndarray, "m width"]:
    """Rows of channels, one a vertex, padded with zeros to whole vectors. Each thread has its own, which are then
    added in order."""
    offsets, weights = lattice.offsets.numpy(), lattice.weights.numpy()
    width = -(-values.shape[1] // LANES) * LANES

    def part(_, start, stop):
        table = np.zeros((lattice.vertices, width), np.float32)
        _splat(values, offsets, weights, start, stop, table.reshape(-1))
        return table

    table, *others = run_parts(part, len(offsets))
    for other in others:
        run_parts(lambda _, i, j, other=other: _accumulate(table.reshape(-1), other.reshape(-1), i, j), table.size)
    return table


def _blur_compiled(
    table: Float32[np.ndarray, "m width"], lattice: Lattice, transpose: bool
) -> Float32[np.ndarray, "m width"]:
    spare, width = np.empty_like(table), table.shape[1]
    for neighbours in lattice.neighbours.numpy()[:: -1 if transpose else 1]:
        arrays = table.reshape(-1), spare.reshape(-1), neighbours
        run_parts(lambda _, start, stop, arrays=arrays: blur_rows(*arrays, width, start, stop), len(table))
        table, spare = spare, table
    return table


def _slice_compiled(
    table: Float32[np.ndarray, "m width"], lattice: Lattice, channels: int
) -> Float32[np.ndarray, "b c p"]:
    b, h, w = lattice.size
    out = np.empty((b, channels, h * w), np.float32)
    offsets, weights, gain = lattice.offsets.numpy(), lattice.weights.numpy(), np.float32(lattice.gain)
    flat, width = table.reshape(-1), table.shape[1]
    run_parts(lambda _, start, stop: _slice(flat, width, offsets, weights, gain, start, stop, out), len(offsets))
    return out


@njit(cache=True, nogil=True)
@no_type_check
def _splat(values, offsets, weights, start, stop, table):
    channels, p = values.shape[1:]
    width = (channels + LANES - 1) // LANES * LANES
    tile = np.zeros(_TILE * width, np.float32)
    while start < stop:
        image = start // p
        count = min(_TILE, stop - start, (image + 1) * p - start)
        for c in range(channels):
            source = values[image, c, start - image * p : start - image * p + count]
            for i in range(count):
                tile[i * width + c] = source[i]
        for i in range(count):
            for k in range(offsets.shape[1]):
                row, weight = offsets[start + i, k] * width, weights[start + i, k]
                for j in range(0, width, LANES):
                    store(table, row + j, madd(load(table, row + j), weight, load(tile, i * width + j)))
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def _accumulate(table, other, start, stop):
    for i in range(start, stop):
        table[i] += other[i]


@njit(cache=True, nogil=True)
@no_type_check
def blur_rows(source, target, neighbours, width, start, stop):
    half = np.float32(0.5)
    for v in range(start, stop):
        row, back, forth = v * width, neighbours[v, 0] * width, neighbours[v, 1] * width
        for j in range(0, width, LANES):
            both = add(load(source, back + j), load(source, forth + j))
            store(target, row + j, madd(load(source, row + j), half, both))


@njit(cache=True, nogil=True)
@no_type_check
def _slice(table, width, offsets, weights, gain, start, stop, out):
    channels, p = out.shape[1:]
    tile = np.zeros(_TILE * width, np.float32)
    while start < stop:
        image = start // p
        count = min(_TILE, stop - start, (image + 1) * p - start)
        for i in range(count):
            for j in range(0, width, LANES):
                total = fill(np.float32(0))
                for k in range(offsets.shape[1]):
                    total = madd(total, weights[start + i, k], load(table, offsets[start + i, k] * width + j))
                store(tile, i * width + j, total)
        for c in range(channels):
            target = out[image, c, start - image * p : start - image * p + count]
            for i in range(count):
                target[i] = tile[i * width + c] * gain
        start += count
