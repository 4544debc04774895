"""Ridge classifier in closed form: one eigendecomposition serves every alpha and exact leave-one-out.

One column of targets a class, +1 for its rows and -1 for all others, is fitted by least squares with the penalty
`alpha * |w|^2` and an intercept that is not penalised. With d > n the n x n kernel is decomposed in place of the d x d
Gram matrix; both give the same spectrum.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int
from numpy.typing import ArrayLike

from repkit.heads.selection import (
    Candidates,
    Choice,
    Labelled,
    Labels,
    Pair,
    checked_features,
    checked_labels,
    checked_pair,
    checked_sets,
    choose,
    positive,
)

ALPHAS = tuple(float(10 ** (e / 2)) for e in range(-6, 13))  # 1e-3 .. 1e6 in half decades
_ROWS = 4096  # rows cast to float64 at a time, so that a large float32 matrix is never copied whole


@dataclass(frozen=True, eq=False)
class RidgeProbe:
    """A fitted ridge classifier on raw (not standardised) features."""

    weight: Float64[np.ndarray, "d k"]
    bias: Float64[np.ndarray, " k"]
    chosen: Choice

    @property
    def alpha(self) -> float:
        return float(self.chosen.value)

    def logits(self, x: ArrayLike) -> Float64[np.ndarray, "n k"]:
        """Least-squares scores, about -1 to +1; not log-probabilities."""
        return checked_features(x, width=len(self.weight)) @ self.weight + self.bias

    def predict(self, x: ArrayLike) -> Int[np.ndarray, " n"]:
        """The class of the largest score for each row."""
        return self.logits(x).argmax(axis=1)


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """What all alphas share: weight(alpha) = vectors @ (cross / (values + alpha)), on features minus their mean."""

    n: int
    mean: Float64[np.ndarray, " d"]
    offset: Float64[np.ndarray, " k"]
    values: Float64[np.ndarray, " r"]
    vectors: Float64[np.ndarray, "d r"]  # divided by the features' scale
    cross: Float64[np.ndarray, "r k"]

    def probe(self, chosen: Choice) -> RidgeProbe:
        weight = self.vectors @ (self.cross / (self.values + chosen.value)[:, None])
        return RidgeProbe(weight, self.offset - self.mean @ weight, chosen)

    def accuracies(self, data: Labelled, alphas: Sequence[float], *, leave_one_out: bool) -> list[float]:
        """Accuracy at each alpha, either on other rows or on the training rows, each predicted by a fit without it."""
        x, y = data.features, data.labels
        hits = np.zeros(len(alphas))
        for rows in _chunks(len(x)):
            z = (x[rows] - self.mean) @ self.vectors
            target = _targets(y[rows], len(self.offset))
            for i, alpha in enumerate(alphas):
                shrunk = z / (self.values + alpha)
                logits = shrunk @ self.cross + self.offset
                if leave_one_out:
                    # The diagonal of the hat matrix; 1/n is the part of the unpenalised intercept.
                    leverage = 1 / self.n + (z * shrunk).sum(axis=1)
                    rest = np.maximum(1 - leverage, np.finfo(np.float64).eps)
                    logits = target - (target - logits) / rest[:, None]
                hits[i] += (logits.argmax(axis=1) == y[rows]).sum()
        return [float(h) for h in hits / len(x)]


class RidgeGram:
    """Centred float64 moments of a training set that arrives in batches; features need not be kept."""

    def __init__(self, d: int, n_classes: int) -> None:
        self.n = 0
        self.mean = np.zeros(d)
        self.offset = np.zeros(n_classes)
        self.gram = np.zeros((d, d))
        self.cross = np.zeros((d, n_classes))

    def update(self, x: ArrayLike, y: ArrayLike) -> None:
        """Adds rows [b d] with labels [b]; any split into batches gives the same moments up to rounding."""
        data = checked_pair(x, y, "training", len(self.mean))
        checked_labels(data.labels, len(self.offset), "training labels")
        for rows in _chunks(len(data.labels)):
            block, target = data.features[rows].astype(np.float64), _targets(data.labels[rows], len(self.offset))
            mean, offset = block.mean(axis=0), target.mean(axis=0)
            self._add(len(block), mean, offset, block - mean, target - offset)

    def merge(self, other: "RidgeGram") -> None:
        """Adds the rows that another accumulator has seen."""
        if self.cross.shape != other.cross.shape:
            raise ValueError(f"moments [d k] are {self.cross.shape} and {other.cross.shape}; expected the same")
        if other.n:
            self._add(other.n, other.mean, other.offset, np.zeros((0, len(self.mean))), np.zeros((0, len(self.offset))))
            self.gram += other.gram
            self.cross += other.cross

    def _add(self, n: int, mean: np.ndarray, offset: np.ndarray, block: np.ndarray, target: np.ndarray) -> None:
        # Pairwise update of centred moments: raw sums would lose the digits of features far from zero. The shift
        # between the two means enters as one more row, so that one product adds everything.
        total = self.n + n
        weight = np.sqrt(self.n * n / total)
        block = np.vstack([block, weight * (mean - self.mean)])
        self.gram += block.T @ block
        self.cross += block.T @ np.vstack([target, weight * (offset - self.offset)])
        self.mean += (mean - self.mean) * (n / total)
        self.offset += (offset - self.offset) * (n / total)
        self.n = total

    def fit(self, validation: Pair, *, alphas: Candidates = ALPHAS, standardize: bool = True) -> RidgeProbe:
        """As `fit_ridge`; leave-one-out needs the features, so a validation set must choose alpha."""
        if self.n < 2 or (self.offset == 1).any():
            raise ValueError(f"{self.n} training rows of fewer than two classes; update with at least two classes")
        held, path = checked_pair(*validation, "validation", len(self.mean)), positive("alphas", alphas)
        checked_labels(held.labels, len(self.offset), "validation labels")
        spectrum = self._spectrum(standardize)
        scores = spectrum.accuracies(held, path, leave_one_out=False)
        return spectrum.probe(choose("alpha", path, scores, "validation", prefer_large=True))

    def _spectrum(self, standardize: bool) -> _Spectrum:
        scale = _scale(self.mean, self.gram.diagonal() / self.n, standardize)
        values, vectors = np.linalg.eigh(self.gram / scale / scale[:, None])
        vectors = vectors / scale[:, None]
        return _Spectrum(self.n, self.mean, self.offset, np.maximum(values, 0), vectors, vectors.T @ self.cross)


def fit_ridge(
    x: ArrayLike,
    y: ArrayLike,
    *,
    alphas: Candidates = ALPHAS,
    validation: Pair | None = None,
    n_classes: int | None = None,
    standardize: bool = True,
) -> RidgeProbe:
    """Ridge classifier on features [n d] with labels [n] in [0, n_classes), at the alpha that scores best.

    Accuracy on `validation` (features, labels) chooses alpha, or without it exact leave-one-out on the training rows;
    equal scores go to the larger alpha. The fit itself uses the training rows only. `standardize` divides each feature
    by its standard deviation over all training rows (fixed during leave-one-out): one range of alphas fits all taps.
    Raises ValueError for mismatched shapes, a single class, non-finite features, alphas that are not positive.
    """
    train, held, n_classes = checked_sets(x, y, validation, n_classes)
    path = positive("alphas", alphas)
    n, d = train.features.shape
    if d > n:
        spectrum = _kernel_spectrum(train.features.astype(np.float64), train.labels, n_classes, standardize)
    else:
        gram = RidgeGram(d, n_classes)
        gram.update(train.features, train.labels)
        spectrum = gram._spectrum(standardize)
    scores = spectrum.accuracies(held or train, path, leave_one_out=held is None)
    by = "leave-one-out" if held is None else "validation"
    return spectrum.probe(choose("alpha", path, scores, by, prefer_large=True))


def _kernel_spectrum(x: Float64[np.ndarray, "n d"], y: Labels, n_classes: int, standardize: bool) -> _Spectrum:
    mean, target = x.mean(axis=0), _targets(y, n_classes)
    offset = target.mean(axis=0)
    x = x - mean
    scale = _scale(mean, np.square(x).mean(axis=0), standardize)
    x /= scale
    values, left = np.linalg.eigh(x @ x.T)
    # Centring leaves at least one zero eigenvalue; its direction has no right singular vector.
    kept = values > max(values[-1], 0) * len(x) * np.finfo(np.float64).eps
    values, left = values[kept], left[:, kept]
    vectors = x.T @ (left / np.sqrt(values)) / scale[:, None]
    cross = np.sqrt(values)[:, None] * (left.T @ (target - offset))
    return _Spectrum(len(x), mean, offset, values, vectors, cross)


def _scale(mean: Float[np.ndarray, " d"], variance: Float[np.ndarray, " d"], standardize: bool) -> np.ndarray:
    # A constant feature keeps scale 1: dividing by its rounding error would turn it into noise of unit variance.
    deviation = np.sqrt(variance)
    usable = deviation > 1e-10 * np.abs(mean)
    return np.where(usable & standardize, deviation, 1.0)


def _targets(y: Labels, n_classes: int) -> Float64[np.ndarray, "n k"]:
    return np.where(y[:, None] == np.arange(n_classes), 1.0, -1.0)


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, n, _ROWS))
