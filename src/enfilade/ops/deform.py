"""Deformable convolution of volumes: every kernel tap samples where its own offset says.

* Dai, Qi, Xiong, Li, Zhang, Hu, Wei: Deformable convolutional networks, ICCV 2017, Eqs. (2) to (4), here in 3-D
* Li, Ding, Huang: IMENet, IJCAI 2021, Sections 3.4 and 3.5 (the use)

    offsets = head(x)                                           # b 81 x y z: 3 numbers for each of 27 taps
    y = deform_conv3d(x, offsets, weight, bias, dilation=2)     # b o x y z

At output p tap t sees x(stride p - padding + dilation t + offset(p, t)), sampled trilinearly in a volume that is 0
outside: of a cell across the border the part inside counts, as zero padding has it. Where a sample lies exactly on a
voxel the derivative in the offset is that of the cell beyond it.

float32 tensors on a CPU run compiled loops on `torch.get_num_threads()` threads. They sample the taps of some points
at a time and multiply while these are in the cache: memory grows with the volumes, not with 27 copies of the input.
float16 and bfloat16 are computed in float32, float64 runs the plain reference, and other devices run torch operations
that recompute each tap's samples in the backward pass. Results repeat exactly for a given number of threads. The loops
are compiled at the first call after an installation (some seconds) and kept on disk.

`torch.export` and `torch.compile` see one operator, `enfilade::deform_conv3d`, whose backward pass is another.
"""

from functools import partial
from itertools import pairwise, product
from math import prod
from typing import NamedTuple, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numba import njit
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from enfilade.errors import UserError
from enfilade.ops.lattice import run_parts
from enfilade.ops.vectors import LANES, add, at, fill, load, madd, mul, store, sub, total

Triple = tuple[int, int, int]


class Geometry(NamedTuple):
    """All that a convolution's loops need to know of its shape, each along x, y, z."""

    size: Triple  # of the input
    kernel: Triple
    out: Triple  # size of the output
    stride: Triple
    padding: Triple
    dilation: Triple


def deform_conv3d(
    x: Float[Tensor, "b c x y z"],
    offsets: Float[Tensor, "b d i j k"],
    weight: Float[Tensor, "o c_g kx ky kz"],
    bias: Float[Tensor, "o"] | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple | None = None,
    dilation: int | Triple = 1,
    groups: int = 1,
    offset_groups: int = 1,
) -> Float[Tensor, "b o i j k"]:
    """Deformable convolution, of `x`'s type, with gradients in all four tensors.

    The d = offset_groups * kx * ky * kz * 3 channels of `offsets` are, for each group of input channels, for each tap
    with kz fastest, the steps along x, y and z in voxels of the input. `padding` None is dilation * (kernel - 1) // 2,
    which at stride 1 keeps the size for odd kernels. Raises UserError where shapes do not fit together."""
    g = _geometry(x, offsets, weight, bias, stride, padding, dilation, groups, offset_groups)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    args = x.to(kind), offsets.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    if x.device.type == "cpu" and kind == torch.float32:
        out = torch.ops.enfilade.deform_conv3d(*args, g.stride, g.padding, g.dilation, groups, offset_groups)
    else:
        with torch.autocast(x.device.type, enabled=False):
            out = _reference(*args, g, groups, offset_groups, frugal=x.device.type != "cpu")
    return out.to(x.dtype)


def deform_conv3d_reference(
    x: Float[Tensor, "b c x y z"],
    offsets: Float[Tensor, "b d i j k"],
    weight: Float[Tensor, "o c_g kx ky kz"],
    bias: Float[Tensor, "o"] | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple | None = None,
    dilation: int | Triple = 1,
    groups: int = 1,
    offset_groups: int = 1,
) -> Float[Tensor, "b o i j k"]:
    """`deform_conv3d` by its definition, tap by tap and corner by corner, in torch operations of any type. Keeps all
    samples for the backward pass."""
    g = _geometry(x, offsets, weight, bias, stride, padding, dilation, groups, offset_groups)
    return _reference(x, offsets, weight, bias, g, groups, offset_groups)


def _triple(name: str, value, least: int) -> Triple:
    numbers = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(numbers) != 3 or min(numbers) < least:
        raise UserError(f"{name} is one number or three (x, y, z), of {least} or more, not {value}")
    return numbers


def _geometry(x, offsets, weight, bias, stride, padding, dilation, groups, offset_groups) -> Geometry:
    for name, tensor, axes in (
        ("x", x, "b c x y z"),
        ("offsets", offsets, "b d i j k"),
        ("weight", weight, "o c/groups kx ky kz"),
    ):
        if tensor.ndim != 5:
            raise UserError(f"{name} of a 3-D deformable convolution is {axes}, not {tuple(tensor.shape)}")
    (b, c, *size), (o, c_g, *kernel) = x.shape, weight.shape
    stride, dilation = _triple("stride", stride, 1), _triple("dilation", dilation, 1)
    same = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel))
    padding = same if padding is None else _triple("padding", padding, 0)
    for name, count in (("groups", groups), ("offset_groups", offset_groups)):
        if count < 1 or c % count:
            raise UserError(f"{c} input channels cannot be divided into {name}={count}")
    if o % groups:
        raise UserError(f"{o} output channels cannot be divided into groups={groups}")
    if c_g * groups != c:
        raise UserError(f"weight is for {c_g * groups} input channels ({c_g} x {groups} groups), but x has {c}")
    if bias is not None and bias.shape != (o,):
        raise UserError(f"bias is one number for each of {o} output channels, not {tuple(bias.shape)}")
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(size, padding, dilation, kernel, stride)]
    if min(*size, *kernel, *out) < 1:
        raise UserError(f"a kernel of {tuple(kernel)}, dilated by {dilation}, does not fit into {tuple(size)} voxels")
    channels = offset_groups * kernel[0] * kernel[1] * kernel[2] * 3
    if offsets.shape != (b, channels, *out):
        raise UserError(
            f"offsets are {tuple(offsets.shape)}, but a kernel of {tuple(kernel)}, offset_groups={offset_groups} and "
            f"an output of {tuple(out)} need {(b, channels, *out)}"
        )
    return Geometry(*((v[0], v[1], v[2]) for v in (size, kernel, out, stride, padding, dilation)))


# ------------------------------------------------------------------------------------------------ torch operations


def _position(steps: Tensor, tap: tuple[int, ...], g: Geometry) -> Tensor:
    """Where a tap samples, in voxels, b groups i j k 3, of its offsets b groups 3 i j k. Kept near the volume, around
    which all is 0, since infinity minus infinity is no weight."""
    like = {"dtype": steps.dtype, "device": steps.device}
    axes = zip(g.out, g.stride, g.padding, g.dilation, tap)
    starts = (torch.arange(n, **like) * stride - padding + dilation * t for n, stride, padding, dilation, t in axes)
    position = torch.stack(torch.meshgrid(*starts, indexing="ij"), -1) + steps.movedim(2, -1)
    return position.clamp(torch.full((3,), -2.0, **like), torch.tensor(g.size, **like) + 1)


def _sample_corners(x: Tensor, position: Tensor) -> Tensor:
    """b groups c x y z at b groups i j k 3: the eight corners of the cell, each with its weight."""
    size, cell, out = x.shape[3:], position.detach().floor(), x.new_zeros(())
    for corner in product((0, 1), repeat=3):
        weight = torch.ones_like(cell[..., 0])
        index = torch.zeros_like(weight, dtype=torch.int64)
        for axis, side in enumerate(corner):
            at, fraction = cell[..., axis] + side, position[..., axis] - cell[..., axis]
            weight = weight * (fraction if side else 1 - fraction) * ((at >= 0) & (at < size[axis]))
            index = index * size[axis] + at.nan_to_num(0).clamp(0, size[axis] - 1).long()
        found = x.flatten(3).gather(3, index.flatten(2)[:, :, None].expand(-1, -1, x.shape[2], -1))
        out = out + weight[:, :, None] * found.unflatten(3, index.shape[2:])
    return out


def _sample_grid(x: Tensor, position: Tensor) -> Tensor:
    """The same by torch's own sampler, whose places run from -1 to 1 over the volume, the last axis first."""
    size = torch.tensor(x.shape[3:], dtype=position.dtype, device=position.device)
    places = ((2 * position + 1) / size - 1).flip(-1).flatten(0, 1)
    out = F.grid_sample(x.flatten(0, 1), places, padding_mode="zeros", align_corners=False)
    return out.unflatten(0, x.shape[:2])


def _convolve_tap(sample, x: Tensor, steps: Tensor, weight: Tensor, tap: tuple[int, ...], g: Geometry) -> Tensor:
    """What one tap adds to the output; weight is groups o/groups c/groups."""
    found = sample(x, _position(steps, tap, g)).flatten(1, 2).unflatten(1, (len(weight), -1))
    return torch.einsum("goc,bgcxyz->bgoxyz", weight, found).flatten(1, 2)


def _reference(x, offsets, weight, bias, g: Geometry, groups: int, offset_groups: int, frugal: bool = False) -> Tensor:
    """`frugal` is for other devices: by torch's sampler, one tap's samples alive at a time, forward and backward."""
    x, weight = x.unflatten(1, (offset_groups, -1)), weight.flatten(2).unflatten(0, (groups, -1))
    offsets = offsets.unflatten(1, (offset_groups, -1, 3))
    out = x.new_zeros(()) if bias is None else bias[:, None, None, None]
    for t, tap in enumerate(product(*map(range, g.kernel))):
        args = x, offsets[:, :, t], weight[..., t], tap, g
        if frugal:
            tap_of = partial(checkpoint, _convolve_tap, use_reentrant=False, preserve_rng_state=False)
            out = out + tap_of(_sample_grid, *args)
        else:
            out = out + _convolve_tap(_sample_corners, *args)
    return out


def in_plain_operators(x, offsets, weight, bias, stride, padding, dilation, groups, offset_groups) -> Tensor:
    """The operator `enfilade::deform_conv3d` in few operations that other programs have: one `grid_sample` for all taps
    and one matrix product. For exported networks, whose sizes may be symbols; its memory grows with the taps."""
    b, (outputs, _, *kernel), (*_, i, j, k) = x.shape[0], weight.shape, offsets.shape
    steps = offsets.reshape(b * offset_groups, -1, 3, i, j, k)
    taps = torch.cartesian_prod(*(torch.arange(n) for n in kernel)).T
    places = []
    for axis, out in enumerate((i, j, k)):
        first = torch.arange(out).view([-1 if a == axis else 1 for a in range(3)]) * stride[axis] - padding[axis]
        position = (first + dilation[axis] * taps[axis].view(-1, 1, 1, 1)) + steps[:, :, axis]
        size = x.shape[2 + axis]
        position = position.clamp(min=-2).clamp(max=size + 1)  # beyond the volume all is 0, however far
        places.append((2 * position + 1) / size - 1)
    at = torch.stack(places[::-1], -1).reshape(b * offset_groups, -1, j, k, 3)
    found = F.grid_sample(x.reshape(b * offset_groups, -1, *x.shape[2:]), at, align_corners=False)
    matrix = weight.reshape(groups, outputs // groups, -1)
    answer = (matrix @ found.reshape(b, groups, -1, i * j * k)).reshape(b, outputs, i, j, k)
    return answer if bias is None else answer + bias[:, None, None, None]


# ------------------------------------------------------------------------------------------------------ the operator

_SHAPE = "int[] stride, int[] padding, int[] dilation, int groups, int offset_groups"


# Not torch.library.custom_op, whose first call imports the compiler: 1.5 s and 100 MB.
torch.library.define(
    "enfilade::deform_conv3d", f"(Tensor x, Tensor offsets, Tensor weight, Tensor? bias, {_SHAPE}) -> Tensor"
)
torch.library.define(
    "enfilade::deform_conv3d_backward",
    f"(Tensor gradient, Tensor x, Tensor offsets, Tensor weight, {_SHAPE}, bool[] needed) -> Tensor[]",
)


@torch.library.impl("enfilade::deform_conv3d", "cpu")
@no_type_check
def _deform_conv3d(x, offsets, weight, bias, stride, padding, dilation, groups, offset_groups):
    g = _known_geometry(x, offsets, weight, stride, padding, dilation)
    out = torch.from_numpy(_zeros(len(x), len(weight), *g.out))
    if bias is not None:
        out += bias[:, None, None, None]
    values, steps, kernels, target = _arrays(x, offsets, weight, out)
    for piece in _pieces(x.shape[1], len(weight), groups, offset_groups):
        arrays = _rows(values, piece, g), steps, piece.offset_group, _matrices(kernels, piece, False), g, target
        outputs = piece.outputs.start, piece.outputs.stop
        run_parts(lambda _, i, j, a=arrays, o=outputs: _forward(*a, *o, i, j), len(x) * target.shape[2])
    return out


@torch.library.register_fake("enfilade::deform_conv3d")
@no_type_check
def _(x, offsets, weight, bias, stride, padding, dilation, groups, offset_groups):
    return x.new_empty(x.shape[0], weight.shape[0], *offsets.shape[2:])


@torch.library.impl("enfilade::deform_conv3d_backward", "cpu")
@no_type_check
def _deform_conv3d_backward(gradient, x, offsets, weight, stride, padding, dilation, groups, offset_groups, needed):
    """Gradients of x, offsets and weight; of no size where not needed."""
    g = _known_geometry(x, offsets, weight, stride, padding, dilation)
    shapes = [t.shape if need else (0,) * 5 for t, need in zip((x, offsets, weight), needed)]
    found = [torch.from_numpy(_zeros(*shape)) for shape in shapes]
    values, steps, kernels, given, to_x, to_steps, to_weight = _arrays(x, offsets, weight, gradient, *found)
    b, outputs, n = given.shape
    for piece in _pieces(x.shape[1], outputs, groups, offset_groups):
        rows, matrices = _rows(values, piece, g), _matrices(kernels, piece, True)
        first, channels = piece.channels.start, piece.channels.stop - piece.channels.start
        arrays = rows, steps, piece.offset_group, matrices, g, given, piece.outputs.start, channels, to_steps

        def part(_, start, stop, rows=rows, matrices=matrices, arrays=arrays):
            taps, outputs, width = matrices.shape
            # Zeros come from the system page by page as they are touched, and a part touches little beyond its share.
            images = (stop - 1) // n + 1 - start // n if needed[0] else 0
            to_rows = _zeros(images, *rows.shape[1:])
            to_matrices = _zeros(taps if needed[2] else 0, width, outputs + -outputs % _PAIR)
            low, high = _backward(*arrays, to_rows, to_matrices, start, stop)  # type: ignore
            return start // n, low, high, to_rows, to_matrices

        for image, low, high, to_rows, to_matrices in run_parts(part, b * n):
            if needed[0]:
                a = to_rows, image, to_x, first, channels
                run_parts(lambda _, i, j, a=a, low=low: _add_rows(*a, low + i, low + j), high - low)
            if needed[2]:
                columns = to_matrices[:, :channels, : len(to_weight[piece.outputs])]
                to_weight[piece.outputs, piece.columns] += columns.transpose(2, 1, 0)
    return found


@torch.library.register_fake("enfilade::deform_conv3d_backward")
@no_type_check
def _(gradient, x, offsets, weight, stride, padding, dilation, groups, offset_groups, needed):
    return [t.new_empty(t.shape if need else (0,) * 5) for t, need in zip((x, offsets, weight), needed)]


@no_type_check
def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[4:]


@no_type_check
def _differentiate(ctx, gradient):
    needed = list(ctx.needs_input_grad[:4])
    found = torch.ops.enfilade.deform_conv3d_backward(gradient, *ctx.saved_tensors, *ctx.options, needed[:3])
    to_bias = gradient.sum((0, 2, 3, 4)) if needed[3] else None
    return *(t if need else None for t, need in zip(found, needed)), to_bias, *(None for _ in ctx.options)


torch.library.register_autograd("enfilade::deform_conv3d", _differentiate, setup_context=_setup)


class _Piece(NamedTuple):
    """Channels of one offset group and one weight group, and the outputs that they go to."""

    channels: slice
    columns: slice  # where `weight` has them
    outputs: slice
    offset_group: int


def _pieces(channels: int, outputs: int, groups: int, offset_groups: int) -> list[_Piece]:
    c, o, pieces = channels // groups, outputs // groups, []
    edges = {*range(0, channels + 1, c), *range(0, channels + 1, channels // offset_groups)}
    for start, stop in pairwise(sorted(edges)):
        group = start // c
        columns, rows = slice(start - group * c, stop - group * c), slice(group * o, group * o + o)
        pieces.append(_Piece(slice(start, stop), columns, rows, start * offset_groups // channels))
    return pieces


def _known_geometry(x, offsets, weight, stride, padding, dilation) -> Geometry:
    return Geometry(*map(tuple, (x.shape[2:], weight.shape[2:], offsets.shape[2:], stride, padding, dilation)))


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().contiguous().flatten(2).numpy() for t in tensors]


def _zeros(*shape: int) -> np.ndarray:
    """NumPy's come from the system as they are touched, and in large pages, which saves 15 of 20 ms on the gradient of
    offsets; these start at a cache line, so that no vector lies on two."""
    size, line = prod(shape), 64 // 4
    buffer = np.zeros(size + line, np.float32)
    skipped = -buffer.ctypes.data // 4 % line
    return buffer[skipped : skipped + size].reshape(shape)


def _matrices(weight: np.ndarray, piece: _Piece, transpose: bool) -> np.ndarray:
    """For each tap c x o, or o x c, the second padded with zeros to pairs of vectors."""
    part = weight[piece.outputs, piece.columns].transpose((2, 0, 1) if transpose else (2, 1, 0))
    return np.ascontiguousarray(np.pad(part, ((0, 0), (0, 0), (0, -part.shape[2] % _PAIR))))


def _rows(values: np.ndarray, piece: _Piece, g: Geometry) -> np.ndarray:
    """b x+2 y+2 z+2 c: channels last, padded with zeros to pairs of vectors, and a border of one empty voxel."""
    first, count = piece.channels.start, piece.channels.stop - piece.channels.start
    rows = _zeros(len(values), *(n + 2 for n in g.size), count + -count % _PAIR)
    lines = len(values) * g.size[0] * g.size[1]
    run_parts(lambda _, start, stop: _fill_rows(values, first, count, rows, start, stop), lines)
    return rows


# --------------------------------------------------------------------------------------------------- compiled loops

_TILE = 32  # points whose taps are all sampled before the next: few, so that rows stay in the first-level cache
_BLOCK = 256  # points whose offsets are fetched into the second-level cache at a time: long pieces of each channel
_PAIR = 2 * LANES  # rows are padded to it: two vectors by four rows of sums keep the arithmetic busy


@njit(cache=True, nogil=True)
@no_type_check
def _fill_rows(values, first, count, rows, start, stop):
    """Lines of voxels along z, start..stop of all."""
    _, nx, ny, nz, _ = rows.shape
    nx, ny, nz = nx - 2, ny - 2, nz - 2
    for line in range(start, stop):
        image, x, y = line // (nx * ny), line // ny % nx, line % ny
        target = rows[image, x + 1, y + 1]
        source = values[image, :, (x * ny + y) * nz : (x * ny + y + 1) * nz]
        for z in range(nz):
            for c in range(count):
                target[z + 1, c] = source[first + c, z]


@njit(cache=True, nogil=True)
@no_type_check
def _add_rows(rows, image, values, first, count, start, stop):
    """Adds a part's planes of voxels, start..stop from that of its first image on, without the border."""
    _, nx, ny, nz, _ = rows.shape
    for plane in range(start, stop):
        part, x = plane // nx, plane % nx - 1
        if 0 <= x < nx - 2:
            for y in range(ny - 2):
                source, z0 = rows[part, x + 1, y + 1], (x * (ny - 2) + y) * (nz - 2)
                target = values[image + part, :, z0 : z0 + nz - 2]
                for c in range(count):
                    for z in range(nz - 2):
                        target[first + c, z] += source[z + 1, c]


@njit(cache=True, nogil=True)
@no_type_check
def _fetch(offsets, first, start, count, steps):
    """Some points' offsets, which lie far apart in memory."""
    for channel in range(len(steps)):
        line, target = offsets[first + channel, start : start + count], steps[channel]
        for i in range(count):
            target[i] = line[i]


@njit(cache=True, nogil=True)
@no_type_check
def _centres(g, start, count, centres):
    """Where the tap 0, 0, 0 of some points samples without offset."""
    for i in range(count):
        rest, z = divmod(start + i, g.out[2])
        x, y = divmod(rest, g.out[1])
        centres[0, i] = x * g.stride[0] - g.padding[0]
        centres[1, i] = y * g.stride[1] - g.padding[1]
        centres[2, i] = z * g.stride[2] - g.padding[2]


@njit(cache=True, nogil=True)
@no_type_check
def _locate(g, centres, tap, steps, start, count, cells, fractions, inside):
    """The first row of the cell that each point's tap falls into, how far it lies in it along each axis, and where a
    step moves it within the volume. NaN falls anywhere inside, but is NaN in the cell."""
    rest, z = divmod(tap, g.kernel[2])
    x, y = divmod(rest, g.kernel[1])
    shift = x * g.dilation[0], y * g.dilation[1], z * g.dilation[2]
    cells[:] = 0
    for axis in range(3):
        step, size, one = np.float32(shift[axis]), np.float32(g.size[axis]), np.float32(1)
        length = np.int32(g.size[axis] + 2)
        # As lines, which LLVM makes vectors of.
        centre, move = centres[axis], steps[3 * tap + axis, start : start + count]
        fraction, within = fractions[axis], inside[axis]
        for i in range(count):
            place = centre[i] + step + move[i]
            kept = place if place > -one else -one
            kept = kept if kept < size else size
            cell = np.floor(kept)
            cell = cell if cell < size else size - one
            fraction[i] = kept - cell if place == place else place
            within[i] = np.float32(0) if place < -one or place >= size else one
            cells[i] = np.int32(cells[i] * length) + np.int32(cell) + np.int32(1)


@njit(cache=True, nogil=True)
@no_type_check
def _between(a, b, fraction):
    return madd(a, fraction, sub(b, a))


@njit(cache=True, nogil=True)
@no_type_check
def _sample(rows, width, step_x, step_y, cells, fractions, count, samples):
    """`rows` and `samples` are flat."""
    along_x, along_y, along_z = fractions[0], fractions[1], fractions[2]
    for pair in range(0, width, _PAIR):
        for i in range(count):
            fx, fy, fz = at(along_x, i), at(along_y, i), at(along_z, i)
            row, sample = np.int64(at(cells, i)) * width + pair, i * width + pair
            for j in range(0, _PAIR, LANES):  # of known length, so that it becomes straight code
                p = row + j
                low = _between(load(rows, p), load(rows, p + width), fz)
                p += step_y
                high = _between(load(rows, p), load(rows, p + width), fz)
                near = _between(low, high, fy)
                p += step_x
                high = _between(load(rows, p), load(rows, p + width), fz)
                p -= step_y
                low = _between(load(rows, p), load(rows, p + width), fz)
                store(samples, sample + j, _between(near, _between(low, high, fy), fx))


@njit(cache=True, nogil=True)
@no_type_check
def _sample_back(rows, width, step_x, step_y, cells, fractions, gradient, count, samples, moves):
    """The samples again, and what a step along each axis changes in their products with their gradient."""
    along_x, along_y, along_z = fractions[0], fractions[1], fractions[2]
    moves[:] = 0
    to_x, to_y, to_z = moves[0], moves[1], moves[2]
    for pair in range(0, width, _PAIR):
        for i in range(count):
            fx, fy, fz = at(along_x, i), at(along_y, i), at(along_z, i)
            row, sample = np.int64(at(cells, i)) * width + pair, i * width + pair
            x, y, z = fill(np.float32(0)), fill(np.float32(0)), fill(np.float32(0))
            for j in range(0, _PAIR, LANES):
                p = row + j
                a0, a2 = load(rows, p), load(rows, p + step_y)
                a1, a3 = sub(load(rows, p + width), a0), sub(load(rows, p + step_y + width), a2)
                a = madd(a0, fz, a1)
                a_y = sub(madd(a2, fz, a3), a)
                a, a_z = madd(a, fy, a_y), _between(a1, a3, fy)
                p += step_x
                b0, b2 = load(rows, p), load(rows, p + step_y)
                b1, b3 = sub(load(rows, p + width), b0), sub(load(rows, p + step_y + width), b2)
                b = madd(b0, fz, b1)
                b_y = sub(madd(b2, fz, b3), b)
                b, b_z = madd(b, fy, b_y), _between(b1, b3, fy)
                step, given = sub(b, a), load(gradient, sample + j)
                store(samples, sample + j, madd(a, fx, step))
                x = add(x, mul(given, step))
                y = add(y, mul(given, _between(a_y, b_y, fx)))
                z = add(z, mul(given, _between(a_z, b_z, fx)))
            to_x[i], to_y[i], to_z[i] = to_x[i] + total(x), to_y[i] + total(y), to_z[i] + total(z)


@njit(cache=True, nogil=True)
@no_type_check
def _scatter(rows, width, step_x, step_y, cells, fractions, gradient, count):
    """The adjoint of `_sample`."""
    along_x, along_y, along_z, one = fractions[0], fractions[1], fractions[2], np.float32(1)
    for pair in range(0, width, _PAIR):
        for i in range(count):
            fx, fy, fz = at(along_x, i), at(along_y, i), at(along_z, i)
            w0, w1, w2, w3 = (one - fx) * (one - fy), (one - fx) * fy, fx * fy, fx * (one - fy)
            row, sample = np.int64(at(cells, i)) * width + pair, i * width + pair
            for j in range(0, _PAIR, LANES):
                given, p = load(gradient, sample + j), row + j
                store(rows, p, madd(load(rows, p), w0 * (one - fz), given))
                store(rows, p + width, madd(load(rows, p + width), w0 * fz, given))
                p += step_y
                store(rows, p, madd(load(rows, p), w1 * (one - fz), given))
                store(rows, p + width, madd(load(rows, p + width), w1 * fz, given))
                p += step_x
                store(rows, p, madd(load(rows, p), w2 * (one - fz), given))
                store(rows, p + width, madd(load(rows, p + width), w2 * fz, given))
                p -= step_y
                store(rows, p, madd(load(rows, p), w3 * (one - fz), given))
                store(rows, p + width, madd(load(rows, p + width), w3 * fz, given))


@njit(cache=True, nogil=True)
@no_type_check
def _multiply(a, step_i, step_k, count, depth, b, first_b, width, out, first_out):
    """out[i] += sum of a[i * step_i + k * step_k] b[k] over k < depth, for i < count rounded up to fours and rows of
    `width`, a number of pairs of vectors. All are flat; those of b and out start at first_b and first_out."""
    for i in range(0, count, 4):
        for j in range(0, width, _PAIR):
            p, q, o = i * step_i, first_b + j, first_out + i * width + j
            s00, s01 = load(out, o), load(out, o + LANES)
            s10, s11 = load(out, o + width), load(out, o + width + LANES)
            s20, s21 = load(out, o + 2 * width), load(out, o + 2 * width + LANES)
            s30, s31 = load(out, o + 3 * width), load(out, o + 3 * width + LANES)
            for _ in range(depth):
                b0, b1 = load(b, q), load(b, q + LANES)
                a0, a1 = at(a, p), at(a, p + step_i)
                a2, a3 = at(a, p + 2 * step_i), at(a, p + 3 * step_i)
                s00, s01 = madd(s00, a0, b0), madd(s01, a0, b1)
                s10, s11 = madd(s10, a1, b0), madd(s11, a1, b1)
                s20, s21 = madd(s20, a2, b0), madd(s21, a2, b1)
                s30, s31 = madd(s30, a3, b0), madd(s31, a3, b1)
                p += step_k
                q += width
            store(out, o, s00)
            store(out, o + LANES, s01)
            store(out, o + width, s10)
            store(out, o + width + LANES, s11)
            store(out, o + 2 * width, s20)
            store(out, o + 2 * width + LANES, s21)
            store(out, o + 3 * width, s30)
            store(out, o + 3 * width + LANES, s31)


@njit(cache=True, nogil=True)
@no_type_check
def _forward(rows, offsets, offset_group, matrices, g, target, first, last, start, stop):
    """Adds to outputs first..last of points start..stop, counted through all images."""
    n, width, (taps, channels, outputs) = target.shape[2], rows.shape[4], matrices.shape
    step_y, step_x = rows.shape[3] * width, rows.shape[2] * rows.shape[3] * width
    centres, cells, steps = (
        np.empty((3, _TILE), np.float32),
        np.empty(_TILE, np.int32),
        np.empty((3 * taps, _BLOCK), np.float32),
    )
    cells, fractions, inside = np.empty(_TILE, np.int32), np.empty_like(centres), np.empty_like(centres)
    samples, sums = np.zeros(_TILE * width, np.float32), np.empty(_TILE * outputs, np.float32)
    matrices = matrices.reshape(-1)
    while start < stop:
        image = start // n
        point = start - image * n
        block = min(_BLOCK, stop - start, n - point)
        volume = rows[image].reshape(-1)
        _fetch(offsets[image], 3 * taps * offset_group, point, block, steps)
        for tile in range(0, block, _TILE):
            count = min(_TILE, block - tile)
            _centres(g, point + tile, count, centres)
            sums[:] = 0
            for tap in range(taps):
                _locate(g, centres, tap, steps, tile, count, cells, fractions, inside)
                _sample(volume, width, step_x, step_y, cells, fractions, count, samples)
                _multiply(samples, width, 1, count, channels, matrices, tap * channels * outputs, outputs, sums, 0)
            for o in range(first, last):
                line = target[image, o, point + tile : point + tile + count]
                for i in range(count):
                    line[i] += sums[i * outputs + o - first]
        start += block


@njit(cache=True, nogil=True)
@no_type_check
def _backward(
    rows, offsets, offset_group, matrices, g, given, first, channels, to_offsets, to_rows, to_matrices, start, stop
):
    """Adds to the three gradients, where they have any elements, what points start..stop give. Returns the planes of
    `to_rows` that it touched, counted through its images."""
    n, width, (taps, outputs, _), planes = given.shape[2], rows.shape[4], matrices.shape, rows.shape[1]
    step_y, step_x = rows.shape[3] * width, rows.shape[2] * rows.shape[3] * width
    padded, first_image, group = -(-outputs // _PAIR) * _PAIR, start // n, 3 * taps * offset_group
    centres, cells, steps = (
        np.empty((3, _TILE), np.float32),
        np.empty(_TILE, np.int32),
        np.empty((3 * taps, _BLOCK), np.float32),
    )
    cells, fractions, inside = np.empty(_TILE, np.int32), np.empty_like(centres), np.empty_like(centres)
    samples, moves = np.zeros(_TILE * width, np.float32), np.empty((3, _TILE), np.float32)
    gradient, to_samples = np.zeros(_TILE * padded, np.float32), np.empty(_TILE * width, np.float32)
    low, high = planes * len(to_rows), 0
    matrices, to_rows, to_matrices = matrices.reshape(-1), to_rows.reshape(-1), to_matrices.reshape(-1)
    while start < stop:
        image = start // n
        point = start - image * n
        block = min(_BLOCK, stop - start, n - point)
        volume = rows[image].reshape(-1)
        to_volume = to_rows[(image - first_image) * volume.size : (image - first_image + 1) * volume.size]
        _fetch(offsets[image], group, point, block, steps)
        lowest, highest = np.int32(2**31 - 1), np.int32(0)
        for tile in range(0, block, _TILE):
            count = min(_TILE, block - tile)
            _centres(g, point + tile, count, centres)
            for o in range(outputs):
                line = given[image, first + o, point + tile : point + tile + count]
                for i in range(count):
                    gradient[i * padded + o] = line[i]
            for tap in range(taps):
                _locate(g, centres, tap, steps, tile, count, cells, fractions, inside)
                to_samples[:] = 0
                _multiply(gradient, padded, 1, count, outputs, matrices, tap * outputs * width, width, to_samples, 0)
                if to_offsets.size:
                    _sample_back(volume, width, step_x, step_y, cells, fractions, to_samples, count, samples, moves)
                    for axis in range(3):  # in the place of the steps, which are done with
                        line, move, within = steps[3 * tap + axis, tile : tile + count], moves[axis], inside[axis]
                        for i in range(count):
                            line[i] = within[i] * move[i]
                elif to_matrices.size:
                    _sample(volume, width, step_x, step_y, cells, fractions, count, samples)
                if to_matrices.size:
                    at_tap = tap * width * padded
                    _multiply(samples, 1, width, channels, count, gradient, 0, padded, to_matrices, at_tap)
                if to_rows.size:
                    _scatter(to_volume, width, step_x, step_y, cells, fractions, to_samples, count)
                    for i in range(count):
                        lowest, highest = min(lowest, cells[i]), max(highest, cells[i])
        if to_offsets.size:
            for channel in range(3 * taps):
                line, part = to_offsets[image, group + channel, point : point + block], steps[channel]
                for i in range(block):
                    line[i] += part[i]
        if to_rows.size:
            plane, size = (image - first_image) * planes, rows.shape[2] * rows.shape[3]
            low, high = min(low, plane + lowest // size), max(high, plane + highest // size + 2)
        start += block
    return low, high
