"""Pooling: a map [b c h w] to a vector [b c'], leaving out what was padded."""

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

POOLS = "mean, max, gem, NxN (for example 2x2) or none"


def pool(maps: Float[Tensor, "b c h w"], how: str, mask: Bool[Tensor, "b H W"] | None = None) -> Float[Tensor, "b ..."]:
    """Pool one map; `none` leaves it as it is.

    mean, max, gem (generalised mean with p = 3 on values clamped to 1e-6): [b c]. NxN: adaptive averages over an N by N
    grid, [b c*N*N] with the channel slowest. `mask` is True where the image has content and weighs the averages by the
    covered share of each cell; a cell without content is 0.
    """
    if how == "none":
        return maps
    weight = None if mask is None else _coverage(mask, (maps.shape[-2], maps.shape[-1])).to(maps)
    if how == "mean":
        return _average(maps, weight, 1).flatten(1)
    if how == "gem":
        return _average(maps.clamp(min=1e-6) ** 3, weight, 1).flatten(1) ** (1 / 3)
    if how == "max":
        return (maps if weight is None else maps.masked_fill(weight == 0, -torch.inf)).amax((-2, -1))
    return rearrange(_average(maps, weight, grid_side(how)), "b c h w -> b (c h w)")


def grid_side(how: str) -> int:
    """The N of `NxN`; ValueError for anything that is not a pooling."""
    match = re.fullmatch(r"(\d+)x(\d+)", how)
    if not match or match[1] != match[2] or int(match[1]) == 0:
        raise ValueError(f"no pooling {how!r}; have {POOLS}")
    return int(match[1])


def pooled_shape(shape: tuple[int, int, int], how: str) -> tuple[int, ...]:
    """The shape [c h w] of one image's map after pooling."""
    if how == "none":
        return shape
    return (shape[0],) if how in ("mean", "max", "gem") else (shape[0] * grid_side(how) ** 2,)


def _coverage(mask: Bool[Tensor, "b H W"], size: tuple[int, int]) -> Float[Tensor, "b 1 h w"]:
    return F.adaptive_avg_pool2d(mask[:, None].float(), size)


def _average(
    maps: Float[Tensor, "b c h w"], weight: Float[Tensor, "b 1 h w"] | None, side: int
) -> Float[Tensor, "b c n n"]:
    if weight is None:
        return F.adaptive_avg_pool2d(maps, side)
    total = F.adaptive_avg_pool2d(maps * weight, side)
    return total / F.adaptive_avg_pool2d(weight, side).clamp(min=1e-12)
