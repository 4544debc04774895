"""Flow and flips: where every cell of an image went, and which way round an object should be matched."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from repkit.matching.featuremap import FeatureMap, cell_centres
from repkit.matching.nearest import Matcher, Matches, mutual_nearest, nearest


@torch.no_grad()
def dense_flow(
    source: FeatureMap, target: FeatureMap, *, match: Matcher = nearest
) -> tuple[Float[Tensor, "2 h w"], Float[Tensor, "h w"]]:
    """Displacements (x, y) in pixels from the centre of every source cell to its match, and the matches' scores.

    match: `nearest` or `soft_nearest`, with their options bound by functools.partial. Cells outside the source's mask
    are matched as well.
    """
    points = cell_centres(source)
    found = match(source, target, points)
    h = source.grid[0]
    return rearrange(found.points - points, "(h w) xy -> xy h w", h=h), rearrange(found.scores, "(h w) -> h w", h=h)


def flip_points(points: Float[Tensor, "*n 2"], width: int) -> Float[Tensor, "*n 2"]:
    """Points (x, y) of an image `width` pixels wide -> their place in its mirror image: x becomes width - 1 - x."""
    return points * points.new_tensor([-1, 1]) + points.new_tensor([width - 1, 0])


def partners(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """For each of `count` keypoints the one that it trades places with in a mirror image: itself where it has none.

    pairs: left and right of each part. Raises ValueError for an unknown keypoint or one in two pairs.
    """
    found = list(range(count))
    for left, right in pairs:
        for point in (left, right):
            if not 0 <= point < count or found[point] != point or left == right:
                raise ValueError(
                    f"pair ({left}, {right}) of {count} keypoints; give two of them that no other pair has"
                )
        found[left], found[right] = right, left
    return found


@torch.no_grad()
def alignment_distance(source: FeatureMap, target: FeatureMap, *, over: Literal["mask", "mutual"] = "mask") -> float:
    """How far apart, in [0, 2], the unit descriptors of the source's cells and of their nearest cells are, on average.

    over: the cells in the source's mask (all without one), or those that are each other's nearest. Infinite where
    there are none.
    Raises ValueError for an unknown `over`.
    """
    if over not in ("mask", "mutual"):
        raise ValueError(f"cannot average over {over!r}; have mask, mutual")
    if over == "mutual":
        scores = mutual_nearest(source, target)[1].scores
    else:
        cells = cell_centres(source)
        mask = source.cell_mask
        scores = nearest(source, target, cells if mask is None else cells[mask.flatten()]).scores
    return float((2 - 2 * scores).clamp_min(0).sqrt().mean()) if len(scores) else float("inf")


@torch.no_grad()
def flip_aligned(
    source: FeatureMap,
    mirrored: FeatureMap,
    target: FeatureMap,
    points: Float[Tensor, "n 2"],
    partner: Sequence[int | None] | None = None,
    *,
    match: Matcher = nearest,
    over: Literal["mask", "mutual"] = "mask",
) -> tuple[Matches, bool]:
    """Matches from the source or from its mirror image, whichever is nearer to the target, and whether it was mirrored.

    mirrored: features of the mirrored source, not the mirrored features. partner: for each point the one of the list
    that it trades places with in the mirror image (left and right eye), itself where it has none, and None where that
    one is not in the list: such a point keeps its match from the source. Without it all points keep their names.
    Raises ValueError for a partner list of another length or with unknown points, and for maps of different sizes.
    """
    partner = list(range(len(points))) if partner is None else list(partner)
    if len(partner) != len(points) or any(p is not None and not 0 <= p < len(points) for p in partner):
        raise ValueError(f"partners {partner} of {len(points)} points; give one of them, or None, for each")
    if source.size != mirrored.size:
        raise ValueError(f"the source is {source.size}, its mirror image {mirrored.size}; give both in one size")
    plain = match(source, target, points)
    if not alignment_distance(mirrored, target, over=over) < alignment_distance(source, target, over=over):
        return plain, False
    known = [i for i, p in enumerate(partner) if p is not None]
    turned = flip_points(points[[p for p in partner if p is not None]], source.size[1])
    found = match(mirrored, target, turned)
    merged = Matches(plain.points.clone(), plain.scores.clone())
    merged.points[known], merged.scores[known] = found.points, found.scores
    return merged, True
