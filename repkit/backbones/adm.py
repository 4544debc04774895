"""OpenAI's guided-diffusion models (ADM): U-Nets on pixels, with or without classes, from their `.pt` files."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repkit.backbones.adm_config import NOISES, infer_config, told_config
from repkit.backbones.adm_points import adm_points
from repkit.backbones.adm_unet import ADMUNet
from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.labels import class_labels
from repkit.backbones.latents import decode_pixels, encode_pixels
from repkit.backbones.parts import Parts
from repkit.capture import Point
from repkit.schedule import Schedule


class ADM(Backbone):
    """An ADMUNet. Class-conditional ones have no null class, so they need a label."""

    def __init__(
        self, model: ADMUNet, schedule: Schedule, *, name: str = "adm", class_names: Sequence[str] | None = None
    ) -> None:
        self.name, self.model, self.schedule, self.class_names = name, model, schedule, class_names
        self.size = model.config["image_size"]
        self.multiple = 2 ** (len(model.config["channel_mult"]) - 1)

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c H W"]:
        return encode_pixels(images, self.model.config["in_channels"])

    def decode(self, x0: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 3 H W"]:
        return decode_pixels(x0)

    def condition(self, cond: Cond, batch: int) -> Condition:
        classes = self.model.config["num_classes"]
        if classes is None:
            if cond is not None:
                raise ValueError(f"{self.name} is unconditional; leave cond out instead of giving {cond!r}")
            return Condition({})
        labels = class_labels(cond, batch, names=self.class_names, count=classes, null=None, model=self.name)
        return Condition({"y": labels.to(self.device)})

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return model(x_t, t, **condition.tensors)[:, : x_t.shape[1]]

    @cached_property
    def points(self) -> Mapping[str, Point]:
        return adm_points(self.model)

    def fold(self, point: Point, raw: Any, x_t: Float[Tensor, "b _c _h _w"]) -> Float[Tensor, "b c h w"]:
        if point.path.endswith((".qkv", ".proj_out")):  # convolutions over a line of pixels, channels first
            raw = rearrange(raw, "b c n -> b n c")
        return super().fold(point, raw, x_t)


def from_parts(parts: Parts) -> ADM:
    """An ADM of an ADMUNet and a schedule in memory."""
    return ADM(parts.denoiser, parts.schedule, name=parts.name, class_names=parts.class_names)


def from_weights(
    weights: Mapping[str, Tensor],
    *,
    name: str,
    config: Mapping[str, Any] | None = None,
    vae: Any = None,
    extractor: Any = None,
    latent: str = "mode",
) -> ADM:
    """The ADM of a checkpoint's weights, float32 on the CPU; `name` is the file's, without its ending.

    config: what weights do not tell, under guided-diffusion's names; published files need none: see `adm_config`.

    Raises OSError where weights are missing, ValueError where config is, and for what is no ADM on images.
    """
    if vae is not None or extractor is not None:
        raise ValueError(f"{name} works on pixels; leave out {'vae' if extractor is None else 'extractor'}=")
    inferred = infer_config(weights, name)
    if inferred["in_channels"] not in (1, 3):
        raise ValueError(f"{name} takes {inferred['in_channels']} channels; have networks of images, not upsamplers")
    told = told_config(name, inferred, config)
    noise, steps = told.pop("noise_schedule"), told.pop("diffusion_steps", 1000)
    with torch.device("meta"):  # no time for random weights that are overwritten
        model = ADMUNet(**inferred, **told)
    _fill(model, weights, name)
    scale = 1000 / steps  # a linear schedule ends at the same noise, however many its steps
    schedule = Schedule.from_betas(NOISES[noise], start=scale * 1e-4, end=scale * 0.02, steps=steps)
    return ADM(model.eval().requires_grad_(False), schedule, name=name)


def _fill(model: ADMUNet, weights: Mapping[str, Tensor], name: str) -> None:
    """Give the network the weights, all of them."""
    wanted = model.state_dict()
    if missing := [key for key in wanted if key not in weights]:
        raise OSError(f"{name} lacks {len(missing)} weights of an ADM, {missing[0]} first; get it again")
    if foreign := [key for key in weights if key not in wanted]:
        raise ValueError(
            f"{name} has {len(foreign)} weights that do not fit the rest, {foreign[0]} first: it is no UNetModel of "
            "guided-diffusion, or not whole; get it again, or load it as what it is"
        )
    for key, tensor in wanted.items():
        if weights[key].shape != tensor.shape:
            raise ValueError(
                f"{key} of {name} is {tuple(weights[key].shape)}, and {tuple(tensor.shape)} in an ADM of these widths"
            )
    if not any(tensor.is_meta for tensor in weights.values()):  # shapes alone are enough for an outline
        model.to_empty(device="cpu").load_state_dict(weights)
