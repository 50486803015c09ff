"""Geometry-aware distillation for indoor semantic segmentation.

Jiao, Wei, Jie, Shi, Lau, Huang, CVPR 2019 ("GAD" below). One encoder; one decoder for labels, one for depth; the depth
decoder's features are added to the label decoder's (FeatProp), guide a global propagation of label features (GAP),
and the result meets the encoder's features again, deep to shallow (SPF). At test time it needs one RGB image.

The blocks come first, in the order in which data meets them; the model is at the end.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from enfilade.errors import UserError
from enfilade.models.encoders import Encoder, SideBySide, covering, pad_to_multiple
from enfilade.models.layers import conv_bn
from enfilade.types import Output, full

Affinity = Literal["dot", "softmax", "window"]
Fusion = Literal["none", "vanilla", "gap"]


def resize(x: Float[Tensor, "b c _ _"], size) -> Float[Tensor, "b c h w"]:
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class UpConv(nn.Module):
    """A 5x5 convolution of the zero-stuffed map of double size (Laina et al. 2016, Section 3.2), cheaply.

    Three of four values under the 5x5 window are zeros, so each of the four output phases sees only a 3x3, 3x2, 2x3
    or 2x2 part of it. One 3x3 convolution to 4 x `cout` channels holds the four (the smaller ones padded by taps that
    are learned too: 36 taps for 25), and a pixel shuffle interleaves them. On matrix units a single dense convolution
    is faster than four small ones.
    """

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.conv = nn.Conv2d(cin, 4 * cout, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(cout)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.bn(F.pixel_shuffle(self.conv(x), 2))


class UpProjection(nn.Module):
    """Up-projection block (Laina et al. 2016, Figure 2d): twice the size, with a projected shortcut."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.up = UpConv(cin, cout)
        self.shortcut = UpConv(cin, cout)
        self.refine = conv_bn(cout, cout, 3, relu=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return F.relu(self.refine(F.relu(self.up(x))) + self.shortcut(x))


class Decoder(nn.Module):
    """Four up-projections. The coarser three outputs are resized and added to the last, "different scale features are
    also propagated to enrich the final layer output" (GAD Section 3.3)."""

    def __init__(self, cin: int, widths: tuple[int, ...], embedding: int):
        super().__init__()
        pairs = zip((cin, *widths), widths)
        self.blocks = nn.ModuleList(UpProjection(a, b) for a, b in pairs)
        self.enrich = nn.ModuleList(conv_bn(w, embedding, 3) for w in widths[:-1])
        self.last = conv_bn(widths[-1], embedding, 1) if widths[-1] != embedding else nn.Identity()

    def forward(
        self, x: Float[Tensor, "b c h w"], added: list[Float[Tensor, "b _ _ _"]] | None = None
    ) -> tuple[Float[Tensor, "b e _ _"], list[Float[Tensor, "b _ _ _"]]]:
        """Returns the embedding and each level's output. `added` are features of the other decoder (FeatProp)."""
        levels = []
        for k, block in enumerate(self.blocks):
            x = block(x)
            levels.append(x)
            if added is not None and k < len(self.blocks) - 1:
                x = x + added[k]
        size = levels[-1].shape[-2:]
        embedding = self.last(levels[-1])
        for conv, level in zip(self.enrich, levels):
            embedding = embedding + conv(resize(level, size))
        return embedding, levels


class GeometryAwarePropagation(nn.Module):
    """GAP, Eq. (3)-(5): every position gathers label features from positions of similar geometry.

    Kinds of `affinity`:

    * dot: Eq. (3) over all positions in O(n) time and memory. W_ij = η_i . φ_j is linear, so the sums over j are taken
      once: q_i = η_i (Σ_j φ_j δ_jᵀ) / (η_i . Σ_j φ_j). η and φ pass a softplus: W stays positive.
    * softmax: the released code's form, weights softmax_j(η_i . φ_j), by attention without an n x n matrix.
    * window: Eq. (3) with N(i) a `window` x `window` neighbourhood.
    """

    def __init__(self, channels: int, inner: int = 32, affinity: Affinity = "dot", window: int = 9):
        super().__init__()
        if affinity not in ("dot", "softmax", "window"):
            raise ValueError(f"affinity is 'dot', 'softmax' or 'window', not {affinity!r}")
        if window % 2 == 0:
            raise ValueError(f"a window has an odd side, so that it has a centre; {window} has none")
        self.affinity, self.window = affinity, window
        self.eta = conv_bn(channels, inner, 1, relu=False)
        self.phi = conv_bn(channels, inner, 1, relu=False)
        self.delta = conv_bn(channels, inner, 1, relu=False)
        self.out = conv_bn(inner, channels, 1, relu=False)

    def forward(self, p: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        eta, phi, delta = self.eta(embedding), self.phi(embedding), self.delta(p)
        propagate = {"dot": propagate_dot, "softmax": propagate_softmax, "window": self._window}[self.affinity]
        return self.out(propagate(eta, phi, delta)) + p  # Eq. (5)

    def _window(self, eta: Tensor, phi: Tensor, delta: Tensor) -> Tensor:
        return propagate_window(eta, phi, delta, self.window)


def propagate_dot(
    eta: Float[Tensor, "b m h w"], phi: Float[Tensor, "b m h w"], delta: Float[Tensor, "b d h w"]
) -> Float[Tensor, "b d h w"]:
    """Eq. (3) with W_ij = softplus(η_i) . softplus(φ_j), all positions, O(n)."""
    with torch.autocast(eta.device.type, enabled=False):  # sums over n positions need fp32
        e, f = F.softplus(full(eta)).flatten(2), F.softplus(full(phi)).flatten(2)
        d = full(delta).flatten(2)
        n = f.shape[-1]
        context = torch.einsum("bmn,bdn->bmd", f, d) / n  # Σ_j φ_j δ_jᵀ; the 1/n cancels, and keeps fp32 exact
        norm = torch.einsum("bmn,bm->bn", e, f.mean(-1))
        q = torch.einsum("bmn,bmd->bdn", e, context) / norm[:, None]
    return q.view_as(delta)


def propagate_reference(
    eta: Float[Tensor, "b m h w"], phi: Float[Tensor, "b m h w"], delta: Float[Tensor, "b d h w"]
) -> Float[Tensor, "b d h w"]:
    """`propagate_dot` as Eq. (3) is written: the n x n matrix W."""
    e, f, d = F.softplus(eta).flatten(2), F.softplus(phi).flatten(2), delta.flatten(2)
    weights = e.transpose(1, 2) @ f  # W_ij
    q = d @ weights.transpose(1, 2) / weights.sum(2)[:, None]
    return q.view_as(delta)


def propagate_softmax(
    eta: Float[Tensor, "b m h w"], phi: Float[Tensor, "b m h w"], delta: Float[Tensor, "b d h w"]
) -> Float[Tensor, "b d h w"]:
    """Weights softmax over j of η_i . φ_j, as the released inference code has them."""
    q, k, v = (x.flatten(2).transpose(1, 2)[:, None].contiguous() for x in (eta, phi, delta))
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return out[:, 0].transpose(1, 2).reshape(delta.shape)


def propagate_window(
    eta: Float[Tensor, "b m h w"], phi: Float[Tensor, "b m h w"], delta: Float[Tensor, "b d h w"], window: int
) -> Float[Tensor, "b d h w"]:
    """Eq. (3) with the positive W of `propagate_dot` over a window; outside the image there are no neighbours.

    Because W is linear in φ, the window sums are box filters of φ_m δ_d and of φ_m, again without any n x k² matrix.
    """
    e, f, d = F.softplus(full(eta)), F.softplus(full(phi)), full(delta)

    def box(x):
        return F.avg_pool2d(x, window, stride=1, padding=window // 2, count_include_pad=True)

    norm = (e * box(f)).sum(1, keepdim=True)
    q = torch.zeros_like(d)
    for eta_m, phi_m in zip(e.split(1, 1), f.split(1, 1)):
        q = q + eta_m * box(phi_m * d)
    return q / norm


class VanillaFusion(nn.Module):
    """VanConv (Figure 3, bottom): the ablation's plain alternative to GAP."""

    def __init__(self, channels: int):
        super().__init__()
        self.fuse = nn.Sequential(conv_bn(2 * channels, channels, 3), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, p: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.fuse(torch.cat([p, embedding], 1))


class SkipPyramidFusion(nn.Module):
    """SPF block (Figure 4): meets one encoder level, hands a feature to the next block and a label map to the loss."""

    def __init__(self, cin: int, skip: int, channels: int, classes: int):
        super().__init__()
        self.reduce = conv_bn(skip, channels, 1)
        self.fuse = conv_bn(cin + channels, channels, 3)
        self.side = nn.Conv2d(channels, classes, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "b c _ _"], skip: Float[Tensor, "b s h w"]
    ) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, "b k h w"]]:
        x = self.fuse(torch.cat([resize(x, skip.shape[-2:]), self.reduce(skip)], 1))
        return x, self.side(x)


class GAD(nn.Module):
    """The network of GAD Figure 2, and every row of its ablation by leaving parts out.

    Args:
        classes: label classes.
        encoder, weights: see `Encoder`.
        encoders: so many of them side by side (`SideBySide`); the paper has one.
        bottleneck: channels after the 1x1 convolution on the trunk (paper: 1024).
        widths: the decoders' four blocks (paper: 512, 256, 128, 64).
        embedding: channels of the two decoders' final features and of GAP and SPF (paper: 64).
        depth: has a depth decoder (DepEm). Without it there is neither FeatProp nor fusion.
        propagate: FeatProp.
        fusion: "gap", "vanilla" (VanConv) or "none".
        affinity, window: see `GeometryAwarePropagation`.
        skip: has the SPF blocks.
        hha: takes the HHA image as three more input channels (the row sem + L_s + HHA).
        dropout: of the distilled feature's channels; 0 in the paper.
        context: dilation of a 3x3 convolution that takes the place of the 1x1 on the trunk; 0 leaves the paper's.
        average: the first SPF block takes the mean of the GAP output over each of its cells; otherwise bilinear
            samples, which leave most positions unseen.
        spf_widths: channels of the SPF blocks, deep to shallow, one for each level of the encoder that they meet; None
            is four of `embedding`.

    `forward(image, hha=None, has_depth=None)`: RGB in [0, 1] of any size. With SPF the logits have the size of the last
    level that it meets (a quarter of the image with four blocks), without it the decoders' (a half). `has_depth` marks
    the samples with depth supervision; from the others the depth decoder gets no gradient (GAD Section 4.5).
    """

    def __init__(
        self,
        *,
        classes: int = 40,
        encoder: str = "resnet50",
        weights: str | None = None,
        encoders: int = 1,
        bottleneck: int = 1024,
        widths: Sequence[int] = (512, 256, 128, 64),
        embedding: int = 64,
        depth: bool = True,
        propagate: bool = True,
        fusion: Fusion = "gap",
        affinity: Affinity = "dot",
        window: int = 9,
        skip: bool = True,
        hha: bool = False,
        dropout: float = 0.0,
        context: int = 0,
        average: bool = False,
        spf_widths: Sequence[int] | None = None,
    ):
        super().__init__()
        self.uses = ("hha",) if hha else ()
        if encoders < 1:
            raise UserError(f"encoders is how many there are side by side, 1 or more, not {encoders}")
        maps = 6 if hha else 3
        if encoders == 1:
            self.trunk = Encoder(encoder, weights=weights, in_channels=maps)
        else:
            self.trunk = SideBySide(encoder, count=encoders, weights=weights, in_channels=maps)
        self.squeeze = conv_bn(
            self.trunk.channels[-1], bottleneck, 3 if context else 1, relu=False, dilation=context or 1
        )
        self.semantic = Decoder(bottleneck, tuple(widths), embedding)
        self.classifier = nn.Conv2d(embedding, classes, 3, padding=1)
        self.propagate = propagate and depth
        self.average = 2 ** len(widths) if average else 1
        self.depth = Decoder(bottleneck, tuple(widths), embedding) if depth else None
        self.depth_head = nn.Conv2d(embedding, 1, 3, padding=1) if depth else None
        if not depth or fusion == "none":
            self.fusion = None
        elif fusion == "gap":
            self.fusion = GeometryAwarePropagation(embedding, affinity=affinity, window=window)
        elif fusion == "vanilla":
            self.fusion = VanillaFusion(embedding)
        else:
            raise ValueError(f"fusion is 'gap', 'vanilla' or 'none', not {fusion!r}")
        levels = self.trunk.channels[::-1]  # the deepest first
        spf_widths = tuple(spf_widths or [embedding] * 4)
        if len(spf_widths) > len(levels):
            raise UserError(
                f"each SPF block meets a level of the encoder, and {encoder} has {len(levels)}: give at most so many "
                f"spf_widths, not {len(spf_widths)}"
            )
        blocks = zip((embedding, *spf_widths), levels, spf_widths)
        self.spf = nn.ModuleList(SkipPyramidFusion(*block, classes) for block in blocks) if skip else None
        self.dropout = nn.Dropout2d(dropout)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("trunk."):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # "initialized by the method in [15]"
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("classifier.weight", "depth_head.weight", "side.weight")):
                nn.init.normal_(parameter, std=0.01)  # all classes start out alike
            elif name == "depth_head.bias":
                # softplus of this is about 2.7 m, the middle of a room: berHu's threshold starts out sensible
                nn.init.constant_(parameter, 2.6)

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What a training stage may train, freeze, clip or give a learning rate of its own."""
        parts = {
            "trunk": [self.trunk],
            "semantic": [self.squeeze, self.semantic, self.classifier],
            "depth": [self.depth, self.depth_head],
            "fusion": [self.fusion],
            "spf": [self.spf],
        }
        return {k: [m for m in v if m is not None] for k, v in parts.items() if v[0] is not None}

    def forward(
        self,
        image: Float[Tensor, "b 3 h w"],
        hha: Float[Tensor, "b 3 h w"] | None = None,
        has_depth: Bool[Tensor, "b"] | None = None,
    ) -> Output:
        if self.uses:
            if hha is None:
                raise ValueError("this GAD was trained with HHA input: give hha (see enfilade.ops.hha)")
            image = torch.cat([image, hha], 1)
        size = image.shape[-2:]
        image = pad_to_multiple(image, self.trunk.strides[-1])  # so that every level covers the same area exactly
        features = self.trunk(image)
        x = self.squeeze(features[-1])

        depth = embedding = levels = None
        if self.depth is not None and self.depth_head is not None:
            embedding, levels = self.depth(x)
            depth = F.softplus(self.depth_head(embedding)[:, 0].float())
            if has_depth is not None and not bool(has_depth.all()):
                known = has_depth.view(-1, 1, 1, 1)
                embedding, *levels = [torch.where(known, f, f.detach()) for f in (embedding, *levels)]

        p, _ = self.semantic(x, levels if self.propagate else None)
        if self.fusion is not None:
            p = self.fusion(p, embedding)
        p = self.dropout(p)
        logits = self.classifier(p)
        sides = []
        if self.spf is not None:
            p = F.avg_pool2d(p, self.average) if self.average > 1 else p
            for block, skip in zip(self.spf, features[::-1]):
                p, side = block(p, skip)
                sides.append(side)
            # "The score map from the bottom SPF block is utilized for the final semantic label prediction"
            logits, sides = sides[-1], [logits, *sides[:-1]]

        padded = image.shape[-2:]
        return Output(
            logits=covering(logits, size, padded),
            depth=None if depth is None else covering(depth, size, padded),
            side_logits=tuple(covering(side, size, padded) for side in sides),
        )
