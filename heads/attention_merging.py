"""Self-attention as segments: a pixel's attention is a map of what belongs to it, and alike maps are merged.

The segmentation of DiffSeg (Tian et al. 2024): attention of all layers on one grid, a grid of anchors, and merging by
the symmetric Kullback-Leibler divergence.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from repkit.images import Number

Rows = Float[Tensor, "n q"]  # each a distribution over the cells


def aggregate_attention(
    maps: Sequence[Float[Tensor, "_keys _h _w"]], side: int | None = None
) -> Float[Tensor, "h w q"]:
    """What each cell of a grid of at most `side` (None: the largest of the maps') attends to, over all layers.

    maps: self-attention [keys h w], its keys the cells in rows. Each layer's attention is enlarged, its keys
    bilinearly and scaled to sum to 1, its queries repeated, and weighted by the side of its grid. Over q = h w, each
    cell of the result sums to 1. Raises ValueError for a map that is no self-attention.
    """
    if wrong := [tuple(one.shape) for one in maps if one.shape[0] != one.shape[1] * one.shape[2]]:
        raise ValueError(
            f"maps of shape {wrong[0]}; give self-attention [h*w h w], taps such as up.0.attn.0.self.map@50"
        )
    height, width = max(one.shape[1] for one in maps), max(one.shape[2] for one in maps)
    if side is not None and max(height, width) > side:
        height, width = (max(1, round(one * side / max(height, width))) for one in (height, width))
    weights = [one.shape[0] ** 0.5 for one in maps]
    layers = [weight * _on_grid(one.float(), height, width) for weight, one in zip(weights, maps, strict=True)]
    return rearrange(torch.stack(layers).sum(0) / sum(weights), "(h w) q -> h w q", h=height)


def _on_grid(maps: Float[Tensor, "keys h w"], height: int, width: int) -> Rows:
    queries = F.interpolate(maps[None], (height, width), mode="nearest-exact")[0]
    keys = rearrange(queries, "(h w) H W -> (H W) 1 h w", h=maps.shape[1])
    keys = F.interpolate(keys, (height, width), mode="bilinear", align_corners=False).flatten(1)
    return keys / keys.sum(1, keepdim=True)


def merge_attention(
    attention: Float[Tensor, "h w q"], *, threshold: Number = 0.9, rounds: int = 3, points: int = 16
) -> Float[Tensor, "s h w"]:
    """Maps of segments from what each cell attends to; a pixel belongs to the map that is largest there.

    Each of points x points anchors is averaged with all cells whose attention diverges from it by less than
    `threshold`, in nats; `rounds` - 1 times more, maps that are left are averaged with those alike and these are gone.
    """
    if not threshold > 0 or rounds < 1 or points < 1:
        raise ValueError(f"threshold={threshold}, rounds={rounds}, points={points}; give above 0, and at least 1")
    height, width, cells = attention.shape
    if cells != height * width:
        raise ValueError(f"attention {tuple(attention.shape)}; give as many columns as cells")
    rows = attention.flatten(0, 1)
    anchors = rows[anchor_cells((height, width), points).to(attention.device)]
    near = (divergence(anchors, rows) < threshold).to(rows)
    merged = near @ rows / near.sum(1, keepdim=True).clamp_min(1)
    for _ in range(rounds - 1):
        merged = _merged_once(merged, threshold)
    return rearrange(merged, "s (h w) -> s h w", h=height)


def anchor_cells(grid: tuple[int, int], points: int) -> Tensor:
    """The numbers of the cells on a centred, even grid of points x points, fewer where there are fewer cells."""
    rows, columns = (_even(side, min(points, side)) for side in grid)
    return (rows[:, None] * grid[1] + columns).flatten()


def divergence(one: Rows, other: Float[Tensor, "m q"]) -> Float[Tensor, "n m"]:
    """(KL(p, q) + KL(q, p)) / 2 of every pair of rows, in nats."""
    # Half of the sum of (p - q)(log p - log q), multiplied out: no array of all pairs and cells is needed.
    p, q = (rows.double().clamp_min(torch.finfo(torch.float32).tiny) for rows in (one, other))
    own_p, own_q = (p * p.log()).sum(1), (q * q.log()).sum(1)
    return ((own_p[:, None] + own_q - p @ q.log().T - p.log() @ q.T) / 2).clamp_min(0)


def _merged_once(maps: Rows, threshold: Number) -> Float[Tensor, "_m q"]:
    near, taken, merged = divergence(maps, maps) < threshold, torch.zeros(len(maps), dtype=torch.bool), []
    for number, row in enumerate(near.cpu()):
        if not taken[number]:
            row[number] = True
            taken |= row
            merged.append(maps[row.to(maps.device)].mean(0))
    return torch.stack(merged)


def _even(side: int, points: int) -> Tensor:
    step = (side - 1) // (points - 1) if points > 1 else 0
    return (side - 1 - step * (points - 1)) // 2 + step * torch.arange(points)
