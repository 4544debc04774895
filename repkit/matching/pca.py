"""Co-PCA: several images' features in the few directions in which they vary most together, exactly."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from repkit.matching.featuremap import wide_dtype


@torch.no_grad()
def co_pca(maps: Sequence[Float[Tensor, "c _h _w"]], dim: int) -> list[Float[Tensor, "d _h _w"]]:
    """The maps, less their common mean, in the `dim` principal directions of all their cells together.

    Exact (eigh, in float64) and so the same every time; the strongest direction comes first, and its largest component
    is positive. The maps may have different grids.
    Raises ValueError for maps of different channels, and for a `dim` beyond the channels or the cells.
    """
    channels = {len(values) for values in maps}
    if len(channels) != 1:
        raise ValueError(f"maps with {sorted(channels)} channels; give one or more, all with the same")
    cells = torch.cat([rearrange(values, "c h w -> (h w) c") for values in maps]).double()
    if not 1 <= dim <= min(cells.shape):
        raise ValueError(f"dim={dim} of {cells.shape[1]} channels at {len(cells)} cells; give 1 to {min(cells.shape)}")
    mean = cells.mean(0)
    basis = principal_directions(cells - mean, dim)
    return [
        torch.einsum("chw,cd->dhw", values.double() - mean[:, None, None], basis).to(wide_dtype(values))
        for values in maps
    ]


def principal_directions(centred: Float[Tensor, "n c"], dim: int) -> Float[Tensor, "c d"]:
    """Orthonormal directions of largest variance, by the smaller of the covariance [c c] and the Gram matrix [n n]."""
    n, c = centred.shape
    if c <= n:
        basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -dim:].flip(1)
    else:
        across = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -dim:].flip(1)
        basis = torch.linalg.qr(centred.T @ across).Q  # directions without variance are no quotient of it
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0)
