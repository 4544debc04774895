"""diffusers' UNet2DModel: pixel-space U-Nets, unconditional or conditioned on a class."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.labels import class_labels
from repkit.backbones.latents import decode_pixels, encode_pixels
from repkit.backbones.parts import Parts
from repkit.backbones.unet_points import unet_points
from repkit.capture import Point
from repkit.schedule import Schedule


class UNet(Backbone):
    """A UNet2DModel on pixels. Classes past the named ones are the null class, as in classifier-free guidance."""

    def __init__(
        self, model: Any, schedule: Schedule, *, name: str = "unet", class_names: Sequence[str] | None = None
    ) -> None:
        config = model.config
        self.name, self.model, self.schedule = name, model, schedule
        if config.sample_size is None:
            raise ValueError(f"the config of {name} has no sample_size; give it the side of its training images")
        self.size = config.sample_size if isinstance(config.sample_size, int) else min(config.sample_size)
        self.multiple = 2 ** sum(stage.downsamplers is not None for stage in model.down_blocks)
        self.class_names = class_names
        self.clean_t = schedule.sigma_min if schedule.kind == "edm" else 0
        self._labels = config.num_class_embeds or 0

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c H W"]:
        return encode_pixels(images, self.model.config.in_channels)

    def decode(self, x0: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 3 H W"]:
        return decode_pixels(x0)

    def condition(self, cond: Cond, batch: int) -> Condition:
        if not self._labels:
            if cond is not None:
                raise ValueError(f"{self.name} is unconditional; leave cond out instead of giving {cond!r}")
            return Condition({})
        count = len(self.class_names) if self.class_names else self._labels
        null = count if count < self._labels else None
        labels = class_labels(cond, batch, names=self.class_names, count=count, null=null, model=self.name)
        return Condition({"class_labels": labels.to(self.device)})

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.schedule.kind == "edm":  # c_in and c_noise of Karras et al. 2022, without checks: t may have no values
            x_t = x_t / (t**2 + self.schedule.sigma_data**2).sqrt().to(x_t.dtype)[:, None, None, None]
            t = t.log() / 4
        prediction = model(x_t, t, return_dict=False, **condition.tensors)[0]
        return prediction[:, : x_t.shape[1]]

    @cached_property
    def points(self) -> Mapping[str, Point]:
        return unet_points(self.model)


def from_parts(parts: Parts) -> UNet:
    """A UNet of a pipeline."""
    return UNet(parts.denoiser, parts.schedule, name=parts.name, class_names=parts.class_names)
