"""Scores of predicted labels, and the split that keeps the rows which choose apart from the rows which fit."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64
from numpy.typing import ArrayLike

from repkit.heads.selection import Labels, checked_labels


@dataclass(frozen=True)
class ClassScore:
    """Recall of one class: the share of its `n` rows that were predicted as it; None without rows."""

    label: int
    n: int
    accuracy: float | None


def accuracy(y: ArrayLike, p: ArrayLike) -> float:
    """Share of rows, in [0, 1], whose predicted label `p` is the true label `y`."""
    truth, predicted = _checked(y, p)
    return float((truth == predicted).mean())


def confusion(y: ArrayLike, p: ArrayLike, k: int) -> Int64[np.ndarray, "k k"]:
    """Counts of (true class, predicted class): a row for each true class, a column for each predicted one."""
    truth, predicted = _checked(y, p, k)
    return np.bincount(truth * k + predicted, minlength=k * k).astype(np.int64).reshape(k, k)


def per_class(y: ArrayLike, p: ArrayLike, k: int) -> list[ClassScore]:
    """One row for each of the `k` classes, in order, also for those that do not occur in `y`."""
    counts = confusion(y, p, k)
    totals = counts.sum(axis=1)
    return [ClassScore(c, int(n), float(counts[c, c] / n) if n else None) for c, n in enumerate(totals)]


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval, within [0, 1], of an accuracy measured as `correct` of `n` independent rows."""
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}; expected 0 <= correct <= n and n >= 1")
    z = 1.959963984540054  # 97.5 % quantile of the standard normal
    centre = (correct + z * z / 2) / (n + z * z)
    half = z * math.sqrt(correct * (n - correct) / n + z * z / 4) / (n + z * z)
    # Rounding would leave 0 of n and n of n a hair off the limits that they reach exactly.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def stratified_split(
    labels: ArrayLike, fraction: float, seed: int = 0
) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """Ascending row numbers (training, validation), the same for the same seed: `fraction` of each class is held out.

    Counts are rounded class by class, but a class of two or more rows is on both sides; a single row is for training.
    """
    classes = checked_labels(labels)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction}; expected a share in (0, 1) of each class to hold out")
    random = np.random.default_rng(seed)
    held = np.zeros(len(classes), dtype=bool)
    for label in np.unique(classes):
        rows = random.permutation(np.flatnonzero(classes == label))
        share = max(round(fraction * len(rows)), 1)
        held[rows[: min(share, len(rows) - 1)]] = True
    if not held.any():
        raise ValueError(f"no class among {len(classes)} labels has two rows; nothing can be held out")
    return np.flatnonzero(~held), np.flatnonzero(held)


def _checked(y: ArrayLike, p: ArrayLike, k: int | None = None) -> tuple[Labels, Labels]:
    truth, predicted = checked_labels(y, k), checked_labels(p, k, "predictions")
    if len(truth) != len(predicted) or not len(truth):
        raise ValueError(f"{len(truth)} labels and {len(predicted)} predictions; expected as many, and at least one")
    return truth, predicted
