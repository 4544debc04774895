"""diffusers' UNet2DConditionModel told a text: Stable Diffusion 1 and 2, SDXL, and what was distilled from them."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.latents import Latent, encode_vae, vae_stride
from repkit.backbones.parts import Parts
from repkit.backbones.prompts import Encoders, Prompts, TextEncoders
from repkit.backbones.texts import clip, needed
from repkit.backbones.unet_points import unet_points
from repkit.capture import Point
from repkit.schedule import Schedule

TOKENS = 77  # what every CLIP pads its texts to


class TextUNet(Backbone):
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
        side = model.config.sample_size
        self.name, self.model, self.schedule, self.vae, self.latent = name, model, schedule, vae, latent
        # Only the autoencoder needs whole cells: the U-Net itself takes latents of any size.
        self.multiple = vae_stride(vae)
        self.size = (side if isinstance(side, int) else min(side)) * self.multiple
        self.options = {"latent": latent} | ({"null prompt": "zeros"} if zero_null else {})
        self._zero_null = zero_null
        self.prompts: Prompts = Prompts(texts, self._encode_text, shapes=_text_shapes(model.config), model=name)

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        return encode_vae(self.vae, images, self.latent)

    def condition(self, cond: Cond, batch: int) -> Condition:
        if cond is None and not self._zero_null:  # a cache may know the zeros of another model with these encoders
            cond = ""
        return self.prompts.condition(cond, batch, self.device, self.dtype)

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told: dict[str, Any] = dict(condition.tensors)
        if "text_embeds" in told:
            told["added_cond_kwargs"] = {"text_embeds": told.pop("text_embeds"), "time_ids": self._time_ids(x_t)}
        prediction = model(x_t, t, return_dict=False, **told)[0]
        return prediction[:, : x_t.shape[1]]

    @cached_property
    def points(self) -> Mapping[str, Point]:
        return unet_points(self.model)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"denoiser": self.model, "vae": self.vae}

    def _encode_text(self, encoders: Encoders, text: str | None) -> dict[str, Tensor]:
        if text is None:
            return {name: torch.zeros(shape) for name, shape in self.prompts.shapes.items()}
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
    """Raise ValueError for U-Nets that want to be told more than a text, or work on other latents."""
    if vae is None:
        raise ValueError(f"{name} has no vae, but a text-conditioned U-Net is only supported on latents; load it whole")
    if config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"{name} takes {config.in_channels} channels where the latents have {vae.config.latent_channels}: U-Nets "
            "for inpainting, editing or upscaling see a second image; load the text-to-image model"
        )
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
