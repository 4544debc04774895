"""Masks and cells: an image's mask as the shares of labels in its features' cells, and the way back to its pixels."""

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from repkit.matching.featuremap import FeatureMap
from repkit.matching.propagation import Labelled, cell_shares, likeliest
from repkit.tasks.correspondence import Correspondence
from repkit.tasks.mask_files import Index


def labelled(features: FeatureMap, index: Index, count: int, correspondence: Correspondence) -> Labelled:
    """An image's features with the mean of its mask over each cell; padding has no label."""
    numbers = torch.from_numpy(_in_frame(index, correspondence))
    return Labelled(features, cell_shares(numbers, count, features.grid))


def to_pixels(
    shares: Float[Tensor, "l h w"], size: tuple[int, int], correspondence: Correspondence, *, stretch: bool = False
) -> Index:
    """The likeliest label at every pixel of an image of `size` = (width, height); stretch: as in `likeliest`."""
    points = correspondence.to_frame(_pixels(size), size)
    height, width = correspondence.frame(size)
    # grid_sample's coordinates run from the outer edge of the first pixel (-1) to that of the last (1).
    places = (points + 0.5) * torch.tensor([2 / width, 2 / height], dtype=points.dtype) - 1
    return likeliest(shares.float(), places.to(shares.device, torch.float32), stretch=stretch).cpu().numpy()


def _pixels(size: tuple[int, int]) -> Float[Tensor, "H W 2"]:
    x, y = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="xy")
    return rearrange([x, y], "xy H W -> H W xy").double()


def _in_frame(index: Index, correspondence: Correspondence) -> Index:
    """The mask over the pixels that the features cover, of the nearest pixel each; -1 outside the image."""
    size = index.shape[1], index.shape[0]
    frame = correspondence.frame(size)
    if frame == index.shape:
        return index
    points = correspondence.from_frame(_pixels((frame[1], frame[0])), size).round().long().numpy()
    x, y = points[..., 0], points[..., 1]
    inside = (x >= 0) & (y >= 0) & (x < size[0]) & (y < size[1])
    return np.where(inside, index[y.clip(0, size[1] - 1), x.clip(0, size[0] - 1)], -1)
