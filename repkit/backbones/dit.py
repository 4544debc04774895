"""diffusers' DiTTransformer2DModel: class-conditional diffusion transformers, on latents (DiT-XL/2) or on pixels."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.labels import class_labels
from repkit.backbones.latents import Latent, decode_pixels, decode_vae, encode_pixels, encode_vae, latent_stride
from repkit.backbones.parts import Parts
from repkit.capture import Point
from repkit.schedule import Schedule


class DiT(Backbone):
    """A DiT with its autoencoder, or without one on pixels. The label past the last class is the null class."""

    square = True  # the network unfolds its tokens onto a square

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        vae: Any = None,
        *,
        name: str = "dit",
        class_names: Sequence[str] | None = None,
        latent: Latent = "mode",
    ) -> None:
        config = model.config
        self.name, self.model, self.schedule, self.vae, self.latent = name, model, schedule, vae, latent
        stride = 1 if vae is None else latent_stride(vae, config.in_channels, name)
        self.size, self.multiple = config.sample_size * stride, config.patch_size * stride
        self.class_names = class_names
        self.options = {} if vae is None else {"latent": latent}
        self._classes = config.num_embeds_ada_norm

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        if self.vae is None:
            return encode_pixels(images, self.model.config.in_channels)
        return encode_vae(self.vae, images, self.latent)

    def decode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        return decode_pixels(x0) if self.vae is None else decode_vae(self.vae, x0)

    def condition(self, cond: Cond, batch: int) -> Condition:
        count = self._classes
        labels = class_labels(cond, batch, names=self.class_names, count=count, null=count, model=self.name)
        return Condition({"class_labels": labels.to(self.device)})

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        prediction = model(x_t, timestep=t, return_dict=False, **condition.tensors)[0]
        return prediction[:, : x_t.shape[1]]

    @cached_property
    def points(self) -> Mapping[str, Point]:
        points: dict[str, Point] = {}
        for index, _ in enumerate(self.model.transformer_blocks):
            name, path = f"block.{index}", f"transformer_blocks.{index}"
            points[f"{name}.in"] = Point(path, "input")
            points[f"{name}.in.adaln"] = Point(f"{path}.norm1")
            points |= {f"{name}.attn.{part}": Point(f"{path}.attn1.to_{part}") for part in "qkv"}
            points[f"{name}.attn.map"] = Point(f"{path}.attn1", "attention")
            points[f"{name}.attn.out"] = Point(f"{path}.attn1")
            points[f"{name}.mlp"] = Point(f"{path}.ff")
            points[name] = Point(path)
        return points

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"denoiser": self.model} | ({} if self.vae is None else {"vae": self.vae})


def from_parts(parts: Parts) -> DiT:
    """A DiT of a pipeline, with its autoencoder where it has one."""
    return DiT(
        parts.denoiser,
        parts.schedule,
        parts.vae,
        name=parts.name,
        class_names=parts.class_names,
        latent=parts.latent,
    )
