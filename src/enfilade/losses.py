"""Training losses: pure functions of tensors, and the named terms that recipes weigh.

A term takes an `Output`, a `Batch` and the class weights, and returns a scalar. Labels are resized to the size of the
logits by nearest neighbour, depth likewise, so that a loss never interpolates over an edge of the truth.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from enfilade.errors import UserError
from enfilade.types import IGNORE, Batch, Output

Weights = Float[Tensor, "k"] | None


def full(x: Tensor) -> Tensor:
    """At least fp32 (autocast hands over bf16); float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a `b h w` map by nearest neighbour (pixel centres aligned)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].to(x.dtype)


def cross_entropy(
    logits: Float[Tensor, "b k h w"], labels: Int64[Tensor, "b _ _"], weight: Weights = None
) -> Float[Tensor, ""]:
    """Mean over labelled pixels, weighted by class (the mean is over the weights, as `F.cross_entropy` has it);
    0 where nothing is labelled."""
    labels = nearest(labels, logits.shape[-2:])
    valid = labels != IGNORE
    if weight is not None:
        valid = valid & (weight[labels.where(valid, 0)] > 0)  # a batch of weight 0 alone would be 0 / 0
    if not valid.any():
        return full(logits).sum() * 0
    return F.cross_entropy(full(logits), labels, weight, ignore_index=IGNORE)


def focal(
    logits: Float[Tensor, "b k h w"], labels: Int64[Tensor, "b _ _"], weight: Weights = None, gamma: float = 2.0
) -> Float[Tensor, ""]:
    """L_s, GAD Eq. (6): -(1 - p)^γ log p of the true class; no α. Mean over labelled pixels.

    # Differs from paper: the mean, not the sum, so that learning rates do not depend on the image size.
    """
    labels = nearest(labels, logits.shape[-2:])
    valid = labels != IGNORE
    log_p = F.log_softmax(full(logits), 1).gather(1, labels.where(valid, 0)[:, None])[:, 0]
    loss = -((1 - log_p.exp()) ** gamma) * log_p
    scale = valid.float() if weight is None else valid * weight[labels.where(valid, 0)]
    return (loss * scale).sum() / scale.sum().clamp(min=1e-6)


def berhu(error: Float[Tensor, "*s"], threshold: Float[Tensor, ""]) -> Float[Tensor, "*s"]:
    """Reverse Huber penalty (GAD Eq. 7): linear up to `threshold` (metres), quadratic beyond."""
    size = error.abs()
    return size.where(size <= threshold, (error.square() + threshold.square()) / (2 * threshold.clamp(min=1e-12)))


def depth_berhu(depth: Float[Tensor, "b h w"], target: Float[Tensor, "b _ _"]) -> Float[Tensor, ""]:
    """L_d, GAD Eq. (7): δ = 0.2 max|d - D*| over the batch; mean over pixels with depth, 0 where there are none.

    # Differs from paper: the mean, not the sum.
    """
    target = nearest(target, depth.shape[-2:])
    error = (full(depth) - target)[target > 0]  # masked before any arithmetic that could make NaN gradients
    if error.numel() == 0:
        return full(depth).sum() * 0
    return berhu(error, 0.2 * error.detach().abs().max()).mean()


def depth_scale_invariant(
    depth: Float[Tensor, "b h w"], target: Float[Tensor, "b _ _"], variance: float = 0.85
) -> Float[Tensor, ""]:
    """Scale-invariant log error (Eigen et al. 2014, Eq. 4), sqrt(mean(g²) - λ mean(g)²) with g = log d - log D*,
    per image, averaged over the images that have depth. λ = `variance`: 0 is the RMSE of logs, 1 forgets the scale."""
    target = nearest(target, depth.shape[-2:])
    terms = []
    for d, t in zip(full(depth), target):
        valid = t > 0
        if valid.any():
            g = d[valid].clamp(min=1e-3).log() - t[valid].log()
            terms.append((g.square().mean() - variance * g.mean().square()).clamp(min=1e-8).sqrt())
    return torch.stack(terms).mean() if terms else full(depth).sum() * 0


def depth_gradient(depth: Float[Tensor, "b h w"], target: Float[Tensor, "b _ _"]) -> Float[Tensor, ""]:
    """Mean `|∇ log d - ∇ log D*|` over neighbouring pixels that both have depth, at strides 1, 2 and 4: edges of depth
    where the truth has them (the multi-scale gradient matching of Li & Snavely 2018, Section 4)."""
    target = nearest(target, depth.shape[-2:])
    valid = target > 0
    g = torch.where(valid, full(depth).clamp(min=1e-3).log() - target.clamp(min=1e-3).log(), 0.0)
    total, count = full(depth).sum() * 0, 0
    for step in (1, 2, 4):
        for dim in (1, 2):
            n = g.shape[dim] - step
            if n <= 0:
                continue
            both = valid.narrow(dim, step, n) & valid.narrow(dim, 0, n)
            difference = (g.narrow(dim, step, n) - g.narrow(dim, 0, n)).abs()
            total = total + (difference * both).sum() / both.sum().clamp(min=1)
            count += 1
    return total / max(count, 1)


def present(value, what: str):
    """`value`, or the sentence that a recipe's loss has nothing to work on."""
    if value is None:
        raise UserError(f"this recipe's losses need {what}, which the model or the data lacks: drop the term")
    return value


def _semantic(term) -> Callable[[Output, Batch, Weights], Tensor]:
    def loss(output: Output, batch: Batch, weight: Weights) -> Tensor:
        return term(present(output.logits, "label logits"), present(batch.labels, "labels"), weight)

    return loss


def _sides(term) -> Callable[[Output, Batch, Weights], Tensor]:
    def loss(output: Output, batch: Batch, weight: Weights) -> Tensor:
        labels = present(batch.labels, "labels")
        sides = present(output.side_logits or None, "side outputs")
        return torch.stack([term(side, labels, weight) for side in sides]).sum()  # Σ_k L_sk, Eq. (8)

    return loss


def _depth(term) -> Callable[[Output, Batch, Weights], Tensor]:
    def loss(output: Output, batch: Batch, weight: Weights) -> Tensor:
        depth = present(output.depth, "predicted depth")
        return depth.sum() * 0 if batch.depth is None else term(depth, batch.depth)

    return loss


TERMS: dict[str, Callable[[Output, Batch, Weights], Tensor]] = {
    "cross_entropy": _semantic(cross_entropy),
    "focal": _semantic(focal),
    "side_cross_entropy": _sides(cross_entropy),
    "side_focal": _sides(focal),
    "depth_berhu": _depth(depth_berhu),
    "depth_scale_invariant": _depth(depth_scale_invariant),
    "depth_gradient": _depth(depth_gradient),
}


def objective(
    output: Output, batch: Batch, terms: dict[str, float], weight: Weights = None
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The weighted sum of named terms (GAD Eq. 8: {"focal": 1, "depth_berhu": 1, "side_focal": 1}), and each."""
    values = {name: TERMS[name](output, batch, weight) for name in terms}
    total = torch.stack([factor * values[name] for name, factor in terms.items()]).sum()
    return total, {name: value.detach() for name, value in values.items()}
