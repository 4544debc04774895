"""Recall, measured on queries that are not in the index, and the least effort that reaches it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from repkit.ann.nearest import Found, Vectors, by_products, rescored
from repkit.ann.searching import TUNED_FOR

_MOST_HELD_OUT, _SHARE = 4000, 10
NEGLIGIBLE = 0.005  # how far a recall may be below the one asked for

Queries = Float32[np.ndarray, "q d"]


@dataclass(frozen=True, eq=False)
class Trial:
    """Queries with the score of their 10th nearest vector: what a search finds at least as near is right.

    So of vectors equally near, whichever is found counts.
    """

    vectors: Vectors
    queries: Queries
    limits: Float32[np.ndarray, " q"]
    metric: str

    def recalls(self, search: Callable[[Queries, int], Found]) -> Float64[np.ndarray, " q"]:
        """Each query's share of its 10 nearest that a search finds."""
        rows = search(self.queries, TUNED_FOR)[1]
        scores = rescored(self.vectors.__getitem__, self.queries, rows, TUNED_FOR, metric=self.metric)[0]
        limits = self.limits[:, None]
        right = (scores <= limits) if self.metric == "l2" else (scores >= limits)
        return (right & (rows >= 0)).mean(1)


def held_out(count: int, seed: int) -> Int64[np.ndarray, " h"]:
    """Rows to leave out while an index is tuned: a tenth, at most 4,000, in random order."""
    return np.random.default_rng(seed).permutation(count)[: min(_MOST_HELD_OUT, count // _SHARE)]


def distinct(queries: Queries) -> Float32[np.ndarray, "r d"]:
    """The first of each that is there several times: their neighbours are easily found, and hide what others miss."""
    first = np.unique(queries, axis=0, return_index=True)[1]
    return queries[np.sort(first)]


def trials(
    vectors: Vectors, queries: Queries, metric: str, allowed: Bool[np.ndarray, " n"] | None
) -> tuple[Trial, Trial]:
    """Every second query to tune by, and the others to measure with; compared with the allowed vectors."""
    limits = by_products(vectors, queries, TUNED_FOR, metric=metric, allowed=allowed)[0][:, -1]
    first, second = (Trial(vectors, queries[start::2], limits[start::2], metric) for start in (0, 1))
    return first, second


def reaches(recalls: Float64[np.ndarray, " q"], recall: float) -> bool:
    """Whether the mean is the asked recall, and so sure that as many other queries' is not far below it.

    The difference of two such means has twice the variance of one; twice its standard error holds 39 times of 40.
    """
    error = (2 * recalls.var() / len(recalls)) ** 0.5
    return bool(recalls.mean() >= recall and recalls.mean() - 2 * error >= recall - NEGLIGIBLE)


def smallest(good: Callable[[int], bool], highest: int) -> int:
    """The smallest number from 1 to the highest that is good; the highest where none is."""
    high = 1
    while high < highest and not good(high):
        high = min(2 * high, highest)
    if not good(high):
        return high
    low = high // 2  # not good, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high
