"""How far probabilities can be believed: ECE, Brier score, likelihood, and the table behind a reliability picture."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from repkit.heads.selection import Labels, checked_labels

BINS = 15


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows whose top probability is in (low, high]: how many, its mean, and the share of them that are right."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> list[ReliabilityBin]:
    """Rows by their top probability, in `bins` bins of equal width over (0, 1].

    probabilities: [n k], rows summing to 1. labels: [n], columns of the true classes.
    """
    p, truth = _checked(probabilities, labels)
    edges = np.linspace(0, 1, bins + 1)
    top, right = p.max(1), p.argmax(1) == truth
    place = np.clip(np.searchsorted(edges, top, side="left") - 1, 0, bins - 1)
    table = []
    for index in range(bins):
        rows = place == index
        n = int(rows.sum())
        confidence, accuracy = (float(top[rows].mean()), float(right[rows].mean())) if n else (None, None)
        table.append(ReliabilityBin(float(edges[index]), float(edges[index + 1]), n, confidence, accuracy))
    return table


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Mean over rows of |accuracy - top probability| of their bin, of 15 equal widths (Guo et al. 2017); in [0, 1]."""
    table = [one for one in reliability(probabilities, labels, bins) if one.n]
    gaps = [one.n * abs(one.accuracy - one.confidence) for one in table if one.accuracy is not None and one.confidence]
    return sum(gaps) / sum(one.n for one in table)


def brier_score(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared distance of the probabilities from the truth, summed over classes (Brier 1950); in [0, 2]."""
    p, truth = _checked(probabilities, labels)
    return float(((p - np.eye(p.shape[1])[truth]) ** 2).sum(1).mean())


def negative_log_likelihood(log_probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean of -log p(true class), in nats; of logs, so that a sure mistake is large and not infinite."""
    logs = np.asarray(log_probabilities, dtype=np.float64)
    _, truth = _checked(np.exp(logs), labels)
    return float(-np.take_along_axis(logs, truth[:, None], 1).mean())


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Float64[np.ndarray, "n k"], Labels]:
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or not len(p):
        raise ValueError(f"probabilities of shape {p.shape}; expected [n k] with at least one row")
    truth = checked_labels(labels, p.shape[1])
    if len(truth) != len(p):
        raise ValueError(f"{len(truth)} labels for {len(p)} rows of probabilities; expected as many")
    if not (p >= 0).all() or not np.allclose(p.sum(1), 1, atol=1e-6):
        raise ValueError("rows of probabilities must be >= 0 and sum to 1; give p, not logits")
    return p, truth
