"""Heads compared on the same features: each fitted over several seeds, chosen on validation rows, and tested."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, stdev
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from repkit.heads.building import KINDS
from repkit.heads.rows import Examples
from repkit.heads.scores import accuracy, stratified_split
from repkit.heads.selection import checked_labels
from repkit.heads.trained import Training, fit_trained
from repkit.tasks.probe import HEADS


@dataclass(frozen=True)
class Rung:
    """A head's accuracies in [0, 1] on the test rows, one a seed, and the hyper-parameter that each seed chose."""

    head: str
    accuracies: tuple[float, ...]
    chosen: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for a single one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def fit_rung(
    head: str,
    train: Examples,
    test: Examples,
    *,
    n_classes: int,
    seeds: Sequence[int] = (0, 1, 2),
    shots: int | None = None,
    training: Training | None = None,
    lrs: Sequence[float] | None = None,
) -> Rung:
    """Fit a head once a seed, and measure each fit once on the test rows.

    head: a name of `repkit probe`, or difformer, whose features are a mapping of taps. A seed decides which fifth of
    each class chooses the hyper-parameter (the fit sees the rest only), and a trained head's first weights and order
    of rows. shots: fit on so many rows of each class; the rows that choose stay as many.
    """
    if head not in HEADS and head not in KINDS:
        raise ValueError(f"no head {head!r}; have {', '.join(dict.fromkeys([*HEADS, *KINDS]))}")
    if not seeds:
        raise ValueError("seeds is empty; give at least one")
    found = []
    for seed in seeds:
        fitted, held = stratified_split(train.labels, 0.2, seed)
        if shots is not None:
            fitted = fitted[few_shot_rows(train.labels[fitted], shots, seed)]
        fit = _fit(head, seed, training, lrs)
        seen, choosing = train[fitted], train[held]
        pair = choosing.features, choosing.labels
        probe = fit(seen.features, seen.labels, validation=pair, n_classes=n_classes)
        found.append((accuracy(test.labels, probe.predict(test.features)), float(probe.chosen.value)))
    return Rung(head, tuple(one for one, _ in found), tuple(value for _, value in found))


def few_shot_rows(labels: ArrayLike, shots: int, seed: int = 0) -> Int[np.ndarray, " m"]:
    """Ascending numbers of `shots` rows of each class, drawn by the seed.

    The draws of a seed are nested: fewer shots are a part of more. Raises ValueError where a class has fewer rows.
    """
    classes = checked_labels(labels)
    if shots < 1:
        raise ValueError(f"shots={shots}; give at least 1 row of each class")
    chosen = []
    for label, count in zip(*np.unique(classes, return_counts=True), strict=True):
        if count < shots:
            raise ValueError(f"class {label} has {count} rows and {shots} are asked for; give at most {count}")
        order = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(classes == label))
        chosen.append(order[:shots])
    return np.sort(np.concatenate(chosen))


def _fit(head: str, seed: int, training: Training | None, lrs: Sequence[float] | None) -> Callable[..., Any]:
    if head in KINDS:
        return partial(fit_trained, head, training=replace(training or Training(), seed=seed), lrs=lrs)
    fit, _ = HEADS[head]
    extra: Mapping[str, Any] = {"seed": seed, "refit": False} if head == "logistic" else {}
    return partial(fit, **extra)
