"""Feature pyramid for segmentation: maps of several strides brought to one width, joined from coarse to fine."""

from collections.abc import Mapping
from math import gcd

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repkit.heads.places import Levels


class Fpn(nn.Module):
    """{stride: map} -> logits on the grid of the finest map: a feature pyramid (Lin et al. 2017), its levels summed.

    channels: of the maps, by stride. Each level gets `width` channels by a 1x1 convolution and adds the coarser one;
    then a 3x3 convolution, and the sum of all on the finest grid makes the logits. Norms are over groups of channels,
    so that one image is as good as many.
    """

    def __init__(self, channels: Mapping[int, int], classes: int, *, width: int = 128) -> None:
        super().__init__()
        self.strides = sorted(channels)
        self.lateral = nn.ModuleDict({str(at): _normed(nn.Conv2d(channels[at], width, 1)) for at in self.strides})
        self.smooth = nn.ModuleDict(
            {str(at): nn.Sequential(_normed(nn.Conv2d(width, width, 3, padding=1)), nn.ReLU()) for at in self.strides}
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, levels: Levels) -> Float[Tensor, "b k h w"]:
        """Logits; raises ValueError for strides other than the head was made for."""
        if sorted(levels) != self.strides:
            raise ValueError(f"maps of strides {sorted(levels)}; this pyramid takes {self.strides}")
        finest = levels[self.strides[0]]
        total, above = finest.new_zeros(()), None
        for stride in reversed(self.strides):
            here = self.lateral[str(stride)](levels[stride])
            above = here if above is None else here + _resized(above, here)
            total = total + _resized(self.smooth[str(stride)](above), finest)
        return self.head(total)


def _normed(convolution: nn.Conv2d) -> nn.Sequential:
    width = convolution.out_channels
    return nn.Sequential(convolution, nn.GroupNorm(gcd(32, width), width))


def _resized(maps: Float[Tensor, "b c _h _w"], like: Float[Tensor, "b _c h w"]) -> Float[Tensor, "b c h w"]:
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)
