"""Pixel classifiers: an ensemble of small networks, each pixel on its own, trained side by side as one.

The head of "Label-Efficient Semantic Segmentation with Diffusion Models" (Baranchuk et al. 2022): Linear, ReLU and
BatchNorm twice, then Linear, on the channels of all maps at a pixel. Since a linear layer and bilinear enlargement
commute, an image's first layer runs at the size of each map, and only its outputs are enlarged.
"""

from collections.abc import Iterator, Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from repkit.heads.places import sample
from repkit.heads.votes import disagreement, majority

NETWORKS, MANY, STD = 10, 30, 0.02
CHUNK = 8192  # pixels at a time


class PixelEnsemble(nn.Module):
    """`networks` classifiers of pixels into `classes`, on maps with so many `channels` each.

    hidden: the widths between; None is the protocol's, 128 and 32, of 30 classes or more 256 and 128. Weights are drawn
    from a normal distribution of standard deviation 0.02 by `seed`, biases are 0.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        *,
        networks: int = NETWORKS,
        hidden: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if classes < 2 or networks < 1 or not channels:
            raise ValueError(
                f"{classes} classes, {networks} networks, {len(channels)} maps; give 2 classes or more, and at least "
                "one network and map"
            )
        hidden = tuple(hidden) if hidden else (128, 32) if classes < MANY else (256, 128)
        sides = [sum(channels), *hidden, classes]
        generator = torch.Generator().manual_seed(seed)
        self.channels, self.networks, self.classes = list(channels), networks, classes
        drawn = [torch.randn(networks, i, o, generator=generator) * STD for i, o in zip(sides, sides[1:], strict=False)]
        self.weights = nn.ParameterList(drawn)
        self.biases = nn.ParameterList([torch.zeros(networks, 1, side) for side in sides[1:]])
        self.norms = nn.ModuleList([nn.BatchNorm1d(networks * side) for side in hidden])

    def forward(self, pixels: Float[Tensor, "n b d"]) -> Float[Tensor, "n b k"]:
        """The logits of each network for pixels of its own."""
        return self._rest(torch.baddbmm(self.biases[0], pixels, self.weights[0]))

    def _rest(self, x: Float[Tensor, "n b h"]) -> Float[Tensor, "n b k"]:
        for norm, weight, bias in zip(self.norms, self.weights[1:], self.biases[1:], strict=True):
            flat = norm(rearrange(x.relu(), "n b h -> b (n h)"))
            x = torch.baddbmm(bias, rearrange(flat, "b (n h) -> n b h", n=self.networks), weight)
        return x

    def logits(
        self, maps: Sequence[Float[Tensor, "_c _h _w"]], places: Float[Tensor, "p 2"], *, chunk: int = CHUNK
    ) -> Iterator[Float[Tensor, "n q k"]]:
        """All networks' logits at places (see `pixel_places`) of one image, `chunk` of them at a time."""
        parts = self.weights[0].split(self.channels, 1)
        small = [einsum(one, part, "c h w, n c o -> n o h w") for one, part in zip(maps, parts, strict=True)]
        for some in places.split(chunk):
            yield self._rest(self.biases[0] + sum(sample(one, some) for one in small))

    @torch.no_grad()
    def predict(
        self, maps: Sequence[Float[Tensor, "_c _h _w"]], places: Float[Tensor, "p 2"]
    ) -> tuple[Int[Tensor, " p"], Float[Tensor, " p"]]:
        """The class that most networks give each place of an image, and how much they disagree there, in nats."""
        self.eval()
        found = [(majority(logits), disagreement(logits)) for logits in self.logits(maps, places)]
        labels, uncertain = zip(*found, strict=True)
        return torch.cat(labels), torch.cat(uncertain)
