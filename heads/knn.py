"""Weighted k-nearest-neighbour classifier on cosine similarity (exact FAISS search)."""

from dataclasses import dataclass

import faiss
import numpy as np
from jaxtyping import Float32, Float64, Int
from numpy.typing import ArrayLike

from repkit.heads.scores import accuracy
from repkit.heads.selection import (
    Candidates,
    Choice,
    Labels,
    Pair,
    Rows,
    checked_features,
    checked_sets,
    choose,
    positive,
)

KS = (1, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True, eq=False)
class KnnProbe:
    """The training rows and the number of neighbours that vote."""

    index: faiss.IndexFlatIP
    labels: Labels
    n_classes: int
    temperature: float
    chosen: Choice

    def logits(self, x: ArrayLike) -> Float64[np.ndarray, "n k"]:
        """Log of each class's share of the votes; -inf for a class without a vote."""
        queries = _unit(checked_features(x, width=self.index.d))
        similarity, neighbours = self.index.search(queries, int(self.chosen.value))
        votes = _votes(similarity, self.labels[neighbours], self.temperature, self.n_classes)
        with np.errstate(divide="ignore"):
            return np.log(votes / votes.sum(axis=1, keepdims=True))

    def predict(self, x: ArrayLike) -> Int[np.ndarray, " n"]:
        """The class with the most votes for each row."""
        return self.logits(x).argmax(axis=1)


def fit_knn(
    x: ArrayLike,
    y: ArrayLike,
    *,
    ks: Candidates = KS,
    temperature: float = 0.07,
    validation: Pair | None = None,
    n_classes: int | None = None,
) -> KnnProbe:
    """Classifier by the k training rows of highest cosine similarity, voting with weight exp(similarity / temperature).

    k is chosen by accuracy on `validation` (features, labels), or without it by leave-one-out on the training rows;
    equal scores go to the larger k. One search at the largest k serves all of them, and a k above the number of rows
    means all rows.
    Raises ValueError for mismatched shapes, a single class, non-finite features, ks or temperature that are not > 0.
    """
    train, held, n_classes = checked_sets(x, y, validation, n_classes)
    (temperature,) = positive("temperature", [temperature])
    bank = _unit(train.features)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    if held is None:
        path, by, truth = _ks(ks, len(bank) - 1), "leave-one-out", train.labels
        similarity, neighbours = _others(*index.search(bank, path[-1] + 1))
    else:
        path, by, truth = _ks(ks, len(bank)), "validation", held.labels
        similarity, neighbours = index.search(_unit(held.features), path[-1])
    found = train.labels[neighbours]
    votes = (_votes(similarity[:, :k], found[:, :k], temperature, n_classes) for k in path)
    scores = [accuracy(truth, v.argmax(axis=1)) for v in votes]
    chosen = choose("k", path, scores, by, prefer_large=True)
    return KnnProbe(index, train.labels.copy(), n_classes, temperature, chosen)


def _ks(ks: Candidates, rows: int) -> list[int]:
    return sorted({min(int(k), rows) for k in positive("ks", ks)})


def _unit(x: Rows) -> Float32[np.ndarray, "n d"]:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.ascontiguousarray(x / np.maximum(norm, np.finfo(np.float32).tiny), dtype=np.float32)


def _others(similarity: np.ndarray, neighbours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drops each row from its own list of k + 1, or the last of the list where many duplicates have crowded it out."""
    own = neighbours == np.arange(len(neighbours))[:, None]
    own[~own.any(axis=1), -1] = True
    shape = len(own), -1
    return similarity[~own].reshape(shape), neighbours[~own].reshape(shape)


def _votes(
    similarity: Float32[np.ndarray, "n j"], labels: Int[np.ndarray, "n j"], temperature: float, n_classes: int
) -> Float64[np.ndarray, "n k"]:
    # Relative to the nearest row, so that a small temperature cannot overflow.
    weight = np.exp((similarity.astype(np.float64) - similarity[:, :1]) / temperature)
    cell = np.arange(len(labels))[:, None] * n_classes + labels
    return np.bincount(cell.ravel(), weight.ravel(), len(labels) * n_classes).reshape(-1, n_classes)
