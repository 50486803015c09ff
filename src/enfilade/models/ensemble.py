"""Several trained networks as one: what `predict --also` averages, in one model file.

Networks that learned apart err apart, so that together they are better than any of them. As one network with one file
they can be served, exported and published as any other model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from enfilade import checkpoint
from enfilade.errors import UserError
from enfilade.tta import LEAST
from enfilade.types import Output, full


class Ensemble(nn.Module):
    """Networks that see the same picture; labels by the geometric mean of their probabilities, depth by the mean.

    Args:
        members: of each network the "model" (a name in `checkpoint.MODELS`), its "arguments" and, for one whose
            canonical camera is another than the first's, the factor "depth" that brings its metres to the first's.

    `forward(image)`: RGB in [0, 1]. Answers lie on the grid of the first that has them; what one network lacks, the
    others answer. The logits are the mean of log-probabilities.
    """

    def __init__(self, *, members: Sequence[Mapping[str, Any]]):
        super().__init__()
        if len(members) < 2:
            raise UserError(f"an ensemble has two members or more, not {len(members)}")
        # A file's arguments may not name another file to read
        built = (checkpoint.build(m["model"], checkpoint.without_files(m["arguments"])) for m in members)
        self.networks = nn.ModuleList(built)
        self.factors = [float(m.get("depth", 1.0)) for m in members]

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Output:
        outputs = [network(image) for network in self.networks]
        scores = [F.log_softmax(full(o.logits), 1) for o in outputs if o.logits is not None]
        depth = mean([f * full(o.depth)[:, None] for o, f in zip(outputs, self.factors) if o.depth is not None])
        return Output(
            logits=mean([s.clamp(min=math.log(LEAST)) for s in scores]),
            depth=None if depth is None else depth[:, 0],
        )


def mean(maps: Sequence[Float[Tensor, "b k _ _"]]) -> Float[Tensor, "b k h w"] | None:
    """The mean on the grid of the first; None of no maps."""
    if not maps:
        return None
    size = maps[0].shape[-2:]
    rest = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:]]
    return torch.stack([maps[0], *rest]).mean(0)
