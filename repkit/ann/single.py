"""One query: FAISS compares it with vectors where they lie, and where few are allowed with no others."""

from typing import Any

import faiss as _faiss
import numpy as np
from jaxtyping import Bool, Float32, Int64

faiss: Any = _faiss  # whose stubs lack what its Python adds
_LISTED = 0.6  # of the vectors: below this share, to go through a list of the allowed rows is less work
_NEARLY_ALL = 0.95  # of the vectors: below this share, to compare with all is less work than to ask about each
_GROUP, _MORE = 64, 4  # values in a group, and times as many as are wanted, to find so many allowed ones among

Vectors = Float32[np.ndarray, "n d"]
Query = Float32[np.ndarray, "1 d"]
Rows = Int64[np.ndarray, " c"]
Allowed = Bool[np.ndarray, " n"]
Nearness = Float32[np.ndarray, " n"]


def candidates(
    vectors: Vectors, query: Query, k: int, spare: int, *, metric: str, allowed: Allowed | None = None
) -> Int64[np.ndarray, "1 c"]:
    """Rows of the k nearest and of some spare ones, since float32 rounds; of equally near ones, the lower; -1 is none.

    Of equal products, FAISS may drop a lower row for a better one that comes later. So where the spare rows are as
    near as the k-th, the lower ones are looked for again.
    """
    vectors, query = (np.ascontiguousarray(array, np.float32) for array in (vectors, query))
    assert vectors.shape[1] == query.shape[1]  # FAISS would read on
    number = len(vectors) if allowed is None else int(np.count_nonzero(allowed))
    count = min(k + spare, number)
    if not count:
        return np.empty((1, 0), np.int64)
    if allowed is None or not _LISTED <= number / len(vectors) < _NEARLY_ALL:
        scores, rows = _searched(vectors, query, count, metric, _selector(allowed, number))
        if metric == "l2" or (np.isfinite(scores[0, 0]) and (k >= count or scores[0, k - 1] > scores[0, -1])):
            return rows
    return _among(_nearness(vectors, query, metric), allowed, count)[None]


def _selector(allowed: Allowed | None, number: int) -> Any:
    """Of a list, FAISS visits only the rows that are in it, while it asks any other selector about each vector.

    It is given a selector even of all: without one, it shares a single query among threads, which on a machine that is
    busy, or limited in its processors, takes several times as long.
    """
    if allowed is None:
        return faiss.IDSelectorAll()
    if number < _LISTED * len(allowed):
        return faiss.IDSelectorArray(np.flatnonzero(allowed))
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def _searched(
    vectors: Vectors, query: Query, count: int, metric: str, selector: Any
) -> tuple[Float32[np.ndarray, "1 c"], Int64[np.ndarray, "1 c"]]:
    scores, rows = np.empty((1, count), np.float32), np.empty((1, count), np.int64)
    given = faiss.swig_ptr(query), faiss.swig_ptr(vectors), vectors.shape[1], 1, len(vectors), count
    if metric == "l2":
        faiss.knn_L2sqr(*given, faiss.swig_ptr(scores), faiss.swig_ptr(rows), None, selector)
    else:
        faiss.knn_inner_product(*given, faiss.swig_ptr(scores), faiss.swig_ptr(rows), selector)
    return scores, rows


def _nearness(vectors: Vectors, query: Query, metric: str) -> Nearness:
    """Of which more is nearer; -inf where float32 overflows."""
    near = np.empty(len(vectors), np.float32)
    compare = faiss.fvec_L2sqr_ny if metric == "l2" else faiss.fvec_inner_products_ny
    compare(*(faiss.swig_ptr(array) for array in (near, query, vectors)), vectors.shape[1], len(vectors))
    if metric == "l2":
        np.negative(near, near)
    if not np.isfinite(near.sum()):  # the sum is cheap
        near[~np.isfinite(near)] = -np.inf
    return near


def _among(near: Nearness, allowed: Allowed | None, count: int) -> Rows:
    """The nearest that are allowed, which are looked for among some times as many of all, as most often most are.

    The largest of each group of values, which are soon found, tell how near so many are at least.
    """
    groups = len(near) // _GROUP
    if groups > _MORE * count:
        tops = near[: groups * _GROUP].reshape(_GROUP, groups).max(0)
        rows = np.flatnonzero(near >= np.partition(tops, -_MORE * count)[-_MORE * count])
        rows = rows if allowed is None else rows[allowed[rows]]
        if len(rows) >= count:
            return rows[_largest(near[rows], count)]
    rows = np.arange(len(near)) if allowed is None else np.flatnonzero(allowed)
    return rows[_largest(near[rows], count)]


def _largest(values: Float32[np.ndarray, " m"], count: int) -> Rows:
    """The places of the largest, in no order; of equal ones, the first."""
    limit = np.partition(values, -count)[-count]
    above, equal = np.flatnonzero(values > limit), np.flatnonzero(values == limit)
    return np.concatenate([above, equal[: count - len(above)]])
