"""Heads trained by SGD, fitted as the closed-form ones are: learning rates compete on validation data."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Int
from numpy.typing import ArrayLike
from torch import nn

from repkit.heads.building import KINDS, WIDTH, build_head
from repkit.heads.rows import Array, Examples, Inputs, ScaledRows, channel_moments
from repkit.heads.scores import accuracy, stratified_split
from repkit.heads.selection import Candidates, Choice, checked_labels, choose, positive
from repkit.heads.training import Candidate, logits_of, train_heads

EPOCHS = 20
Moments = Mapping[str, tuple[Float32[np.ndarray, " _c"], Float32[np.ndarray, " _c"]]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Training:
    """How a head is trained; seed: of its first weights, of the order of the rows, and of rows held out."""

    epochs: int = EPOCHS
    batch_size: int = 64
    weight_decay: float = 0.0
    width: int = WIDTH
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")


@dataclass(frozen=True, eq=False)
class TrainedProbe:
    """A trained head, and the moments of the training features, by which whatever it reads is scaled."""

    head: nn.Module
    moments: Moments
    chosen: Choice

    def logits(self, x: Inputs) -> Float32[np.ndarray, "n k"]:
        """Unnormalised log-probabilities."""
        data = Examples(x, np.zeros(0, np.int64))
        return logits_of([Candidate(self.head, self.chosen.value, data.key)], _scaled(data, self.moments))[0]

    def predict(self, x: Inputs) -> Int[np.ndarray, " n"]:
        """The most probable class for each row."""
        return self.logits(x).argmax(axis=1)


def fit_trained(
    kind: str,
    x: Inputs,
    y: ArrayLike,
    *,
    lrs: Candidates | None = None,
    validation: tuple[Inputs, ArrayLike] | None = None,
    n_classes: int | None = None,
    training: Training | None = None,
    progress: Progress | None = None,
) -> TrainedProbe:
    """Train a head of `build_head` on features [n c] or [n c h w] (difformer: by tap), at all learning rates at once.

    Accuracy on `validation` (features, labels) chooses the rate, or without it on a tenth of each class that the seed
    holds out, after which the head is trained once more on all rows; a single rate needs no choice. Features are
    scaled by each channel's mean and deviation over the training rows. All rates start from the same weights.
    `progress` is told epochs. Raises ValueError for mismatched inputs, a single class, and rates that all diverge.
    """
    training = training or Training()
    path = positive("lrs", KINDS.get(kind, (1.0,)) if lrs is None else lrs)
    data = _checked(x, y, "training")
    held = None if validation is None else _checked(*validation, "validation")
    n_classes = _count_classes(data, held, n_classes)
    if held is None and len(path) > 1:
        fitted, rest = stratified_split(data.labels, 0.1, training.seed)
        chosen = _fit(kind, data[fitted], path, data[rest], n_classes, training, None).chosen
        probe = _fit(kind, data, [chosen.value], None, n_classes, training, progress)
        return replace(probe, chosen=replace(chosen, by="held-out"))
    return _fit(kind, data, path, held, n_classes, training, progress)


def _fit(
    kind: str,
    data: Examples,
    path: Sequence[float],
    held: Examples | None,
    n_classes: int,
    training: Training,
    progress: Progress | None,
) -> TrainedProbe:
    """Train at each rate of the path, and keep the head that is best on the rows held out."""
    moments = {key: channel_moments(array) for key, array in data.by_key.items()}
    candidates = _candidates(kind, data, path, n_classes, training)
    epoch = math.ceil(len(data.labels) / training.batch_size)
    if progress:
        progress(0, training.epochs)
    train_heads(
        candidates,
        _scaled(data, moments),
        data.labels,
        steps=epoch * training.epochs,
        batch_size=training.batch_size,
        seed=training.seed,
        progress=None if progress is None else _epochs(progress, epoch),
    )
    if held is None:
        return TrainedProbe(candidates[0].head, moments, Choice("lr", path[0], tuple(path), (), "given"))
    logits = logits_of(candidates, _scaled(held, moments))
    finite = [bool(np.isfinite(one).all()) for one in logits]
    if not any(finite):
        raise ValueError(f"{kind} diverged at every learning rate of {', '.join(f'{lr:g}' for lr in path)}; give less")
    scores = [accuracy(held.labels, one.argmax(1)) if ok else 0.0 for one, ok in zip(logits, finite, strict=True)]
    chosen = choose("lr", path, scores, "validation", prefer_large=False)
    return TrainedProbe(candidates[path.index(chosen.value)].head, moments, chosen)


def _candidates(
    kind: str, data: Examples, path: Sequence[float], n_classes: int, training: Training
) -> list[Candidate]:
    """The same fresh head once for each rate."""
    sizes = {key: array.shape[1:] for key, array in data.by_key.items()}
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        head = build_head(kind, sizes, n_classes, training.width).to(training.device)
    return [Candidate(deepcopy(head), lr, data.key, training.weight_decay) for lr in path]


def _epochs(progress: Progress, epoch: int) -> Progress:
    def told(step: int, steps: int) -> None:
        if step % epoch == 0:
            progress(step // epoch, steps // epoch)

    return told


def _scaled(data: Examples, moments: Moments) -> Mapping[str, Array]:
    return {key: ScaledRows(array, *moments[key]) for key, array in data.by_key.items()}


def _checked(x: Inputs, y: ArrayLike, what: str) -> Examples:
    """The features with a label for each row of every array."""
    data = Examples(x, checked_labels(y, what=f"{what} labels"))
    n = len(data.labels)
    for array in data.by_key.values():
        if len(array.shape) not in (2, 4):
            raise ValueError(f"{what} features have shape {tuple(array.shape)}; expected [n c] or [n c h w]")
        if len(array) != n or not n:
            raise ValueError(f"{len(array)} rows of {what} features but {n} labels; expected as many, not 0")
    return data


def _count_classes(data: Examples, held: Examples | None, n_classes: int | None) -> int:
    """By default one more than the largest label."""
    if len(np.unique(data.labels)) < 2:
        raise ValueError(
            f"all {len(data.labels)} training labels are class {data.labels[0]}; a head needs at least two classes"
        )
    labels = data.labels if held is None else np.concatenate([data.labels, held.labels])
    count = int(labels.max()) + 1 if n_classes is None else n_classes
    checked_labels(labels, count)
    return count
