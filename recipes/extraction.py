"""Extraction: which features a recipe reads, in words that fit in a yaml file."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from repkit.extractors import DiffusionExtractor, Extractor
from repkit.images import Resize
from repkit.tasks.building import build_extractor


@dataclass(frozen=True)
class Extraction:
    """A frozen model and its taps.

    Args:
        model: what repkit extract takes for -m: a name of repkit models, a folder, a file, a hub id, or timm:NAME
        taps: groups BLOCKS@TIMES, or of timm models BLOCKS
        size: side of the images in pixels; null is the model's own
        cond: what a conditional model is told, a text or a class; null is its null prompt or class
        draws: the mean is taken over that many noises
        seed: of the noise
        noise: new at each training step, of each image's own as in evaluation, or the same for all images
        dtype: float32, bfloat16 or float16, that the model computes in
        load: what else loading takes, such as vae, config, denoiser or lora
    """

    model: str = "mini-unet"
    taps: list[str] = field(default_factory=lambda: ["mid@50"])
    size: int | None = None
    cond: str | int | None = None
    draws: int = 1
    seed: int = 0
    noise: Literal["step", "image", "shared"] = "step"
    dtype: str = "float32"
    load: dict[str, Any] = field(default_factory=dict)

    def build(self, device: str | torch.device) -> Extractor:
        """The extractor; errors are those of `build_extractor`."""
        return build_extractor(
            self.model,
            self.taps,
            resize=None if self.size is None else Resize(self.size),
            cond=self.cond,
            draws=self.draws,
            seed=self.seed,
            noise="image" if self.noise == "step" else self.noise,
            device=str(device),
            dtype=self.dtype,
            **self.load,
        )


def strides_of(extractor: Extractor) -> Mapping[str, int]:
    """The image pixels to a cell of each key's map."""
    return {key: block.stride for key, block in extractor.blocks.items()}


def at_step(extractor: Extractor, step: int) -> Extractor:
    """The extractor with noise that no other step has: a function of the seed, the step and the image."""
    if not isinstance(extractor, DiffusionExtractor):
        return extractor
    again = copy(extractor)
    words = np.random.SeedSequence([extractor.seed % 2**64, step]).generate_state(1, np.uint64)
    again.seed = int(words[0] >> 1)  # a seed has 63 bits and a sign
    return again
