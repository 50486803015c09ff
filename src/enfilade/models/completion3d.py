"""Semantic scene completion from depth alone: the 3-D backbones that IMENet is built on.

* Song, Yu, Zeng, Chang, Savva, Funkhouser: Semantic scene completion from a single depth image, CVPR 2017 (`SSCNet`)
* Chen, Lin, Qian, Zeng, Li: 3D sketch-aware semantic scene completion via semi-supervised structure prior, CVPR 2020
  (`SketchNet`; its released code is called TorchSSC)
* Li, Liu, Gong, Shi, Yuan, Zhao, Reid: RGBD based dimensional decomposition residual network for 3D semantic scene
  completion, CVPR 2019 (`DDR`)

Both take the flipped TSDF of a grid (240 x 144 x 240 voxels of 2 cm, or any sides that 4 divides) and answer with class
scores at a quarter of its size; class 0 is empty. The network that training knows, `Completion3d`, is the last here.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from enfilade.errors import UserError, unknown
from enfilade.models.encoders import multiple
from enfilade.types import IGNORE, Output


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """`width` times as many channels, in whole multiples."""
    return max(1, round(channels * width / multiple)) * multiple


def demand_grid(tsdf: Tensor) -> None:
    if any(n % 4 or n < 4 for n in tsdf.shape[2:]):
        raise UserError(f"the TSDF of a completion network has sides that 4 divides, not {tuple(tsdf.shape[2:])}")


def initialise(network: nn.Module) -> None:
    """He initialisation of every 3-D convolution."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Pointwise(nn.Conv3d):
    """A 1x1x1 convolution, as the matrix product that it is: in fp32, channels last, oneDNN's convolution takes
    several times as long."""

    def __init__(self, cin: int, cout: int, bias: bool = True):
        super().__init__(cin, cout, 1, bias=bias)

    def forward(self, input: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b d x y z"]:
        return F.linear(input.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


# ------------------------------------------------------------------------------------------------------------- SSCNet


def conv3(cin: int, cout: int, dilation: int, bn: bool) -> nn.Sequential:
    conv = nn.Conv3d(cin, cout, 3, padding=dilation, dilation=dilation, bias=not bn)
    return nn.Sequential(conv, nn.BatchNorm3d(cout)) if bn else nn.Sequential(conv)


class Residual(nn.Module):
    """Two 3x3x3 convolutions and a shortcut, which is a 1x1x1 convolution at the first block of a size."""

    def __init__(self, cin: int, cout: int, *, project: bool = False, dilation: int = 1, bn: bool = False):
        super().__init__()
        self.shortcut = Pointwise(cin, cout, bias=False) if project else nn.Identity()
        self.one, self.two = conv3(cin, cout, dilation, bn), conv3(cout, cout, dilation, bn)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b d x y z"]:
        return F.relu(self.two(F.relu(self.one(x), inplace=True)) + self.shortcut(x), inplace=True)


class SSCNet(nn.Module):
    """SSCNet, layer by layer as its released network file has it (930,508 parameters for 12 classes at width 1).

    Args:
        classes: label classes, empty among them.
        width: factor of all channels but the classes.
        bn: batch norm after the 7x7x7 and the 3x3x3 convolutions. The original has none.
    """

    def __init__(self, *, classes: int = 12, width: float = 1.0, bn: bool = False):
        super().__init__()
        a, b, c, d = (scaled(n, width) for n in (16, 32, 64, 128))
        self.narrow = a < 16
        first = nn.Conv3d(1, a, 7, stride=2, padding=3, bias=not bn)
        self.first = nn.Sequential(first, nn.BatchNorm3d(a)) if bn else nn.Sequential(first)
        self.second = Residual(a, b, project=True, bn=bn)
        self.third = nn.ModuleList(
            Residual(cin, c, project=cin != c or k == 0, dilation=dilation, bn=bn)
            for k, (cin, dilation) in enumerate(((b, 1), (c, 1), (c, 2), (c, 2)))
        )
        self.fourth = nn.ModuleList((Pointwise(4 * c, d), Pointwise(d, d)))
        self.classify = Pointwise(d, classes)
        initialise(self)
        nn.init.normal_(self.classify.weight, std=0.01)  # all classes start out alike

    def features(self, tsdf: Float[Tensor, "b 1 _x _y _z"]) -> Float[Tensor, "b d x y z"]:
        """What the scores are computed from: 128 channels (times the width)."""
        demand_grid(tsdf)
        # oneDNN's bf16 gradient of fewer than 16 channels takes twice as long as its fp32 one
        with torch.autocast("cpu", enabled=False) if self.narrow and tsdf.device.type == "cpu" else nullcontext():
            x = F.relu(self.first(tsdf), inplace=True)
        x = F.max_pool3d(self.second(x), 2)
        maps = []
        for block in self.third:
            x = block(x)
            maps.append(x)
        x = torch.cat(maps, 1)
        for layer in self.fourth:
            x = F.relu(layer(x), inplace=True)
        return x

    def forward(self, tsdf: Float[Tensor, "b 1 _x _y _z"]) -> Float[Tensor, "b k x y z"]:
        return self.classify(self.features(tsdf))


# ------------------------------------------------------------------------------------------------- the sketch network


@dataclass(frozen=True, slots=True)
class Sketch:
    """What `SketchNet` says of where surfaces bend or end, as scores of "not there" and "there". The last four are made
    in training only."""

    raw: Float[Tensor, "b 2 x y z"]  # stage 1, from the TSDF
    prior: Float[Tensor, "b 2 x y z"]  # the CVAE's, of latent codes from the prior: what the labels are told
    posterior: Float[Tensor, "b 2 x y z"] | None = None  # of latent codes from the encoder, which saw the truth
    mean: Float[Tensor, "b l _ _ _"] | None = None  # of the encoder's latent codes
    log_variance: Float[Tensor, "b l _ _ _"] | None = None
    truth: Int64[Tensor, "b x y z"] | None = None  # 0, 1, or 255 where the volume is unknown


def sketch_of(volume: Int64[Tensor, "b x y z"]) -> Int64[Tensor, "b x y z"]:
    """The sketch of a label volume: 1 where the labels change along at least two axes, by Sobel's operator on the
    class numbers (unknown is empty), as the authors publish it. 255 where the volume is unknown."""
    smooth, plain, change = (torch.tensor(t, device=volume.device) for t in ((1.0, 2, 1), (1.0, 1, 1), (1.0, 0, -1)))
    axes = (change, plain, smooth), (smooth, change, plain), (smooth, plain, change)
    kernels = torch.stack([torch.einsum("i,j,k->ijk", *(t.to(torch.float32) for t in taps)) for taps in axes])
    known = volume != IGNORE
    changes = F.conv3d(volume.where(known, 0)[:, None].float(), kernels[:, None], padding=1) != 0
    return (changes.sum(1) > 1).long().where(known, IGNORE)


def conv_bn(conv: nn.Module) -> nn.Sequential:
    channels: Any = conv.out_channels
    return nn.Sequential(conv, nn.BatchNorm3d(channels))


class DDR(nn.Module):
    """A bottleneck whose 3x3x3 convolution is taken apart along z, y and x, with sums from each to the later ones
    (Li et al. 2019, as TorchSSC has it). With `halve` each of the three halves its axis."""

    def __init__(self, cin: int, inner: int, cout: int, dilation: int = 1, halve: bool = False):
        super().__init__()

        def along(axis: int) -> nn.Sequential:
            def at(value: int, other: int) -> tuple[int, int, int]:
                return (value if axis == 0 else other, value if axis == 1 else other, value if axis == 2 else other)

            stride, spread = at(2 if halve else 1, 1), at(dilation, 1)
            padding = at(dilation, 0)
            return conv_bn(nn.Conv3d(inner, inner, at(3, 1), stride, padding, spread, bias=False))

        self.squeeze = conv_bn(Pointwise(cin, inner, bias=False))
        self.z, self.y, self.x = along(2), along(1), along(0)
        self.expand = conv_bn(Pointwise(inner, cout, bias=False))
        self.halve = halve
        if halve:
            self.z_over_y, self.z_over_x, self.y_over_x = (
                conv_bn(Pointwise(inner, inner, bias=False)) for _ in range(3)
            )
            self.shortcut = conv_bn(Pointwise(cin, cout, bias=False))

    def forward(self, x: Float[Tensor, "b c _x _y _z"]) -> Float[Tensor, "b d x y z"]:
        z = self.z(F.relu(self.squeeze(x)))
        y = self.y(F.relu(z))
        if self.halve:
            z = self.z_over_y(F.avg_pool3d(z, (1, 2, 1)))
        y = y + z
        last = self.x(F.relu(y))
        if self.halve:
            z, y = self.z_over_x(F.avg_pool3d(z, (2, 1, 1))), self.y_over_x(F.avg_pool3d(y, (2, 1, 1)))
            x = self.shortcut(F.avg_pool3d(x, 2))
        return F.relu(self.expand(F.relu(last + z + y)) + x)


class Hourglass(nn.Module):
    """Four DDR blocks at half the size, four at a quarter, and two deconvolutions back, with one skip."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.upper = self.level(channels, channels)
        self.lower = self.level(channels, 2 * channels)
        self.up = nn.ModuleList((deconv_bn(2 * channels, channels), deconv_bn(channels, channels)))
        self.classify = nn.Sequential(nn.Dropout3d(0.1), Pointwise(channels, out))

    @staticmethod
    def level(cin: int, cout: int) -> nn.Sequential:
        more = (DDR(cout, cout // 4, cout, dilation) for dilation in (1, 2, 3))
        return nn.Sequential(DDR(cin, cin // 4, cout, halve=True), *more)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b k x y z"]:
        upper = self.upper(x)
        x = F.relu(self.up[0](self.lower(upper))) + upper
        return self.classify(F.relu(self.up[1](x)))


def deconv_bn(cin: int, cout: int) -> nn.Sequential:
    return conv_bn(nn.ConvTranspose3d(cin, cout, 3, stride=2, padding=1, output_padding=1, bias=False))


def convs(*channels: int) -> nn.Sequential:
    """3x3x3 convolutions with batch norm and ReLU."""
    layers = []
    for cin, cout in pairwise(channels):
        layers += [*conv_bn(nn.Conv3d(cin, cout, 3, padding=1, bias=False)), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class CVAE(nn.Module):
    """The sketch hallucination of Chen et al., Section 3.3: a conditional variational auto-encoder that completes a raw
    sketch, with a latent code of 16 channels at a quarter of its size.

    `samples` codes are drawn and their answers averaged. Outside training the code is the prior's mean, 0, so that
    answers repeat, unless `deterministic` is False (# Differs from paper: it samples at test time as well)."""

    def __init__(self, latent: int, samples: int, deterministic: bool):
        super().__init__()
        self.latent, self.samples, self.deterministic = latent, samples, deterministic
        self.encoder, self.condition = self.contract(2, latent), self.contract(1, latent)
        self.mean, self.log_variance = Pointwise(latent, latent), Pointwise(latent, latent)
        self.decoder = nn.ModuleList((deconv_bn(2 * latent, latent), deconv_bn(latent, latent)))
        self.classify = nn.Sequential(nn.Dropout3d(0.1), Pointwise(latent, 2))

    @staticmethod
    def contract(cin: int, latent: int) -> nn.Sequential:
        fine, half, quarter = convs(cin, 3, 16, 16), convs(16, latent), convs(latent, latent)
        return nn.Sequential(fine, nn.AvgPool3d(2), half, nn.AvgPool3d(2), quarter)

    def decode(self, condition: Tensor, code: Tensor) -> Float[Tensor, "b 2 x y z"]:
        x = torch.cat([condition, code], 1)
        for layer in self.decoder:
            x = F.relu(layer(x))
        return self.classify(x)

    def forward(self, raw: Float[Tensor, "b 1 x y z"], truth: Float[Tensor, "b 1 x y z"] | None) -> dict[str, Tensor]:
        """The fields of `Sketch` that a CVAE makes; those of the encoder only with the truth."""
        condition = self.condition(raw)
        if not self.training and self.deterministic:
            return {"prior": self.decode(condition, torch.zeros_like(condition))}

        def averaged(code) -> Tensor:
            return torch.stack([self.decode(condition, code()) for _ in range(self.samples)]).mean(0)

        made = {"prior": averaged(lambda: torch.randn_like(condition))}
        if truth is not None:
            x = self.encoder(torch.cat([raw, truth], 1))
            mean, log_variance = self.mean(x).float(), self.log_variance(x).float()
            code = lambda: mean + (0.5 * log_variance).exp() * torch.randn_like(mean)  # noqa: E731
            made |= {"posterior": averaged(code), "mean": mean, "log_variance": log_variance}
        return made


def strongest(tsdf: Float[Tensor, "b 1 _x _y _z"]) -> Float[Tensor, "b 1 x y z"]:
    """Of 4x4x4 values the one farthest from 0, which in a flipped TSDF is the nearest to a surface."""
    high, low = F.max_pool3d(tsdf, 4), -F.max_pool3d(-tsdf, 4)
    return torch.where(high >= -low, high, low)


class SketchNet(nn.Module):
    """The sketch network of Chen et al. for depth alone: stage 1 sketches the room's structure from the TSDF and lets a
    CVAE complete the sketch, stage 2 labels the volume.

    # Differs from paper: stage 2 adds both sketches to the features of the TSDF, where the original has those of an
    image; IMENet's 3-D branch sees depth only. The released TSDF is of the coarse grid; this is the fine grid's, of
    which each 4x4x4 block keeps its value nearest to a surface.

    Args:
        classes, width: as for `SSCNet`; the 3 channels of the stems and the latent code of 16 stay.
        samples: latent codes drawn for each answer (4 as released).
        deterministic: see `CVAE`.
    """

    def __init__(self, *, classes: int = 12, width: float = 1.0, samples: int = 4, deterministic: bool = True):
        super().__init__()
        channels, middle = scaled(128, width, 4), scaled(64, width)
        self.stem = convs(1, 3, middle, channels)
        self.sketch = Hourglass(channels, 2)
        self.cvae = CVAE(16, samples, deterministic)
        self.from_raw, self.from_prior = convs(2, 3, middle, channels), convs(2, 3, middle, channels)
        self.semantic = Hourglass(channels, classes)
        initialise(self)

    def forward(
        self, tsdf: Float[Tensor, "b 1 _x _y _z"], volume: Int64[Tensor, "b x y z"] | None = None
    ) -> tuple[Float[Tensor, "b k x y z"], Sketch]:
        """Class scores and the sketch. In training the CVAE's encoder needs the labels, `volume`."""
        demand_grid(tsdf)
        x = strongest(tsdf)
        size = x.shape[2:]
        beyond = [p for n in reversed(size) for p in (0, multiple(n, 4) - n)]  # two halvings
        features = self.stem(F.pad(x, beyond))
        raw = self.sketch(features)
        truth = None if volume is None else sketch_of(volume)
        seen = None
        if self.training and truth is not None:
            seen = F.pad(truth.where(truth != IGNORE, 0), beyond)[:, None].to(x.dtype)
        made = self.cvae(raw.argmax(1, keepdim=True).to(x.dtype), seen)
        logits = self.semantic(features + self.from_raw(raw) + self.from_prior(made["prior"]))

        def inside(t: Tensor) -> Tensor:
            return t[..., : size[0], : size[1], : size[2]]

        made = {k: inside(v) if k in ("prior", "posterior") else v for k, v in made.items()}
        return inside(logits), Sketch(raw=inside(raw), **made, truth=truth if self.training else None)


# -------------------------------------------------------------------------------------------------------- the network

BACKBONES = {"sscnet": SSCNet, "sketch": SketchNet}


def make_backbone(name: str, options: dict[str, Any]) -> SSCNet | SketchNet:
    """A 3-D backbone by its name in `BACKBONES`.

    Raises:
        UserError: no such backbone.
    """
    if name not in BACKBONES:
        raise unknown("3-D backbone", name, BACKBONES)
    return BACKBONES[name](**options)


def complete(
    backbone: nn.Module, tsdf: Float[Tensor, "b 1 _x _y _z"], volume: Int64[Tensor, "b x y z"] | None = None
) -> tuple[Float[Tensor, "b k x y z"], Sketch | None]:
    """Class scores of either backbone, and the sketch of the one that makes one."""
    return backbone(tsdf, volume) if isinstance(backbone, SketchNet) else (backbone(tsdf), None)


def channels_last(network: nn.Module) -> None:
    """All of a network's images and volumes channels last. `Module.to(memory_format=...)` knows one rank only."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim in formats:
            tensor.data = tensor.data.contiguous(memory_format=formats[tensor.ndim])


class Volumetric(nn.Module):
    """A module of images and volumes, which `to(memory_format=torch.channels_last)` turns each as its rank wants it."""

    def to(self, *args, **kwargs):
        if kwargs.get("memory_format") is torch.channels_last:
            del kwargs["memory_format"]
            channels_last(self)
        return super().to(*args, **kwargs)


class Completion3d(Volumetric):
    """A 3-D backbone on its own: the rows SSCNet and TorchSSC of IMENet's Tables 1 and 2, without its 2-D branch.

    Args:
        backbone: "sscnet" or "sketch".
        classes, width: as for `SSCNet`.
        bn: batch norm in SSCNet; the sketch network always has it.
        samples, deterministic: of the sketch network.
        weights: none exist: for the checkpoints' sake.
    """

    def __init__(
        self,
        *,
        backbone: str = "sscnet",
        classes: int = 12,
        width: float = 1.0,
        bn: bool = False,
        samples: int = 4,
        deterministic: bool = True,
        weights: str | None = None,
    ):
        super().__init__()
        own = {"samples": samples, "deterministic": deterministic} if backbone == "sketch" else {"bn": bn}
        self.backbone = make_backbone(backbone, {"classes": classes, "width": width, **own})
        self.loaded = f"3-D backbone {backbone}: random weights"

    @property
    def trunk(self) -> nn.Module:
        return self.backbone

    @property
    def uses(self) -> tuple[str, ...]:
        """What it takes of a batch beside the image. The CVAE is trained with the truth."""
        learns = self.backbone.training and isinstance(self.backbone, SketchNet)
        return ("tsdf", "volume") if learns else ("tsdf",)

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        return {"3d": [self.backbone]}

    def forward(
        self,
        image: Float[Tensor, "b 3 _h _w"] | None,
        tsdf: Float[Tensor, "b 1 _x _y _z"],
        volume: Int64[Tensor, "b x y z"] | None = None,
    ) -> Output:
        """`image` is there for the training loop's sake, which gives it to every network."""
        logits, sketch = complete(self.backbone, tsdf, volume)
        return Output(volume_logits=logits, sketch=sketch)
