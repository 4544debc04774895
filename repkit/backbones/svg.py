"""Latents that are features: what a diffusion transformer on a frozen encoder such as DINO denoises, as in SVG."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from repkit.features import identity_hash

Statistic = float | list[float] | Tensor


class FeatureLatents:
    """Clean latents (features - mean) / std, from one map of an extractor.

    extractor: images -> features, with `blocks` and `identity`, such as a DinoExtractor. key: which of its maps; may be
    left out where there is one. mean, std: a number, or one a channel.
    Raises ValueError for a key that does not exist and for statistics that do not fit.
    """

    def __init__(self, extractor: Any, *, key: str | None = None, mean: Statistic = 0.0, std: Statistic = 1.0) -> None:
        have = list(extractor.blocks)
        if key is None and len(have) == 1:
            key = have[0]
        if key not in have:
            raise ValueError(f"latents are one map of the extractor, not {key!r}; config={{'key': one of {have}}}")
        self.extractor, self.key = extractor, key
        self.channels, self.stride = extractor.blocks[key].channels, extractor.blocks[key].stride
        self.mean, self.std = (_per_channel(value, self.channels) for value in (mean, std))
        if not (self.std > 0).all():
            raise ValueError("a std of the latents is not positive; give config={'std': ...}, as in training")

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Images, RGB in [0, 1], to latents; nothing is computed where the images have shapes and no values."""
        if isinstance(images, FakeTensor):  # an extractor looks at values
            batch, _, height, width = images.shape
            return images.new_zeros(batch, self.channels, height // self.stride, width // self.stride)
        # What is not finite is reported, or left out, by whoever asked for the latents.
        features = self.extractor(images, grad=torch.is_grad_enabled(), check=False)[self.key].to(images.device)
        mean, std = (value[:, None, None].to(images.device) for value in (self.mean, self.std))
        return (features.float() - mean) / std

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the latents, as JSON-ready data; the images come resized."""
        own = {key: value for key, value in self.extractor.identity.items() if key not in ("resize", "decoder")}
        statistics = {"mean": self.mean.tolist(), "std": self.std.tolist()}
        return {**own, "key": self.key, "statistics": identity_hash(statistics)}

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The extractor's network, where it has one that it names `model`."""
        model = getattr(self.extractor, "model", None)
        return {"features": model} if isinstance(model, nn.Module) else {}


def _per_channel(value: Statistic, channels: int) -> Float[Tensor, "c"]:
    values = torch.as_tensor(value, dtype=torch.float32).flatten()
    if len(values) not in (1, channels):
        raise ValueError(f"{len(values)} statistics for latents of {channels} channels; give one, or one a channel")
    return values.expand(channels).clone()
