"""Match: points of one picture found in another, by the features that the index is made of."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repkit.images import Resize
from repkit.matching.featuremap import FeatureMap, cell_centres
from repkit.matching.nearest import mutual_nearest, nearest
from repkit.matching.scoring import similarity

MOST = 20  # correspondences, where no point is given and not all are asked for
Points = Float[Tensor, "n 2"]


@dataclass(frozen=True, eq=False)
class Seen:
    """A picture of `size` = (width, height) and the map of what the network saw of it."""

    map: FeatureMap
    size: tuple[int, int]
    resize: Resize

    def enter(self, points: Points) -> Points:
        """Pixels of the picture -> of the map."""
        return self.resize.points(points, self.size)

    def leave(self, points: Points) -> Points:
        """The inverse of `enter`."""
        return self.resize.original_points(points, self.size)

    @property
    def box(self) -> list[float]:
        """The left, top, right and bottom edges, in pixels of the picture, of what the map covers."""
        height, width = self.map.size
        corners = torch.tensor([[-0.5, -0.5], [width - 0.5, height - 0.5]], dtype=torch.float64)
        return [float(value) for value in (self.leave(corners) + 0.5).flatten()]


def match_point(source: Seen, target: Seen, point: tuple[float, float]) -> dict[str, Any]:
    """Where a point of the source is in the target, and how like it every cell of the target is.

    Raises ValueError for a point outside the source, and for one that the network did not see.
    """
    width, height = source.size
    if not (-0.5 <= point[0] <= width - 0.5 and -0.5 <= point[1] <= height - 0.5):
        raise ValueError(f"point {point[0]:g},{point[1]:g} lies outside the source of {width}x{height} pixels")
    asked = torch.tensor([point], dtype=torch.float32)
    entered = source.enter(asked)
    size = torch.tensor([source.map.size[1], source.map.size[0]])
    if ((entered < -0.5) | (entered > size - 0.5)).any():
        raise ValueError(f"point {point[0]:g},{point[1]:g} lies in a part that the model does not see: it crops")
    found = nearest(source.map, target.map, entered)
    best = _correspondence(asked[0], target.leave(found.points)[0], found.scores[0])
    return {"best": best, "correspondences": [best], "heat": _heat(source, target, entered)}


def match_dense(source: Seen, target: Seen) -> dict[str, Any]:
    """The place in the target of every cell of the source that shows picture."""
    cells, mask = cell_centres(source.map), source.map.cell_mask
    if mask is not None:
        cells = cells[mask.flatten()]
    found = nearest(source.map, target.map, cells)
    return _listed(source, target, cells, found.points, found.scores, len(cells))


def match_mutual(source: Seen, target: Seen) -> dict[str, Any]:
    """The cells that are each other's nearest, the most alike first, at most MOST of them."""
    cells, found = mutual_nearest(source.map, target.map)
    return _listed(source, target, cells, found.points, found.scores, MOST)


def _listed(
    source: Seen, target: Seen, cells: Points, places: Points, scores: Float[Tensor, " n"], most: int
) -> dict[str, Any]:
    order = scores.argsort(descending=True, stable=True)[:most]
    points, found = source.leave(cells[order]), target.leave(places[order])
    rows = [_correspondence(*one) for one in zip(points, found, scores[order], strict=True)]
    return {"best": rows[0] if rows else None, "correspondences": rows, "heat": None}


def _correspondence(point: Tensor, place: Tensor, score: Tensor) -> dict[str, Any]:
    (x, y), (to_x, to_y) = point.tolist(), place.tolist()
    return {"point": {"x": x, "y": y}, "place": {"x": to_x, "y": to_y}, "score": float(score)}


def _heat(source: Seen, target: Seen, entered: Points) -> dict[str, Any]:
    scores, mask = similarity(source.map, target.map, entered)[0], target.map.cell_mask
    shown = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    rows = zip(scores.tolist(), shown.tolist(), strict=True)
    grid = [[value if seen else None for value, seen in zip(*row, strict=True)] for row in rows]
    return {"grid": grid, "box": target.box}
