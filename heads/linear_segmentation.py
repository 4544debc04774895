"""Linear segmentation: one 1x1 convolution over the channels of all maps, scaled to zero mean and unit variance."""

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repkit.heads.places import Levels


class LinearSegmentation(nn.Module):
    """{stride: map} -> logits on the grid of the finest map: BatchNorm without weights, then a 1x1 convolution.

    channels: of the maps, by stride. The convolution runs at each map's own size; the sum of what it gives there,
    enlarged, is what it would give on the maps enlarged and put side by side.
    """

    def __init__(self, channels: Mapping[int, int], classes: int) -> None:
        super().__init__()
        self.strides = sorted(channels)
        self.norms = nn.ModuleDict({str(at): nn.BatchNorm2d(channels[at], affine=False) for at in self.strides})
        self.parts = nn.ModuleDict(
            {str(at): nn.Conv2d(channels[at], classes, 1, bias=at == self.strides[0]) for at in self.strides}
        )

    def forward(self, levels: Levels) -> Float[Tensor, "b k h w"]:
        """Logits; raises ValueError for strides other than the head was made for."""
        if sorted(levels) != self.strides:
            raise ValueError(f"maps of strides {sorted(levels)}; this head takes {self.strides}")
        small = [self.parts[str(at)](self.norms[str(at)](levels[at])) for at in self.strides]
        finest = small[0].shape[-2:]
        enlarged = [F.interpolate(one, finest, mode="bilinear", align_corners=False) for one in small[1:]]
        return sum(enlarged, small[0])
