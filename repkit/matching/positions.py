"""Positions: how much of a match is only the place in the image, and how to take that out of the features."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repkit.matching.featuremap import FeatureMap, wide_dtype
from repkit.matching.nearest import Matches


def same_position(points: Float[Tensor, "*n 2"], source: FeatureMap, target: FeatureMap) -> Float[Tensor, "*n 2"]:
    """The position-only baseline: each point at the same place in the target, in shares of the image's sides."""
    scale = [target.size[1] / source.size[1], target.size[0] / source.size[0]]
    return (points + 0.5) * points.new_tensor(scale) - 0.5


def stayed(
    found: Matches, points: Float[Tensor, "*n 2"], source: FeatureMap, target: FeatureMap, *, within: float = 1.0
) -> Bool[Tensor, "*n"]:
    """Which matches lie at the position of their point, at most `within` cells of the target away along x and y.

    Their share, beside that of the true matches, says how far the features are bound to positions.
    """
    places = same_position(points.to(found.points), source, target)
    cells = (found.points - places) / found.points.new_tensor(target.stride)
    return (cells.abs() <= within).all(-1)


@torch.no_grad()
def position_component(maps: Iterable[Float[Tensor, "_b _c _h _w"]]) -> Float[Tensor, "_c _h _w"]:
    """What features have at each position whatever the image: the mean over images, less its mean over positions.

    maps: batches, of which one is held at a time; many different images, or their content will be in it.
    Raises ValueError for no images and for batches of different shapes.
    """
    total, count = None, 0
    for batch in maps:
        if total is not None and batch.shape[1:] != total.shape:
            raise ValueError(f"maps {tuple(batch.shape[1:])} after maps {tuple(total.shape)}; extract all in one size")
        part = batch.double().sum(0)
        total, count = part if total is None else total + part, count + len(batch)
    if total is None or not count:
        raise ValueError("no maps; give the features of at least one image")
    mean = total / count
    return (mean - mean.mean((1, 2), keepdim=True)).float()


def without_position(
    maps: Float[Tensor, "*b c h w"], component: Float[Tensor, "c2 h2 w2"]
) -> Float[Tensor, "*b c h w"]:
    """The maps less a `position_component`; ValueError where it was measured on another grid or other channels."""
    if maps.shape[-3:] != component.shape:
        raise ValueError(
            f"maps {tuple(maps.shape[-3:])}, but positions were measured on {tuple(component.shape)}; "
            "extract both in one size"
        )
    return maps.to(wide_dtype(maps)) - component
