"""What families that are told a text share: the latents of an autoencoder, and prompts by text encoders."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.latents import Latent, decode_vae, encode_vae, latent_stride
from repkit.backbones.prompts import Encoders, Prompts, TextEncoders
from repkit.schedule import Schedule


class TextOnLatents(Backbone):
    """A denoiser on an autoencoder's latents, told a text. A family adds its sizes, `predict`, `points` and texts.

    channels: of the latents that the denoiser takes. shapes: of one text's tensors, as `encode_text` gives them.
    null: the text that the null prompt is, or None where it is zeros. `stride`: image pixels a latent pixel.
    """

    prompts: Prompts

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        vae: Any,
        texts: TextEncoders | None,
        *,
        name: str,
        latent: Latent,
        channels: int,
        shapes: Mapping[str, tuple[int, ...]],
        null: str | None = "",
    ) -> None:
        self.name, self.model, self.schedule, self.vae, self.latent = name, model, schedule, vae, latent
        self.stride = latent_stride(vae, channels, name)
        self.options = {"latent": latent}
        self.prompts = Prompts(texts, self.encode_text, shapes=shapes, model=name, null=null)

    @abstractmethod
    def encode_text(self, encoders: Encoders, text: str) -> dict[str, Tensor]:
        """One row of each tensor that the denoiser is told."""

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        return encode_vae(self.vae, images, self.latent)

    def decode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        return decode_vae(self.vae, x0)

    def condition(self, cond: Cond, batch: int) -> Condition:
        return self.prompts.condition(cond, batch, self.device, self.dtype)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"denoiser": self.model, "vae": self.vae}
