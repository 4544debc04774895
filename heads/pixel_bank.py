"""Pixels of many images, read from feature maps that keep their own sizes."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


class PixelBank:
    """The maps of `count` images with `shapes` = (c, h, w) each: `fill` puts an image in, `at` reads pixels.

    A pixel's vector is that of all maps, enlarged bilinearly and put side by side, without any map being enlarged: of
    30 images, 8,448 channels at 256 x 256 pixels take 66 GB, at the sizes they come in 3 GB.
    """

    def __init__(
        self, count: int, shapes: Sequence[tuple[int, int, int]], *, device: torch.device | str = "cpu"
    ) -> None:
        # Channels last: the vector of a cell is then one piece of memory.
        self.maps = [torch.zeros(count, h, w, c, device=device) for c, h, w in shapes]

    @property
    def channels(self) -> int:
        """The length of a pixel's vector."""
        return sum(one.shape[-1] for one in self.maps)

    def fill(self, image: int, maps: Sequence[Float[Tensor, "_c _h _w"]]) -> None:
        """Put the maps of one image in place."""
        for held, one in zip(self.maps, maps, strict=True):
            held[image] = rearrange(one, "c h w -> h w c")

    def at(self, images: Int[Tensor, " p"], places: Float[Tensor, "p 2"]) -> Float[Tensor, "p d"]:
        """The vectors at places (see `pixel_places`) of images, given by number."""
        return torch.cat([_bilinear(one, images, places) for one in self.maps], 1)


def _bilinear(
    maps: Float[Tensor, "n h w c"], images: Int[Tensor, " p"], places: Float[Tensor, "p 2"]
) -> Float[Tensor, "p c"]:
    height, width = maps.shape[1:3]
    places = places.to(maps.dtype)
    (left, right, x), (top, bottom, y) = _between(places[:, 0], width), _between(places[:, 1], height)
    upper = torch.lerp(maps[images, top, left], maps[images, top, right], x)
    return torch.lerp(upper, torch.lerp(maps[images, bottom, left], maps[images, bottom, right], x), y)


def _between(places: Float[Tensor, " p"], side: int) -> tuple[Tensor, Tensor, Float[Tensor, "p 1"]]:
    """The cells on both sides of a place, and the share of the second; beyond the outer centres they are the same."""
    at = ((places + 1) * (side / 2) - 0.5).clamp(0, side - 1)
    low = at.long()
    return low, (low + 1).clamp(max=side - 1), (at - low)[:, None]
