"""What an image costs: floating-point operations of an extractor, counted on shapes alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from repkit.backbones.base import UNCOUNTED
from repkit.capture import capture
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor, Extractor
from repkit.fusion import Fused
from repkit.mirrored import Mirrored


def image_flops(extractor: Extractor) -> int | None:
    """Operations for one image that went through the extractor's resize (a multiply-add is two); None if not known.

    The autoencoder once, the denoiser to the last tapped block for every time and draw; texts are not counted.
    """
    if isinstance(extractor, Mirrored):
        return image_flops(extractor.extractor)
    if isinstance(extractor, Fused):
        counts = [image_flops(one) for one in dict.fromkeys(part.extractor for part in extractor.parts)]
        return None if None in counts else sum(count or 0 for count in counts)
    if isinstance(extractor, DiffusionExtractor):
        return _diffusion(extractor)
    return _transformer(extractor) if isinstance(extractor, DinoExtractor) else None


def _diffusion(extractor: DiffusionExtractor) -> int:
    """All draws of a level cost the same, and so do levels with the same blocks."""
    backbone, levels = extractor.backbone, dict.fromkeys(extractor.levels.values())
    condition = backbone.blank_condition(1)
    images = torch.zeros(1, 3, *extractor.resize.shape, device=backbone.device)
    total, x0 = _counted(partial(backbone.encode, images))
    latent, forwards = torch.empty(x0.shape, device=backbone.device), dict[tuple[str, ...], int]()
    for level in levels:
        blocks = tuple(dict.fromkeys(extractor.taps[key].block for key, at in extractor.levels.items() if at == level))
        if blocks not in forwards:
            forwards[blocks], _ = _counted(partial(backbone.activations, latent, level.t, condition, blocks))
        total += forwards[blocks] * (1 if level.clean else extractor.draws)
    return total


def _transformer(extractor: DinoExtractor) -> int:
    points = [reading.point for reading in extractor.readings.values()]
    pixels = torch.zeros(1, 3, *extractor.resize.shape, device=extractor.device, dtype=extractor.dtype)
    forward = partial(capture, extractor.model, points, lambda model: model.forward_features(pixels))  # type: ignore[operator]
    return _counted(forward)[0]


@torch.no_grad()
def _counted(run: Callable[[], Any]) -> tuple[int, Any]:
    """The operations of a function that computes nothing while they are counted, and what it returns."""
    with (
        FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter,
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        found = run()
    return counter.get_total_flops(), found
