"""Label refinement network for coarse-to-fine semantic segmentation, and the networks it is compared with.

Islam, Naha, Rochan, Bruce, Wang, 2017 ("LRN" below). An encoder; a first label map from its deepest feature; then five
refinements, each of which doubles the map and corrects it by the encoder's feature of that size. All six label maps
are supervised.

SegNet (Badrinarayanan et al. 2017), SegNet with deep supervision, and FCN-8s (Long et al. 2015) are the baselines of
LRN's Tables 1 to 3. All take any encoder whose maps halve down to stride 32: VGG-16 with batch norm as in the papers
("vgg16_bn", whose maps are the last activations before each pooling, from stride 1), or others of timm's with maps
from stride 2.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from enfilade.errors import UserError
from enfilade.models.encoders import Encoder, covering, pad_to_multiple
from enfilade.models.layers import conv_bn
from enfilade.types import Output


def double(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def from_stride_1(trunk: Encoder, name: str) -> bool:
    """Whether the encoder has a map of the image's own size.

    Raises:
        UserError: its maps do not halve from stride 1 or 2 down to 32.
    """
    if trunk.strides not in ([1, 2, 4, 8, 16, 32], [2, 4, 8, 16, 32]):
        raise UserError(
            f"encoder {name} has maps of strides {trunk.strides}; this network refines step by step and needs "
            "2, 4, 8, 16, 32, with or without 1, as vgg16_bn, resnet50 and mobilenetv2_100 have them"
        )
    return trunk.strides[0] == 1


def initialise(network: nn.Module) -> None:
    """He initialisation of everything but the encoder."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("trunk."):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Refinement(nn.Module):
    """RE (LRN Figure 2): M, the skip feature, becomes m by a 3x3 convolution, batch norm and ReLU; then [R, m] becomes
    the finer label map R' by a 3x3 convolution. It starts out as R' = R, a plain up-sampling."""

    def __init__(self, skip: int, width: int, classes: int):
        super().__init__()
        self.skip = conv_bn(skip, width)
        self.label = nn.Conv2d(classes + width, classes, 3, padding=1)

    def start(self) -> None:
        with torch.no_grad():
            self.label.weight.normal_(std=0.01)
            for k in range(self.label.out_channels):
                self.label.weight[k, k, 1, 1] += 1

    def forward(self, coarse: Float[Tensor, "b k h w"], skip: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        return self.label(torch.cat([coarse, self.skip(skip)], 1))  # Eq. (2)


class LRN(nn.Module):
    """The label refinement network (LRN Figure 1).

    Args:
        classes: label classes (C).
        encoder, weights: see `Encoder`.
        widths: channels of m in the five refinements, coarse to fine; None: C in each, as published.

    The image's own colours stand in for f_1 where the encoder has no map of stride 1 (# Differs from paper: VGG has
    one). Side outputs are s_1 .. s_5, at strides 32, 16, 8, 4, 2; the logits are s_6, at the image's size.
    """

    def __init__(
        self,
        *,
        classes: int = 11,
        encoder: str = "vgg16_bn",
        weights: str | None = None,
        widths: Sequence[int] | None = None,
    ):
        super().__init__()
        self.trunk = Encoder(encoder, weights=weights)
        skips = self.trunk.channels[:-1] if from_stride_1(self.trunk, encoder) else [3, *self.trunk.channels[:-1]]
        widths = tuple(widths or [classes] * 5)
        if len(widths) != 5:
            raise UserError(f"LRN has five refinements: give five widths, not {len(widths)}")
        self.first = nn.Conv2d(self.trunk.channels[-1], classes, 3, padding=1)
        self.refine = nn.ModuleList(Refinement(c, w, classes) for c, w in zip(reversed(skips), widths))
        initialise(self)
        nn.init.normal_(self.first.weight, std=0.01)
        for module in self.modules():
            if isinstance(module, Refinement):
                module.start()

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What a training stage may train, freeze, clip or give a learning rate of its own."""
        return {"trunk": [self.trunk], "decoder": [self.first, self.refine]}

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Output:
        size = image.shape[-2:]
        image = pad_to_multiple(image, 32)
        *skips, top = self.trunk(image)
        if len(skips) < 5:
            skips = [(image - self.trunk.mean) / self.trunk.std, *skips]
        maps = [self.first(top)]  # s_1, Eq. (1)
        for refine, skip in zip(self.refine, reversed(skips)):
            maps.append(refine(double(maps[-1]), skip))
        *sides, logits = (covering(s, size, image.shape[-2:]) for s in maps)
        return Output(logits=logits, side_logits=tuple(sides))


class SegNet(nn.Module):
    """SegNet: only the positions of the encoder's maxima cross to the decoder, which puts its features back there.

    Args:
        classes, encoder, weights: see `LRN`.
        depth: convolutions of the decoder's stages, deep to shallow; None: 3, 3, 3, 2, 2, as VGG-16 has them.
        supervise: SegNet+DS, a 3x3 convolution to label maps and a loss after each stage: side outputs at strides
            16, 8, 4 and 2.

    An encoder without pooling lends its maps all the same: the map of stride s is pooled here, only for the positions
    of its maxima. Where there is none of stride 1, the last doubling is bilinear (# Differs from paper: VGG has one).
    """

    def __init__(
        self,
        *,
        classes: int = 11,
        encoder: str = "vgg16_bn",
        weights: str | None = None,
        depth: Sequence[int] | None = None,
        supervise: bool = False,
    ):
        super().__init__()
        self.trunk = Encoder(encoder, weights=weights)
        from_stride_1(self.trunk, encoder)
        *pooled, top = self.trunk.channels
        pooled = pooled[::-1]  # deep to shallow
        depth = tuple(depth or (3, 3, 3, 2, 2)[: len(pooled)])
        if len(depth) != len(pooled) or min(depth) < 1:
            raise UserError(f"SegNet's decoder has {len(pooled)} stages here: give as many depths, not {len(depth)}")
        # Positions are of single channels, so a stage must start with as many as its map of the encoder has
        self.adapt = conv_bn(top, pooled[0]) if top != pooled[0] else nn.Identity()
        self.stages = nn.ModuleList()
        for channels, after, count in zip(pooled, [*pooled[1:], pooled[-1]], depth):
            widths = [channels] * count + [after]
            self.stages.append(nn.Sequential(*(conv_bn(a, b) for a, b in pairwise(widths))))
        self.label = nn.Conv2d(pooled[-1], classes, 3, padding=1)
        sides = [*pooled[1:], pooled[-1]][: len(pooled) - (len(pooled) == 5)] if supervise else []
        self.sides = nn.ModuleList(nn.Conv2d(c, classes, 3, padding=1) for c in sides)
        initialise(self)

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        return {"trunk": [self.trunk], "decoder": [self.adapt, self.stages, self.label, self.sides]}

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Output:
        size = image.shape[-2:]
        image = pad_to_multiple(image, 32)
        *maps, x = self.trunk(image)
        x = self.adapt(x)
        features = []
        for stage, source in zip(self.stages, reversed(maps)):
            _, positions = F.max_pool2d(source, 2, return_indices=True)
            x = stage(F.max_unpool2d(x, positions, [2, 2], output_size=source.shape[-2:]))
            features.append(x)
        if x.shape[-2:] != image.shape[-2:]:
            x = double(x)
        sides = (label(f) for label, f in zip(self.sides, features))
        padded = image.shape[-2:]
        return Output(
            logits=covering(self.label(x), size, padded), side_logits=tuple(covering(s, size, padded) for s in sides)
        )


class FCN8s(nn.Module):
    """FCN-8s: scores of strides 32, 16 and 8, added from coarse to fine; the last step, times 8, is bilinear.

    Args:
        classes, encoder, weights: see `LRN`.
        hidden: channels of the two convolutions (7x7, then 1x1, with dropout) that VGG's fully connected layers become;
            0 leaves them out, for encoders that never had any.
    """

    def __init__(
        self,
        *,
        classes: int = 21,
        encoder: str = "vgg16_bn",
        weights: str | None = None,
        hidden: int = 4096,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.trunk = Encoder(encoder, weights=weights)
        # VGG's maps come before its pooling: "pool3", of stride 8, is the pooled map of stride 4
        self.before_pooling = from_stride_1(self.trunk, encoder)
        channels = dict(zip(self.trunk.strides, self.trunk.channels))
        three, four = (4, 8) if self.before_pooling else (8, 16)
        top = channels[32]
        dense = [nn.Conv2d(top, hidden, 7, padding=3), nn.Conv2d(hidden, hidden, 1)] if hidden else []
        self.dense = nn.Sequential(*(m for conv in dense for m in (conv, nn.ReLU(inplace=True), nn.Dropout2d(dropout))))
        self.score = nn.ModuleList(nn.Conv2d(c, classes, 1) for c in (hidden or top, channels[four], channels[three]))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(classes, classes, 4, stride=2, padding=1, bias=False) for _ in range(2)
        )
        initialise(self)
        tap = torch.tensor([0.25, 0.75, 0.75, 0.25])
        bilinear = torch.eye(classes)[:, :, None, None] * (tap[:, None] * tap)
        for name, parameter in self.named_parameters():
            if name.startswith("score."):
                nn.init.zeros_(parameter)  # as the authors start it
            elif name.startswith("up."):
                parameter.data.copy_(bilinear)  # and then learned

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        return {"trunk": [self.trunk], "decoder": [self.dense, self.score, self.up]}

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Output:
        size = image.shape[-2:]
        image = pad_to_multiple(image, 32)
        features = self.trunk(image)
        if self.before_pooling:
            three, four, top = F.max_pool2d(features[2], 2), F.max_pool2d(features[3], 2), features[5]
        else:
            three, four, top = features[2], features[3], features[4]
        x = self.score[0](self.dense(top))
        x = self.up[0](x) + self.score[1](four)
        x = self.up[1](x) + self.score[2](three)
        x = F.interpolate(x, scale_factor=8, mode="bilinear", align_corners=False)
        return Output(logits=covering(x, size, image.shape[-2:]))


class Stage(nn.Module):
    """A network that answers with its `index`-th label map, counted from the coarsest (LRN Table 4, Figure 5): the map
    is up-sampled bilinearly, and the other maps are left out."""

    def __init__(self, network: nn.Module, index: int):
        super().__init__()
        self.network, self.index = network, index

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Output:
        h, w = image.shape[-2:]
        padded = pad_to_multiple(image, 32)  # a coarse map then covers whole cells, and up-sampling keeps its place
        output = self.network(padded)
        chosen = (*output.side_logits, output.logits)[self.index]
        full = F.interpolate(chosen, padded.shape[-2:], mode="bilinear", align_corners=False)
        return Output(logits=full[..., :h, :w])
