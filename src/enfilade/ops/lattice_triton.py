"""The filter of `ops.lattice` as Triton kernels, for float32 on a GPU.

Values are rows of channels, one a point or a vertex. The splat sums over each vertex's corners, which are sorted once
for a lattice, so nothing is added atomically and results repeat exactly. Each blur is one pass over the vertices, and
the slice sums a point's d + 1 rows in registers.

This module needs Triton, which comes with torch for GPUs and is no dependency of this package; `ops.lattice` runs torch
operations where it is missing.
"""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from enfilade.ops.trial import works

if TYPE_CHECKING:
    from enfilade.ops.lattice import Lattice

PIECE = 256  # corners of a vertex that one program sums: a uniform wall may put most of an image onto a few vertices
# Of a program: channels at a time, rows, rows times channels, and vertices of the splat; so that all it holds stays in
# registers. Not tuned: no GPU was at hand.
WIDEST, TALLEST, ELEMENTS, VERTICES = 128, 256, 2048, 4


def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`: a GPU that Triton compiles for, tried out once; or a CPU in Triton's
    interpreter, which is for tests (TRITON_INTERPRET=1 before the first import)."""
    if not isinstance(_blur, triton.runtime.JITFunction):
        return device.type in ("cpu", "cuda")
    if device.type != "cuda":
        return False

    def launch() -> None:
        blur(torch.zeros(1, 1, device=device), torch.zeros(1, 2, dtype=torch.int32, device=device))

    return works(launch, "lattices", device)


@dataclass(frozen=True)
class Corners:
    """The corners of all points in order of their vertices, in pieces of at most `PIECE` that share a vertex. The first
    m pieces are the first ones of each vertex (empty where it has no corner), further ones follow in order."""

    order: Int64[Tensor, "corners"]  # point * (d + 1) + corner
    pieces: Int64[Tensor, "pieces 2"]  # the first corner and the one after the last, as places in `order`
    long: Int64[Tensor, "long 3"]  # a vertex of several pieces, the first of the further ones, the one after the last


def sort_corners(offsets: Int32[Tensor, "n corners"], vertices: int) -> Corners:
    vertex, order = offsets.flatten().sort(stable=True)
    bounds = torch.searchsorted(vertex, torch.arange(vertices + 1, dtype=vertex.dtype, device=vertex.device))
    first, last = bounds[:-1], bounds[1:]
    further = ((last - first - 1) // PIECE).clamp_min(0)
    long = further.nonzero()[:, 0]
    further = further[long]
    end = further.cumsum(0)
    owner = long.repeat_interleave(further)
    nth = torch.arange(len(owner), device=vertex.device) - (end - further).repeat_interleave(further) + 1
    start = torch.cat([first, first[owner] + nth * PIECE])
    stop = torch.minimum(start + PIECE, torch.cat([last, last[owner]]))
    long = torch.stack([long, vertices + end - further, vertices + end], 1)
    return Corners(order, torch.stack([start, stop], 1), long)


def filter(values: Float32[Tensor, "b c h w"], lattice: "Lattice", transpose: bool) -> Float32[Tensor, "b c h w"]:
    """K values, or K^T values with `transpose`, as `ops.lattice._filter_torch` computes it."""
    b, h, w = lattice.size
    rows = values.detach().permute(0, 2, 3, 1).reshape(b * h * w, values.shape[1]).contiguous()
    table = splat(rows, lattice.corners, lattice.weights, lattice.vertices)
    directions = range(len(lattice.neighbours))
    for j in reversed(directions) if transpose else directions:
        table = blur(table, lattice.neighbours[j])
    rows = slice_rows(table, lattice.offsets, lattice.weights, lattice.gain)
    return rows.view(b, h, w, values.shape[1]).permute(0, 3, 1, 2)


def splat(
    rows: Float32[Tensor, "n c"], corners: Corners, weights: Float32[Tensor, "n corners"], vertices: int
) -> Float32[Tensor, "m c"]:
    """The sum of each vertex's corners: the points' rows times their weights. In a fixed order."""
    count, channels = len(corners.pieces), rows.shape[1]
    table, block = rows.new_empty(count, channels), _block(channels)
    block["STEP"] = min(ELEMENTS // (VERTICES * block["BLOCK"]), 32)  # corners of each at once; there are some tens
    sources = rows, corners.order, weights.contiguous(), corners.pieces
    corners_each = {"CORNERS": weights.shape[1], "PIECES": VERTICES}
    _launch(_splat, -(-count // VERTICES), *sources, table, count, **corners_each, **block)
    _launch(_collect, len(corners.long), corners.long, table, **block)
    return table[:vertices]


def blur(table: Float32[Tensor, "m c"], neighbours: Int32[Tensor, "m 2"]) -> Float32[Tensor, "m c"]:
    """Each row plus half of the two beside it."""
    out, block = torch.empty_like(table), _block(table.shape[1])
    rows = min(ELEMENTS // block["BLOCK"], TALLEST)
    _launch(_blur, -(-len(table) // rows), table, neighbours.contiguous(), out, len(table), ROWS=rows, **block)
    return out


def slice_rows(
    table: Float32[Tensor, "m c"],
    offsets: Int32[Tensor, "n corners"],
    weights: Float32[Tensor, "n corners"],
    gain: float,
) -> Float32[Tensor, "n c"]:
    """Of each point `gain` times the sum of its corners' rows times their weights."""
    n, corners = offsets.shape
    out, block = table.new_empty(n, table.shape[1]), _block(table.shape[1])
    rows = min(ELEMENTS // block["BLOCK"], TALLEST)
    sources = table, offsets.contiguous(), weights.contiguous()
    _launch(_slice, -(-n // rows), *sources, out, n, gain, CORNERS=corners, ROWS=rows, **block)
    return out


def _block(channels: int) -> dict[str, int]:
    """The number of channels is a constant of the kernels, so that they know how rows are aligned."""
    return {"CHANNELS": channels, "BLOCK": min(triton.next_power_of_2(max(channels, 1)), WIDEST)}


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: int) -> None:
    device = arguments[0].device
    # Triton launches on the current device, not on that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if programs:
            kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)


# ---------------------------------------------------------------------------------------------------------- kernels
# Rows times channels may pass 2^31, so their places are counted in 64 bits.


@triton.jit
@no_type_check
def _splat(
    rows,
    order,
    weights,
    pieces,
    table,
    count,
    CHANNELS: tl.constexpr,
    CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PIECES: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    start = tl.load(pieces + 2 * piece, piece < count, 0)[:, None]
    stop = tl.load(pieces + 2 * piece + 1, piece < count, 0)[:, None]
    longest = tl.max(stop - start)
    for left in range(0, CHANNELS, BLOCK):
        channel = left + tl.arange(0, BLOCK)
        total = tl.full((PIECES, STEP, BLOCK), 0.0, tl.float32)
        for i in range(0, longest, STEP):
            place = start + i + tl.arange(0, STEP)[None, :]
            corner = tl.load(order + place, place < stop, 0)
            weight = tl.load(weights + corner, place < stop, 0.0)
            mask = (place < stop)[:, :, None] & (channel < CHANNELS)[None, None, :]
            row = (corner // CORNERS)[:, :, None] * CHANNELS + channel[None, None, :]
            total += tl.load(rows + row, mask, 0.0) * weight[:, :, None]
        mask = (piece < count)[:, None] & (channel < CHANNELS)[None, :]
        tl.store(table + piece[:, None] * CHANNELS + channel[None, :], tl.sum(total, 1), mask)


@triton.jit
@no_type_check
def _collect(long, table, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * 3
    vertex = tl.load(long + entry)
    start = tl.load(long + entry + 1)
    stop = tl.load(long + entry + 2)
    for left in range(0, CHANNELS, BLOCK):
        channel = left + tl.arange(0, BLOCK)
        total = tl.full((STEP, BLOCK), 0.0, tl.float32)
        for i in range(start, stop, STEP):
            piece = i + tl.arange(0, STEP)
            mask = (piece < stop)[:, None] & (channel < CHANNELS)[None, :]
            total += tl.load(table + piece[:, None] * CHANNELS + channel[None, :], mask, 0.0)
        place = table + vertex * CHANNELS + channel
        first = tl.load(place, channel < CHANNELS, 0.0)
        tl.store(place, first + tl.sum(total, 0), channel < CHANNELS)


@triton.jit
@no_type_check
def _blur(table, neighbours, out, vertices, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    vertex = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    back = tl.load(neighbours + 2 * vertex, vertex < vertices, 0).to(tl.int64)
    forth = tl.load(neighbours + 2 * vertex + 1, vertex < vertices, 0).to(tl.int64)
    for left in range(0, CHANNELS, BLOCK):
        channel = (left + tl.arange(0, BLOCK))[None, :]
        mask = (vertex < vertices)[:, None] & (channel < CHANNELS)
        both = tl.load(table + back[:, None] * CHANNELS + channel, mask, 0.0)
        both += tl.load(table + forth[:, None] * CHANNELS + channel, mask, 0.0)
        place = vertex[:, None] * CHANNELS + channel
        tl.store(out + place, tl.load(table + place, mask, 0.0) + 0.5 * both, mask)


@triton.jit
@no_type_check
def _slice(
    table,
    offsets,
    weights,
    out,
    points,
    gain,
    CHANNELS: tl.constexpr,
    CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    point = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for left in range(0, CHANNELS, BLOCK):
        channel = (left + tl.arange(0, BLOCK))[None, :]
        mask = (point < points)[:, None] & (channel < CHANNELS)
        total = tl.full((ROWS, BLOCK), 0.0, tl.float32)
        for k in tl.static_range(CORNERS):
            vertex = tl.load(offsets + point * CORNERS + k, point < points, 0).to(tl.int64)
            weight = tl.load(weights + point * CORNERS + k, point < points, 0.0)
            total += tl.load(table + vertex[:, None] * CHANNELS + channel, mask, 0.0) * weight[:, None]
        tl.store(out + point[:, None] * CHANNELS + channel, gain * total, mask)
