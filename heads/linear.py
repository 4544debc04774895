"""Linear heads: one matrix on pooled features, and the same behind a batch normalisation without parameters."""

from jaxtyping import Float
from torch import Tensor, nn

from repkit.pooling import pool

Input = Float[Tensor, "b c"] | Float[Tensor, "b c h w"]


class LinearHead(nn.Module):
    """Maps averaged over a `pool` by `pool` grid, or vectors as they are, and one linear layer -> logits [b k].

    channels: of the maps; of vectors their length, with pool=1.
    """

    def __init__(self, channels: int, n_classes: int, *, pool: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.linear = nn.Linear(channels * pool**2, n_classes)

    def inputs(self, x: Input) -> Float[Tensor, "b d"]:
        """What the linear layer sees; it depends on no weight."""
        return pooled_rows(x, self.pool, self.linear.in_features)

    def forward(self, x: Input) -> Float[Tensor, "b k"]:
        return self.linear(self.inputs(x))


class BatchNormLinear(nn.Module):
    """As LinearHead, behind BatchNorm without learned scale and shift: the convention of MAE's linear probe.

    channels and pool: as for LinearHead. While training the statistics are those of the batch, afterwards the running
    ones.
    """

    def __init__(self, channels: int, n_classes: int, *, pool: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm1d(channels * pool**2, affine=False, eps=1e-6)
        self.linear = nn.Linear(channels * pool**2, n_classes)

    def inputs(self, x: Input) -> Float[Tensor, "b d"]:
        """What the linear layer sees; it depends on no learned weight."""
        return self.norm(pooled_rows(x, self.pool, self.linear.in_features))

    def forward(self, x: Input) -> Float[Tensor, "b k"]:
        return self.linear(self.inputs(x))


def pooled_rows(x: Input, side: int, width: int) -> Float[Tensor, "b d"]:
    """Vectors as they are, maps averaged over a `side` by `side` grid with the channel slowest.

    Raises ValueError unless there are `width` numbers for an image.
    """
    rows = x if x.ndim == 2 else pool(x, f"{side}x{side}")
    if rows.shape[1] != width:
        raise ValueError(
            f"features {list(x.shape[1:])} pooled {side}x{side} are {rows.shape[1]} wide; the head takes {width}"
        )
    return rows
