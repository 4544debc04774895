"""Scores of descriptors at every place of an image: cells of its grid, or pixels of the interpolated features."""

from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from repkit.matching.featuremap import FeatureMap, descriptors, wide_dtype
from repkit.precision import full_float32

Metric = Literal["cosine", "l2"]
Score = Callable[[Float[Tensor, "n c"]], Float[Tensor, "n h w"]]

CHUNK = 2**22  # scores that are held at once: 16 MiB in float32


@torch.no_grad()
def similarity(
    source: FeatureMap,
    target: FeatureMap,
    points: Float[Tensor, "n 2"],
    *,
    metric: Metric = "cosine",
    exact: bool = False,
) -> Float[Tensor, "n h w"]:
    """How like each of the source's points every cell of the target is, masked or not; higher is more alike.

    cosine: -1 to 1. l2: minus the Euclidean distance. exact: at every pixel [n H W], of the
    features interpolated there.
    Raises ValueError for points outside the source and maps of different channels.
    """
    return scorer(target, metric, exact)(checked_queries(source, target, points))


def checked_queries(source: FeatureMap, target: FeatureMap, points: Float[Tensor, "n 2"]) -> Float[Tensor, "n c"]:
    """The source's descriptors at `points`; ValueError where the target has other channels."""
    if len(source.values) != len(target.values):
        raise ValueError(
            f"the source has {len(source.values)} channels, the target {len(target.values)}; extract both alike"
        )
    return descriptors(source, points)


def score_chunks(
    queries: Float[Tensor, "n c"], target: FeatureMap, metric: Metric, exact: bool, chunk: int
) -> Iterator[Float[Tensor, "m p"]]:
    """Scores of the queries at all p places of the target in order of rows, some queries at a time; -inf where masked.

    No array has more than max(chunk, p) scores, whatever the number of queries.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; give the number of scores to hold at once, 1 or more")
    mask = target.mask if exact else target.cell_mask
    shape = target.size if exact else target.grid
    score = scorer(target, metric, exact)
    for part in queries.split(max(1, chunk // (shape[0] * shape[1]))):
        scores = score(part)
        yield rearrange(scores if mask is None else scores.masked_fill_(~mask, -torch.inf), "m h w -> m (h w)")


def scorer(target: FeatureMap, metric: Metric, exact: bool) -> Score:
    """The function from descriptors to their scores in the target.

    A dot product with interpolated features is the interpolated dot product, so only the norms, which are the same for
    all descriptors, are those of features that would have to be interpolated.
    Raises ValueError for an unknown metric.
    """
    if metric not in ("cosine", "l2"):
        raise ValueError(f"no metric {metric!r}; have cosine, l2")
    values = target.values.to(wide_dtype(target.values))
    centre = values.mean((1, 2))
    if metric == "l2":  # distances stay when all is moved, and near the origin their squares lose fewer digits
        values = values - centre[:, None, None]
    squares = interpolated_squares(values, target.size) if exact else values.square().sum(0)
    norms, cells = squares.sqrt().clamp_min(1e-12), rearrange(values, "c h w -> c (h w)")

    def score(queries: Float[Tensor, "n c"]) -> Float[Tensor, "n h w"]:
        moved = F.normalize(queries) if metric == "cosine" else queries - centre
        with full_float32():
            dots = rearrange(moved @ cells, "n (h w) -> n h w", h=target.grid[0])
        if exact and target.size != target.grid:
            dots = upsampled(dots, target.size)
        if metric == "cosine":
            return dots.div_(norms)
        offset = moved.square().sum(1)[:, None, None]
        return dots.mul_(-2).add_(squares).add_(offset).clamp_min_(0).sqrt_().neg_()

    return score


def upsampled(scores: Float[Tensor, "n h w"], size: tuple[int, int]) -> Float[Tensor, "n H W"]:
    """Bilinear interpolation (align_corners=False) that leaves equal neighbours equal to the last bit.

    Torch's own does not, so that beyond the outermost centres, where all pixels tie, rounding would choose.
    """
    rows, columns = (_places(cells, pixels, scores) for cells, pixels in zip(scores.shape[1:], size, strict=True))
    wide = torch.lerp(scores[:, :, columns[0]], scores[:, :, columns[1]], columns[2])
    return torch.lerp(wide[:, rows[0]], wide[:, rows[1]], rows[2][:, None])


def interpolated_squares(values: Float[Tensor, "c h w"], size: tuple[int, int]) -> Float[Tensor, "H W"]:
    """Squared norms of the features interpolated to `size` (bilinear, align_corners=False), which are never made.

    Between four cells the features are a + x b + y c + xy d, so their square is a sum over products of a, b, c and d.
    """
    h, w = values.shape[1:]
    (rows, _, y), (columns, _, x) = _places(h, size[0], values), _places(w, size[1], values)
    padded = F.pad(values[None], (0, 1, 0, 1), mode="replicate")[0]
    down, right = padded[:, 1:] - padded[:, :-1], padded.diff(dim=2)
    parts = [values, right[:, :h], down[:, :, :w], down.diff(dim=2)]
    weights = [torch.ones_like(y[:, None] * x), x[None].expand(size), y[:, None].expand(size), y[:, None] * x]
    total = values.new_zeros(size)
    for i, j in combinations_with_replacement(range(4), 2):
        product = (parts[i] * parts[j]).sum(0)[rows[:, None], columns]  # [H W]
        total += (1 if i == j else 2) * weights[i] * weights[j] * product
    return total.clamp_min_(0)


def _places(cells: int, pixels: int, like: Tensor) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Float[Tensor, " p"]]:
    """For each pixel along an axis: the cells before and after it, and how far it lies from the first, in [0, 1)."""
    place = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * cells / pixels - 0.5).clamp(0, cells - 1)
    before = place.long()
    return before.to(like.device), (before + 1).clamp(max=cells - 1).to(like.device), (place - before).to(like)
