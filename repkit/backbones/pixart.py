"""diffusers' PixArtTransformer2DModel: PixArt-alpha and PixArt-Sigma, told a text by T5 through cross-attention."""

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
from repkit.backbones.texts import needed, t5
from repkit.capture import Point
from repkit.schedule import Schedule

ALPHA_TOKENS, SIGMA_TOKENS = 120, 300  # what texts are padded to; no config says it


class PixArt(TextOnLatents):
    """A PixArt with its autoencoder, at any size: its position embedding is stretched. None is the empty prompt.

    Texts lose their capitals and outer blanks, as in diffusers. tokens: what texts are padded to.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        vae: Any,
        texts: TextEncoders | None = None,
        *,
        name: str = "pixart",
        tokens: int = ALPHA_TOKENS,
        latent: Latent = "mode",
    ) -> None:
        config = model.config
        shapes = {
            "encoder_hidden_states": (tokens, config.caption_channels or config.cross_attention_dim),
            "encoder_attention_mask": (tokens,),
        }
        told: dict[str, Any] = {"name": name, "latent": latent, "shapes": shapes}
        super().__init__(model, schedule, vae, texts, channels=config.in_channels, **told)
        self.tokens = tokens
        self.size, self.multiple = config.sample_size * self.stride, config.patch_size * self.stride
        self.options = {"latent": latent, "tokens": str(tokens)}

    def encode_text(self, encoders: Encoders, text: str) -> dict[str, Tensor]:
        """T5's hidden states [n d], and the mask [n] of those that are no padding."""
        tokenizer, encoder = needed(encoders, "tokenizer", "text_encoder", model=self.name)
        said = text.lower().strip()
        hidden, mask = t5(tokenizer, encoder, said, length=self.tokens, masked=True)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added = self.image_size(x_t) if self.model.use_additional_conditions else None
        prediction = model(x_t, timestep=t, added_cond_kwargs=added, return_dict=False, **condition.tensors)[0]
        return prediction[:, : x_t.shape[1]]

    def image_size(self, x_t: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b _n"]]:
        """Height and width in pixels, and their ratio, which the 1024-pixel alpha model is told beside the time."""
        height, width = x_t.shape[-2] * self.stride, x_t.shape[-1] * self.stride
        told = {"resolution": [float(height), float(width)], "aspect_ratio": [height / width]}
        return {
            key: torch.tensor([row], dtype=x_t.dtype, device=x_t.device).repeat(len(x_t), 1)
            for key, row in told.items()
        }

    @cached_property
    def points(self) -> Mapping[str, Point]:
        points: dict[str, Point] = {}
        for index, _ in enumerate(self.model.transformer_blocks):
            name, path = f"block.{index}", f"transformer_blocks.{index}"
            points[f"{name}.in"] = Point(path, "input")
            points[f"{name}.in.adaln"] = Point(f"{path}.attn1", "input")  # norm1 is not modulated, the block does that
            points |= {f"{name}.attn.{part}": Point(f"{path}.attn1.to_{part}") for part in "qkv"}
            points[f"{name}.attn.map"] = Point(f"{path}.attn1", "attention")
            points[f"{name}.attn.out"] = Point(f"{path}.attn1")
            points[f"{name}.cross.q"] = Point(f"{path}.attn2.to_q")
            points[f"{name}.cross.map"] = Point(f"{path}.attn2", "attention")
            points[f"{name}.cross.out"] = Point(f"{path}.attn2")
            points[f"{name}.mlp"] = Point(f"{path}.ff")
            points[name] = Point(path)
        return points


def from_parts(parts: Parts) -> PixArt:
    """A PixArt of a pipeline, whose class says how long its texts are."""
    pipeline = parts.index.get("_class_name", parts.name)  # a pipeline in memory is named by its class
    return PixArt(
        parts.denoiser,
        parts.schedule,
        parts.vae,
        parts.texts,
        name=parts.name,
        tokens=SIGMA_TOKENS if "Sigma" in pipeline else ALPHA_TOKENS,
        latent=parts.latent,
    )
