"""Propagation: labels of some images' cells carried to another image's cells by the likeness of their features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from repkit.matching.featuremap import FeatureMap, wide_dtype
from repkit.matching.scoring import CHUNK
from repkit.precision import full_float32

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Labelled:
    """An image's features, and for each label its share of every cell, in [0, 1].

    Raises ValueError for labels on another grid than that of the features.
    """

    features: FeatureMap
    labels: Float[Tensor, "l h w"]

    def __post_init__(self) -> None:
        if tuple(self.labels.shape[1:]) != self.features.grid:
            raise ValueError(
                f"labels {tuple(self.labels.shape)} for features of {self.features.grid} cells; give [l h w] on those"
            )


@torch.no_grad()
def propagate_labels(
    target: FeatureMap,
    context: Sequence[Labelled],
    *,
    top_k: int = 15,
    temperature: float = 0.2,
    radius: int | None = None,
    chunk: int = CHUNK,
) -> Float[Tensor, "l h w"]:
    """Each of the target's cells gets the mean labels of its `top_k` most similar cells in all of the context.

    The weights of the mean are softmax(cosine / temperature). Of cells as similar as the last of the `top_k` all count,
    so that no order decides. radius: only cells at most so many cells away along x and y count, as in neighbouring
    frames of a video; None is no limit. Masked cells of the context never count; a cell of the target for which none
    is left gets zeros. Beside the features, memory is taken for a few arrays of max(chunk, cells of the context within
    reach of one cell) scores.
    Raises ValueError for an empty context, for images that differ in channels, labels or, with a radius, grids, and
    for a top_k, temperature, radius or chunk that is too small.
    """
    check_rule(top_k, temperature, radius, chunk)
    _check_alike(target, context, radius)
    values = F.normalize(target.values.to(wide_dtype(target.values)), dim=0)
    found = values.new_zeros(len(context[0].labels), *target.grid)
    keys = [_Keys(one, values) for one in context]
    for row, columns in _tiles(target.grid, keys, radius, chunk):
        window = slice(None), slice(None)
        if radius is not None:
            window = _around(row, row + 1, radius), _around(columns.start, columns.stop, radius)
        queries = rearrange(values[:, row, columns], "c m -> m c")
        scores = torch.cat([one.scores(queries, window) for one in keys], 1)
        if radius is not None:
            scores.masked_fill_(~_near(columns, target.grid[1], radius, scores), -torch.inf)
        labels = torch.cat([rearrange(one.labels[:, *window], "l h w -> (h w) l") for one in keys])
        found[:, row, columns] = _mean(scores, labels, top_k, temperature).T
    return found


class _Keys:
    """An image of the context: its features, their norms, the cells that count, and their labels."""

    def __init__(self, one: Labelled, like: Tensor) -> None:
        self.values, self.labels = one.features.values.to(like), one.labels.to(like)
        self.norms = self.values.norm(dim=0).clamp_min(1e-12)
        self.mask = one.features.cell_mask

    def scores(self, queries: Float[Tensor, "m c"], window: tuple[slice, slice]) -> Float[Tensor, "m n"]:
        """Cosines with the cells of the window in order of rows; -inf where masked."""
        values = rearrange(self.values[:, *window], "c h w -> c (h w)")
        with full_float32():
            cosines = (queries @ values).div_(self.norms[window].flatten())
        return cosines if self.mask is None else cosines.masked_fill_(~self.mask[window].flatten(), -torch.inf)


def _tiles(grid: Grid, keys: Sequence[_Keys], radius: int | None, chunk: int) -> Iterator[tuple[int, slice]]:
    """Pieces of rows whose scores stay within the chunk, and whose windows are not much wider than each cell's own."""
    h, w = grid
    if radius is None:
        wide, count = w, sum(one.norms.numel() for one in keys)
    else:
        wide = min(w, 2 * radius + 1)
        count = len(keys) * min(h, 2 * radius + 1) * min(w, 4 * radius + 1)
    wide = max(1, min(wide, chunk // count))
    for row in range(h):
        for start in range(0, w, wide):
            yield row, slice(start, min(start + wide, w))


def _around(start: int, stop: int, radius: int) -> slice:
    return slice(max(0, start - radius), stop + radius)


def _near(columns: slice, width: int, radius: int, scores: Float[Tensor, "m n"]) -> Bool[Tensor, "m n"]:
    """Which of a tile's scores are of columns within the radius; the rows of its window all are."""
    places = torch.arange(width, device=scores.device)
    there = places[_around(columns.start, columns.stop, radius)]
    near = (places[columns, None] - there).abs() <= radius
    return repeat(near, "m n -> m (rows n)", rows=scores.shape[1] // len(there))


def _mean(
    scores: Float[Tensor, "m n"], labels: Float[Tensor, "n l"], top_k: int, temperature: float
) -> Float[Tensor, "m l"]:
    best = scores.topk(min(top_k, scores.shape[1])).values
    weights = ((scores - best[:, :1]) / temperature).exp_().masked_fill_(scores < best[:, -1:], 0).nan_to_num_(0)
    with full_float32():
        return weights @ labels / weights.sum(1, keepdim=True).clamp_min(1e-12)


def check_rule(top_k: int, temperature: float, radius: int | None = None, chunk: int = CHUNK) -> None:
    """Raise ValueError for settings that `propagate_labels` does not take."""
    if top_k < 1:
        raise ValueError(f"top_k={top_k}; give 1 or more")
    if not 0 < temperature < inf:
        raise ValueError(f"temperature={temperature}; give a number above 0")
    if radius is not None and radius < 0:
        raise ValueError(f"radius={radius}; give 0 or more cells, or None for no limit")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; give 1 or more")


def _check_alike(target: FeatureMap, context: Sequence[Labelled], radius: int | None) -> None:
    if not context:
        raise ValueError("no labelled image to take labels from; give at least one")
    channels = {len(one.values) for one in [target, *(one.features for one in context)]}
    counts = {len(one.labels) for one in context}
    if len(channels) > 1 or len(counts) > 1:
        raise ValueError(f"{sorted(channels)} channels, {sorted(counts)} labels; give all images the same")
    grids = {target.grid, *(one.features.grid for one in context)}
    if radius is not None and len(grids) > 1:
        raise ValueError(f"a radius between grids {sorted(grids)}; extract all in one size, or give no radius")


def cell_shares(index: Int[Tensor, "H W"], count: int, grid: Grid) -> Float[Tensor, "l h w"]:
    """The share of each label 0 ... count - 1 in the pixels of every cell; pixels of -1 have none and do not count.

    A cell without any label gets zeros.
    """
    shares = [F.adaptive_avg_pool2d((index == label)[None].float(), grid)[0] for label in range(count)]
    found = torch.stack(shares)
    return found / found.sum(0).clamp_min(1e-12)


def likeliest(
    shares: Float[Tensor, "l h w"], places: Float[Tensor, "H W 2"], *, stretch: bool = False
) -> Int[Tensor, "H W"]:
    """The label with the largest share at each place, the first of several; shares are bilinear between cells' centres.

    places: (x, y) as `F.grid_sample` counts, -1 to 1 from edge to edge. stretch: first scale the shares of every label
    that occurs to 0 ... 1 over the places, as the published label propagation does; it favours labels that are unsure
    everywhere.
    """
    best = shares.new_full(places.shape[:2], -torch.inf)
    found = torch.zeros(places.shape[:2], dtype=torch.long, device=shares.device)
    for label, one in enumerate(shares):  # one by one, or many labels of a large image would not fit
        there = F.grid_sample(one[None, None], places[None], padding_mode="border", align_corners=False)[0, 0]
        if stretch and there.max() > 0:
            there = there - there.min()
            there = there / there.max().clamp_min(1e-12)
        better = there > best
        best, found = torch.where(better, there, best), found.masked_fill_(better, label)
    return found
