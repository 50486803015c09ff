"""IMENet: 2-D segmentation and 3-D completion that correct each other, again and again.

Li, Ding, Huang: IMENet: Joint 3D Semantic Scene Completion and 2D Semantic Segmentation through Iterative Mutual
Enhancement, IJCAI 2021 ("the paper" below). A 2-D network scores the pixels of an RGB image, a 3-D network the voxels
of a TSDF. Then, T times, the voxels' labels are projected into the image and correct the pixels' (deformable context
pyramid, Eq. 1), and the pixels' are put into the volume and correct the voxels' (the same in 3-D, then attention along
depth, Eq. 2).

The 2-D network is that of Liu et al.: See and think: disentangling semantic scene completion, NeurIPS 2018 (Seg2DNet),
with the dense upsampling convolutions of Wang et al., WACV 2018.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from enfilade.errors import UserError
from enfilade.models.completion3d import SketchNet, Volumetric, complete, make_backbone
from enfilade.models.encoders import Encoder, ceil_div, first, pad_to_multiple
from enfilade.models.layers import conv_bn
from enfilade.ops.deform import deform_conv3d
from enfilade.ops.projection import along_rays, to_pixels, to_voxels
from enfilade.types import IGNORE, Output, full

Product = Literal["mean", "sum"]


# ---------------------------------------------------------------------------------------------- the 2-D segmentation


class DUC(nn.Module):
    """Dense upsampling convolution: four maps of half the size are shuffled into one."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.conv = conv_bn(cin, 4 * cout, relu=False, kaiming=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return F.pixel_shuffle(F.relu(self.conv(x), inplace=True), 2)


class SegDecoder(nn.Module):
    """Seg2DNet after its encoder, whose maps have strides 2 to 32 (ResNet-101's: 64, 256, 512, 1024, 2048 channels).

    From stride 32 up, each DUC's map is added to the encoder's of that size; at stride 4 the pooled stem joins (64 more
    channels, 320, then 128 by a 1x1 convolution); the last map has 32 channels at stride 1. Four dilated convolutions
    of 64 channels, summed, and a 1x1 convolution score the classes. `stride` 2 or 4 leaves out one or both of the last
    two DUCs.
    """

    def __init__(self, channels: Sequence[int], classes: int, stride: int, context: int):
        super().__init__()
        stem, quarter, *_ = channels
        deep = list(channels[:0:-1])  # strides 32, 16, 8, 4
        self.up = nn.ModuleList(DUC(a, b) for a, b in pairwise(deep))
        self.join = nn.Conv2d(quarter + stem, 2 * stem, 1)
        last = [(2 * stem, stem), (stem, max(1, stem // 2))][: {4: 0, 2: 1, 1: 2}[stride]]
        self.last = nn.ModuleList(DUC(a, b) for a, b in last)
        cin = last[-1][1] if last else 2 * stem
        self.pyramid = nn.ModuleList(conv_bn(cin, context, relu=False, dilation=d, kaiming=True) for d in (1, 3, 5, 7))
        self.classify = nn.Conv2d(context, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)  # all classes start out alike

    def forward(self, maps: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b k h w"]:
        stem, *skips, x = maps
        for up, skip in zip(self.up, reversed(skips)):
            x = up(x) + skip
        x = self.join(torch.cat([x, F.max_pool2d(stem, 3, stride=2, padding=1)], 1))
        for k, up in enumerate(self.last):
            x = up(x) + stem if k == 0 else up(x)
        return self.classify(F.relu(torch.stack([conv(x) for conv in self.pyramid]).sum(0)))


# ------------------------------------------------------------------------------------- what one branch tells the other


def one_hot(scores: Float[Tensor, "b k *s"]) -> Float[Tensor, "b k *s"]:
    """h of Eq. (1): 1 at the best class, and 0 in all classes where nothing was projected.

    # Differs from paper: its one-hot calls such a place empty (label 0), which is a claim about what nobody saw.
    """
    hard = F.one_hot(scores.argmax(1), scores.shape[1]).movedim(-1, 1).to(scores.dtype)
    return hard * (scores.amax(1, keepdim=True) > 0)


def labels_one_hot(labels: Int64[Tensor, "b *s"], classes: int) -> Float[Tensor, "b k *s"]:
    """The truth in the place of probabilities: 0 in all classes where it is unknown."""
    known = labels != IGNORE
    return (F.one_hot(labels.where(known, 0), classes) * known[..., None]).movedim(-1, 1).float()


def seen(volume: Float[Tensor, "b k x y z"], voxels: Int64[Tensor, "b h w"], stride: int) -> Float[Tensor, "b k h2 w2"]:
    """The volume's numbers at cells of `stride` x `stride` pixels: each pixel has those of its voxel, a cell the mean
    of its pixels', of which those without a voxel count as 0."""
    h, w = voxels.shape[1:]
    beyond = (0, ceil_div(w, stride) * stride - w, 0, ceil_div(h, stride) * stride - h)
    return F.avg_pool2d(to_pixels(volume, F.pad(voxels, beyond, value=-1)), stride)


def enlarged(x: Float[Tensor, "b k h2 w2"], size: Sequence[int], stride: int) -> Float[Tensor, "b k h w"]:
    """A map of stride `stride` at every pixel of an image of `size`, bilinearly."""
    x = F.interpolate(x, scale_factor=stride, mode="bilinear", align_corners=False) if stride > 1 else x
    return first(x, size)


# ---------------------------------------------------------------------------------- deformable context pyramid, Eq. (1)


def deform_conv2d(
    x: Float[Tensor, "b c h w"],
    offsets: Float[Tensor, "b _ h w"],
    weight: Float[Tensor, "o c 3 3"],
    bias: Float[Tensor, "o"] | None = None,
    *,
    dilation: int = 1,
) -> Float[Tensor, "b o h w"]:
    """Deformable 3x3 convolution of stride 1; `offsets` are 9 times (down, right) in pixels, zero padding.

    On a CPU and in an exported network all nine taps are sampled at once and multiplied as one convolution of nine
    rows, 2 to 5 times faster than torchvision's loops; elsewhere it is torchvision's."""
    if x.device.type != "cpu" and not torch.compiler.is_exporting():
        from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

        return torchvision_deform_conv2d(
            x, offsets, weight, bias, padding=(dilation, dilation), dilation=(dilation, dilation)
        )
    b, c, h, w = x.shape
    taps = dilation * torch.tensor([-1, 0, 1], device=x.device, dtype=x.dtype)
    rows = torch.arange(h, device=x.device, dtype=x.dtype)[:, None, None, None] + taps[:, None, None]  # h 3 1 1
    columns = torch.arange(w, device=x.device, dtype=x.dtype) + taps[:, None]  # 3 w
    down, right = offsets.view(b, 3, 3, 2, h, w).permute(3, 0, 4, 1, 2, 5)  # b h 3 3 w each
    # grid_sample counts from -1 to 1 over the map, columns first
    at = torch.stack([(2 * (columns + right) + 1) / w - 1, (2 * (rows + down) + 1) / h - 1], -1)
    found = F.grid_sample(x, at.reshape(b, 9 * h, w, 2), padding_mode="zeros", align_corners=False)
    return F.conv2d(found, weight.reshape(weight.shape[0], c, 9, 1), bias, stride=(9, 1))


class ContextPyramid(nn.Module):
    """CR[Σ_i D_i(p)] of Eq. (1), of images (`rank` 2) or volumes (3): deformable convolutions D_i of one input with
    dilations 1, 2, 3, each with its own offsets, which start at 0; summed, R, and the 1x1 convolution C.

    # Differs from paper: p has the twelve classes' scores, not their best one's number, whose order means nothing.
    """

    def __init__(self, classes: int, rank: int, dilations: Sequence[int] = (1, 2, 3)):
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.rank, self.dilations = rank, tuple(dilations)
        taps = rank * 3**rank
        self.offsets = nn.ModuleList(conv(classes, taps, 3, padding=d, dilation=d) for d in dilations)
        self.weights = nn.ParameterList(torch.empty(classes, classes, *(3,) * rank) for _ in dilations)
        self.out = conv(classes, classes, 1)
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)
        for weight in self.weights:
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        nn.init.normal_(self.out.weight, std=0.01)  # the correction starts small
        nn.init.zeros_(self.out.bias)

    def forward(self, p: Float[Tensor, "b k *s"]) -> Float[Tensor, "b k *s"]:
        deform = deform_conv2d if self.rank == 2 else deform_conv3d
        found = [
            deform(p, full(offsets(p)), weight, dilation=dilation)
            for offsets, weight, dilation in zip(self.offsets, self.weights, self.dilations)
        ]
        return self.out(F.relu(torch.stack(found).sum(0)))


class Correction(nn.Module):
    """DCP, Eq. (1): f + h(p) + CR[Σ_i D_i(p)], of images or volumes."""

    def __init__(self, classes: int, rank: int):
        super().__init__()
        self.pyramid = ContextPyramid(classes, rank)

    def forward(self, f: Float[Tensor, "b k *s"], p: Float[Tensor, "b k *s"]) -> Float[Tensor, "b k *s"]:
        return f + one_hot(p) + self.pyramid(p)


# --------------------------------------------------------------------------------------------- depth attention, Eq. (2)


def depth_attention(f: Float[Tensor, "b k x y z"], product: Product = "mean") -> Float[Tensor, "b k x y z"]:
    """Eq. (2): each slice j of the volume along depth (z) gains the mean of all slices i under softmax_i(f_i . f_j).

    # Differs from paper: its product sums over the 12 x 60 x 36 numbers of a slice. Products of slices that differ a
    little then differ by hundreds, the softmax picks j itself, and the module doubles its input. `product` "mean"
    averages over the slice's positions, so that the product is that of two voxels' scores; "sum" is as printed.
    """
    with torch.autocast(f.device.type, enabled=False):
        slices = full(f).flatten(1, 3)  # b n z
        scale = 1 / (f.shape[2] * f.shape[3]) if product == "mean" else 1.0
        weights = (scale * torch.einsum("bni,bnj->bij", slices, slices)).softmax(1)
        return (torch.einsum("bij,bni->bnj", weights, slices) + slices).view(f.shape)


# -------------------------------------------------------------------------------------------------------- the network


class IMENet(Volumetric):
    """The network of Figure 2, its ablation (Table 3) by leaving parts out, and its upper bounds.

    Args:
        classes: of pixels and voxels alike, empty (0) among them.
        encoder, weights: of the 2-D network, see `Encoder`; its maps have strides 2 to 32.
        stride: of the 2-D scores, 1 (the paper's), 2 or 4.
        context: channels of the 2-D network's last convolutions.
        backbone_3d, width, bn, samples, deterministic: see `completion3d.Completion3d`.
        iterations: T. Also an attribute, to be set at test time.
        train_iterations: T in training; None is the same.
        dcp: DCP corrects the 2-D scores by the 3-D ones.
        dda: DDA corrects the 3-D scores by the 2-D ones.
        truth: "2d" and "3d" put the true labels in the place of that branch's prediction wherever the other branch asks
            for it: IMENet-2DGT and IMENet-3DGT. They are needed at test time as well.
        project: 2-D scores go to the voxels that the pixels' points lie in ("surface") or to all voxels behind the
            pixels ("rays").
        attention: see `depth_attention`.

    Rows of Table 3: A iterations=1, dcp=False, dda=False. B adds to A only repeated training of one branch after the
    other ("there is no feature interaction"): its network is A's. C dcp=True, dda=False. D dcp=False, dda=True. E both.
    A correction depends on the other branch's latest scores and on its own branch's first ones, so that without the
    other correction repetitions change nothing, and are left out. While neither correction learns, training goes past
    both, and runs the branches that learn alone.

    `forward` takes RGB in [0, 1] of any size, the TSDF, and for each pixel its voxel of the output grid (`voxels`). It
    is probabilities that cross between the branches, as data: no gradient follows them ("to update the 2D SS branch
    weights with the 3D SSC weights fixed and vice versa"). Training in turn names the parts: train=("trunk", "2d",
    "dcp"), then ("3d", "dda"). Side outputs are the scores before each correction: s1 the backbone's.

    The branches' sizes differ: 2-D scores are enlarged to the image before they are put into voxels; the voxels' are
    gathered at every pixel and averaged over the cells of the 2-D scores' stride.
    """

    def __init__(
        self,
        *,
        classes: int = 12,
        encoder: str = "resnet101",
        weights: str | None = None,
        stride: int = 1,
        context: int = 64,
        backbone_3d: str = "sscnet",
        width: float = 1.0,
        bn: bool = False,
        samples: int = 4,
        deterministic: bool = True,
        iterations: int = 3,
        train_iterations: int | None = None,
        dcp: bool = True,
        dda: bool = True,
        truth: Literal["none", "2d", "3d"] = "none",
        project: Literal["surface", "rays"] = "surface",
        attention: Product = "mean",
    ):
        super().__init__()
        for name, value, known in (
            ("truth", truth, ("none", "2d", "3d")),
            ("project", project, ("surface", "rays")),
            ("attention", attention, ("mean", "sum")),
            ("stride", stride, (1, 2, 4)),
        ):
            if value not in known:
                raise UserError(f"{name} is {', '.join(map(str, known[:-1]))} or {known[-1]}, not {value!r}")
        if iterations < 1:
            raise UserError(f"iterations is at least 1, not {iterations}")
        self.trunk = Encoder(encoder, weights=weights)
        if self.trunk.strides != [2, 4, 8, 16, 32]:
            raise UserError(
                f"encoder {encoder} has maps of strides {self.trunk.strides}; this network needs 2, 4, 8, 16, 32, as "
                "resnet101 and mobilenetv2_100 have them"
            )
        self.classes, self.stride, self.iterations = classes, stride, iterations
        self.train_iterations = iterations if train_iterations is None else train_iterations
        self.truth, self.project = truth, project
        self.attention: Product = attention
        self.decoder = SegDecoder(self.trunk.channels, classes, stride, context)
        own = {"samples": samples, "deterministic": deterministic} if backbone_3d == "sketch" else {"bn": bn}
        self.backbone = make_backbone(backbone_3d, {"classes": classes, "width": width, **own})
        self.dcp = Correction(classes, 2) if dcp else None
        self.dda = Correction(classes, 3) if dda else None

    @property
    def uses(self) -> tuple[str, ...]:
        """What it takes of a batch beside the image."""
        sketch = self.backbone.training and isinstance(self.backbone, SketchNet)
        more = {
            "pixels": self.project == "rays" and self.dda is not None,
            "labels": self.truth == "2d",
            "volume": self.truth == "3d" or sketch,
        }
        return ("tsdf", "voxels", *(name for name, needed in more.items() if needed))

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What a training stage may train, freeze, clip or give a learning rate of its own."""
        parts = {
            "trunk": self.trunk,
            "2d": self.decoder,
            "3d": self.backbone,
            "dcp": self.dcp,
            "dda": self.dda,
        }
        return {name: [module] for name, module in parts.items() if module is not None}

    def forward(
        self,
        image: Float[Tensor, "b 3 h w"],
        tsdf: Float[Tensor, "b 1 _x _y _z"],
        voxels: Int64[Tensor, "b _h _w"],
        pixels: Int64[Tensor, "b x y z"] | None = None,
        labels: Int64[Tensor, "b h w"] | None = None,
        volume: Int64[Tensor, "b x y z"] | None = None,
    ) -> Output:
        size = image.shape[-2:]
        if voxels.shape[-2:] != size:
            raise UserError(
                f"the image has {size[1]}x{size[0]} pixels, the map of its voxels {voxels.shape[2]}x{voxels.shape[1]}: "
                "resize both alike"
            )
        if self.training and not (learns(self.dcp) or learns(self.dda)):  # a branch by itself
            logits = self.segment(image) if learns(self.trunk) or learns(self.decoder) else None
            if not learns(self.backbone):
                return Output(logits=logits)
            volume_logits, sketch = complete(self.backbone, tsdf, volume)
            return Output(logits=logits, volume_logits=volume_logits, sketch=sketch)
        f_2d = self.segment(image)
        f_3d, sketch = complete(self.backbone, tsdf, volume)
        grid = (f_3d.shape[2], f_3d.shape[3], f_3d.shape[4])
        all_2d, all_3d = [f_2d], [f_3d]
        interact = self.dcp is not None and self.dda is not None and self.truth == "none"
        repeated = (self.train_iterations if self.training else self.iterations) if interact else 1
        fixed_3d = self.training and not (learns(self.backbone) or learns(self.dda))
        for t in range(1, repeated + 1):
            if self.dcp is not None:
                told = self.voxel_probabilities(all_3d[-1], volume)
                all_2d.append(self.dcp(full(f_2d), seen(told, voxels, self.stride)))
            if self.dda is not None and not (fixed_3d and t == repeated):  # no loss would see the last one
                told = self.pixel_probabilities(all_2d[-1], size, labels)
                if self.project == "rays":
                    p = along_rays(told, demand(pixels, "pixels", "project is rays"))
                else:
                    p = to_voxels(told, voxels, grid)
                all_3d.append(depth_attention(self.dda(full(f_3d), p), self.attention))
        *sides_2d, logits = all_2d
        *sides_3d, volume_logits = all_3d
        return Output(
            logits=logits,
            side_logits=tuple(sides_2d),
            volume_logits=volume_logits,
            side_volume_logits=tuple(sides_3d),
            sketch=sketch,
        )

    def segment(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k h2 w2"]:
        """f_2d, the 2-D network's own scores: one for each cell of `stride` x `stride` pixels."""
        padded = pad_to_multiple(image, 32)
        return first(self.decoder(self.trunk(padded)), [ceil_div(n, self.stride) for n in image.shape[-2:]])

    @torch.no_grad()
    def voxel_probabilities(self, scores: Float[Tensor, "b k x y z"], volume: Tensor | None) -> Tensor:
        """F_3d as DCP is told it."""
        if self.truth == "3d":
            return labels_one_hot(demand(volume, "volume", "truth is 3d"), self.classes)
        return full(scores).softmax(1)

    @torch.no_grad()
    def pixel_probabilities(self, scores: Float[Tensor, "b k h2 w2"], size, labels: Tensor | None) -> Tensor:
        """F_2d as DDA is told it, at the image's size."""
        if self.truth == "2d":
            return labels_one_hot(demand(labels, "labels", "truth is 2d"), self.classes)
        return enlarged(full(scores), size, self.stride).softmax(1)


def learns(module: nn.Module | None) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())


def demand(value: Tensor | None, name: str, reason: str) -> Tensor:
    if value is None:
        raise UserError(f"this IMENet needs {name}, because {reason}")
    return value
