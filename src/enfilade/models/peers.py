"""Networks of other libraries behind our interface, to be measured beside ours. They need `enfilade[peers]`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from enfilade.errors import UserError
from enfilade.models.encoders import Encoder, pad_to_multiple
from enfilade.types import Output


class FPN(nn.Module):
    """`segmentation_models_pytorch.FPN` with a timm encoder; the default model's peer."""

    def __init__(self, *, classes: int = 40, encoder: str = "mobilenetv2_100", weights: str | None = None):
        super().__init__()
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise UserError("the FPN peer needs segmentation_models_pytorch: pip install 'enfilade[peers]'") from error
        self.net = smp.FPN(f"tu-{encoder}", encoder_weights=None, classes=classes)
        ours = Encoder(encoder, weights=weights)  # the same file, checks and colour normalisation as ours
        self.loaded = ours.loaded
        self.net.encoder.model = ours.net
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", ours.mean)
        self.register_buffer("std", ours.std)

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        return {"trunk": [self.net.encoder], "decoder": [self.net.decoder, self.net.segmentation_head]}

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Output:
        h, w = image.shape[-2:]
        x = pad_to_multiple((image - self.mean) / self.std, 32)
        logits: torch.Tensor = self.net(x)
        return Output(logits=logits[..., :h, :w])
