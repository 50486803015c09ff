"""RSN: depth from one image, first at the level of regions, then refined.

* Anonymous: Region-Support Depth Inference from a Single Image (Figures 1 and 2, Table 1)

    network = RSN(encoder="mobilenetv2_100", width=96, refine_width=16)
    output = network(image)             # depth in metres; side_depths: region support, then each earlier iteration
    output = network(image, support=s)  # with a true region support (`ops.regions`) in place of the generated one
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from enfilade.errors import UserError
from enfilade.models.encoders import Encoder, as_symbol, ceil_div, covering, pad_to_multiple
from enfilade.models.layers import conv_bn
from enfilade.types import IGNORE, Output

SCALES = (2, 4, 8, 10, 20, 40, 80, 160)  # the pyramid's, in pixels of the network's image
TABLE_1 = "resnet34-half"
METRES = 3.0  # depth enters the refinement in units of this, so that it weighs about as much as a colour


def resize(x: Float[Tensor, "b c _ _"], size: Sequence[int]) -> Float[Tensor, "b c h w"]:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def average_cells(x: Float[Tensor, "b c _ _"], rows: int, columns: int) -> Float[Tensor, "b c _ _"]:
    """The map averaged over `rows` x `columns` cells that cover it. Exported it is a product with the cells' weights:
    ONNX's average pooling takes no count of cells that depends on the input's size."""
    if not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(x, (rows, columns))
    down, across = (cell_weights(n, as_symbol(count)) for n, count in zip(x.shape[-2:], (rows, columns)))
    return down @ x @ across.T


def cell_weights(size: int, count: int) -> Float[Tensor, "count size"]:
    """Row i averages the places from i size / count, rounded down, to (i + 1) size / count, rounded up."""
    cell, place = torch.arange(count)[:, None], torch.arange(size)
    start, end = cell * size // count, ((cell + 1) * size + count - 1) // count
    return ((place >= start) & (place < end)).float() / (end - start)


class PyramidUnit(nn.Module):
    """The pyramid pooling unit (Table 1, layer 21 or 7): the map averaged over squares of `SCALES` pixels, one 1x1
    convolution to an eighth of the channels each, resized back and concatenated.

    `stride` is that of the map: squares of its own size or smaller leave it as it is.
    """

    def __init__(self, channels: int, stride: int):
        super().__init__()
        if channels % len(SCALES):
            raise UserError(f"the pyramid unit divides its channels by {len(SCALES)}: {channels} do not")
        self.stride = stride
        self.tops = nn.ModuleList(conv_bn(channels, channels // len(SCALES), 1) for _ in SCALES)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        size = x.shape[-2:]
        levels = []
        for scale, top in zip(SCALES, self.tops):
            if scale <= self.stride:
                levels.append(top(x))
            else:
                pooled = average_cells(x, *(ceil_div(side * self.stride, scale) for side in size))
                levels.append(resize(top(pooled), size))
        return torch.cat(levels, 1)


class HalfResNet(Encoder):
    """ResNet-34 that is sub-sampled once, after its first module: layers 1-20 of Table 1.

    # Differs from paper: Table 1 has 256, 512 and 512 channels in the last three modules. The pre-trained network that
    it starts from has 128, 256 and 512, and so has this one.
    """

    def __init__(self, weights: str | None = None):
        super().__init__("resnet34", weights=weights)
        net: Any = self.net
        net.conv1.stride = (1, 1)
        net.maxpool = nn.Identity()
        for module in (net.layer3[0], net.layer4[0]):
            module.conv1.stride = (1, 1)
            for layer in module.downsample:
                if isinstance(layer, nn.Conv2d):
                    layer.stride = (1, 1)
                elif isinstance(layer, nn.AvgPool2d):
                    raise UserError("resnet34 has another shape in this timm: its short cuts pool")
        self.strides = [1, 1, 2, 2, 2]

    @property
    def ends(self) -> tuple[int, int]:
        """Channels of what `forward` returns."""
        return self.channels[1], self.channels[4]

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The map before the sub-sampling, and the last one at half its size."""
        features = super().forward(image)
        return [features[1], features[4]]


class Gathered(Encoder):
    """The same two maps from any timm encoder: its finest one, and all others brought to twice that stride by a 1x1
    convolution to `width` channels, and summed."""

    def __init__(self, name: str, width: int, weights: str | None = None):
        super().__init__(name, weights=weights)
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in self.channels[1:])
        self.norm = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        if self.strides[:2] != [2, 4]:
            raise UserError(
                f"encoder {name} has maps of strides {self.strides}; this network needs 2, 4, ..., as resnet34 and "
                "mobilenetv2_100 have them"
            )
        self.ends = self.channels[0], width

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        finest, *features = super().forward(image)
        *finer, total = [lateral(f) for lateral, f in zip(self.laterals, features)]
        for feature in reversed(finer):
            total = feature + resize(total, feature.shape[-2:])
        return [finest, self.norm(total)]


class Generation(nn.Module):
    """Layers 5-6 and 21-30 of Table 1: from the two maps of the trunk to one depth a pixel of the finer one.

    "We ensure the channel of the high-resolution feature map holds half of channels of the concatenated feature map."
    """

    def __init__(self, fine: int, coarse: int, width: int, stride: int):
        super().__init__()
        half, quarter = width // 2, width // 4
        self.lift = nn.Sequential(conv_bn(fine, quarter), conv_bn(quarter, quarter))  # 5, 6
        self.pyramid = PyramidUnit(coarse, 2 * stride)  # 21
        self.mix = conv_bn(coarse, width)  # 22
        self.join = conv_bn(width + coarse, width)  # 23
        self.up = nn.Sequential(  # 24
            nn.ConvTranspose2d(width, half, 3, 2, padding=1, output_padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )
        self.narrow = conv_bn(half, quarter)  # 25
        last = nn.Conv2d(quarter, 1, 3, padding=1)
        self.regress = nn.Sequential(
            conv_bn(half, quarter), *(conv_bn(quarter, quarter) for _ in range(3)), last
        )  # 26-30
        initialise(self)
        start_at(last, 2.6)  # softplus: about 2.7 m, the middle of a room

    def forward(self, fine: Float[Tensor, "b _ h w"], coarse: Float[Tensor, "b _ _ _"]) -> Float[Tensor, "b h w"]:
        x = self.mix(self.pyramid(coarse))
        x = self.up(self.join(torch.cat([x, coarse], 1)))
        x = torch.cat([self.narrow(x[..., : fine.shape[-2], : fine.shape[-1]]), self.lift(fine)], 1)
        return positive(self.regress(x))


class Refinement(nn.Module):
    """The right half of Table 1: RGB, guidance and the current depth give the next depth, all at one resolution.

    `residual` learns the factor by which a depth changes, from 1; the paper regresses the depth itself.

    # Differs from paper: five channels enter, as Figure 1 and Section 3.2 have it; Table 1 counts four.
    """

    def __init__(self, width: int, stride: int, residual: bool):
        super().__init__()
        self.first = conv_bn(5, width, 7)  # 1
        self.units = nn.ModuleList([conv_bn(width, width) for _ in range(3)])  # 2-4
        self.lift = nn.Sequential(conv_bn(width, 2 * width), conv_bn(2 * width, 2 * width))  # 5, 6
        self.pyramid = PyramidUnit(2 * width, stride)  # 7
        self.mix = conv_bn(2 * width, 2 * width)  # 8
        last = nn.Conv2d(2 * width, 1, 3, padding=1)
        self.regress = nn.Sequential(
            conv_bn(4 * width, 2 * width), *(conv_bn(2 * width, 2 * width) for _ in range(5)), last
        )
        self.residual = residual
        initialise(self)
        start_at(last, 0.0 if residual else 2.6)

    def forward(
        self, image: Float[Tensor, "b 3 h w"], guidance: Float[Tensor, "b h w"], depth: Float[Tensor, "b h w"]
    ) -> Float[Tensor, "b h w"]:
        x = self.first(torch.cat([(image - 0.45) / 0.25, guidance[:, None] / METRES, depth[:, None] / METRES], 1))
        for unit in self.units:
            x = x + unit(x)
        x = self.lift(x)
        answer = self.regress(torch.cat([self.mix(self.pyramid(x)), x], 1))
        return depth * answer[:, 0].float().exp() if self.residual else positive(answer)


def positive(answer: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b h w"]:
    """# Differs from paper: a last softplus, so that the logarithm of a depth always exists."""
    return F.softplus(answer[:, 0].float())


def initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def start_at(layer: nn.Conv2d, value: float) -> None:
    """A last layer that answers about `value` everywhere before training."""
    nn.init.normal_(layer.weight, std=0.01 if value else 1e-3)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, value)


class RSN(nn.Module):
    """The region support network, its two modules, and every row of its Tables 2 and 3 by leaving parts out.

    Args:
        encoder: "resnet34-half", the paper's (Table 1, layers 1-20), at the image's own resolution; or a timm encoder,
            at half the image's resolution.
        weights: see `Encoder`.
        width: channels of the generation's coarse maps (paper: 512); a multiple of 8.
        refine_width: channels of the refinement's first layers (paper: 64), half of the others'.
        generation, refinement: which modules there are. Without generation a true `support` is taken for the generated
            one. With neither, the support is the answer (the row Baseline2).
        semantic: labels are the guidance, each a learned number, in place of the region support.
        residual: see `Refinement`.
        iterations: of the refinement; 3.

    `forward(image, support=None, labels=None)`: RGB in [0, 1] of any size; `support` is used where it is given, for
    guidance and, its void filled with the image's mean, as the first coarse depth. `side_depths` holds what was before
    the answer: the region support, if it was generated, and the iterations but for the last.
    """

    def __init__(
        self,
        *,
        encoder: str = TABLE_1,
        weights: str | None = None,
        width: int = 512,
        refine_width: int = 64,
        generation: bool = True,
        refinement: bool = True,
        semantic: bool = False,
        residual: bool = False,
        iterations: int = 3,
        classes: int = 40,
    ):
        super().__init__()
        if semantic and not (generation and refinement):
            raise UserError("labels guide the refinement of a generated depth: semantic needs both modules")
        if iterations < 1:
            raise UserError(f"the refinement takes at least one iteration, not {iterations}")
        self.iterations, self.loaded = iterations, "no encoder"
        self.trunk = self.generation = self.refinement = self.numbers = None
        self.stride = 1 if encoder == TABLE_1 else 2  # of the answer
        if generation:
            trunk = HalfResNet(weights) if encoder == TABLE_1 else Gathered(encoder, width, weights)
            fine, coarse = trunk.ends
            self.trunk, self.loaded = trunk, trunk.loaded
            self.generation = Generation(fine, coarse, width, self.stride)
        if refinement:
            self.refinement = Refinement(refine_width, self.stride, residual)
        if semantic:
            self.numbers = nn.Embedding(classes + 1, 1)  # the last is void
        self.uses = () if generation and not semantic else ("labels",) if semantic else ("support",)

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What a training stage may train, freeze, clip or give a learning rate of its own."""
        parts = {
            "trunk": [self.trunk],
            "generation": [self.generation],
            "refinement": [self.refinement, self.numbers],
        }
        return {k: found for k, v in parts.items() if (found := [m for m in v if m is not None])}

    def forward(
        self,
        image: Float[Tensor, "b 3 h w"],
        support: Float[Tensor, "b h w"] | None = None,
        labels: Int64[Tensor, "b h w"] | None = None,
    ) -> Output:
        for name, given in (("support", support), ("labels", labels)):
            if name in self.uses and given is None:
                raise ValueError(f"this RSN is guided by {name}: give it (see enfilade.ops.regions)")
        size = image.shape[-2:]
        image = pad_to_multiple(image, self.trunk.strides[-1] if self.trunk is not None else self.stride)
        padded = image.shape[-2:]
        depths = []
        learning = torch.is_grad_enabled() and (learns(self.trunk) or learns(self.generation))
        if self.generation is not None and (support is None or learning):
            with torch.set_grad_enabled(learning):
                assert self.trunk is not None
                depths.append(self.generation(*self.trunk(image)))
        guidance = depths[-1] if support is None else self.subsampled(support, padded)
        depth = guidance if support is None else filled(guidance)
        if self.refinement is None:
            depths = depths or [depth]
        else:
            if self.numbers is not None:
                assert labels is not None
                void = self.numbers.num_embeddings - 1
                known = self.subsampled(labels, padded, IGNORE)
                guidance = METRES * self.numbers(known.where(known != IGNORE, void))[..., 0]
            small = F.avg_pool2d(image, self.stride) if self.stride > 1 else image
            for _ in range(self.iterations):
                depth = self.refinement(small, guidance, depth)
                depths.append(depth)
        *sides, depth = [covering(d, size, padded) for d in depths]
        return Output(depth=depth, side_depths=tuple(sides))

    def subsampled(self, x: Tensor, padded: Sequence[int], outside: int = 0) -> Tensor:
        """A map of the image's pixels at the network's resolution, by nearest neighbour; `outside` beyond the image."""
        h, w = x.shape[-2:]
        x = F.pad(x, (0, padded[1] - w, 0, padded[0] - h), value=outside)
        return x[:, self.stride // 2 :: self.stride, self.stride // 2 :: self.stride]


class Step(nn.Module):
    """A network that answers with the `step`-th depth map of an RSN: 0 is the first that it makes."""

    def __init__(self, network: RSN, step: int):
        super().__init__()
        self.network, self.step, self.uses = network, step, network.uses

    def forward(self, image: Float[Tensor, "b 3 h w"], **given: Tensor) -> Output:
        output = self.network(image, **given)
        return Output(depth=[*output.side_depths, output.depth][self.step])


def filled(support: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Region support as a first depth: void, where it is 0, takes the mean of the image."""
    known = support > 0
    mean = support.sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
    return support.where(known, mean.clamp(min=1e-3)[:, None, None])


def learns(module: nn.Module | None) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())
