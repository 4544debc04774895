"""Exact search: products of matrices, a block of vectors at a time, and the best of each block.

FAISS's flat index compares 2 to some hundred queries one by one, and with a filter any number; this takes a fraction
of the time there. A single query is FAISS's.
"""

from collections.abc import Callable, Iterable, Iterator

import faiss
import numpy as np
from jaxtyping import Bool, Float32, Int64

from repkit.ann.single import candidates

METRICS = {"cosine": faiss.METRIC_INNER_PRODUCT, "ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
Vectors = Float32[np.ndarray, "n d"]
Found = tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]
Take = Callable[[Int64[np.ndarray, " b"]], Float32[np.ndarray, "b d"]]
Block = tuple[Float32[np.ndarray, "b d"], Int64[np.ndarray, " b"], Bool[np.ndarray, " b"] | None]

# Numbers in a block of vectors. One query reads each once, best from a cache; a product by several threads should be
# large, since on a machine that is busy, or limited in its processors, each product may have to wait for a thread.
_BLOCK, _PRODUCT = 1 << 20, 1 << 24
_QUERIES = 256  # of a product, which bounds its scores
_FETCHED = 0.7  # of the vectors: below this share, to fetch the allowed ones is less work
SPARE = 8  # candidates beside the k: products of other shapes round another way, and so would choose others


def nearest(
    vectors: Vectors,
    queries: Float32[np.ndarray, "q d"],
    k: int,
    *,
    metric: str,
    allowed: Bool[np.ndarray, " n"] | None = None,
) -> Found:
    """Scores and rows of the k nearest allowed vectors of each query, nearest first; of equal ones, the lower row.

    scores: inner products (cosines, of vectors of `unit`), or for "l2" Euclidean distances; where there are fewer
    than k, and where float32 overflows, -inf (for "l2" inf) and row -1. A score is the same in any batch of queries.
    """
    if len(queries) == 1:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is never chosen
            rows = candidates(vectors, queries, k, SPARE, metric=metric, allowed=allowed)
            return rescored(vectors.__getitem__, queries, rows, k, metric=metric)
    found = by_products(vectors, queries, k + SPARE, metric=metric, allowed=allowed)
    return with_lower_rows(found, vectors, queries, k, metric=metric, allowed=allowed)


def with_lower_rows(
    found: tuple[Float32[np.ndarray, "q c"], Int64[np.ndarray, "q c"]],
    vectors: Vectors,
    queries: Float32[np.ndarray, "q d"],
    k: int,
    *,
    metric: str,
    allowed: Bool[np.ndarray, " n"] | None = None,
) -> Found:
    """The k best of those that products found with some spare ones, and of equally near ones, the lower rows.

    Where even the last of the spare ones is as near as the k-th, there may be lower rows that are too: such a query is
    asked again, alone.
    """
    scores, rows = found
    tied = np.flatnonzero((rows[:, -1] >= 0) & (scores[:, k - 1] == scores[:, -1]))
    scores, rows = scores[:, :k], rows[:, :k]
    for query in tied if len(vectors) > found[1].shape[1] else ():
        one = slice(query, query + 1)
        scores[one], rows[one] = nearest(vectors, queries[one], k, metric=metric, allowed=allowed)
    return scores, rows


def by_products(
    vectors: Vectors,
    queries: Float32[np.ndarray, "q d"],
    k: int,
    *,
    metric: str,
    allowed: Bool[np.ndarray, " n"] | None = None,
) -> Found:
    """As `nearest`, but of very many equally near vectors, any."""
    if allowed is not None and np.count_nonzero(allowed) < _FETCHED * len(vectors):
        return nearest_rows(vectors.__getitem__, np.flatnonzero(allowed), queries, k, metric=metric)
    blocks = _slices(vectors, allowed, _rows_a_block(queries))
    return _nearest_of(blocks, vectors.__getitem__, queries, k, metric)


def nearest_rows(
    take: Take, rows: Int64[np.ndarray, " m"], queries: Float32[np.ndarray, "q d"], k: int, *, metric: str
) -> Found:
    """As `by_products`, among the rows given; `take` fetches the vectors of some rows."""
    step = _rows_a_block(queries)
    parts = (rows[start : start + step] for start in range(0, len(rows), step))
    return _nearest_of(((take(part), part, None) for part in parts), take, queries, k, metric)


def rescored(
    take: Take, queries: Float32[np.ndarray, "q d"], rows: Int64[np.ndarray, "q c"], k: int, *, metric: str
) -> Found:
    """The k best of each query's candidate rows, by their exact scores; row -1 is none."""
    worst = np.inf if metric == "l2" else -np.inf
    scores = np.full((len(queries), max(k, rows.shape[1])), worst, np.float32)
    chosen = np.full(scores.shape, -1)
    step = max(1, _BLOCK // max(1, rows.shape[1] * queries.shape[1]))
    for start in range(0, len(queries) if rows.size and (rows >= 0).any() else 0, step):
        part = slice(start, start + step)
        found = rows[part]
        known = take(np.where(found < 0, rows.max(), found).ravel()).reshape(*found.shape, queries.shape[1])
        exact = _scores(known, queries[part, None], metric)
        good = (found >= 0) & np.isfinite(exact)
        exact, found = np.where(good, exact, np.float32(worst)), np.where(good, found, -1)
        order = np.arange(len(found))[:, None], np.lexsort((found, exact if metric == "l2" else -exact), axis=1)
        scores[part, : found.shape[1]], chosen[part, : found.shape[1]] = exact[order], found[order]
    return scores[:, :k], chosen[:, :k]


def unit(vectors: Vectors) -> Vectors:
    """Rows scaled to length 1; in float64, since squares of float32 overflow. Zeros stay zeros."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.ascontiguousarray((vectors / np.where(norms == 0, 1, norms)).astype(np.float32))


def _rows_a_block(queries: Float32[np.ndarray, "q d"]) -> int:
    return max(1, (_BLOCK if len(queries) == 1 else _PRODUCT) // max(1, queries.shape[1]))


def _slices(vectors: Vectors, allowed: Bool[np.ndarray, " n"] | None, step: int) -> Iterator[Block]:
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step]
        part = None if allowed is None else allowed[start : start + step]
        yield block, np.arange(start, start + len(block)), part


def _nearest_of(blocks: Iterable[Block], take: Take, queries: Float32[np.ndarray, "q d"], k: int, metric: str) -> Found:
    best = np.full((len(queries), k + SPARE), -np.inf, np.float32)
    rows = np.full(best.shape, -1)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is never chosen
        for vectors, names, allowed in blocks:
            for start in range(0, len(queries), _QUERIES):
                part = slice(start, start + _QUERIES)
                scores = _closeness(vectors, queries[part], metric)
                if allowed is not None:
                    np.copyto(scores, -np.inf, where=~allowed)
                _keep_best(best[part], rows[part], scores, names)
        return rescored(take, queries, rows, k, metric=metric)


def _closeness(
    vectors: Float32[np.ndarray, "b d"], queries: Float32[np.ndarray, "q d"], metric: str
) -> Float32[np.ndarray, "q b"]:
    """Of which more is nearer: for "l2" what orders as the negative distance does."""
    products = np.einsum("bd,d->b", vectors, queries[0])[None] if len(queries) == 1 else queries @ vectors.T
    return 2 * products - np.einsum("bd,bd->b", vectors, vectors) if metric == "l2" else products


def _keep_best(
    best: Float32[np.ndarray, "q c"],
    rows: Int64[np.ndarray, "q c"],
    scores: Float32[np.ndarray, "q b"],
    names: Int64[np.ndarray, " b"],
) -> None:
    """Merge a block's scores into the best so far, which are sorted; most blocks hold nothing better for most."""
    better = np.flatnonzero(~(scores.max(1) <= best[:, -1]))  # a NaN hides what is beside it
    if not len(better):
        return
    found, places = _largest(scores[better], best.shape[1])
    both = np.concatenate([best[better], found], 1)
    named = np.concatenate([rows[better], np.where(places < 0, -1, names[places])], 1)
    found, places = _largest(both, best.shape[1])
    best[better] = found
    rows[better] = np.where(places < 0, -1, np.take_along_axis(named, places, 1))


def _largest(scores: Float32[np.ndarray, "q b"], k: int) -> Found:
    """The k largest of each row, sorted, and their places: -1, with -inf, where fewer are finite."""
    k = min(k, scores.shape[1])
    if len(scores) > 2:
        found, places = faiss.kmax(scores, k)
        return np.where(places < 0, np.float32(-np.inf), found), places
    places = np.argpartition(-scores, k - 1, axis=1)[:, :k]  # FAISS would start threads for so little
    found = np.take_along_axis(scores, places, 1)
    order = np.argsort(-found, axis=1)
    found, places = np.take_along_axis(found, order, 1), np.take_along_axis(places, order, 1)
    known = np.isfinite(found)
    return np.where(known, found, np.float32(-np.inf)), np.where(known, places, -1)


def _scores(
    vectors: Float32[np.ndarray, "q c d"], queries: Float32[np.ndarray, "q 1 d"], metric: str
) -> Float32[np.ndarray, "q c"]:
    if metric == "l2":
        return np.sqrt(np.square(vectors - queries).sum(2))
    return (vectors * queries).sum(2)
