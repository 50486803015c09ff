"""Distillation: networks that have been trained before say what they see, and a new one learns to say the same.

A teacher sees the very crop that the student sees, mirrored, zoomed and coloured as it is ("consistent teaching",
Beyer et al., CVPR 2022): what it answers for a picture that it was never shown tells more than the label that both
were shown. Several teachers answer together, by the geometric mean of their probabilities.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from enfilade import checkpoint
from enfilade.errors import UserError
from enfilade.models.encoders import ceil_div
from enfilade.stages import Recipe


class Teachers:
    """The networks that a stage names as its `teachers`, frozen.

    Args:
        names: shipped models, model files or run folders, of labels and of RGB alone.
        recipe: the student's: its label space is the teachers' too, and its `scale` says how to resize a crop to
            the scale that a teacher was trained at.

    Raises:
        UserError: no such model; one of another label space, or that takes more than RGB.
    """

    def __init__(self, names: Sequence[str], recipe: Recipe, device: str | torch.device = "cpu"):
        self.networks = []
        for name in names:
            loaded = checkpoint.load(name, device)
            space = loaded.meta.get("space", "nyu40")
            if space != recipe.space:
                raise UserError(f"teacher {name} speaks of {space}, the recipe of {recipe.space}: take another teacher")
            if uses := getattr(loaded.network, "uses", ()):
                raise UserError(f"teacher {name} takes {uses[0]} beside RGB: take one of RGB alone")
            network = loaded.network.to(memory_format=torch.channels_last).requires_grad_(False)
            self.networks.append((network, float(loaded.meta["scale"]) / recipe.scale))

    @torch.no_grad()
    def __call__(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k _ _"]:
        """Their common answer: the mean of their log-probabilities, at a quarter of the crop's resolution."""
        size = [ceil_div(side, 4) for side in image.shape[-2:]]
        answers = []
        for network, factor in self.networks:
            seen = image
            if abs(factor - 1) > 1e-3:
                scaled = [round(side * factor) for side in image.shape[-2:]]
                seen = F.interpolate(image, scaled, mode="bilinear", antialias=True)
                seen = seen.contiguous(memory_format=torch.channels_last)
            logits = network(seen).logits
            if logits is None:
                raise UserError("a teacher answers without labels: take a model of labels")
            log_p = F.log_softmax(logits.float(), 1)
            answers.append(F.interpolate(log_p, size, mode="bilinear", align_corners=False))
        return torch.stack(answers).mean(0)
