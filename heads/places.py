"""Places in an image, and what feature maps of any size have there, so that no map is enlarged to the image's size."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Levels = Mapping[int, Float[Tensor, "b _c _h _w"]]  # maps by their stride


def pixel_places(height: int, width: int) -> Float[Tensor, "H W 2"]:
    """(x, y) of the pixels' centres as `F.grid_sample` counts: -1 to 1 from edge to edge of the image."""
    x, y = ((torch.arange(side) + 0.5) * (2 / side) - 1 for side in (width, height))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def sample(maps: Float[Tensor, "b c h w"], places: Float[Tensor, "p 2"]) -> Float[Tensor, "b p c"]:
    """The maps' values at places, bilinear between cells' centres as in `F.interpolate(align_corners=False)`."""
    grid = places.to(maps).expand(len(maps), 1, -1, -1)
    found = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return rearrange(found, "b c 1 p -> b p c")


def by_stride(maps: Mapping[str, Float[Tensor, "b _c _h _w"]], strides: Mapping[str, int]) -> dict[int, Tensor]:
    """{stride: map}, the finest first; maps of one stride side by side in their order."""
    keys = {
        stride: [key for key in maps if strides[key] == stride] for stride in sorted({strides[key] for key in maps})
    }
    return {stride: torch.cat([maps[key] for key in same], 1) for stride, same in keys.items()}


def joined(levels: Levels) -> Float[Tensor, "b c h w"]:
    """All levels on the grid of the finest, each with unit vectors, side by side."""
    return enlarged({stride: F.normalize(one.float(), dim=1) for stride, one in levels.items()})


def enlarged(levels: Levels) -> Float[Tensor, "b c h w"]:
    """All levels on the grid of the finest, side by side."""
    maps = list(levels.values())
    grid = max(one.shape[-2] for one in maps), max(one.shape[-1] for one in maps)
    return torch.cat([F.interpolate(one, grid, mode="bilinear", align_corners=False) for one in maps], 1)
