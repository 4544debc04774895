"""AttentionHead: a map's cells as tokens, read by a class token through transformer blocks."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Shape = tuple[int, int, int]  # channels, rows and columns of a map
NormName = Literal["layer", "batch"]


class AttentionHead(nn.Module):
    """A map -> logits [b k], by attention over its cells (Mukhopadhyay et al. 2023, "attention head").

    shape: (c, h, w) of the maps. They are averaged to at most `side` by `side` cells, normalised over all of [c h w]
    (or by batch statistics of each channel), and each cell is projected to `width`. `depth` pre-norm blocks of `heads`
    heads follow, and a linear layer on the class token. The defaults are the published sizes.
    """

    def __init__(
        self,
        shape: Shape,
        n_classes: int,
        *,
        width: int = 1024,
        depth: int = 2,
        heads: int = 8,
        side: int = 16,
        norm: NormName = "layer",
    ) -> None:
        super().__init__()
        self.tokens = MapTokens(shape, width, side, norm)
        self.trunk = Trunk(width, depth, heads)
        self.linear = nn.Linear(width, n_classes)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.linear(self.trunk(self.tokens(x)))


class MapTokens(nn.Module):
    """A map's cells, normalised and projected: [b c h w] -> [b n width]; a map smaller than `side` keeps its size."""

    def __init__(self, shape: Shape, width: int, side: int, norm: NormName) -> None:
        super().__init__()
        channels, h, w = self.shape = shape
        self.grid = min(h, side), min(w, side)
        self.norm = nn.LayerNorm([channels, *self.grid]) if norm == "layer" else nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, width, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        if x.shape[1:] != self.shape:
            raise ValueError(f"maps are {list(x.shape[1:])}; the head was built for {list(self.shape)}")
        return rearrange(self.project(self.norm(F.adaptive_avg_pool2d(x, self.grid))), "b d h w -> b (h w) d")


class Trunk(nn.Module):
    """Tokens -> what a learned class token, put before them, has become after the blocks: [b n d] -> [b d]."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads; give a multiple of {heads}")
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        cls = self.cls.expand(len(tokens), -1, -1)
        return self.blocks(torch.cat([cls, tokens], dim=1))[:, 0]


class Block(nn.Module):
    """Pre-norm transformer block: attention without biases for query, key and value, then a perceptron 4 times wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        seen = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(rearrange(seen, "b h n e -> b n (h e)"))
        return x + self.mlp(self.norm2(x))
