"""Match: where points of one image are in another, how sure that is, and how every pixel moves."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from einops import rearrange
from jaxtyping import Float
from pyarrow.csv import WriteOptions, write_csv
from torch import Tensor

from repkit.datasets.pairs import numbers, read_rows
from repkit.matching.featuremap import FeatureMap, check_inside, descriptors
from repkit.matching.flow import dense_flow
from repkit.matching.method import Method
from repkit.matching.nearest import k_nearest, mutual_nearest
from repkit.matching.scoring import similarity
from repkit.tasks.alignment import Framed, Points, pixel_grid

APART = 2  # cells that the second best place must be away from the best, or it would be on the same peak


@dataclass(frozen=True)
class Match:
    """Where one point was found.

    point: of the source; place: of the target; (x, y) in pixels of the images. score: higher is more alike. ratio: of
    the distances of the best and the second best place, 0 to 1; high is ambiguous. round_trip: how many pixels from
    the point its place's own match lies; mutual: whether that is at most half a cell along x and y. places: the best
    ones with their scores, each away from those before it.
    """

    point: tuple[float, float]
    place: tuple[float, float]
    score: float
    ratio: float
    round_trip: float
    mutual: bool
    places: tuple[tuple[float, float, float], ...]

    @property
    def row(self) -> dict[str, Any]:
        """Its line of a table."""
        (x, y), (to_x, to_y) = self.point, self.place
        named = {"score": self.score, "ratio": self.ratio, "round_trip": self.round_trip, "mutual": self.mutual}
        return {"x": x, "y": y, "to_x": to_x, "to_y": to_y, **named}


def find(source: Framed, target: Framed, points: Points, *, k: int = 3) -> list[Match]:
    """Where the source's points are in the target, by the correspondence's method.

    k: how many places are listed at most. Raises ValueError naming the first point outside the source.
    """
    check_inside(points, (source.size[1], source.size[0]))
    method = source.correspondence.method
    match, entered = method.matcher(), source.enter(points)
    there = match(source.map, target.map, entered)
    back = match(target.map, source.map, there.points).points
    mutual = ((back - entered).abs() <= entered.new_tensor(source.map.stride) / 2).all(1)
    away = (source.leave(back) - points).norm(dim=1)
    best, scores, ratios = _alternatives(source, target, entered, method, k)
    return [
        Match(
            _pair(points[row]),
            _pair(target.leave(there.points[row : row + 1])[0]),
            float(there.scores[row]),
            float(ratios[row]),
            float(away[row]),
            bool(mutual[row]),
            tuple(
                (*_pair(place), float(score))
                for place, score in zip(best[row], scores[row], strict=True)
                if score.isfinite()
            ),
        )
        for row in range(len(points))
    ]


def _alternatives(
    source: Framed, target: Framed, entered: Points, method: Method, k: int
) -> tuple[Float[Tensor, "n k 2"], Float[Tensor, "n k"], Float[Tensor, " n"]]:
    """The k best places among those that are searched, their scores, and the ratio of the two best distances."""
    apart, exact = APART * max(target.map.stride), method.choice == "pixel"
    found = k_nearest(source.map, target.map, entered, max(k, 2), metric=method.metric, exact=exact, apart=apart)
    distance = (2 - 2 * found.scores).clamp_min(0).sqrt() if method.metric == "cosine" else -found.scores
    ratio = torch.where(distance[:, 1] > 0, distance[:, 0] / distance[:, 1], 1.0)
    places = target.leave(rearrange(found.points, "n k xy -> (n k) xy"))
    return rearrange(places, "(n k) xy -> n k xy", n=len(entered))[:, :k], found.scores[:, :k].cpu(), ratio


def _pair(point: Tensor) -> tuple[float, float]:
    x, y = point.tolist()
    return x, y


def mutual_points(source: Framed, target: Framed, most: int) -> Points:
    """The source's cells that have a mutual nearest neighbour in the target, the most alike first.

    most: if there are more, those are left out that lie near better ones, so that what is left is spread.
    Raises ValueError where there is none.
    """
    points, found = mutual_nearest(source.map, target.map, metric=source.correspondence.method.metric)
    if not len(points):
        raise ValueError("no cells are each other's nearest; give the points, or other taps")
    ordered = points[found.scores.argsort(descending=True, stable=True)]
    places = (ordered + 0.5) / ordered.new_tensor(source.map.stride)
    return source.leave(ordered[_spread(places, most)])


def _spread(places: Points, most: int) -> list[int]:
    """The rows of `most` places, given best first and in cells, each as far from those before as there is room for."""
    apart, chosen = (len(places) / most) ** 0.5, list[int]()
    distance = places.new_full((len(places),), torch.inf)  # to the nearest chosen one
    while len(chosen) < min(most, len(places)):
        free = (distance >= apart).nonzero()
        if not len(free):
            apart *= 0.8
            continue
        chosen.append(int(free[0]))
        distance = distance.minimum((places - places[chosen[-1]]).norm(dim=1))
    return sorted(chosen)


def heat(source: Framed, target: Framed, points: Points, shape: tuple[int, int]) -> Float[Tensor, "n H W"]:
    """How like each point every place of the target is, as pictures of `shape` = (H, W) of the whole target image."""
    metric = source.correspondence.method.metric
    scores = similarity(source.map, target.map, source.enter(points), metric=metric)
    scale = torch.tensor([target.size[0] / shape[1], target.size[1] / shape[0]])
    places = target.enter((pixel_grid(*shape) + 0.5) * scale - 0.5)
    seen = descriptors(FeatureMap(scores, target.map.size), places)
    return rearrange(seen, "(h w) n -> n h w", h=shape[0]).cpu()


def pixel_flow(source: Framed, target: Framed, *, smooth: int = 0) -> Float[Tensor, "H W 2"]:
    """How far each pixel of the source is from its place in the target, (dx, dy) in pixels.

    Cells are matched, and their displacements interpolated. smooth: they become the median over so many cells around.
    Only cells within the source's mask, where it has one, have a say.
    """
    displacement, _ = dense_flow(source.map, target.map, match=source.correspondence.method.matcher())
    known = torch.ones_like(displacement[0]) if source.map.cell_mask is None else source.map.cell_mask.float()
    if smooth:
        displacement = _median(displacement, known.bool(), smooth)
    entered = source.enter(source.pixels)
    weighted = torch.cat([displacement * known, known[None]])
    sums = descriptors(FeatureMap(weighted, source.map.size), entered)
    moved = entered + sums[:, :2] / sums[:, 2:].clamp_min(1e-6)
    flow = target.leave(moved) - source.pixels
    return rearrange(flow, "(h w) xy -> h w xy", h=source.size[1])


def _median(values: Float[Tensor, "2 h w"], known: Tensor, around: int) -> Float[Tensor, "2 h w"]:
    """The median over the known cells of a box; where there is none, the value itself."""
    side = 2 * around + 1
    hidden = torch.where(known, values, torch.nan)
    padded = torch.nn.functional.pad(hidden, (around,) * 4, value=torch.nan)
    boxes = padded.unfold(1, side, 1).unfold(2, side, 1)
    middle = rearrange(boxes, "c h w i j -> c h w (i j)").nanmedian(-1).values
    return torch.where(middle.isnan(), values, middle)


def read_points(path: Path) -> Points:
    """The points of a .csv file with columns x and y; FileNotFoundError without it, ValueError naming file and line."""
    rows = [
        numbers([row["x"], row["y"]], f"{path}, line {line}") for line, row in read_rows(path, ("x", "y"), "points")
    ]
    if not rows:
        raise ValueError(f"{path} has no points; give at least one line below the names of its columns")
    return torch.tensor(rows)


def table_bytes(matches: Sequence[Match], suffix: str) -> bytes:
    """A file of one row a match, with a line for the names of columns: .csv, or .parquet."""
    table, content = pa.Table.from_pylist([match.row for match in matches]), BytesIO()
    if suffix == ".parquet":
        pq.write_table(table, content)
    else:
        write_csv(table, content, WriteOptions(quoting_style="needed"))
    return content.getvalue()
