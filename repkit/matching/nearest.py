"""Nearest: the places of one image that are most like the points of another."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from repkit.images import grid_to_pixel
from repkit.matching.featuremap import FeatureMap, cell_centres
from repkit.matching.scoring import CHUNK, Metric, checked_queries, score_chunks
from repkit.matching.softargmax import soft_argmax

Points = Float[Tensor, "n 2"]


@dataclass(frozen=True, eq=False)
class Matches:
    """Where points were found: (x, y) in pixels of the target, and the scores there; higher is more alike.

    Of k best, points are [n k 2] and scores [n k], best first.
    """

    points: Float[Tensor, "*n 2"]
    scores: Float[Tensor, "*n"]


Matcher = Callable[[FeatureMap, FeatureMap, Points], Matches]


@torch.no_grad()
def nearest(
    source: FeatureMap,
    target: FeatureMap,
    points: Points,
    *,
    metric: Metric = "cosine",
    exact: bool = False,
    chunk: int = CHUNK,
) -> Matches:
    """The place in the target that is most like each of the source's points.

    Places are the centres of the target's cells; exact: its pixels, with features interpolated to its size. Of equal
    scores the first in order of rows wins. Beside the descriptors of the points, memory is taken for a few arrays of
    max(chunk, places) scores and a few copies of the target's map, however many points there are.
    Raises ValueError for points outside the source, maps of different channels, an unknown metric and a chunk below 1.
    """
    found = k_nearest(source, target, points, 1, metric=metric, exact=exact, chunk=chunk)
    return Matches(found.points[:, 0], found.scores[:, 0])


@torch.no_grad()
def k_nearest(
    source: FeatureMap,
    target: FeatureMap,
    points: Points,
    k: int,
    *,
    metric: Metric = "cosine",
    exact: bool = False,
    chunk: int = CHUNK,
    apart: float = 0.0,
) -> Matches:
    """The k places most like each point, best first; options as in `nearest`.

    apart: pixels that each place must be away from all better ones, or they crowd around one peak. A rank for which no
    place is left has score -inf and lies at the first place.
    Raises ValueError as `nearest` does, for a k beyond the target's places, and for a negative `apart`.
    """
    mask, grid = (target.mask, target.size) if exact else (target.cell_mask, target.grid)
    places = grid[0] * grid[1] if mask is None else int(mask.sum())
    if not 1 <= k <= places or not apart >= 0:
        raise ValueError(f"k={k} of {places} places, apart={apart}; give 1 to {places}, and 0 pixels or more")
    queries = checked_queries(source, target, points)
    scores, index = queries.new_empty(len(queries), k), queries.new_zeros((len(queries), k), dtype=torch.long)
    row = 0
    for part in score_chunks(queries, target, metric, exact, chunk):
        rows = slice(row, row := row + len(part))
        for rank in range(k):  # topk leaves open which of equal scores comes first, max does not
            scores[rows, rank], index[rows, rank] = part.max(1)
            if rank < k - 1:
                _strike(part, index[rows, rank], grid, target, apart)
    return Matches(_to_pixels(index, target, exact, scores.dtype), scores)


def _strike(
    scores: Float[Tensor, "m p"], index: Int[Tensor, " m"], grid: tuple[int, int], target: FeatureMap, apart: float
) -> None:
    """Rule out the places at `index`, and all that are not `apart` pixels away from them."""
    scores.scatter_(1, index[:, None], -torch.inf)
    if apart > 0:
        dx = (torch.arange(grid[1], device=index.device) - index[:, None] % grid[1]) * (target.size[1] / grid[1])
        dy = (torch.arange(grid[0], device=index.device) - index[:, None] // grid[1]) * (target.size[0] / grid[0])
        near = dx[:, None] ** 2 + dy[:, :, None] ** 2 < apart**2  # [m h w]
        scores.masked_fill_(rearrange(near, "m h w -> m (h w)"), -torch.inf)


def _to_pixels(index: Int[Tensor, "*n"], target: FeatureMap, exact: bool, dtype: torch.dtype) -> Float[Tensor, "*n 2"]:
    width = (target.size if exact else target.grid)[1]
    cells = torch.stack([index % width, index // width], -1).to(dtype)
    return cells if exact else grid_to_pixel(cells, target.stride)


@torch.no_grad()
def soft_nearest(
    source: FeatureMap,
    target: FeatureMap,
    points: Points,
    *,
    locate: Callable[[Float[Tensor, "n h w"]], Float[Tensor, "n 2"]] = soft_argmax,
    chunk: int = CHUNK,
) -> Matches:
    """The place between cells where `locate` sees the peak of each point's cosines; the scores are those of the peaks.

    locate: `soft_argmax` or `kernel_soft_argmax`, with their options bound by functools.partial.
    Raises ValueError for points outside the source, maps of different channels, and a chunk below 1.
    """
    queries = checked_queries(source, target, points)
    found, scores = queries.new_empty(len(queries), 2), queries.new_empty(len(queries))
    row = 0
    for part in score_chunks(queries, target, "cosine", False, chunk):
        rows = slice(row, row := row + len(part))
        found[rows] = locate(rearrange(part, "m (h w) -> m h w", h=target.grid[0]))
        scores[rows] = part.amax(1)
    return Matches(grid_to_pixel(found, target.stride), scores)


@torch.no_grad()
def ratio_nearest(
    source: FeatureMap,
    target: FeatureMap,
    points: Points,
    *,
    apart: float = 0.0,
    metric: Metric = "cosine",
    exact: bool = False,
    chunk: int = CHUNK,
) -> tuple[Matches, Float[Tensor, " n"]]:
    """The nearest places, and how much nearer they are than the second (Lowe's ratio): keep those below 0.8 or so.

    The ratio of distances is in [0, 1]; with cosine, of those of unit descriptors, sqrt(2 - 2 cosine). 1: the second is
    as near; 0 where there is no second. apart: pixels between the two, so that a neighbouring cell is no rival.
    Raises ValueError as `k_nearest` does, also for a target of a single place.
    """
    two = k_nearest(source, target, points, 2, metric=metric, exact=exact, chunk=chunk, apart=apart)
    distance = (2 - 2 * two.scores).clamp_min(0).sqrt() if metric == "cosine" else -two.scores
    ratio = torch.where(distance[:, 1] > 0, distance[:, 0] / distance[:, 1], 1.0)
    return Matches(two.points[:, 0], two.scores[:, 0]), ratio


@torch.no_grad()
def round_trip(
    source: FeatureMap, target: FeatureMap, points: Points, *, match: Matcher = nearest
) -> tuple[Matches, Float[Tensor, " n"]]:
    """The matches of points, and how many pixels from each point its match's own match in the source lies.

    A match is mutual where that is less than half a cell of the source.
    """
    there = match(source, target, points)
    back = match(target, source, there.points)
    return there, (back.points - points.to(back.points)).norm(dim=1)


@torch.no_grad()
def mutual_nearest(
    source: FeatureMap, target: FeatureMap, *, metric: Metric = "cosine", chunk: int = CHUNK
) -> tuple[Float[Tensor, "m 2"], Matches]:
    """The cells that are each other's nearest: their centres in the source, and the matches in the target."""
    here, there = cell_centres(source), cell_centres(target)
    forth = nearest(source, target, here, metric=metric, chunk=chunk)
    back = nearest(target, source, there, metric=metric, chunk=chunk)
    home = back.points[_cells(forth.points, target)]
    kept = _cells(home, source) == torch.arange(len(here), device=home.device)
    return here[kept], Matches(forth.points[kept], forth.scores[kept])


def _cells(points: Points, image: FeatureMap) -> Int[Tensor, " n"]:
    """The cell, counted row by row, that each point lies in."""
    cells = ((points + 0.5) / points.new_tensor(image.stride)).long()
    return cells[:, 1] * image.grid[1] + cells[:, 0]
