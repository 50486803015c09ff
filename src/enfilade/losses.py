"""Training losses: pure functions of tensors, and the named terms that recipes weigh.

A term takes an `Output`, a `Batch`, the class weights and the way to resize labels, and returns a scalar. Labels are
resized to the size of the logits by nearest neighbour or by the vote of an area, depth by nearest neighbour, so that a
loss never interpolates over an edge of the truth.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from enfilade.errors import UserError, unknown
from enfilade.ops.regions import region_means
from enfilade.types import IGNORE, Batch, Output, full

Weights = Float[Tensor, "k"] | None
Term = Callable[..., Tensor]  # of (output, batch, class weights, resize="nearest")


def cell(size: Sequence[int], coarse: Sequence[int]) -> int | None:
    """The stride of a map of `coarse` positions over an image of `size`: each position covers a square of that side,
    the last row and column perhaps beyond the image. None if no power of two fits."""
    h, w = size
    return next((s for s in (1, 2, 4, 8, 16, 32, 64) if (-(-h // s), -(-w // s)) == tuple(coarse)), None)


def nearest(x: Shaped[Tensor, "b _ _"], size: Sequence[int], outside: int = 0) -> Shaped[Tensor, "b h w"]:
    """Resize a map of labels or depth by nearest neighbour (pixel centres aligned). Where a coarse map's cells reach
    beyond the image, what lies there is `outside`."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if stride := cell(x.shape[-2:], size):
        x = cover(x, size, stride, outside)
    return F.interpolate(x[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].to(x.dtype)


def cover(x: Shaped[Tensor, "b _ _"], size: Sequence[int], stride: int, outside: int) -> Shaped[Tensor, "b _ _"]:
    """`x`, continued by `outside` to whole cells."""
    (h, w), (rows, columns) = x.shape[-2:], size
    return F.pad(x, (0, columns * stride - w, 0, rows * stride - h), value=outside)


def majority(labels: Int64[Tensor, "b _ _"], size: Sequence[int]) -> Int64[Tensor, "b h w"]:
    """Resize a label map by area vote: a cell has the label of most of its pixels. Void votes as well; a tie goes to
    the lowest class, and to void last. Sizes that are no whole cells of a power of two are resized by `nearest`."""
    stride = cell(labels.shape[-2:], size)
    if stride is None or stride == 1:
        return nearest(labels, size, IGNORE)
    labels = cover(labels, size, stride, IGNORE)
    (b, _, _), (rows, columns) = labels.shape, size
    classes = int(labels.where(labels != IGNORE, 0).max()) + 2  # void is the last
    votes = labels.where(labels != IGNORE, classes - 1).view(b, rows, stride, columns, stride).movedim(3, 2)
    at = torch.arange(b * rows * columns, device=labels.device).repeat_interleave(stride * stride)
    counts = torch.bincount(at * classes + votes.reshape(-1), minlength=b * rows * columns * classes)
    # arg max is free to choose among equals: count n of class c is ranked by n, then by the lower c
    order = torch.arange(classes, device=labels.device)
    chosen = (counts.view(-1, classes) * classes - order).argmax(1).view(b, rows, columns)
    return chosen.where(chosen != classes - 1, IGNORE)


RESIZE = {"nearest": partial(nearest, outside=IGNORE), "majority": majority}


def cross_entropy(
    logits: Float[Tensor, "b k h w"], labels: Int64[Tensor, "b _ _"], weight: Weights = None
) -> Float[Tensor, ""]:
    """Mean over labelled pixels, weighted by class (the mean is over the weights, as `F.cross_entropy` has it);
    0 where nothing is labelled."""
    labels = nearest(labels, logits.shape[-2:], IGNORE)
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
    labels = nearest(labels, logits.shape[-2:], IGNORE)
    valid = labels != IGNORE
    log_p = F.log_softmax(full(logits), 1).gather(1, labels.where(valid, 0)[:, None])[:, 0]
    loss = -((1 - log_p.exp()) ** gamma) * log_p
    scale = valid.float() if weight is None else valid * weight[labels.where(valid, 0)]
    return (loss * scale).sum() / scale.sum().clamp(min=1e-6)


LOVASZ_PIXELS = 2**16


def lovasz(
    logits: Float[Tensor, "b k h w"], labels: Int64[Tensor, "b _ _"], weight: Weights = None
) -> Float[Tensor, ""]:
    """Lovász-softmax (Berman et al. 2018, Eq. 11): the convex closure of 1 - IoU, averaged over the classes that the
    batch shows. It rewards what mIoU counts, a rare class as much as a common one, so that `weight` only leaves out
    classes of weight 0. Of more than 65536 labelled pixels, that many are taken, evenly spread: each class sorts them
    all, which at full resolution would take as long as the network."""
    labels = nearest(labels, logits.shape[-2:], IGNORE)
    valid = labels != IGNORE
    at = valid.view(-1).nonzero()[:, 0]
    if len(at) > LOVASZ_PIXELS:
        at = at[torch.arange(LOVASZ_PIXELS, device=at.device) * len(at) // LOVASZ_PIXELS]
    truth = labels.reshape(-1)[at]
    probabilities = F.softmax(full(logits.movedim(1, -1).reshape(-1, logits.shape[1])[at]), 1)
    terms = []
    for c in truth.unique().tolist():
        if weight is not None and weight[c] == 0:
            continue
        of_class = (truth == c).to(probabilities.dtype)
        errors, order = (of_class - probabilities[:, c]).abs().sort(descending=True)
        terms.append(errors @ jaccard_gradient(of_class[order]))
    return torch.stack(terms).mean() if terms else full(logits).sum() * 0


def jaccard_gradient(truth: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """By how much 1 - IoU grows with each further error, errors sorted from the largest (Berman et al., Alg. 1)."""
    total = truth.sum()
    jaccard = 1 - (total - truth.cumsum(0)) / (total + (1 - truth).cumsum(0))
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def distillation(
    logits: Float[Tensor, "b k h w"],
    taught: Float[Tensor, "b k _ _"],
    weight: Weights = None,
    temperature: float = 2.0,
) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence of the teachers' probabilities from the student's, both softened by `temperature`
    T, times T² (Hinton et al. 2015, Section 2), the mean over all pixels, unlabelled ones too. `taught` are
    log-probabilities. Of `weight`, only 0 counts: such classes are left out on both sides, as nobody learned them."""
    told = full(taught)
    if tuple(told.shape[-2:]) != tuple(logits.shape[-2:]):
        told = F.interpolate(told, logits.shape[-2:], mode="bilinear", align_corners=False)
    logits = full(logits)
    if weight is not None:
        logits, told = logits[:, weight > 0], told[:, weight > 0]
    student, teacher = F.log_softmax(logits / temperature, 1), F.log_softmax(told / temperature, 1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1).mean()


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


def depth_pairwise(
    depth: Float[Tensor, "b h w"], target: Float[Tensor, "b _ _"], far: float = 7.0, step: float = 0.14
) -> Float[Tensor, ""]:
    """L_depth of Mousavian et al., Eq. (4): over all pairs of pixels, the mean squared difference of their log depths'
    differences, in O(n): with D = log d - log d*, it is 2 (mean(D²) - mean(D)²). Per image, averaged over the images
    that have depth. The truth is clipped at `far` metres and rounded to multiples of `step`, as the paper trains."""
    target = nearest(target, depth.shape[-2:])
    terms = []
    for d, t in zip(full(depth), target):
        valid = t > 0
        if valid.any():
            rounded = (t[valid].clamp(max=far) / step).round().clamp(min=1) * step
            terms.append(2 * (d[valid].clamp(min=1e-3).log() - rounded.log()).var(correction=0))
    return torch.stack(terms).mean() if terms else full(depth).sum() * 0


def depth_l2(depth: Float[Tensor, "b h w"], target: Float[Tensor, "b _ _"], log: bool = False) -> Float[Tensor, ""]:
    """L_2 of RSN, Eq. (1): the mean squared error over pixels with depth, of depths or of their logarithms."""
    target = nearest(target, depth.shape[-2:])
    valid = target > 0
    if not valid.any():
        return full(depth).sum() * 0
    return depth_error(full(depth)[valid], target[valid], "l2", log).mean()


def depth_region(
    depth: Float[Tensor, "b h w"],
    target: Float[Tensor, "b _h _w"],
    regions: Int64[Tensor, "b _h _w"],
    norm: Literal["l1", "l2"] = "l2",
    log: bool = False,
) -> Float[Tensor, ""]:
    """L_r of RSN, Eq. (2): the error's mean inside each region, averaged over the regions of an image, so that a cup
    counts as much as a wall. Images without regions with depth are left out.

    # Differs from paper: the printed form has neither a square nor an absolute value; `norm` is one of them.
    """
    target, regions = nearest(target, depth.shape[-2:]), nearest(regions, depth.shape[-2:])
    valid = target > 0
    error = depth_error(full(depth), target.where(valid, 1.0), norm, log)
    means, pixels = region_means(error, regions.where(valid, 0))
    count = (pixels > 0).sum(1)
    return (means.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def depth_error(depth: Tensor, target: Tensor, norm: str, log: bool) -> Tensor:
    """The squared or absolute error of depths in metres, or of their natural logarithms."""
    error = depth.clamp(min=1e-3).log() - target.log() if log else depth - target
    return error.square() if norm == "l2" else error.abs()


def cross_entropy_sum(
    logits: Float[Tensor, "b k h w"], labels: Int64[Tensor, "b _ _"], weight: Weights = None
) -> Float[Tensor, ""]:
    """The sum over labelled pixels, for published recipes whose learning rates count on it (Mousavian et al. 2016)."""
    labels = nearest(labels, logits.shape[-2:], IGNORE)
    return F.cross_entropy(full(logits), labels, weight, ignore_index=IGNORE, reduction="sum")


def present(value, what: str):
    """`value`, or the sentence that a recipe's loss has nothing to work on."""
    if value is None:
        raise UserError(f"this recipe's losses need {what}, which the model or the data lacks: drop the term")
    return value


def _semantic(term) -> Term:
    def loss(output: Output, batch: Batch, weight: Weights, resize: str = "nearest") -> Tensor:
        logits, labels = present(output.logits, "label logits"), present(batch.labels, "labels")
        return term(logits, RESIZE[resize](labels, logits.shape[-2:]), weight)

    return loss


def _sides(term) -> Term:
    def loss(output: Output, batch: Batch, weight: Weights, resize: str = "nearest") -> Tensor:
        labels = present(batch.labels, "labels")
        sides = present(output.side_logits or None, "side outputs")
        values = [term(side, RESIZE[resize](labels, side.shape[-2:]), weight) for side in sides]
        return torch.stack(values).sum()  # Σ_k L_sk, Eq. (8)

    return loss


def _depth(term) -> Term:
    def loss(output: Output, batch: Batch, weight: Weights, resize: str = "nearest") -> Tensor:
        depth = present(output.depth, "predicted depth")
        return depth.sum() * 0 if batch.depth is None else term(depth, batch.depth)

    return loss


def _distillation(output: Output, batch: Batch, weight: Weights, resize: str = "nearest") -> Tensor:
    return distillation(present(output.logits, "label logits"), present(batch.taught, "teachers in the stage"), weight)


NORMS: tuple[Literal["l1", "l2"], ...] = ("l2", "l1")


def _region(target: str, norm: Literal["l1", "l2"], log: bool) -> Term:
    def loss(output: Output, batch: Batch, weight: Weights, resize: str = "nearest") -> Tensor:
        truth, regions = present(getattr(batch, target), target), present(batch.regions, "regions")
        return depth_region(present(output.depth, "predicted depth"), truth, regions, norm, log)

    return loss


TERMS: dict[str, Term] = {
    "cross_entropy": _semantic(cross_entropy),
    "cross_entropy_sum": _semantic(cross_entropy_sum),
    "focal": _semantic(focal),
    "lovasz": _semantic(lovasz),
    "distillation": _distillation,
    "side_cross_entropy": _sides(cross_entropy),
    "side_focal": _sides(focal),
    "depth_berhu": _depth(depth_berhu),
    "depth_scale_invariant": _depth(depth_scale_invariant),
    "depth_gradient": _depth(depth_gradient),
    "depth_pairwise": _depth(depth_pairwise),
    "depth_l2": _depth(depth_l2),
    "depth_l2_log": _depth(partial(depth_l2, log=True)),
    # L_r: region_l2, region_l1, region_l2_log, region_l1_log; and support_..., whose truth is the region support
    **{
        f"{kind}_{norm}{'_log' * log}": _region(target, norm, log)
        for kind, target in (("region", "depth"), ("support", "support"))
        for norm in NORMS
        for log in (False, True)
    },
}


def resolve(name: str) -> tuple[Term, str]:
    """The term called `name`, and the map that it is for: "cross_entropy/s1" is of the coarsest of a network's label
    maps, "cross_entropy/s6" of the sixth; "region_l2/d1" is of its first depth map; without a map ("") it is of the
    network's answer.

    Raises:
        UserError: no such term, or a map that is not called s1, s2, ... or d1, d2, ...
    """
    from enfilade.losses_volume import VOLUME_TERMS

    term, slash, which = name.partition("/")
    terms = TERMS | VOLUME_TERMS
    if term not in terms:
        raise unknown("loss term", term, terms)
    if not slash:
        return terms[term], ""
    if not re.fullmatch(r"[sd][1-9]\d*", which):
        raise UserError(
            f"loss term {name!r}: after the slash comes a label map, s1 for the coarsest, or a depth map, d1 for the "
            f"first, not {which!r}"
        )
    return terms[term], which


def at_map(output: Output, which: str) -> Output:
    """The output whose answer is one of its maps: label map "s1" is the coarsest, depth map "d1" the first; all of it
    for ""."""
    if not which:
        return output
    kind, number = which[0], int(which[1:])
    if kind == "s":
        maps = (*output.side_logits, present(output.logits, "label logits"))
    else:
        maps = (*output.side_depths, present(output.depth, "predicted depth"))
    if number > len(maps):
        raise UserError(
            f"a loss is for {'label' if kind == 's' else 'depth'} map {which}, but this model makes {len(maps)}"
        )
    if kind == "s":
        return replace(output, logits=maps[number - 1], side_logits=())
    return replace(output, depth=maps[number - 1], side_depths=())


def objective(
    output: Output, batch: Batch, terms: dict[str, float], weight: Weights = None, resize: str = "nearest"
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The weighted sum of named terms, and each. GAD Eq. (8) is {"focal": 1, "depth_berhu": 1, "side_focal": 1}; deep
    supervision names its scales (LRN Section 4): {"cross_entropy/s1": 1, ..., "cross_entropy/s6": 1}. `resize`, a key
    of `RESIZE`, is how the truth is brought to a map's size."""
    values = {}
    for name in terms:
        term, which = resolve(name)
        values[name] = term(at_map(output, which), batch, weight, resize)
    total = torch.stack([factor * values[name] for name, factor in terms.items()]).sum()
    return total, {name: value.detach() for name, value in values.items()}
