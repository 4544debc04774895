"""Alignment: two images' fused maps side by side, and the way between their pixels and the images' own."""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from repkit.matching.featuremap import FeatureMap
from repkit.matching.flow import alignment_distance, flip_points
from repkit.tasks.correspondence import Correspondence, Seen

Points = Float[Tensor, "n 2"]


@dataclass(frozen=True, eq=False)
class Framed:
    """An image of `size` = (width, height), its fused map or its mirror image's, and the way between their pixels."""

    map: FeatureMap
    size: tuple[int, int]
    correspondence: Correspondence
    mirrored: bool = False

    def enter(self, points: Points) -> Points:
        """Pixels of the image -> pixels of the map."""
        places = self.correspondence.to_frame(points, self.size).to(self.map.values)
        return flip_points(places, self.map.size[1]) if self.mirrored else places

    def leave(self, places: Points) -> Points:
        """The inverse of `enter`; what lies beyond the image, as the centre of a cell may, comes to its edge."""
        places = flip_points(places, self.map.size[1]) if self.mirrored else places
        points = self.correspondence.from_frame(places, self.size).cpu()
        return points.clamp(min=torch.zeros(2), max=torch.tensor(self.size) - 1.0)

    @property
    def pixels(self) -> Float[Tensor, "p 2"]:
        """Every pixel of the image, row by row."""
        return pixel_grid(self.size[1], self.size[0])

    def within(self, mask: Bool[Tensor, "H W"]) -> "Framed":
        """The same image, in which matches lie in cells that `mask`, of the image, touches.

        Raises ValueError for a mask of another size or without any True.
        """
        if tuple(mask.shape) != (self.size[1], self.size[0]) or not bool(mask.any()):
            raise ValueError(
                f"a mask of {mask.shape[1]}x{mask.shape[0]} with {int(mask.sum())} pixels for an image of "
                f"{self.size[0]}x{self.size[1]}; give one of its size that is not empty"
            )
        return replace(self, map=replace(self.map, mask=self._frame_mask(mask)))

    def _frame_mask(self, mask: Bool[Tensor, "H W"]) -> Bool[Tensor, "H W"]:
        """The whole of the cells in which a pixel of the image that the mask has lies."""
        x, y = self.enter(mask.nonzero().flip(1).float()).unbind(1)
        (h, w), (sx, sy) = self.map.grid, self.map.stride
        touched = torch.zeros(h, w, dtype=torch.bool, device=x.device)
        touched[((y + 0.5) / sy).long().clamp(0, h - 1), ((x + 0.5) / sx).long().clamp(0, w - 1)] = True
        rows = ((torch.arange(self.map.size[0], device=x.device) + 0.5) / sy).long()
        columns = ((torch.arange(self.map.size[1], device=x.device) + 0.5) / sx).long()
        whole = touched[rows][:, columns]
        return whole if self.map.mask is None else whole & self.map.mask.to(whole.device)


def pixel_grid(height: int, width: int) -> Float[Tensor, "p 2"]:
    """The (x, y) of every pixel, row by row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return rearrange([x, y], "xy h w -> (h w) xy").float()


def align(correspondence: Correspondence, source: Seen, target: Seen) -> tuple[Framed, Framed]:
    """The two images' maps; where flips are tried, the source's the way round in which it is nearer to the target."""
    one, other = correspondence.views(source, target)
    there = Framed(other.plain, target.size, correspondence)
    if one.mirrored is None or not _nearer(one.mirrored, one.plain, other.plain):
        return Framed(one.plain, source.size, correspondence), there
    return Framed(one.mirrored, source.size, correspondence, mirrored=True), there


def _nearer(mirrored: FeatureMap, plain: FeatureMap, target: FeatureMap) -> bool:
    """Whether the source's mirror image is more like the target, as `flip_aligned` judges in a Correspondence."""
    return alignment_distance(mirrored, target, over="mutual") < alignment_distance(plain, target, over="mutual")
