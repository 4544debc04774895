"""Feature maps as colours: the first three principal components, one basis for all images of a tap."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from repkit.extractors import Extractor
from repkit.images import decode
from repkit.tasks.pictures import mosaic


def pca_colors(maps: Float[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """The first three principal components of all positions of all images, as RGB.

    Each component is stretched from its 1st to its 99th percentile; its sign makes its largest loading positive, so
    that the same maps give the same colours.
    """
    flat = rearrange(maps.double(), "b c h w -> (b h w) c")
    flat = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    basis = vectors[:, -3:].flip(1)  # [c 3], largest first; fewer for maps of one or two channels
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    projected = flat @ (basis * largest.sign())
    low, high = projected.quantile(0.01, 0), projected.quantile(0.99, 0)
    scaled = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    scaled = torch.nn.functional.pad(scaled, (0, 3 - scaled.shape[1]))
    colors = (scaled * 255).round().to(torch.uint8)
    return rearrange(colors, "(b h w) c -> b h w c", b=len(maps), h=maps.shape[2], w=maps.shape[3]).numpy()


def visualize(
    images: Sequence[Path | Image.Image], extractor: Extractor, *, side: int = 128, batch_size: int = 16
) -> tuple[Image.Image, list[str]]:
    """A mosaic with the images as the network sees them on top, and a row of PCA colours for each tap below.

    Returns the mosaic and the keys of its rows.
    """
    if not images:
        raise ValueError("no images to show; give at least one")
    pictures = [decode(image) for image in images]
    batches = [extractor(pictures[start : start + batch_size]) for start in range(0, len(pictures), batch_size)]
    rows = [[extractor.resize(picture)[0] for picture in pictures]]
    keys = [key for key in extractor.blocks if extractor.shapes[key][1:] != (1, 1)]
    if not keys:
        raise ValueError(f"{', '.join(extractor.blocks)} have no map to show; take blocks or norm instead")
    for key in keys:
        rows.append(list(pca_colors(torch.cat([batch[key] for batch in batches]).cpu())))
    return mosaic(rows, side), keys
