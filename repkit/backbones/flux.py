"""diffusers' FluxTransformer2DModel: FLUX.1 dev and schnell, rectified flows on packed latents, told by CLIP and T5."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from einops import rearrange, repeat
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

PATCH = 2  # latent pixels a token's side: each 2x2 patch is packed into the channels of one token


class Flux(TextOnLatents):
    """A FLUX.1: `block.i` have a stream for the text and one for the image, `single.i` one for both.

    guidance: the scale that the distilled models are told; others have none. tokens: the length that T5's text is
    padded to; None is 512 with guidance (dev) and 256 without (schnell). The null prompt is the empty text.
    Papers that count all blocks in one row (DiTF) have `single.0` after the last `block.i`: their 28 is `single.9`.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        vae: Any,
        texts: TextEncoders | None = None,
        *,
        name: str = "flux",
        latent: Latent = "mode",
        guidance: float = 3.5,
        tokens: int | None = None,
    ) -> None:
        config = model.config
        self.guidance = float(guidance) if config.guidance_embeds else None
        self.tokens = tokens or (512 if config.guidance_embeds else 256)
        shapes = {
            "encoder_hidden_states": (self.tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }
        told: dict[str, Any] = {"name": name, "latent": latent, "shapes": shapes}
        super().__init__(model, schedule, vae, texts, channels=config.in_channels // PATCH**2, **told)
        self.size, self.multiple = vae.config.sample_size, PATCH * self.stride
        self.options = {"latent": latent, "guidance": str(self.guidance), "tokens": str(self.tokens)}

    def encode_text(self, encoders: Encoders, text: str) -> dict[str, Tensor]:
        """T5's hidden states [n d] and CLIP's pooled vector."""
        tokenizer, encoder = needed(encoders, "tokenizer", "text_encoder", model=self.name)
        _, pooled = clip(tokenizer, encoder, text)
        tokenizer, encoder = needed(encoders, "tokenizer_2", "text_encoder_2", model=self.name)
        hidden, _ = t5(tokenizer, encoder, text, length=self.tokens)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        tokens = condition.tensors["encoder_hidden_states"].shape[1]
        guidance = None if self.guidance is None else torch.full((len(x_t),), self.guidance, device=x_t.device)
        prediction = model(
            pack(x_t),
            timestep=t / 1000,
            guidance=guidance,
            img_ids=positions(x_t),
            txt_ids=torch.zeros(tokens, 3, device=x_t.device),
            return_dict=False,
            **condition.tensors,
        )[0]
        return unpack(prediction, *grid(x_t))

    def fold(self, point: Point, raw: Any, x_t: Float[Tensor, "b _c _h _w"]) -> Float[Tensor, "b c h w"]:
        """The image's tokens on their grid; the text's, which come before them in one sequence, are dropped."""
        height, width = grid(x_t)
        if isinstance(raw, Attended):
            return joint_map(raw, point.part, height, width, text_first=True)
        # Blocks return (text, image), what lies inside them the image first.
        value = raw[point.path.count(".") == 1] if isinstance(raw, tuple) else raw
        if value.ndim == 3 and value.shape[1] == self.tokens + height * width:
            value = value[:, self.tokens :]
        if point.path.startswith("single_transformer_blocks."):
            value = value.clone()  # a slice of the joint sequence would keep all of it in memory
        return super().fold(point, value, x_t)

    @cached_property
    def points(self) -> Mapping[str, Point]:
        points: dict[str, Point] = {}
        for index, _ in enumerate(self.model.transformer_blocks):
            points |= _points(f"block.{index}", f"transformer_blocks.{index}", norm="norm1", mlp="ff")
        for index, _ in enumerate(self.model.single_transformer_blocks):
            # One projection joins attention and MLP here, so the MLP's own activation is its wide hidden layer.
            points |= _points(f"single.{index}", f"single_transformer_blocks.{index}", norm="norm", mlp="act_mlp")
        return points


def grid(x_t: Float[Tensor, "b c h w"]) -> tuple[int, int]:
    """The tokens' grid (rows, columns) of a latent."""
    return x_t.shape[-2] // PATCH, x_t.shape[-1] // PATCH


def pack(x_t: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """A token for each 2x2 patch, row by row; within a token the channel is slowest."""
    return rearrange(x_t, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Float[Tensor, "b n d"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """What `pack` took apart, from tokens on a grid of height x width."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=PATCH, q=PATCH)


def positions(x_t: Float[Tensor, "b c h w"]) -> Float[Tensor, "n 3"]:
    """(0, row, column) of each token, from which the rotary embedding is made; text is at the origin."""
    height, width = grid(x_t)
    rows = repeat(torch.arange(height, device=x_t.device), "h -> (h w)", w=width)
    columns = repeat(torch.arange(width, device=x_t.device), "w -> (h w)", h=height)
    return torch.stack([torch.zeros_like(rows), rows, columns], 1).float()


def _points(name: str, path: str, *, norm: str, mlp: str) -> dict[str, Point]:
    return {
        f"{name}.in": Point(path, "input"),
        f"{name}.in.adaln": Point(f"{path}.{norm}"),
        **{f"{name}.attn.{part}": Point(f"{path}.attn.to_{part}") for part in "qkv"},
        f"{name}.attn.map": Point(f"{path}.attn", "attention"),
        f"{name}.attn.text.map": Point(f"{path}.attn", "attention", "text"),
        f"{name}.attn.out": Point(f"{path}.attn"),
        f"{name}.mlp": Point(f"{path}.{mlp}"),
        name: Point(path),
    }


def from_parts(parts: Parts) -> Flux:
    """A FLUX.1 of a pipeline."""
    return Flux(parts.denoiser, parts.schedule, parts.vae, parts.texts, name=parts.name, latent=parts.latent)
