"""Joint semantic segmentation and depth with a learned, fully connected CRF.

Mousavian, Pirsiavash, Kosecka: Joint Semantic Segmentation and Depth Estimation with Deep Convolutional Networks, 3DV
2016 ("the paper" below). Five branches of different resolution each score every class and every bin of depth; the
scores are resized and summed. Depth is the expectation over its bins (Eq. 3). A dense CRF whose kernels see colours and
the estimated depth then refines the labels (Eqs. 5 to 7), and its C x C weights are learned with the network's.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from enfilade.errors import UserError
from enfilade.models.encoders import Encoder, covering, pad_to_multiple
from enfilade.models.layers import conv_bn
from enfilade.ops.crf import PAPER_KERNELS, DenseCRF, Kernel
from enfilade.types import Output

TABLE_1 = "table1"  # the paper's own five branches, in the place of an encoder's name
VGG_16 = {  # timm's key of VGG-16 for each convolution of Table 1 that has one: those of [4] that the paper starts from
    **dict(zip(("one.0", "one.1", "two.0", "two.1", "two_top", "three.0", "three.1"), (0, 2, 0, 2, 5, 5, 7))),
    **dict(zip(("four.0", "four.1", "five.0", "five.1"), (10, 12, 17, 19))),
}


def conv_relu(cin: int, cout: int, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, padding=dilation * (kernel // 2), dilation=dilation)
    return nn.Sequential(conv, nn.ReLU(inplace=True))


class TableOne(nn.Module):
    """The five branches of Table 1: features of 64, 128, 128, 128 and 1024 channels at strides 1, 2, 4, 8 and 8.

    # Differs from paper: it prints "upsample x4" for branch 4, which is at stride 8 if each pooling halves; DeepLab's
    atrous network, which it follows, keeps stride 8 through its last pooling, and so does this one.
    """

    strides = (1, 2, 4, 8, 8)
    channels = (64, 128, 128, 128, 1024)

    def __init__(self, weights: str | None = None):
        super().__init__()
        self.one = nn.Sequential(conv_relu(3, 64), conv_relu(64, 64))
        self.two = nn.Sequential(conv_relu(3, 64), conv_relu(64, 64))
        self.two_top = conv_relu(64, 128)
        self.three = nn.Sequential(conv_relu(64, 128), conv_relu(128, 128))
        self.three_top = nn.Sequential(conv_relu(128, 128), conv_relu(128, 128))
        self.four = nn.Sequential(conv_relu(128, 256), conv_relu(256, 256))
        self.four_top = nn.Sequential(conv_relu(256, 128), conv_relu(128, 128))
        self.five = nn.Sequential(conv_relu(256, 512), conv_relu(512, 512))
        self.five_top = nn.Sequential(conv_relu(512, 1024, dilation=12), nn.Dropout(0.5), conv_relu(1024, 1024, 1))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # pyright: ignore
        self.loaded = "the branches of Table 1: random weights"
        if weights is not None:
            self.load_vgg(weights)

    def load_vgg(self, weights: str) -> None:
        """Start from a VGG-16: "timm", or a safetensors file with timm's keys. Layers that VGG lacks stay random."""
        if weights == "timm":
            import timm

            tensors = timm.create_model("vgg16", pretrained=True).state_dict()
        elif Path(weights).is_file():
            from safetensors.torch import load_file

            tensors = load_file(weights)
        else:
            raise UserError(f"no VGG-16 weights at {weights}: give a safetensors file with timm's keys for vgg16")
        own = self.state_dict()
        for name, layer in VGG_16.items():
            for kind in ("weight", "bias"):
                tensor = tensors.get(f"features.{layer}.{kind}")
                if tensor is None or tensor.shape != own[f"{name}.0.{kind}"].shape:
                    raise UserError(
                        f"{weights} is not of timm's vgg16: features.{layer}.{kind} is missing or different"
                    )
                own[f"{name}.0.{kind}"].copy_(tensor)
        self.loaded = f"the branches of Table 1: {len(VGG_16)} of 17 convolutions from {weights}"

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        def pool(x, stride=2):
            return F.max_pool2d(x, 3, stride, padding=1)

        x = (image - self.mean) / self.std
        two = pool(self.two(x))
        three = pool(self.three(two))
        four = pool(self.four(three))
        five = pool(self.five(four), stride=1)
        return [self.one(x), self.two_top(two), self.three_top(three), self.four_top(four), self.five_top(five)]


class Branches(nn.Module):
    """The same over a timm encoder: two convolutions after each of its five maps, strides 2 to 32; the deepest has the
    wide view of Table 1's conv5-3 (a dilated 3x3, then 1x1)."""

    def __init__(self, encoder: str, weights: str | None, widths: Sequence[int]):
        super().__init__()
        self.trunk = Encoder(encoder, weights=weights)
        self.strides, self.loaded = tuple(self.trunk.strides), self.trunk.loaded
        if self.strides != (2, 4, 8, 16, 32):
            raise UserError(
                f"encoder {encoder} has maps of strides {list(self.strides)}; this network needs 2, 4, 8, 16, 32, as "
                "resnet50 and mobilenetv2_100 have them"
            )
        if len(widths) != 5:
            raise UserError(f"the network has five branches: give five widths, not {len(widths)}")
        self.channels = tuple(widths)
        self.tops = nn.ModuleList()
        for cin, width, last in zip(self.trunk.channels, widths, (False,) * 4 + (True,)):
            second = conv_bn(width, width, 1 if last else 3, kaiming=True)
            self.tops.append(nn.Sequential(conv_bn(cin, width, dilation=2 if last else 1, kaiming=True), second))

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        return [top(feature) for top, feature in zip(self.tops, self.trunk(image))]


def heads(channels: Sequence[int], out: int) -> nn.ModuleList:
    """A 1x1 convolution for each branch; all answers start out alike."""
    made = nn.ModuleList(nn.Conv2d(c, out, 1) for c in channels)
    for name, parameter in made.named_parameters():
        nn.init.normal_(parameter, std=0.01) if name.endswith("weight") else nn.init.zeros_(parameter)
    return made


def summed(scores: Sequence[Float[Tensor, "b k _ _"]]) -> Float[Tensor, "b k h w"]:
    """The scores of all branches, resized to the finest and summed. From coarse to fine, so that each is resized by
    one step only: bilinear doubling, again and again."""
    *finer, total = scores
    for score in reversed(finer):
        if total.shape[-2:] != score.shape[-2:]:
            total = F.interpolate(total, score.shape[-2:], mode="bilinear", align_corners=False)
        total = total + score
    return total


def expected_depth(responses: Float[Tensor, "b n h w"], length: float) -> Float[Tensor, "b h w"]:
    """Eq. (3): the mean of the bins' depths b x `length` metres, b = 1 .. n, under their softmax."""
    depths = length * torch.arange(1, responses.shape[1] + 1, device=responses.device, dtype=torch.float32)
    return torch.einsum("bnhw,n->bhw", responses.float().softmax(1), depths)


class JointCRF(nn.Module):
    """The network of Figure 1 and, by leaving parts out, every row of Table 3.

    Args:
        classes: label classes (C).
        encoder: "table1", the paper's own five branches, or a timm encoder with maps at strides 2 to 32.
        weights: see `Encoder`; for "table1" those of VGG-16.
        widths: channels of the five branches over a timm encoder, shallow to deep.
        bins, bin_length: of depth; 50 of 0.14 m.
        depth: estimates depth.
        crf: "none", "rgb" (Sem-CRF: the kernels of colour and of position) or "rgbd" (Sem-CRF+: also that of depth).
        theta: the kernels' standard deviations, (xy, rgb), (xy, depth), (xy): network pixels, 0-255 colours, metres.
            The paper's are ((160, 3), (50, 0.2), (3,)), in pixels of its 513 x 513 crops.
        crf_weights: what the kernels' matrices start from, times the identity; 7, 4, 3.
        crf_stride: the CRF works on every so many-th network pixel, with colours averaged; 1 is the paper's.
        iterations, train_iterations: of mean field; 10 and 5.

    `forward(image)`: RGB in [0, 1] of any size. Side outputs are the unaries where there is a CRF, so that losses can
    name them: s1 the unaries, s2 the CRF's answer. While the CRF's weights are frozen (stages 1 and 2), training goes
    past it and the unaries are the answer.

    Depth enters the CRF as data: "estimated depths are only taken as extra input modality".
    """

    def __init__(
        self,
        *,
        classes: int = 40,
        encoder: str = TABLE_1,
        weights: str | None = None,
        widths: Sequence[int] = (32, 48, 64, 128, 256),
        bins: int = 50,
        bin_length: float = 0.14,
        depth: bool = True,
        crf: Literal["none", "rgb", "rgbd"] = "none",
        theta: Sequence[Sequence[float | int]] = ((160, 3), (50, 0.2), (3,)),
        crf_weights: Sequence[float | int] = (7, 4, 3),
        crf_stride: int = 1,
        iterations: int = 10,
        train_iterations: int = 5,
    ):
        super().__init__()
        if crf not in ("none", "rgb", "rgbd"):
            raise UserError(f"crf is none, rgb or rgbd, not {crf!r}")
        if crf == "rgbd" and not depth:
            raise UserError("a CRF with a kernel of depth (crf=rgbd) needs a network that estimates depth: depth=True")
        if crf_stride < 1:
            raise UserError(f"crf_stride is at least 1, not {crf_stride}")
        self.branches = TableOne(weights) if encoder == TABLE_1 else Branches(encoder, weights, widths)
        self.loaded = self.branches.loaded
        self.stride = 8 if encoder == TABLE_1 else 32
        self.bin_length, self.crf_stride = bin_length, crf_stride
        self.semantic = heads(self.branches.channels, classes)
        self.depth = heads(self.branches.channels, bins) if depth else None
        self.crf = None
        if crf != "none":
            kernels = paper_kernels(theta, crf_stride)
            chosen = [0, 1, 2] if crf == "rgbd" else [0, 2]
            self.crf = DenseCRF(
                classes,
                kernels=tuple(kernels[i] for i in chosen),
                weights=tuple(float(crf_weights[i]) for i in chosen),
                iterations=iterations,
                train_iterations=train_iterations,
            )

    @property
    def trunk(self) -> nn.Module:
        return self.branches.trunk if isinstance(self.branches, Branches) else self.branches

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What a training stage may train, freeze, clip or give a learning rate of its own."""
        tops = [self.branches.tops] if isinstance(self.branches, Branches) else []
        parts = {"trunk": [self.trunk], "semantic": [*tops, self.semantic], "depth": [self.depth], "crf": [self.crf]}
        return {k: found for k, v in parts.items() if (found := [m for m in v if m is not None])}

    def forward(self, image: Float[Tensor, "b 3 h w"], has_depth: Tensor | None = None) -> Output:
        """`has_depth` is taken for the training loop's sake and changes nothing: the losses mask by pixel."""
        size = image.shape[-2:]
        image = pad_to_multiple(image, self.stride)
        padded = image.shape[-2:]
        features = self.branches(image)
        logits = summed([head(f) for head, f in zip(self.semantic, features)])
        depth = None
        if self.depth is not None:
            depth = expected_depth(summed([head(f) for head, f in zip(self.depth, features)]), self.bin_length)
        sides: tuple[Tensor, ...] = ()
        if self.crf is not None and not (self.training and not self.crf.weights.requires_grad):
            unary = logits
            logits = self.refine(unary, image, depth)
            sides = (covering(unary, size, padded),)
        return Output(
            logits=covering(logits, size, padded),
            depth=None if depth is None else covering(depth, size, padded),
            side_logits=sides,
        )

    def refine(
        self, logits: Float[Tensor, "b k _ _"], image: Float[Tensor, "b 3 h w"], depth: Float[Tensor, "b _ _"] | None
    ) -> Float[Tensor, "b k h2 w2"]:
        """The CRF's answer on every `crf_stride`-th pixel."""
        assert self.crf is not None
        with torch.autocast(image.device.type, enabled=False):
            image = F.avg_pool2d(image.float(), self.crf_stride) if self.crf_stride > 1 else image.float()
            size = image.shape[-2:]
            logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
            if depth is not None:
                depth = F.interpolate(depth.detach()[:, None], size, mode="bilinear", align_corners=False)[:, 0]
            return self.crf(logits, image, depth)


def paper_kernels(theta: Sequence[Sequence[float | int]], stride: int = 1) -> tuple[Kernel, Kernel, Kernel]:
    """The three kernels of Eq. (7) with standard deviations `theta`, on a grid of every `stride`-th pixel.

    Raises:
        UserError: not three, or not (xy, rgb), (xy, depth), (xy).
    """
    if [len(t) for t in theta] != [2, 2, 1]:
        raise UserError(f"theta is ((xy, rgb), (xy, depth), (xy,)), not {theta}")
    values = [(float(a) / stride, *map(float, rest)) for a, *rest in theta]
    colour, distance, place = PAPER_KERNELS
    return (
        replace(colour, xy=values[0][0], rgb=values[0][1]),
        replace(distance, xy=values[1][0], depth=values[1][1]),
        replace(place, xy=values[2][0]),
    )
