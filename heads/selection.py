"""What the fitted heads share: checked inputs, and the record of how a hyper-parameter was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

Rows = Float[np.ndarray, "n d"]
Labels = Int[np.ndarray, " n"]
Pair = tuple[ArrayLike, ArrayLike]
Candidates = Sequence[float | int] | np.ndarray


@dataclass(frozen=True, eq=False)
class Labelled:
    """Checked rows of features, float32 or float64, and the int64 class of each."""

    features: Rows
    labels: Labels

    def __getitem__(self, rows: Int[np.ndarray, " m"]) -> "Labelled":
        return Labelled(self.features[rows], self.labels[rows])

    def __add__(self, other: "Labelled") -> "Labelled":
        features = np.concatenate([self.features, other.features])
        return Labelled(features, np.concatenate([self.labels, other.labels]))


@dataclass(frozen=True)
class Choice:
    """The value taken for a hyper-parameter, and each candidate's accuracy in [0, 1] on the data that chose it."""

    name: str
    value: float | int
    candidates: tuple[float | int, ...]
    scores: tuple[float, ...]
    by: str  # "validation", "leave-one-out", "held-out"; "given" where there was one and nothing was scored


def choose(
    name: str, candidates: Sequence[float | int], scores: Sequence[float], by: str, *, prefer_large: bool
) -> Choice:
    """The most accurate candidate; among equals the smoother one, which `prefer_large` says is the largest."""
    best = max(scores)
    tied = [candidate for candidate, score in zip(candidates, scores, strict=True) if score == best]
    return Choice(name, max(tied) if prefer_large else min(tied), tuple(candidates), tuple(map(float, scores)), by)


def positive(name: str, candidates: Candidates) -> tuple[float, ...]:
    """Candidates in ascending order without repeats; a ValueError unless there is one and all are finite and > 0."""
    if not len(candidates) or not all(np.isfinite(c) and c > 0 for c in candidates):
        raise ValueError(f"{name} must be finite numbers > 0, at least one; got {list(candidates)}")
    return tuple(sorted({float(c) for c in candidates}))


def checked_features(x: ArrayLike, what: str = "features", width: int | None = None) -> Rows:
    """Features as a float32 or float64 array [n d]; a ValueError for no rows, another width, NaN or infinity."""
    array = np.asarray(x)
    if array.ndim != 2:
        raise ValueError(f"{what} have shape {array.shape}; expected [n d]: pool or flatten each image to one row")
    if not len(array):
        raise ValueError(f"{what} are empty (0 rows); give at least one labelled row")
    if width is not None and array.shape[1] != width:
        raise ValueError(f"{what} have {array.shape[1]} columns; expected {width}: use the same taps and pooling")
    array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
    bad = int((~np.isfinite(array).all(axis=1)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(array)} rows of {what} hold NaN or infinity; drop them or use a wider dtype")
    return array


def checked_labels(y: ArrayLike, n_classes: int | None = None, what: str = "labels") -> Labels:
    """Labels as int64 [n]; a ValueError unless they are integers in [0, n_classes)."""
    array = np.asarray(y)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{what} are {array.dtype} of shape {array.shape}; expected integers [n], one class a row")
    high = np.inf if n_classes is None else n_classes
    outside = np.unique(array[(array < 0) | (array >= high)])
    if len(outside):
        raise ValueError(f"{what} hold the classes {outside[:5].tolist()}; expected integers >= 0 and < {high}")
    return array.astype(np.int64, copy=False)


def checked_pair(x: ArrayLike, y: ArrayLike, what: str, width: int | None = None) -> Labelled:
    """Features [n d] and their labels [n]; a ValueError unless there is one label for each row."""
    features, labels = checked_features(x, f"{what} features", width), checked_labels(y, what=f"{what} labels")
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} rows of {what} features but {len(labels)} labels; expected one label a row")
    return Labelled(features, labels)


def checked_sets(
    x: ArrayLike, y: ArrayLike, validation: Pair | None, n_classes: int | None
) -> tuple[Labelled, Labelled | None, int]:
    """Training pair, validation pair or None, and the number of classes: by default one more than the largest label.

    A ValueError for a training set of one class, or a label that is not below `n_classes`.
    """
    train = checked_pair(x, y, "training")
    held = None if validation is None else checked_pair(*validation, "validation", train.features.shape[1])
    seen = np.unique(train.labels)
    if len(seen) < 2:
        raise ValueError(
            f"all {len(train.labels)} training labels are class {seen[0]}; a probe needs at least two classes"
        )
    labels = train.labels if held is None else np.concatenate([train.labels, held.labels])
    if n_classes is None:
        n_classes = int(labels.max()) + 1
    checked_labels(labels, n_classes)
    return train, held, n_classes
