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
float16 and bfloat16 are computed in float32, and float64 runs the plain reference. Results repeat exactly for a given
number of threads. The loops are compiled at the first call after an installation (some seconds) and kept on disk.

A GPU runs Triton kernels (`ops.deform_triton`) where triton is installed and works; their gradient of `x` does not
repeat in its last digits. Otherwise, for float64 there, and on other devices, torch operations recompute each tap's
samples in the backward pass.

`torch.export` and `torch.compile` see one operator, `enfilade::deform_conv3d`, whose backward pass is another.
"""

from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise, product
from math import prod
from typing import NamedTuple, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from enfilade.errors import UserError
from enfilade.ops.deform_loops import PAIR, add_rows, backward, fill_rows, forward
from enfilade.ops.lattice import run_parts
from enfilade.ops.trial import works

Triple = tuple[int, int, int]

_TRITON = find_spec("triton") is not None  # it comes with torch for Linux


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
    options = g.stride, g.padding, g.dilation, groups, offset_groups
    if has_kernels(x):  # they read half precision as it is
        return torch.ops.enfilade.deform_conv3d(x, offsets, weight, bias, *options)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    args = x.to(kind), offsets.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    if x.device.type == "cpu" and kind == torch.float32:
        out = torch.ops.enfilade.deform_conv3d(*args, *options)
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


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels of `ops.deform_triton` run for `x`: on a GPU that Triton compiles for, of float32 or half
    precision. Not where `torch.use_deterministic_algorithms` is on: their sums are atomic, and the torch operations
    tell so by themselves."""
    if not (_TRITON and x.is_cuda) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    return torch.compiler.is_compiling() or _triton_works(x.device)  # a compiler cannot look into the trial


@cache
def _triton_works(device: torch.device) -> bool:
    """Tried once, on one voxel."""
    from enfilade.ops import deform_triton

    one, steps = torch.ones(1, 1, 1, 1, 1, device=device), torch.zeros(1, 3, 1, 1, 1, device=device)
    args = one, steps, one, None, (1, 1, 1), (0, 0, 0), (1, 1, 1), 1, 1
    return works(lambda: deform_triton.forward(*args), "deformable convolutions", device)


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
    g = known_geometry(x, offsets, weight, stride, padding, dilation)
    out = torch.from_numpy(_zeros(len(x), len(weight), *g.out))
    if bias is not None:
        out += bias[:, None, None, None]
    values, steps, kernels, target = _arrays(x, offsets, weight, out)
    for piece in pieces_of(x.shape[1], len(weight), groups, offset_groups):
        arrays = _rows(values, piece, g), steps, piece.offset_group, _matrices(kernels, piece, False), g, target
        outputs = piece.outputs.start, piece.outputs.stop
        run_parts(lambda _, i, j, a=arrays, o=outputs: forward(*a, *o, i, j), len(x) * target.shape[2])
    return out


@torch.library.register_fake("enfilade::deform_conv3d")
@no_type_check
def _(x, offsets, weight, bias, stride, padding, dilation, groups, offset_groups):
    return x.new_empty(x.shape[0], weight.shape[0], *offsets.shape[2:])


@torch.library.impl("enfilade::deform_conv3d_backward", "cpu")
@no_type_check
def _deform_conv3d_backward(gradient, x, offsets, weight, stride, padding, dilation, groups, offset_groups, needed):
    """Gradients of x, offsets and weight; of no size where not needed."""
    g = known_geometry(x, offsets, weight, stride, padding, dilation)
    shapes = [t.shape if need else (0,) * 5 for t, need in zip((x, offsets, weight), needed)]
    found = [torch.from_numpy(_zeros(*shape)) for shape in shapes]
    values, steps, kernels, given, to_x, to_steps, to_weight = _arrays(x, offsets, weight, gradient, *found)
    b, outputs, n = given.shape
    for piece in pieces_of(x.shape[1], outputs, groups, offset_groups):
        rows, matrices = _rows(values, piece, g), _matrices(kernels, piece, True)
        first, channels = piece.channels.start, piece.channels.stop - piece.channels.start
        arrays = rows, steps, piece.offset_group, matrices, g, given, piece.outputs.start, channels, to_steps

        def part(_, start, stop, rows=rows, matrices=matrices, arrays=arrays):
            taps, outputs, width = matrices.shape
            # Zeros come from the system page by page as they are touched, and a part touches little beyond its share.
            images = (stop - 1) // n + 1 - start // n if needed[0] else 0
            to_rows = _zeros(images, *rows.shape[1:])
            to_matrices = _zeros(taps if needed[2] else 0, width, outputs + -outputs % PAIR)
            low, high = backward(*arrays, to_rows, to_matrices, start, stop)  # type: ignore
            return start // n, low, high, to_rows, to_matrices

        for image, low, high, to_rows, to_matrices in run_parts(part, b * n):
            if needed[0]:
                a = to_rows, image, to_x, first, channels
                run_parts(lambda _, i, j, a=a, low=low: add_rows(*a, low + i, low + j), high - low)
            if needed[2]:
                columns = to_matrices[:, :channels, : len(to_weight[piece.outputs])]
                to_weight[piece.outputs, piece.columns] += columns.transpose(2, 1, 0)
    return found


@torch.library.register_fake("enfilade::deform_conv3d_backward")
@no_type_check
def _(gradient, x, offsets, weight, stride, padding, dilation, groups, offset_groups, needed):
    return [t.new_empty(t.shape if need else (0,) * 5) for t, need in zip((x, offsets, weight), needed)]


@torch.library.impl("enfilade::deform_conv3d", "cuda")
@no_type_check
def _(*args):
    from enfilade.ops import deform_triton  # which needs triton

    return deform_triton.forward(*args)


@torch.library.impl("enfilade::deform_conv3d_backward", "cuda")
@no_type_check
def _(*args):
    from enfilade.ops import deform_triton

    return deform_triton.backward(*args)


@no_type_check
def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[4:]


@no_type_check
def _differentiate(ctx, gradient):
    needed = list(ctx.needs_input_grad[:4])
    found = torch.ops.enfilade.deform_conv3d_backward(gradient, *ctx.saved_tensors, *ctx.options, needed[:3])
    to_bias = gradient.sum((0, 2, 3, 4), dtype=torch.float32) if needed[3] else None
    return *(t if need else None for t, need in zip(found, needed)), to_bias, *(None for _ in ctx.options)


torch.library.register_autograd("enfilade::deform_conv3d", _differentiate, setup_context=_setup)


class Piece(NamedTuple):
    """Channels of one offset group and one weight group, and the outputs that they go to."""

    channels: slice
    columns: slice  # where `weight` has them
    outputs: slice
    offset_group: int


def pieces_of(channels: int, outputs: int, groups: int, offset_groups: int) -> list[Piece]:
    c, o, pieces = channels // groups, outputs // groups, []
    edges = {*range(0, channels + 1, c), *range(0, channels + 1, channels // offset_groups)}
    for start, stop in pairwise(sorted(edges)):
        group = start // c
        columns, rows = slice(start - group * c, stop - group * c), slice(group * o, group * o + o)
        pieces.append(Piece(slice(start, stop), columns, rows, start * offset_groups // channels))
    return pieces


def known_geometry(x, offsets, weight, stride, padding, dilation) -> Geometry:
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


def _matrices(weight: np.ndarray, piece: Piece, transpose: bool) -> np.ndarray:
    """For each tap c x o, or o x c, the second padded with zeros to pairs of vectors."""
    part = weight[piece.outputs, piece.columns].transpose((2, 0, 1) if transpose else (2, 1, 0))
    return np.ascontiguousarray(np.pad(part, ((0, 0), (0, 0), (0, -part.shape[2] % PAIR))))


def _rows(values: np.ndarray, piece: Piece, g: Geometry) -> np.ndarray:
    """b x+2 y+2 z+2 c: channels last, padded with zeros to pairs of vectors, and a border of one empty voxel."""
    first, count = piece.channels.start, piece.channels.stop - piece.channels.start
    rows = _zeros(len(values), *(n + 2 for n in g.size), count + -count % PAIR)
    lines = len(values) * g.size[0] * g.size[1]
    run_parts(lambda _, start, stop: fill_rows(values, first, count, rows, start, stop), lines)
    return rows
