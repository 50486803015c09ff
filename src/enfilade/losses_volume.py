"""Training losses of semantic scene completion: pure functions of volumes, and the named terms that recipes weigh.

* Song et al., CVPR 2017 (SSCNet): cross-entropy over the occupied voxels and twice as many empty ones, behind surfaces
* Chen et al., CVPR 2020 (TorchSSC): cross-entropy over the scored voxels; cross-entropy of the sketches; KL divergence
* Li et al., IJCAI 2021 (IMENet), Section 3.6: cross-entropy, "we remove all empty voxels", no balancing

A term takes an `Output`, a `Batch` and, like those of `losses`, class weights and a way to resize, of which it takes no
notice: class weights are counted on pixels, and volumes come at the networks' own size.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from enfilade.errors import unknown
from enfilade.losses import present
from enfilade.types import IGNORE, Batch, Output, full

Empty = Literal["known", "scored", "balanced", "removed"]
BALANCE = 2  # SSCNet's: empty voxels for each occupied one


def training_labels(
    volume: Int64[Tensor, "b x y z"],
    *,
    empty: Empty = "scored",
    scored: Bool[Tensor, "b x y z"] | None = None,
    occluded: Bool[Tensor, "b x y z"] | None = None,
) -> Int64[Tensor, "b x y z"]:
    """The labels with 255 wherever the loss does not look. Of empty voxels (class 0) it looks at

    * known: all whose label is known, free space included;
    * scored: those that are `scored`, which leaves out free space, where the depth map shows that nothing is.
      TorchSSC's mask, and our reading of IMENet;
    * balanced: `occluded` (else `scored`) ones drawn at random, at most twice as many in each volume as it has occupied
      ones, as SSCNet does;
    * removed: none, as IMENet prints it: the network then never learns to leave a voxel empty.

    Of occupied voxels it looks at all that are `scored` ("known": at all). A mask that is None holds everywhere. Draws
    come from torch's global generator. Raises UserError for another way.
    """
    if empty not in get_args(Empty):
        raise unknown("way to treat empty voxels", empty, get_args(Empty))
    labels = volume if scored is None or empty == "known" else volume.where(scored, IGNORE)
    if empty == "removed":
        return labels.where(labels != 0, IGNORE)
    if empty != "balanced":
        return labels
    allowed = scored if occluded is None else occluded
    free = volume == 0 if allowed is None else (volume == 0) & allowed
    wanted = BALANCE * ((labels != 0) & (labels != IGNORE)).flatten(1).sum(1)
    draw = torch.rand(volume.shape, device=volume.device).where(free, 2.0).flatten(1)
    rank = draw.argsort(1).argsort(1).view(volume.shape)
    chosen = free & (rank < wanted.view(-1, 1, 1, 1))
    return labels.where(labels != 0, IGNORE).where(~chosen, 0)


def volume_cross_entropy(
    logits: Float[Tensor, "b k x y z"], labels: Int64[Tensor, "b x y z"], weight: Float[Tensor, "k"] | None = None
) -> Float[Tensor, ""]:
    """Mean over the voxels that are not 255, weighted by class (the mean is over the weights, as `F.cross_entropy` has
    it); 0 where there are none."""
    valid = labels != IGNORE
    if weight is not None:
        valid = valid & (weight[labels.where(valid, 0)] > 0)  # a batch of weight 0 alone would be 0 / 0
    if not valid.any():
        return full(logits).sum() * 0
    # Gathered first: the softmax of 130,000 voxels of which a fifth count is a waste
    return F.cross_entropy(full(logits.movedim(1, -1)[valid]), labels[valid], weight)


def sketch_cross_entropy(logits: Float[Tensor, "b 2 x y z"], truth: Int64[Tensor, "b x y z"]) -> Float[Tensor, ""]:
    """Mean over the voxels that are not 255 of the two-class cross-entropy: of "there" against "not there"."""
    return volume_cross_entropy(logits, truth)


def kl_divergence(mean: Float[Tensor, "b l x y z"], log_variance: Float[Tensor, "b l x y z"]) -> Float[Tensor, ""]:
    """KL(N(mean, variance) || N(0, 1)), averaged over all latent numbers, as released; not their sum."""
    mean, log_variance = full(mean), full(log_variance)
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()


# ---------------------------------------------------------------------------------------------------------------- terms


def labels_of(batch: Batch, empty: Empty) -> Int64[Tensor, "b x y z"]:
    volume = present(batch.volume, "label volumes")
    return training_labels(volume, empty=empty, scored=batch.scored, occluded=batch.occluded)


def with_outside(
    labels: Int64[Tensor, "b x y z"], volume: Int64[Tensor, "b x y z"], tsdf: Float[Tensor, "b 1 _x _y _z"]
) -> Int64[Tensor, "b x y z"]:
    """Training labels, and 0 for voxels of unknown label that are mostly behind surfaces: what lies behind the walls of
    a rendered room is nothing, and unless it is told so, a network says anything there. As many are drawn at random as
    there are labels already, so that they do not drown the room. Draws come from torch's global generator."""
    hidden = F.avg_pool3d((tsdf < 0).float(), tsdf.shape[2] // volume.shape[1])[:, 0] > 0.5
    outside = (volume == IGNORE) & hidden
    share = (labels != IGNORE).sum() / outside.sum().clamp(min=1)
    return labels.where(~outside | (torch.rand(volume.shape, device=volume.device) >= share), 0)


def _volume_outside(output: Output, batch: Batch, weight=None, resize: str = "nearest") -> Tensor:
    volume, tsdf = present(batch.volume, "label volumes"), present(batch.tsdf, "the TSDF")
    labels = with_outside(labels_of(batch, "scored"), volume, tsdf)
    return volume_cross_entropy(present(output.volume_logits, "volume logits"), labels)


def _volume(empty: Empty) -> Callable[..., Tensor]:
    def loss(output: Output, batch: Batch, weight=None, resize: str = "nearest") -> Tensor:
        return volume_cross_entropy(present(output.volume_logits, "volume logits"), labels_of(batch, empty))

    return loss


def _sides(empty: Empty) -> Callable[..., Tensor]:
    def loss(output: Output, batch: Batch, weight=None, resize: str = "nearest") -> Tensor:
        sides, labels = present(output.side_volume_logits or None, "side volumes"), labels_of(batch, empty)
        return torch.stack([volume_cross_entropy(side, labels) for side in sides]).sum()

    return loss


def _sketch(*names: str) -> Callable[..., Tensor]:
    def loss(output: Output, batch: Batch, weight=None, resize: str = "nearest") -> Tensor:
        sketch = present(output.sketch, "a sketch")
        truth = present(sketch.truth, "a sketch in training")
        truth = truth if batch.scored is None else truth.where(batch.scored, IGNORE)
        made = [present(getattr(sketch, name), f"the {name} sketch") for name in names]
        return torch.stack([sketch_cross_entropy(logits, truth) for logits in made]).sum()

    return loss


def _sketch_kl(output: Output, batch: Batch, weight=None, resize: str = "nearest") -> Tensor:
    sketch = present(output.sketch, "a sketch")
    return kl_divergence(present(sketch.mean, "latent codes"), present(sketch.log_variance, "latent codes"))


# TorchSSC's weights: {"volume": 1, "sketch": 1, "sketch_prior": 1.5, "sketch_kl": 2}
VOLUME_TERMS: dict[str, Callable[..., Tensor]] = {
    "volume": _volume("scored"),
    "volume_outside": _volume_outside,
    "volume_known": _volume("known"),
    "volume_balanced": _volume("balanced"),
    "volume_removed": _volume("removed"),
    "side_volume": _sides("scored"),
    "side_volume_known": _sides("known"),
    "side_volume_balanced": _sides("balanced"),
    "side_volume_removed": _sides("removed"),
    "sketch": _sketch("raw", "posterior"),
    "sketch_prior": _sketch("prior"),
    "sketch_kl": _sketch_kl,
}
