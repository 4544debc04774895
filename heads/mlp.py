"""MlpHead: pooled features through hidden layers with ReLU."""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from repkit.heads.linear import Input, pooled_rows


class MlpHead(nn.Module):
    """Maps averaged over a `pool` by `pool` grid, or vectors as they are, and a perceptron -> logits [b k].

    channels: of the maps; of vectors their length, with pool=1. hidden: widths of the layers that a ReLU follows.
    """

    def __init__(self, channels: int, n_classes: int, *, hidden: Sequence[int] = (512,), pool: int = 1) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden={list(hidden)}; give at least one width >= 1, or use LinearHead")
        self.pool, self.width = pool, channels * pool**2
        layers: list[nn.Module] = []
        for before, after in pairwise([self.width, *hidden]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], n_classes))

    def forward(self, x: Input) -> Float[Tensor, "b k"]:
        return self.layers(pooled_rows(x, self.pool, self.width))
