"""Encoders: any timm feature extractor, at any input size, behind one small interface.

An encoder turns RGB in [0, 1] into a list of feature maps, shallow to deep. It normalises the colours itself, pads
inputs that are not divisible by its stride, and always says which weights it holds.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from enfilade.errors import UserError, unknown

log = logging.getLogger(__name__)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Not -(-a // b): ONNX divides integers towards zero."""
    return (a + b - 1) // b


def pad_to_multiple(image: Float[Tensor, "b c _ _"], stride: int) -> Float[Tensor, "b c _ _"]:
    """Continue the last row and column (edge replication invents no contour) up to a multiple of `stride`."""
    h, w = image.shape[-2:]
    height, width = multiple(h, stride), multiple(w, stride)
    # An exported network takes any size: there is no branch on it, and often zero rows to add
    if torch.compiler.is_exporting() or (height, width) != (h, w):
        return F.pad(image, (0, width - w, 0, height - h), mode="replicate")
    return image


def multiple(side: int, stride: int) -> int:
    """`side` rounded up to a multiple of `stride`. In a network that is being exported it is `stride` times a new
    symbol, so that the formulas of all later sizes, which the exporter compares again and again, are of that symbol and
    not of the image's side rounded up."""
    if not torch.compiler.is_exporting():
        return ceil_div(side, stride) * stride
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if statically_known_true(side % stride == 0):
        return side
    found = as_symbol(ceil_div(side, stride)) * stride
    torch._check(found >= side)
    return found


def as_symbol(size: int) -> int:
    """A size of 1 or more that the exporter knows nothing else of, neither its formula nor that it is not 1 in the
    example, which would bind the exported network to sizes like the example's. Elsewhere the size itself."""
    if not torch.compiler.is_exporting():
        return size
    symbol: Any = torch.scalar_tensor(size, dtype=torch.int64).item()
    torch._check(symbol >= 1)
    return symbol


def covering(x: Float[Tensor, "b ..."], size: Sequence[int], padded: Sequence[int]) -> Float[Tensor, "b ..."]:
    """The part of a map of the padded image (height, width: `padded`) that covers the image itself (`size`)."""
    (h, w), (height, width) = size, padded
    return x[..., : ceil_div(h * x.shape[-2], height), : ceil_div(w * x.shape[-1], width)]


def first(x: Float[Tensor, "b k _ _"], size: Sequence[int]) -> Float[Tensor, "b k h w"]:
    """The first rows and columns of a map, as many as `size` (height, width) says."""
    if torch.compiler.is_exporting():  # a slice might be smaller than that, for all that the exporter knows
        return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))
    return x[..., : size[0], : size[1]]


def in_fp32(conv: nn.Conv2d, x: Float[Tensor, "b c _ _"]) -> Float[Tensor, "b c _ _"]:
    """`conv(x)` outside CPU autocast. oneDNN's bf16 input gradient of a strided depthwise convolution is 6 to 80 times
    slower than its fp32 one (96 channels at 113x145: 78 ms against 10 on two cores): a quarter of a training step."""
    if x.device.type != "cpu":
        return type(conv).forward(conv, x)
    with torch.autocast("cpu", enabled=False):
        return type(conv).forward(conv, x.float()).to(x.dtype)


class Encoder(nn.Module):
    """`timm.create_model(name, features_only=True)` at any input size.

    Args:
        name: a timm architecture, e.g. "mobilenetv2_100", "resnet50".
        weights: None (random, and said so), "timm" (timm's default weights, fetched by name: needs a network or a
            filled cache), or the path of a local safetensors file with timm's keys.
        in_channels: 3, or more when further maps (HHA) are stacked under the colours.

    Attributes: `channels` and `strides` of the returned maps, shallow to deep; `loaded`, a sentence about the weights.

    Raises:
        UserError: an unknown architecture, a missing weight file, or one that does not fit.
    """

    def __init__(self, name: str, *, weights: str | None = None, in_channels: int = 3):
        super().__init__()
        import timm

        if name.split(".")[0] not in timm.list_models():
            raise unknown("timm encoder", name, timm.list_models())
        options: dict = {"features_only": True, "in_chans": in_channels}
        if weights is not None and weights != "timm":
            if not Path(weights).is_file():
                raise UserError(f"no encoder weights at {weights}: give a safetensors file with timm's keys for {name}")
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
        elif weights == "timm":
            options |= {"pretrained": True}
        # The freely licensed MobileNetV2 weights come from TensorFlow, whose strided convolutions pad "same"
        extra: dict = {"pad_type": "same"} if name.startswith("mobilenetv2") else {}
        try:
            self.net = timm.create_model(name, **options, **extra)
        except Exception as error:
            raise UserError(f"cannot load weights {weights!r} into encoder {name}: {error}") from error
        if "pretrained_cfg_overlay" in options:
            # timm passes over weights that the file lacks. What changes with the seed did not come from the file.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(torch.initial_seed() + 1)
                again = timm.create_model(name, **options, **extra).state_dict()
            lost = [k for k, v in self.net.state_dict().items() if not torch.equal(v, again[k])]
            if lost:
                raise UserError(f"{weights} does not fit encoder {name}: it lacks {len(lost)} tensors, first {lost[0]}")
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and module.stride[0] > 1:
                module.__dict__["forward"] = partial(in_fp32, module)  # a partial, not a closure: it survives deepcopy
        net: Any = self.net  # timm's networks have attributes that nn.Module does not declare
        self.channels: list[int] = net.feature_info.channels()
        self.strides: list[int] = net.feature_info.reduction()
        # Colours as the weights want them: a local MobileNetV2 file follows TensorFlow, [-1, 1]. Kept in checkpoints.
        tensorflow = name.startswith("mobilenetv2") and weights != "timm"
        config = {} if tensorflow else net.pretrained_cfg or {}
        more = (0.5,) * (in_channels - 3)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([*config.get("mean", (0.5,) * 3), *more]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor([*config.get("std", (0.5,) * 3), *more]).view(1, -1, 1, 1))
        source = "random weights" if weights is None else f"weights {'of timm' if weights == 'timm' else weights}"
        count = sum(p.numel() for p in self.net.parameters())
        self.loaded = f"encoder {name}: {source}, {count / 1e6:.2f} M parameters"
        log.info(self.loaded)

    def forward(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Feature maps at `strides`; map of stride s has ceil(h / s) x ceil(w / s) positions."""
        h, w = image.shape[-2:]
        stride = self.strides[-1]
        image = (image - self.mean) / self.std
        features = self.net(pad_to_multiple(image, stride))
        return [f[..., : ceil_div(h, s), : ceil_div(w, s)] for f, s in zip(features, self.strides)]


class SideBySide(nn.Module):
    """Encoders of one architecture next to each other: their maps are joined, level by level. What networks that were
    trained apart have learned, one set of decoders can read.

    Args: `count` encoders; the others as `Encoder` takes them. Attributes: as those of an `Encoder`.
    """

    def __init__(self, name: str, *, count: int, weights: str | None = None, in_channels: int = 3):
        super().__init__()
        self.nets = nn.ModuleList(Encoder(name, weights=weights, in_channels=in_channels) for _ in range(count))
        first: Any = self.nets[0]
        self.channels: list[int] = [count * c for c in first.channels]
        self.strides: list[int] = first.strides
        self.loaded = f"{count} times {first.loaded}"

    def forward(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Feature maps at `strides`."""
        return [torch.cat(maps, 1) for maps in zip(*(net(image) for net in self.nets))]
