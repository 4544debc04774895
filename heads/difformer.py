"""DifFormer: maps of several blocks and times, fused by one attention trunk."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repkit.heads.attention import MapTokens, NormName, Shape, Trunk


class DifFormer(nn.Module):
    """Maps by tap `block@time` -> logits [b k] (Mukhopadhyay et al. 2023, "DifFormer").

    shapes: (c, h, w) of each tap, every block at every time, such as `extractor.shapes`. Each block has a
    normalisation and projection of its own, the same at all times; the tokens of a time's blocks go through the trunk
    together, and the class tokens of the times into one linear layer. The defaults are the published sizes.
    Raises ValueError where a block lacks a time or changes its shape with it.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        n_classes: int,
        *,
        width: int = 1024,
        depth: int = 2,
        heads: int = 8,
        side: int = 16,
        norm: NormName = "layer",
    ) -> None:
        super().__init__()
        self.keys = grid_of_taps(list(shapes))
        for row in zip(*self.keys, strict=True):
            if len({tuple(shapes[key]) for key in row}) > 1:
                raise ValueError(f"{' and '.join(row)} differ in shape; a block needs the same at every time")
        self.tokens = nn.ModuleList(MapTokens(shapes[key], width, side, norm) for key in self.keys[0])
        self.trunk = Trunk(width, depth, heads)
        self.linear = nn.Linear(width * len(self.keys), n_classes)

    def forward(self, maps: Mapping[str, Float[Tensor, "b _c _h _w"]]) -> Float[Tensor, "b k"]:
        times = [
            torch.cat([tokens(maps[key]) for tokens, key in zip(self.tokens, keys, strict=True)], dim=1)
            for keys in self.keys
        ]
        return self.linear(torch.cat([self.trunk(tokens) for tokens in times], dim=1))


def grid_of_taps(keys: list[str]) -> list[list[str]]:
    """The taps of each time, with the blocks in the same order; ValueError unless every block has every time."""
    blocks, times = (list(dict.fromkeys(key.rpartition("@")[place] for key in keys)) for place in (0, 2))
    grid = [[f"{block}@{time}" for block in blocks] for time in times]
    missing = [key for row in grid for key in row if key not in keys]
    if missing or not keys:
        raise ValueError(f"no {', '.join(missing) or 'taps'} among {', '.join(keys)}; give every block at every time")
    return grid
