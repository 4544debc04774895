"""diffusers' SD3Transformer2DModel: Stable Diffusion 3 and 3.5, in which text and image tokens attend jointly."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repkit.attention import Attended, joint_map
from repkit.backbones.conditions import Condition
from repkit.backbones.latents import Latent
from repkit.backbones.parts import Parts
from repkit.backbones.prompts import Encoders, TextEncoders
from repkit.backbones.text_latents import TextOnLatents
from repkit.backbones.texts import clip, needed, t5
from repkit.capture import Point
from repkit.schedule import Schedule

CLIP_TOKENS, T5_TOKENS = 77, 256


class SD3(TextOnLatents):
    """An SD3 or SD3.5 with its autoencoder; blocks are their image stream. None is the empty prompt.

    Without the third text encoder (T5) its tokens are zeros, which the model was trained to bear.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        vae: Any,
        texts: TextEncoders | None = None,
        *,
        name: str = "sd3",
        latent: Latent = "mode",
    ) -> None:
        config = model.config
        shapes = {
            "encoder_hidden_states": (CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }
        told: dict[str, Any] = {"name": name, "latent": latent, "shapes": shapes}
        super().__init__(model, schedule, vae, texts, channels=config.in_channels, **told)
        self.size, self.multiple = config.sample_size * self.stride, config.patch_size * self.stride
        self.largest = config.pos_embed_max_size * self.multiple

    def encode_text(self, encoders: Encoders, text: str) -> dict[str, Tensor]:
        """Both CLIPs' hidden states side by side, zeros up to T5's width, then T5's tokens; both pooled vectors."""
        hidden, pooled = zip(*(self._clip_tokens(encoders, number, text) for number in ("", "_2")), strict=True)
        beside = torch.cat(hidden, dim=-1)  # [n d1+d2]
        beside = nn.functional.pad(beside, (0, self.model.config.joint_attention_dim - beside.shape[-1]))
        tokens = torch.cat([beside, self._t5_tokens(encoders, text).to(beside)])
        return {"encoder_hidden_states": tokens, "pooled_projections": torch.cat(pooled)}

    def _clip_tokens(
        self, encoders: Encoders, number: str, text: str
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, " p"]]:
        tokenizer, encoder = needed(encoders, f"tokenizer{number}", f"text_encoder{number}", model=self.name)
        return clip(tokenizer, encoder, text, layer=-2)

    def _t5_tokens(self, encoders: Encoders, text: str) -> Float[Tensor, "n d"]:
        if encoders.get("text_encoder_3") is None:
            return torch.zeros(T5_TOKENS, self.model.config.joint_attention_dim)
        tokenizer, encoder = needed(encoders, "tokenizer_3", "text_encoder_3", model=self.name)
        return t5(tokenizer, encoder, text, length=T5_TOKENS)[0]

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return model(x_t, timestep=t, return_dict=False, **condition.tensors)[0]

    def fold(self, point: Point, raw: Any, x_t: Float[Tensor, "b _c _h _w"]) -> Float[Tensor, "b c h w"]:
        if isinstance(raw, Attended):
            height, width = (side // self.model.config.patch_size for side in x_t.shape[-2:])
            return joint_map(raw, point.part, height, width, text_first=False)
        whole_block = isinstance(raw, tuple) and point.path.rpartition(".")[0] == "transformer_blocks"
        # A block returns (text, image); its attention (image, text), its norm the image first as well.
        return super().fold(point, raw[1] if whole_block else raw, x_t)

    def check_size(self, height: int, width: int) -> None:
        if max(height, width) > self.largest:  # the position embedding is cropped, never stretched
            raise ValueError(
                f"{self.name} takes sides that are multiples of {self.multiple} up to {self.largest}, "
                f"not {height}x{width}; resize them"
            )
        super().check_size(height, width)

    @cached_property
    def points(self) -> Mapping[str, Point]:
        points: dict[str, Point] = {}
        for index, block in enumerate(self.model.transformer_blocks):
            name, path = f"block.{index}", f"transformer_blocks.{index}"
            points[f"{name}.in"] = Point(path, "input")
            points[f"{name}.in.adaln"] = Point(f"{path}.norm1")
            points |= _attention_points(f"{name}.attn", f"{path}.attn")
            points[f"{name}.attn.text.map"] = Point(f"{path}.attn", "attention", "text")
            if block.attn2 is not None:  # SD3.5-medium's second attention, of the image alone
                points |= _attention_points(f"{name}.attn2", f"{path}.attn2")
            points[f"{name}.mlp"] = Point(f"{path}.ff")
            points[name] = Point(path)
        return points


def _attention_points(name: str, path: str) -> dict[str, Point]:
    points = {f"{name}.{part}": Point(f"{path}.to_{part}") for part in "qkv"}
    return points | {f"{name}.map": Point(path, "attention"), f"{name}.out": Point(path)}


def from_parts(parts: Parts) -> SD3:
    """An SD3 of a pipeline."""
    return SD3(parts.denoiser, parts.schedule, parts.vae, parts.texts, name=parts.name, latent=parts.latent)
