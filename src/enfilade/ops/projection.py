"""Features from pixels to voxels and back, with gradients.

* Li, Ding, Huang: IMENet: Joint 3D semantic scene completion and 2D semantic segmentation through iterative mutual
  enhancement, IJCAI 2021, Section 3 (the projections p between the two branches)

    voxels = torch.from_numpy(ops.voxels.pixel_voxels(depth, camera, grid.coarse()))[None]        # b h w
    volume = to_voxels(features, voxels, grid.coarse().shape)                                     # b c h w -> b c x y z
    image = to_pixels(volume, voxels)                                                             # b c x y z -> b c h w

Both use the map from each pixel to the voxel that its point lies in, so that they speak of what is visible. The map
from each voxel to its pixel (`voxels.voxel_pixels`) also fills what is hidden: `along_rays`. Features of another size
than the depth map go with a depth map and a camera resized to theirs.

float32 and float64 tensors on a CPU run compiled loops on `torch.get_num_threads()` threads; other types and devices
run torch operations. Project at the networks' own 60 x 36 x 60 voxels where the model allows: at 240 x 144 x 240 a
volume of 12 channels is 400 MB.
"""

from typing import Literal, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Integer
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from enfilade.errors import UserError
from enfilade.ops.lattice import run_parts

Reduce = Literal["mean", "max"]


def to_voxels(
    features: Float[Tensor, "b c h w"],
    voxels: Integer[Tensor, "_ _ _"],
    shape: tuple[int, int, int],
    *,
    reduce: Reduce = "mean",
) -> Float[Tensor, "b c x y z"]:
    """The features of the pixels in the voxels that their points lie in, empty (0) elsewhere.

    `voxels` holds flat numbers in a volume of `shape`, -1 for pixels that go nowhere. Where several pixels share a
    voxel it gets their mean, or in each channel their maximum (whose gradient is shared by equal ones). Raises
    UserError where the sizes differ or a number is outside the volume."""
    if reduce not in ("mean", "max"):
        raise UserError(f"reduce is mean or max, not {reduce!r}")
    b, c, h, w = features.shape
    if voxels.shape != (b, h, w):
        raise UserError(f"features are {tuple(features.shape)}, but the voxels of their pixels {tuple(voxels.shape)}")
    count = shape[0] * shape[1] * shape[2]
    _demand_range(voxels, count, "voxel", "a volume")
    if _compiled(features):
        out = _ToVoxels.apply(features.flatten(2), voxels.flatten(1), count, reduce == "max")
    else:
        out = _to_voxels_torch(features.flatten(2), voxels.flatten(1), count, reduce == "max")
    return out.view(b, c, *shape)


def to_pixels(volume: Float[Tensor, "b c x y z"], voxels: Integer[Tensor, "_ _ _"]) -> Float[Tensor, "b c _ _"]:
    """At each pixel the features of the voxel that its point lies in: of the visible voxel. 0 where `voxels` is -1.

    The adjoint of summing over the pixels of a voxel. Raises UserError where the batches differ or a number is outside
    the volume."""
    if volume.shape[0] != voxels.shape[0]:  # not len: an exported network takes any batch
        raise UserError(f"a batch of {len(volume)} volumes cannot be seen in a batch of {len(voxels)} images")
    _demand_range(voxels, volume[0, 0].numel(), "voxel", "a volume")
    return _gather(volume.flatten(2), voxels.flatten(1)).unflatten(2, voxels.shape[1:])


def along_rays(features: Float[Tensor, "b c h w"], pixels: Integer[Tensor, "_ x y z"]) -> Float[Tensor, "b c x y z"]:
    """Every voxel in view gets the features of its pixel, hidden ones too; 0 where `pixels` (`voxels.voxel_pixels`) is
    -1. Raises UserError where the batches differ or a number is outside the image."""
    if features.shape[0] != pixels.shape[0]:
        raise UserError(f"a batch of {len(features)} images cannot be cast into a batch of {len(pixels)} volumes")
    _demand_range(pixels, features[0, 0].numel(), "pixel", "an image")
    return _gather(features.flatten(2), pixels.flatten(1)).unflatten(2, pixels.shape[1:])


def _demand_range(index: Tensor, count: int, what: str, where: str) -> None:
    if torch.compiler.is_exporting():  # an exported network cannot complain
        return
    if index.device.type == "cpu" and index.numel() and int(index.max()) >= count:  # elsewhere it would cost a wait
        raise UserError(f"{what} {int(index.max())} is outside {where} of {count} {what}s: is it of another size?")


def _compiled(values: Tensor) -> bool:
    if torch.compiler.is_exporting():  # a network that is exported is of torch operations only
        return False
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


# ------------------------------------------------------------------------------------------------ torch operations


def _to_voxels_torch(features: Tensor, voxels: Tensor, count: int, largest: bool) -> Tensor:
    """`to_voxels` of b c n features, in torch operations: for other devices and types, and to check the loops."""
    index = torch.where(voxels < 0, count, voxels).long()[:, None].expand_as(features)
    out = features.new_zeros(*features.shape[:2], count + 1)
    if torch.compiler.is_exporting() and not largest:  # ONNX has sums, and no means
        pixels = out[:, :1].scatter_add(2, index[:, :1], torch.ones_like(features[:, :1]))
        return (out.scatter_add(2, index, features) / pixels.clamp(min=1))[..., :count]
    out = out.scatter_reduce(2, index, features, "amax" if largest else "mean", include_self=False)
    return out[..., :count]


def _gather_torch(values: Tensor, index: Tensor) -> Tensor:
    """b c n values at b m indices, 0 at -1."""
    found = values.gather(2, index.clamp(min=0).long()[:, None].expand(-1, values.shape[1], -1))
    return found * (index >= 0)[:, None]


def _gather(values: Tensor, index: Tensor) -> Tensor:
    return _Gather.apply(values, index) if _compiled(values) else _gather_torch(values, index)


# --------------------------------------------------------------------------------------------------- compiled loops


@njit(cache=True, nogil=True)
@no_type_check  # a checked function cannot be compiled
def _group(index, slots):
    """The pixels of each voxel: order[starts[s]:starts[s + 1]] are those of voxel cells[s]. `slots` is all 0."""
    cells, counts, used = np.empty(len(index), np.int32), np.zeros(len(index) + 1, np.int32), 0
    for i in range(len(index)):
        if index[i] >= 0:
            slot = slots[index[i]]
            if slot == 0:
                cells[used] = index[i]
                used += 1
                slot = used
                slots[index[i]] = slot
            counts[slot - 1] += 1
    starts = np.zeros(used + 1, np.int32)
    for s in range(used):
        starts[s + 1] = starts[s] + counts[s]
        counts[s] = starts[s]
    order = np.empty(starts[used], np.int32)
    for i in range(len(index)):
        if index[i] >= 0:
            slot = slots[index[i]] - 1
            order[counts[slot]] = i
            counts[slot] += 1
    return order, starts, cells[:used]


@njit(cache=True, nogil=True)
@no_type_check
def _reduce(features, order, starts, cells, largest, out):
    for s in range(len(cells)):
        first, last = starts[s], starts[s + 1]
        value = features[order[first]]
        for i in range(first + 1, last):
            other = features[order[i]]
            value = (other if other > value else value) if largest else value + other
        out[cells[s]] = value if largest else value / (last - first)


@njit(cache=True, nogil=True)
@no_type_check
def _reduce_back(gradient, features, order, starts, cells, largest, out):
    for s in range(len(cells)):
        first, last = starts[s], starts[s + 1]
        if not largest:
            for i in range(first, last):
                out[order[i]] = gradient[cells[s]] / (last - first)
            continue
        value, equal = features[order[first]], 0
        for i in range(first, last):
            if features[order[i]] > value:
                value = features[order[i]]
        for i in range(first, last):
            equal += features[order[i]] == value
        for i in range(first, last):
            if features[order[i]] == value:
                out[order[i]] = gradient[cells[s]] / equal


@njit(cache=True, nogil=True)
@no_type_check
def _pick(values, index, out):
    for i in range(len(index)):
        out[i] = values[index[i]] if index[i] >= 0 else 0


@njit(cache=True, nogil=True)
@no_type_check
def _add(values, index, out):
    for i in range(len(index)):
        if index[i] >= 0:
            out[index[i]] += values[i]


def _rows(function, b: int, c: int) -> None:
    """function(image, channel) for all, side by side."""

    def part(_, start, stop):
        for row in range(start, stop):
            function(*divmod(row, c))

    run_parts(part, b * c)


def _zeros(*shape: int, like: Tensor) -> np.ndarray:
    """NumPy's, which come from the system as they are touched: most voxels are empty."""
    return np.zeros(shape, torch.empty(0, dtype=like.dtype).numpy().dtype)


class _ToVoxels(torch.autograd.Function):
    @staticmethod
    @no_type_check
    def forward(ctx, features, voxels, count, largest):
        b, c, _ = features.shape
        values = features.detach().contiguous().numpy()
        groups = [_group(image, np.zeros(count, np.int32)) for image in voxels.contiguous().numpy()]
        out = _zeros(b, c, count, like=features)
        _rows(lambda i, j: _reduce(values[i, j], *groups[i], largest, out[i, j]), b, c)
        ctx.groups, ctx.largest, ctx.shape = groups, largest, features.shape
        ctx.save_for_backward(features if largest else None)
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx, gradient):
        (b, c, _), (features,) = ctx.shape, ctx.saved_tensors
        given, out = gradient.contiguous().numpy(), _zeros(*ctx.shape, like=gradient)
        values = out if features is None else features.detach().contiguous().numpy()  # a mean does not look at them
        _rows(
            lambda i, j: _reduce_back(given[i, j], values[i, j], *ctx.groups[i], ctx.largest, out[i, j]),
            b,
            c,
        )
        return torch.from_numpy(out), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    @no_type_check
    def forward(ctx, values, index):
        b, c, n = values.shape
        source, where = values.detach().contiguous().numpy(), index.contiguous().numpy()
        out = torch.empty(b, c, index.shape[1], dtype=values.dtype)
        target = out.numpy()
        _rows(lambda i, j: _pick(source[i, j], where[i], target[i, j]), b, c)
        ctx.index, ctx.count = where, n
        return out

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx, gradient):
        b, c, _ = gradient.shape
        given, out = gradient.contiguous().numpy(), _zeros(b, c, ctx.count, like=gradient)
        _rows(lambda i, j: _add(given[i, j], ctx.index[i], out[i, j]), b, c)
        return torch.from_numpy(out), None
