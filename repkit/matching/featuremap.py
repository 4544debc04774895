"""FeatureMap: one image's features with the pixels they cover, and the descriptors at its points."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from repkit.features import Features, all_finite
from repkit.images import grid_to_pixel


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """One image's features [c h w], and the (H, W) in pixels that they cover; every point is (x, y) in those pixels.

    Integer coordinates are pixel centres. mask: True on the pixels that a match may lie on; None means all of them.
    Raises ValueError for features that are empty or not finite, a size below 1, and a mask of another size or without
    any True.
    """

    values: Float[Tensor, "c h w"]
    size: tuple[int, int]
    mask: Bool[Tensor, "H W"] | None = None

    def __post_init__(self) -> None:
        if not self.values.numel() or min(self.size) < 1:
            raise ValueError(f"features {tuple(self.values.shape)} of size {self.size}; give [c h w], (H, W)")
        if not all_finite(self.values):
            raise ValueError("the features have values that are NaN or infinite; extract them in float32")
        if self.mask is not None and tuple(self.mask.shape) != self.size:
            raise ValueError(f"a mask {tuple(self.mask.shape)} for an image of {self.size}; give [H W] of its pixels")
        if self.mask is not None and not bool(self.mask.any()):
            raise ValueError("the mask is False everywhere; give one that leaves a pixel to match")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the features."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def stride(self) -> tuple[float, float]:
        """Pixels a cell along x and y."""
        return self.size[1] / self.grid[1], self.size[0] / self.grid[0]

    @property
    def cell_mask(self) -> Bool[Tensor, "h w"] | None:
        """The cells that the mask covers at least half of; where there is none, those that it touches."""
        if self.mask is None:
            return None
        covered = F.adaptive_avg_pool2d(self.mask[None].float(), self.grid)[0]
        half = covered >= 0.5
        return half if bool(half.any()) else covered > 0


def feature_maps(features: Features, key: str | None = None) -> list[FeatureMap]:
    """The images of `features` one by one, under one key; without `key` they must have a single one.

    What was padded is masked. Raises KeyError for an unknown key and ValueError for a missing one.
    """
    if key is None and len(features) != 1:
        raise ValueError(f"the features have keys {', '.join(features)}; say which to match")
    maps = features[next(iter(features)) if key is None else key]
    masks = [None] * len(maps) if features.mask is None else [mask.to(maps.device) for mask in features.mask]
    return [FeatureMap(values, features.size, mask) for values, mask in zip(maps, masks, strict=True)]


def wide_dtype(values: Tensor) -> torch.dtype:
    """Float32 at least: sums of half-precision products lose what tells neighbours apart."""
    return torch.promote_types(values.dtype, torch.float32)


def cell_centres(image: FeatureMap) -> Float[Tensor, "n 2"]:
    """The point at the centre of every cell, row by row."""
    h, w = image.grid
    x, y = torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")
    cells = rearrange([x, y], "xy h w -> (h w) xy").to(image.values.device, wide_dtype(image.values))
    return grid_to_pixel(cells, image.stride)


def descriptors(image: FeatureMap, points: Float[Tensor, "n 2"]) -> Float[Tensor, "n c"]:
    """The features at `points`, bilinear between the centres of cells; beyond the outermost centres, those of the edge.

    They are what the map, upsampled to the image's size (bilinear, align_corners=False), holds at these pixels.
    Raises ValueError naming the first point outside the image.
    """
    values = image.values.to(wide_dtype(image.values))
    points = points.to(values)
    check_inside(points, image.size)
    # grid_sample's coordinates run from the outer edge of the first pixel (-1) to that of the last (1).
    place = (points + 0.5) * points.new_tensor([2 / image.size[1], 2 / image.size[0]]) - 1
    sampled = F.grid_sample(values[None], place[None, None], padding_mode="border", align_corners=False)
    return rearrange(sampled, "1 c 1 n -> n c")


def check_inside(points: Float[Tensor, "n 2"], size: tuple[int, int]) -> None:
    """Raise ValueError naming the first point that lies on no pixel of an image of `size` = (H, W)."""
    limit = points.new_tensor([size[1] - 0.5, size[0] - 0.5])
    inside = ((points >= -0.5) & (points <= limit)).all(1)  # False for NaN as well
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0, 0])
        x, y = points[row].tolist()
        raise ValueError(
            f"point {row} at ({x:g}, {y:g}) is outside the image of {size[1]}x{size[0]} pixels; "
            f"x goes from 0 to {size[1] - 1}, y from 0 to {size[0] - 1}"
        )
