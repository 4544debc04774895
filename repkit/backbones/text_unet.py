"""diffusers' UNet2DConditionModel told a text: Stable Diffusion 1 and 2, SDXL, and what was distilled from them."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repkit.backbones.conditions import Condition
from repkit.backbones.latents import Latent
from repkit.backbones.parts import Parts
from repkit.backbones.prompts import Encoders, TextEncoders
from repkit.backbones.text_latents import TextOnLatents
from repkit.backbones.texts import clip, needed
from repkit.backbones.unet_points import unet_points
from repkit.capture import Point
from repkit.schedule import Schedule

TOKENS = 77  # what every CLIP pads its texts to


class TextUNet(TextOnLatents):
    """A text-conditioned U-Net with its autoencoder; `zero_null`: the null prompt is zeros, not the empty text.

    SDXL's is also told the size of the image, uncropped. Guidance-distilled ones (LCM) are told no guidance.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        vae: Any,
        texts: TextEncoders | None = None,
        *,
        name: str = "text-unet",
        latent: Latent = "mode",
        zero_null: bool = False,
    ) -> None:
        _check_supported(model.config, schedule, vae, name)
        told: dict[str, Any] = {"channels": model.config.in_channels, "shapes": _text_shapes(model.config)}
        null = None if zero_null else ""
        super().__init__(model, schedule, vae, texts, name=name, latent=latent, null=null, **told)
        # Only the autoencoder needs whole cells: the U-Net itself takes latents of any size.
        self.multiple, side = self.stride, model.config.sample_size
        self.size = (side if isinstance(side, int) else min(side)) * self.stride
        self.options = {"latent": latent} | ({"null prompt": "zeros"} if zero_null else {})

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told: dict[str, Any] = dict(condition.tensors)
        if "text_embeds" in told:
            told["added_cond_kwargs"] = {"text_embeds": told.pop("text_embeds"), "time_ids": self._time_ids(x_t)}
        prediction = model(x_t, t, return_dict=False, **told)[0]
        return prediction[:, : x_t.shape[1]]

    @cached_property
    def points(self) -> Mapping[str, Point]:
        return unet_points(self.model)

    def encode_text(self, encoders: Encoders, text: str) -> dict[str, Tensor]:
        """The hidden states [77 d] of CLIP, or of SDXL's two side by side with the second one's pooled vector."""
        tokenizer, encoder = needed(encoders, "tokenizer", "text_encoder", model=self.name)
        if "text_embeds" not in self.prompts.shapes:
            return {"encoder_hidden_states": clip(tokenizer, encoder, text)[0]}
        first, _ = clip(tokenizer, encoder, text, layer=-2)
        tokenizer, encoder = needed(encoders, "tokenizer_2", "text_encoder_2", model=self.name)
        second, pooled = clip(tokenizer, encoder, text, layer=-2)
        return {"encoder_hidden_states": torch.cat([first, second], dim=-1), "text_embeds": pooled}

    def _time_ids(self, x_t: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 6"]:
        """Original size, top left of the crop, and target size, each (rows, columns) in image pixels."""
        size = [side * self.multiple for side in x_t.shape[-2:]]
        return torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=x_t.device).expand(len(x_t), -1)


def from_parts(parts: Parts) -> TextUNet:
    """A TextUNet of a pipeline."""
    if parts.index.get("requires_aesthetics_score"):
        raise ValueError(f"{parts.name} is an SDXL refiner, told a score in place of a size; load SDXL's base model")
    sdxl = parts.denoiser.config.addition_embed_type == "text_time"  # its pipelines need not write what is the default
    return TextUNet(
        parts.denoiser,
        parts.schedule,
        parts.vae,
        parts.texts,
        name=parts.name,
        latent=parts.latent,
        zero_null=bool(parts.index.get("force_zeros_for_empty_prompt", sdxl)),
    )


def _text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (TOKENS, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":  # the pooled text lies before the six sizes
        sizes = 6 * config.addition_time_embed_dim
        shapes["text_embeds"] = (config.projection_class_embeddings_input_dim - sizes,)
    return shapes


def _check_supported(config: Any, schedule: Schedule, vae: Any, name: str) -> None:
    """Raise ValueError for U-Nets that want to be told more than a text, or work on pixels."""
    if vae is None:
        raise ValueError(f"{name} has no vae, but a text-conditioned U-Net is only supported on latents; load it whole")
    told = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type")
    more = {key: value for key in told if (value := config.get(key)) is not None}
    if more.get("addition_embed_type") == "text_time":
        more.pop("addition_embed_type")
    if more:
        what = ", ".join(f"{key}={value!r}" for key, value in more.items())
        raise ValueError(f"{name} is told more than a text ({what}); have U-Nets as in Stable Diffusion 1, 2 and SDXL")
    if schedule.kind != "discrete":
        raise ValueError(
            f"{name} has a schedule of kind {schedule.kind!r}; text-conditioned U-Nets have 'discrete' only"
        )
    if config.sample_size is None:
        raise ValueError(f"the config of {name} has no sample_size; give it the side of its training latents")
