"""Intersection over union of a whole data set, from counts of pixels by their true and found labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

IGNORE = 255
Counts = Int64[np.ndarray, "k_and_1 _c"]


@dataclass(frozen=True)
class MeanIou:
    """The IoU of each class in [0, 1], None for one that was neither there nor found, and the mean of the others."""

    per_class: tuple[float | None, ...]
    mean: float

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """The same with the classes' names."""
        return {"mIoU": self.mean, "IoU": dict(zip(classes, self.per_class, strict=True))}


def count_pixels(
    found: Int[np.ndarray, "H W"], truth: Int[np.ndarray, "_H _W"], classes: int, labels: int | None = None
) -> Counts:
    """How many pixels have each (true class, found label); a last row counts those whose truth is 255, ignored.

    labels: how many there are to be found, where these are other than the classes. Counts of images add up.
    Raises ValueError for masks of different sizes, and for a class or label that does not exist.
    """
    labels = classes if labels is None else labels
    if found.shape != truth.shape:
        raise ValueError(f"a mask {found.shape} for a truth {truth.shape}; give both in one size")
    rows = np.where(truth == IGNORE, classes, truth)
    for what, values, count in (("true", truth[truth != IGNORE], classes), ("found", found, labels)):
        if values.size and not 0 <= values.min() <= values.max() < count:
            raise ValueError(f"{what} labels from {values.min()} to {values.max()}; give 0 ... {count - 1}")
    cells = rows.ravel().astype(np.int64) * labels + found.ravel()
    return np.bincount(cells, minlength=(classes + 1) * labels).reshape(classes + 1, labels).astype(np.int64)


def mean_iou(counts: Counts, *, compat: bool = False) -> MeanIou:
    """IoU over all pixels of a data set by the counts of `count_pixels`; columns beyond the classes are no class.

    compat: as ddpm-segmentation counts: what is found where truth is ignored enlarges the union, and a class that
    is nowhere scores 0. Raises ValueError where there is no class to average over.
    """
    classes = len(counts) - 1
    seen = counts if compat else counts[:-1]
    inside = counts[np.arange(classes), np.arange(classes)]
    union = counts[:-1].sum(1) + seen.sum(0)[:classes] - inside
    if compat:
        scores = inside / (union + 1e-8)
        return MeanIou(tuple(scores.tolist()), float(scores.mean()))
    if not union.any():
        raise ValueError("every pixel is ignored, so there is no class to score; give masks with labels")
    per_class = tuple(float(one / of) if of else None for one, of in zip(inside, union, strict=True))
    return MeanIou(per_class, float(np.mean([score for score in per_class if score is not None])))
