"""Networks of another library behind our interface, to be measured beside ours. They need `enfilade[peers]`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from enfilade.errors import UserError, unknown
from enfilade.models.encoders import Encoder, pad_to_multiple
from enfilade.types import Output

ARCHITECTURES = ("FPN", "Unet")


class Peer(nn.Module):
    """A network of `segmentation_models_pytorch` ("FPN" or "Unet", its defaults) with a timm encoder."""

    def __init__(
        self,
        *,
        architecture: str = "FPN",
        classes: int = 40,
        encoder: str = "mobilenetv2_100",
        weights: str | None = None,
    ):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise unknown("peer architecture", architecture, ARCHITECTURES)
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise UserError("the peers need segmentation_models_pytorch: pip install 'enfilade[peers]'") from error
        self.net = getattr(smp, architecture)(f"tu-{encoder}", encoder_weights=None, classes=classes)
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
