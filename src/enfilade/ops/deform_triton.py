"""The deformable convolution of `ops.deform` on a GPU: Triton kernels for float32, bfloat16 and float16, with sums in
float32.

As for the loops on CPUs, volumes become rows of channels in a border of one empty voxel: a sample is made of eight
rows, which are in memory whatever the offset, and each is read as one piece. A program takes 64 positions of the output
through all taps, samples 16 channels at a time in registers and multiplies them there. One tap's samples at a time in
memory and a library's product would be a shorter form; but of some ten channels, as IMENet has them, these samples are
to be written and read 27 times, more bytes than all else, in 54 launches.

The backward pass samples again, in two kernels. One has the gradients of the samples, again a product, and turns them
into those of the offsets and, by atomic sums, into that of the input: these are added in no fixed order, and the last
digits differ from run to run. The other sums the weight's gradient over shares of the positions, in a fixed order.

Channel groups (`deform.Piece`) are run one after the other, for they are few. In the kernels `g` is a
`deform.Geometry`, `n` the number of positions of one image's output, and an image's first element is found in 64 bits.
"""

from math import prod
from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from enfilade.ops.deform import Piece, known_geometry, pieces_of

_POINTS, _CHANNELS = 64, 16  # of a block; no side of a product of blocks may be below 16
_PROGRAMS = 2048  # about as many sum the gradient of a weight: enough to fill the largest cards
# One stage: to fetch the next block of channels ahead takes 70 KiB of shared memory, the place of other programs, and
# up to 16 channels there is no next one.
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
@no_type_check
def _place(block, n, g, POINTS: tl.constexpr):
    """The image of a block of positions, the positions, which of them there are, and where the tap 0, 0, 0 of each
    samples without offset."""
    blocks = tl.cdiv(n, POINTS)
    image = tl.cast(block // blocks, tl.int64)
    point = block % blocks * POINTS + tl.arange(0, POINTS)
    line = point // g.out[2]
    x = line // g.out[1] * g.stride[0] - g.padding[0]
    y = line % g.out[1] * g.stride[1] - g.padding[1]
    z = point % g.out[2] * g.stride[2] - g.padding[2]
    return image, point, point < n, x, y, z


@triton.jit
@no_type_check
def _divide(place, size):
    """The cell along an axis, how far into it, and whether a step moves the sample within the volume. NaN falls
    anywhere inside, but is NaN in the cell."""
    kept = tl.where(place > -1.0, place, -1.0)
    kept = tl.where(kept < size, kept, size)
    cell = tl.floor(kept)
    cell = tl.where(cell < size, cell, size - 1.0)
    fraction = tl.where(place == place, kept - cell, place)
    within = tl.where((place < -1.0) | (place >= size), 0.0, 1.0)
    return cell.to(tl.int32) + 1, fraction, within


@triton.jit
@no_type_check
def _locate(steps, tap, n, point, known, x, y, z, g):
    """Of each point the cell's first row, how far into the cell, and where steps count, both along x, y, z."""
    line = tap // g.kernel[2]
    step = steps + tl.cast(3 * tap, tl.int64) * n + point
    move_x = tl.load(step, known, 0.0).to(tl.float32)
    move_y = tl.load(step + n, known, 0.0).to(tl.float32)
    move_z = tl.load(step + 2 * tl.cast(n, tl.int64), known, 0.0).to(tl.float32)
    cell_x, fx, in_x = _divide((x + line // g.kernel[1] * g.dilation[0]).to(tl.float32) + move_x, g.size[0] * 1.0)
    cell_y, fy, in_y = _divide((y + line % g.kernel[1] * g.dilation[1]).to(tl.float32) + move_y, g.size[1] * 1.0)
    cell_z, fz, in_z = _divide((z + tap % g.kernel[2] * g.dilation[2]).to(tl.float32) + move_z, g.size[2] * 1.0)
    row = (cell_x * (g.size[1] + 2) + cell_y) * (g.size[2] + 2) + cell_z
    return row, (fx[:, None], fy[:, None], fz[:, None]), (in_x, in_y, in_z)


@triton.jit
@no_type_check
def _edges(rows, row, channel, width, g):
    """Where the four edges of each cell along z start: at x and y, y + 1, x + 1, and both."""
    step_y = (g.size[2] + 2) * width
    step_x = (g.size[1] + 2) * step_y
    a = rows + row.to(tl.int64)[:, None] * width + channel[None, :]
    return a, a + step_y, a + step_x, a + step_x + step_y


@triton.jit
@no_type_check
def _sample(rows, row, channel, width, fractions, g):
    """Samples, points by channels, and what a step along x, y, z changes in them."""
    a, b, c, d = _edges(rows, row, channel, width, g)
    fx, fy, fz = fractions
    a0, b0 = tl.load(a).to(tl.float32), tl.load(b).to(tl.float32)
    c0, d0 = tl.load(c).to(tl.float32), tl.load(d).to(tl.float32)
    a_z, b_z = tl.load(a + width).to(tl.float32) - a0, tl.load(b + width).to(tl.float32) - b0
    c_z, d_z = tl.load(c + width).to(tl.float32) - c0, tl.load(d + width).to(tl.float32) - d0
    a, b, c, d = a0 + fz * a_z, b0 + fz * b_z, c0 + fz * c_z, d0 + fz * d_z
    near, near_y, near_z = a + fy * (b - a), b - a, a_z + fy * (b_z - a_z)
    far, far_y, far_z = c + fy * (d - c), d - c, c_z + fy * (d_z - c_z)
    by_x, by_y, by_z = far - near, near_y + fx * (far_y - near_y), near_z + fx * (far_z - near_z)
    return near + fx * by_x, by_x, by_y, by_z


@triton.jit
@no_type_check
def _forward(rows, steps, matrices, out, image_steps, image_out, width, outputs, columns, n, taps, g,
             POINTS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr):  # fmt: skip
    """Adds to `out` at a block of positions, for a block of outputs. Rows are `width` channels, and `matrices` are taps
    of width by `columns`."""
    image, point, known, x, y, z = _place(tl.program_id(0), n, g, POINTS)
    channels, output = tl.arange(0, CHANNELS), tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows += image * (g.size[0] + 2) * (g.size[1] + 2) * (g.size[2] + 2) * width
    steps += image * image_steps
    target = out + image * image_out + output.to(tl.int64)[None, :] * n + point[:, None]
    mask = known[:, None] & (output < outputs)[None, :]
    sums = tl.load(target, mask, 0.0)
    for tap in range(taps):
        row, fractions, _ = _locate(steps, tap, n, point, known, x, y, z, g)
        for first in range(0, width, CHANNELS):
            samples = _sample(rows, row, first + channels, width, fractions, g)[0]
            matrix = tl.load(matrices + (tap * width + first + channels)[:, None] * columns + output[None, :])
            sums = tl.dot(samples, matrix, sums, input_precision="ieee")
    tl.store(target, sums, mask)


@triton.jit
@no_type_check
def _backward(rows, steps, matrices, given, to_rows, to_steps, image_steps, image_given, width, outputs, columns, n,
              taps, g, POINTS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr):  # fmt: skip
    """Adds to `to_rows` and `to_steps`, where they are not None, what a block of positions gives."""
    image, point, known, x, y, z = _place(tl.program_id(0), n, g, POINTS)
    channels, output = tl.arange(0, CHANNELS), tl.arange(0, OUTPUTS)
    volume = image * (g.size[0] + 2) * (g.size[1] + 2) * (g.size[2] + 2) * width
    given += image * image_given + point[:, None]
    for tap in range(taps):
        row, fractions, inside = _locate(steps + image * image_steps, tap, n, point, known, x, y, z, g)
        to_x = tl.zeros((POINTS,), tl.float32)
        to_y = tl.zeros((POINTS,), tl.float32)
        to_z = tl.zeros((POINTS,), tl.float32)
        for first in range(0, width, CHANNELS):
            channel = first + channels
            to_samples = tl.zeros((POINTS, CHANNELS), tl.float32)
            for start in range(0, columns, OUTPUTS):
                o = start + output
                gradient = tl.load(given + o.to(tl.int64)[None, :] * n, known[:, None] & (o < outputs)[None, :], 0.0)
                matrix = tl.load(matrices + (tap * width + channel)[None, :] * columns + o[:, None])
                to_samples = tl.dot(gradient.to(tl.float32), matrix, to_samples, input_precision="ieee")
            if to_steps is not None:
                _, by_x, by_y, by_z = _sample(rows + volume, row, channel, width, fractions, g)
                to_x += tl.sum(to_samples * by_x, 1)
                to_y += tl.sum(to_samples * by_y, 1)
                to_z += tl.sum(to_samples * by_z, 1)
            if to_rows is not None:
                a, b, c, d = _edges(to_rows + volume, row, channel, width, g)
                fx, fy, fz = fractions
                far, mask = fx * to_samples, known[:, None]
                to_b, to_d = fy * (to_samples - far), fy * far
                to_a, to_c = to_samples - far - to_b, far - to_d
                tl.atomic_add(a, to_a - fz * to_a, mask, sem="relaxed")
                tl.atomic_add(a + width, fz * to_a, mask, sem="relaxed")
                tl.atomic_add(b, to_b - fz * to_b, mask, sem="relaxed")
                tl.atomic_add(b + width, fz * to_b, mask, sem="relaxed")
                tl.atomic_add(c, to_c - fz * to_c, mask, sem="relaxed")
                tl.atomic_add(c + width, fz * to_c, mask, sem="relaxed")
                tl.atomic_add(d, to_d - fz * to_d, mask, sem="relaxed")
                tl.atomic_add(d + width, fz * to_d, mask, sem="relaxed")
        if to_steps is not None:
            at = to_steps + image * image_steps + tl.cast(3 * tap, tl.int64) * n + point
            tl.store(at, tl.load(at, known, 0.0) + inside[0] * to_x, known)
            at += n
            tl.store(at, tl.load(at, known, 0.0) + inside[1] * to_y, known)
            at += n
            tl.store(at, tl.load(at, known, 0.0) + inside[2] * to_z, known)


@triton.jit
@no_type_check
def _to_weight(rows, steps, given, parts, image_steps, image_given, width, outputs, columns, n, taps, blocks, g,
               POINTS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr):  # fmt: skip
    """One block of one tap's matrix, summed over a share of the `blocks` of positions of all images."""
    tap, first = tl.program_id(0) % taps, tl.program_id(0) // taps * CHANNELS
    channel, output = first + tl.arange(0, CHANNELS), tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    size = tl.cast(g.size[0] + 2, tl.int64) * (g.size[1] + 2) * (g.size[2] + 2) * width
    sums = tl.zeros((CHANNELS, OUTPUTS), tl.float32)
    for block in range(tl.program_id(2), blocks, tl.num_programs(2)):
        image, point, known, x, y, z = _place(block, n, g, POINTS)
        row, fractions, _ = _locate(steps + image * image_steps, tap, n, point, known, x, y, z, g)
        samples = _sample(rows + image * size, row, channel, width, fractions, g)[0]
        mask = known[:, None] & (output < outputs)[None, :]
        address = given + image * image_given + output.to(tl.int64)[None, :] * n + point[:, None]
        gradient = tl.load(address, mask, 0.0).to(tl.float32)
        sums = tl.dot(tl.trans(samples), gradient, sums, input_precision="ieee")
    line = (tl.program_id(2) * taps + tap).to(tl.int64) * width + channel
    tl.store(parts + line[:, None] * columns + output[None, :], sums)


# ----------------------------------------------------------------------------------------------------------- launches


@no_type_check
def forward(x, offsets, weight, bias, stride, padding, dilation, groups, offset_groups):
    """The operator `enfilade::deform_conv3d`: an output of x's type."""
    g = known_geometry(x, offsets, weight, stride, padding, dilation)
    b, outputs, taps, n, steps = len(x), len(weight), prod(g.kernel), prod(g.out), offsets.contiguous().flatten(2)
    out = x.new_zeros((b, outputs, n), dtype=torch.float32)
    if bias is not None:
        out += bias[:, None]
    for piece in pieces_of(x.shape[1], len(weight), groups, offset_groups):
        rows, moves, (matrices, block) = _rows(x, piece), _moves(piece, taps), _matrices(weight, piece)
        target, (width, columns) = out[:, piece.outputs], matrices.shape[1:]
        shape = steps.stride(0), out.stride(0), width, target.shape[1], columns, n, taps, g
        grid = triton.cdiv(n, _POINTS) * b, columns // block
        with torch.cuda.device_of(x):
            _forward[grid](rows, steps[:, moves], matrices, target, *shape, _POINTS, _CHANNELS, block, **_OPTIONS)
    return out.to(x.dtype).view(b, outputs, *g.out)


@no_type_check
def backward(gradient, x, offsets, weight, stride, padding, dilation, groups, offset_groups, needed):
    """The operator `enfilade::deform_conv3d_backward`: gradients of x, offsets and weight, of their types; of no size
    where not `needed`."""
    g = known_geometry(x, offsets, weight, stride, padding, dilation)
    taps, n = prod(g.kernel), prod(g.out)
    blocks, steps, given = triton.cdiv(n, _POINTS) * len(x), offsets.contiguous().flatten(2), gradient.contiguous()
    tensors = x, offsets, weight
    shapes = (t.shape if need else (0,) * 5 for t, need in zip(tensors, needed))
    to_x, to_offsets, to_weight = (x.new_zeros(shape, dtype=torch.float32) for shape in shapes)
    for piece in pieces_of(x.shape[1], len(weight), groups, offset_groups):
        rows, moves, (matrices, block) = _rows(x, piece), _moves(piece, taps), _matrices(weight, piece)
        part, channels, (width, columns) = given[:, piece.outputs], _length(piece.channels), matrices.shape[1:]
        shape = steps.stride(0), given.stride(0), width, part.shape[1], columns, n, taps
        constants = g, _POINTS, _CHANNELS, block
        with torch.cuda.device_of(x):
            if needed[0] or needed[1]:
                to_rows = torch.zeros_like(rows, dtype=torch.float32) if needed[0] else None
                to_steps = to_offsets[:, moves] if needed[1] else None
                _backward[(blocks,)](
                    rows, steps[:, moves], matrices, part, to_rows, to_steps, *shape, *constants, **_OPTIONS
                )
                if to_rows is not None:
                    to_x[:, piece.channels] = to_rows[:, 1:-1, 1:-1, 1:-1, :channels].movedim(-1, 1)
            if needed[2]:
                grid = taps * width // _CHANNELS, columns // block
                shares = max(1, min(blocks, _PROGRAMS // prod(grid)))
                sums = torch.empty((shares, *matrices.shape), dtype=torch.float32, device=x.device)
                _to_weight[(*grid, shares)](rows, steps[:, moves], part, sums, *shape, blocks, *constants, **_OPTIONS)
                found = sums.sum(0)[:, :channels, : part.shape[1]].permute(2, 1, 0)
                to_weight[piece.outputs, piece.columns] = found.unflatten(2, g.kernel)
    return [t.to(like.dtype) for t, like in zip((to_x, to_offsets, to_weight), tensors)]


def _length(part: slice) -> int:
    return part.stop - part.start


def _moves(piece: Piece, taps: int) -> slice:
    """A piece's channels of the offsets."""
    return slice(3 * taps * piece.offset_group, 3 * taps * (piece.offset_group + 1))


def _rows(x: Tensor, piece: Piece) -> Tensor:
    """b x+2 y+2 z+2 c: channels last, padded with zeros to whole blocks, and a border of one empty voxel."""
    channels = _length(piece.channels)
    rows = x.new_zeros(len(x), *(n + 2 for n in x.shape[2:]), channels + -channels % _CHANNELS)
    rows[:, 1:-1, 1:-1, 1:-1, :channels] = x[:, piece.channels].movedim(1, -1)
    return rows


def _matrices(weight: Tensor, piece: Piece) -> tuple[Tensor, int]:
    """For each tap c x o, padded with zeros to whole blocks, and the block's outputs."""
    part = weight[piece.outputs, piece.columns].float().flatten(2).permute(2, 1, 0)
    _, channels, outputs = part.shape
    block = min(64, max(16, triton.next_power_of_2(outputs)))
    return F.pad(part, (0, -outputs % block, 0, -channels % _CHANNELS)).contiguous(), block
