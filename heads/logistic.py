"""Multinomial logistic regression (scikit-learn, L-BFGS) along a path of C, on standardised features."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from repkit.heads.scores import accuracy, stratified_split
from repkit.heads.selection import Candidates, Choice, Labelled, Pair, checked_features, checked_sets, choose, positive

CS = tuple(10.0**e for e in range(-6, 3))
Fit = tuple[Float64[np.ndarray, "d k"], Float64[np.ndarray, " k"], bool]  # weight, bias, converged


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """A fitted logistic regression on raw (not standardised) features."""

    weight: Float64[np.ndarray, "d k"]
    bias: Float64[np.ndarray, " k"]
    chosen: Choice
    converged: bool
    unconverged: tuple[float, ...]  # candidates C whose fit ran out of iterations while C was being chosen

    def logits(self, x: ArrayLike) -> Float64[np.ndarray, "n k"]:
        """Unnormalised log-probabilities; -inf for a class that had no training rows."""
        return checked_features(x, width=len(self.weight)) @ self.weight + self.bias

    def predict(self, x: ArrayLike) -> Int[np.ndarray, " n"]:
        """The most probable class for each row."""
        return self.logits(x).argmax(axis=1)


def fit_logistic(
    x: ArrayLike,
    y: ArrayLike,
    *,
    cs: Candidates = CS,
    validation: Pair | None = None,
    seed: int = 0,
    refit: bool = True,
    n_classes: int | None = None,
    max_iter: int = 1000,
    tol: float = 1e-4,
) -> LogisticProbe:
    """Logistic regression on features [n d] with labels [n], at the C (inverse penalty) that scores best.

    C is chosen by accuracy on `validation` (features, labels), or without it on a tenth of each class that `seed` holds
    out; equal scores go to the smaller C. `refit` then fits once more at that C on training and validation rows
    together; without it the probe has seen the training rows only. A fit that runs out of `max_iter` iterations does
    not warn: see `converged` (of the final fit) and `unconverged` (of the path).
    Raises ValueError for mismatched shapes, a single class, non-finite features, cs that are not positive.
    """
    train, held, n_classes = checked_sets(x, y, validation, n_classes)
    by = "held-out" if held is None else "validation"
    if held is None:
        fitted, rest = stratified_split(train.labels, 0.1, seed)
        train, held = train[fitted], train[rest]
    path = positive("cs", cs)
    model = LogisticRegression(max_iter=max_iter, tol=tol, warm_start=True, random_state=seed)
    fits = _fit_path(model, train, path, n_classes)
    scores = [accuracy(held.labels, (held.features @ weight + bias).argmax(axis=1)) for weight, bias, _ in fits]
    chosen = choose("C", path, scores, by, prefer_large=False)
    weight, bias, converged = fits[path.index(chosen.value)]
    if refit:
        fresh = LogisticRegression(max_iter=max_iter, tol=tol, random_state=seed)
        ((weight, bias, converged),) = _fit_path(fresh, train + held, (chosen.value,), n_classes)
    unconverged = tuple(c for c, fit in zip(path, fits, strict=True) if not fit[2])
    return LogisticProbe(weight, bias, chosen, converged, unconverged)


def _fit_path(model: LogisticRegression, data: Labelled, path: Sequence[float], n_classes: int) -> list[Fit]:
    """A fit for each C, each starting from the one before where the model starts warm."""
    scaler = StandardScaler()
    rows = scaler.fit_transform(data.features.astype(np.float64))
    fits = []
    for c in path:
        converged = _converges(model.set_params(C=c), rows, data.labels)
        fits.append((*_on_raw_features(model, scaler, n_classes), converged))
    return fits


def _converges(model: LogisticRegression, x: Float64[np.ndarray, "n d"], y: Int[np.ndarray, " n"]) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y)
    stopped = [issubclass(w.category, ConvergenceWarning) for w in caught]
    for warning, expected in zip(caught, stopped, strict=True):
        if not expected:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return not any(stopped)


def _on_raw_features(
    model: LogisticRegression, scaler: StandardScaler, n_classes: int
) -> tuple[Float64[np.ndarray, "d k"], Float64[np.ndarray, " k"]]:
    coefficients, intercept = model.coef_.T, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps one column, the log-odds of the second class
        coefficients = np.hstack([np.zeros_like(coefficients), coefficients])
        intercept = np.concatenate([[0.0], intercept])
    weight = np.zeros((len(coefficients), n_classes))
    weight[:, model.classes_] = coefficients / scaler.scale_[:, None]
    bias = np.full(n_classes, -np.inf)
    bias[model.classes_] = intercept - scaler.mean_ @ weight[:, model.classes_]
    return weight, bias
