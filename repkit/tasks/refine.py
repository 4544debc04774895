"""Refinement: a region of a picture made likelier by a diffusion model, the rest kept (SDEdit, Meng et al. 2022)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Cond
from repkit.images import Resize, digest, to_tensor, to_uint8
from repkit.noise import noise_like
from repkit.precision import full_float32
from repkit.sampling import predictor, sample, sampling_times
from repkit.tasks.swap import blended


@dataclass(frozen=True)
class Refinement:
    """How a region is refined.

    strength: to which share of its schedule the model's noise goes up, 0 to 1: at 0 nothing changes, at 1 nothing of
    the region stays. steps: how many there are from there down. guidance: of `predictor`, away from the null condition.
    """

    strength: float
    steps: int = 20
    cond: Cond = None
    guidance: float = 1.0
    seed: int = 0


def refined(picture: Image.Image, share: Float[np.ndarray, "H W"], backbone: Backbone, how: Refinement) -> Image.Image:
    """The picture, noised and denoised in the region where `share` is above 0, and mixed in by it.

    The picture is brought to about as many pixels as the model's images have, with its aspect ratio where the model
    takes that. The latents outside the region are noised to each step's level, never denoised, and the pixels there
    are the picture's own. The noise is a function of the seed and the picture.
    Raises ValueError for another strength or number of steps, and where the backbone cannot make images.
    """
    times = sampling_times(backbone.schedule, how.steps, strength=how.strength)
    if not len(times) or not share.any():
        return picture
    backbone.check_frozen()
    resize = Resize(working_size(backbone, picture.size), "squash")
    pixels = resize(picture)[0]
    with torch.no_grad(), full_float32():
        x0 = backbone.encode(to_tensor(pixels[None]).to(backbone.device))
        backbone.decode(x0[..., :1, :1])  # what cannot make images says so before all the steps
        noise = noise_like(x0.shape[1:], seed=how.seed, digest=digest(pixels), t=float(times[0]), draw=0)
        made = backbone.decode(_denoised(x0, noise[None].to(x0), _cells(share, x0), times, backbone, how))
    result = Image.fromarray(to_uint8(made)[0]).resize(picture.size, Image.Resampling.BICUBIC)
    return blended(result, picture, share)


def _denoised(x0: Tensor, noise: Tensor, inside: Tensor, times: Tensor, backbone: Backbone, how: Refinement) -> Tensor:
    schedule = backbone.schedule
    null = None if how.guidance == 1 else backbone.condition(None, 1)
    predict = predictor(backbone, backbone.condition(how.cond, 1), null=null, guidance=how.guidance)

    def keep(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.where(inside, x_t, schedule.add_noise(x0, noise, t))

    found = sample(schedule, predict, schedule.add_noise(x0, noise, times[0]), times, keep=keep)
    return torch.where(inside, found, x0)


def _cells(share: Float[np.ndarray, "H W"], x0: Tensor) -> Bool[Tensor, "h w"]:
    """The latent cells that the region touches."""
    region = torch.from_numpy(share > 0)[None].float().to(x0.device)
    return torch.nn.functional.adaptive_max_pool2d(region, x0.shape[-2:])[0] > 0


def working_size(backbone: Backbone, size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) nearest to a picture's (width, height) in shape, of about the area of the model's images."""
    if backbone.square:
        return backbone.size, backbone.size
    scale = backbone.size / (size[0] * size[1]) ** 0.5
    height, width = (max(1, round(side * scale / backbone.multiple)) * backbone.multiple for side in size[::-1])
    backbone.check_size(height, width)
    return height, width
