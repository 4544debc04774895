"""Search of a FAISS index: exactly where a filter allows few vectors, else by the graph or the lists that it built."""

from math import ceil
from typing import Any

import faiss as _faiss
import numpy as np
from jaxtyping import Bool, Float32, Int64

from repkit.ann.nearest import SPARE, Found, Vectors, nearest, nearest_rows, rescored, with_lower_rows

faiss: Any = _faiss  # whose stubs lack what its Python adds
TUNED_FOR = 10  # hits: what ef and nprobe are tuned for
CANDIDATES = 16  # for each hit, from compressed vectors: they are scored again with the whole ones
_PRODUCTS = 8  # so much faster is a vector compared with each query of a batch at once than with one after another

Queries = Float32[np.ndarray, "q d"]
Allowed = Bool[np.ndarray, " n"]


def search_vectors(
    index: Any,
    queries: Queries,
    k: int,
    *,
    metric: str,
    allowed: Allowed | None = None,
    exact: bool = False,
    ef: int | None = None,
    nprobe: int | None = None,
    raw: Vectors | None = None,
) -> Found:
    """Scores and rows of the k nearest vectors that are allowed, nearest first; the index stays as it is.

    index: what `build_vectors` made. scores: inner products, or Euclidean distances for "l2"; -inf (for "l2" inf) and
    row -1 where fewer than k are allowed. exact: compare with every allowed vector, as "flat" always does. ef and
    nprobe stand in for the tuned ones of "hnsw", and of "ivf" and "ivf-pq"; other kinds have none and take no notice.
    raw: the vectors that were indexed, without which "ivf-pq" has compressed ones only and so cannot be exact.
    Raises ValueError for queries of another dimension or not finite, and for k, ef or nprobe below 1.
    """
    check_search(index, queries, k, allowed=allowed, ef=ef, nprobe=nprobe)
    number = index.ntotal if allowed is None else int(np.count_nonzero(allowed))
    allowed = None if number == index.ntotal else allowed
    wanted = min(k, number)
    if not wanted or not len(queries):
        found = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    elif sees_all(index, number, len(queries), wanted, exact=exact, ef=ef, nprobe=nprobe, raw=raw):
        found = _exact(index, raw, queries, wanted, metric, allowed)
    elif kind_of(index) == "hnsw":
        found = _walked(index, queries, wanted, metric, allowed, ef or _walk(index, wanted))
    else:
        found = _probed(index, raw, queries, wanted, metric, allowed, nprobe or index.nprobe)
    return _filled_up(*found, k, metric)


def check_search(
    index: Any,
    queries: Queries,
    k: int,
    *,
    allowed: Allowed | None = None,
    ef: int | None = None,
    nprobe: int | None = None,
) -> None:
    """Raise ValueError for what FAISS would answer with an assertion, a crash or nothing."""
    if queries.ndim != 2 or queries.shape[1] != index.d:
        raise ValueError(f"queries have shape {queries.shape}; give [q {index.d}], as long as the vectors of the index")
    if not np.isfinite(queries).all():
        raise ValueError("a query is not finite; leave out NaN and infinities")
    if allowed is not None and allowed.shape != (index.ntotal,):
        raise ValueError(f"allowed has shape {allowed.shape}; give one value for each of {index.ntotal} vectors")
    for name, value in (("k", k), ("ef", ef), ("nprobe", nprobe)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; give at least 1")


def kind_of(index: Any) -> str:
    """The kind of a FAISS index; ValueError for one that `build_vectors` does not make."""
    kinds = {"IndexFlat": "flat", "IndexHNSWFlat": "hnsw", "IndexIVFFlat": "ivf", "IndexIVFPQ": "ivf-pq"}
    for name, kind in kinds.items():
        if isinstance(index, getattr(faiss, name)):
            return kind
    raise ValueError(f"a FAISS {type(index).__name__} is not one of {', '.join(kinds)}")


def reconstruct(index: Any, rows: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "m d"]:
    """The vectors of some rows as the index holds them: of "ivf-pq", what their compression has left.

    Raises ValueError for rows that are not there.
    """
    if len(rows) and not 0 <= rows.min() <= rows.max() < index.ntotal:
        raise ValueError(f"rows {rows.min()} to {rows.max()}; the index has 0 to {index.ntotal - 1}")
    whole = vectors_of(index)
    if whole is not None:
        return whole[rows]
    return index.reconstruct_batch(rows) if len(rows) else np.empty((0, index.d), np.float32)


def vectors_of(index: Any) -> Vectors | None:
    """The vectors of a "flat" or "hnsw" index, in its own memory and for as long as it lives; None of other kinds."""
    kind = kind_of(index)
    if kind not in ("flat", "hnsw"):
        return None
    flat = faiss.downcast_index(index.storage) if kind == "hnsw" else index
    vectors = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
    vectors.flags.writeable = False
    return vectors


def _exact(index: Any, raw: Vectors | None, queries: Queries, k: int, metric: str, allowed: Allowed | None) -> Found:
    whole = vectors_of(index) if raw is None else raw
    if whole is not None:
        if _multiplies(index, len(queries), k, allowed):
            rows = index.search(queries, min(k + SPARE, index.ntotal))[1]
            found = rescored(whole.__getitem__, queries, rows, rows.shape[1], metric=metric)
            return with_lower_rows(found, whole, queries, k, metric=metric)
        return nearest(whole, queries, k, metric=metric, allowed=allowed)
    if kind_of(index) == "ivf-pq":
        raise ValueError('"ivf-pq" holds compressed vectors only; give raw= for an exact search')
    rows = np.arange(index.ntotal) if allowed is None else np.flatnonzero(allowed)
    return nearest_rows(index.reconstruct_batch, rows, queries, k, metric=metric)


def _multiplies(index: Any, queries: int, k: int, allowed: Allowed | None) -> bool:
    """Whether to let FAISS multiply matrices: unfiltered, from its threshold on, which a service sets.

    Only for few hits: of many it keeps, of equally near ones, not the lower rows.
    """
    enough = queries * index.d >= faiss.cvar.distance_compute_blas_threshold
    few = k + SPARE < faiss.cvar.distance_compute_min_k_reservoir
    return kind_of(index) == "flat" and queries > 1 and allowed is None and enough and few


def sees_all(
    index: Any,
    number: int,
    queries: int,
    k: int,
    *,
    exact: bool = False,
    ef: int | None = None,
    nprobe: int | None = None,
    raw: Vectors | None = None,
) -> bool:
    """Whether a search compares with every one of `number` allowed vectors, so that its hits are exact.

    It does where that is less work than to look for them among the others: an unfiltered search sees so many vectors,
    and with a filter it must see more, by 1 / the share that is allowed.
    """
    kind = kind_of(index)
    if exact or kind == "flat":
        return True
    if number == index.ntotal or (kind == "ivf-pq" and raw is None):
        return False
    if kind == "hnsw":
        seen = (ef or _walk(index, k)) * index.hnsw.nb_neighbors(0)
    else:
        seen = (nprobe or index.nprobe) * index.ntotal / index.nlist
    return number * number <= min(queries, _PRODUCTS) * seen * index.ntotal


def _walk(index: Any, k: int) -> int:
    """The tuned ef, which is for 10 hits, and in proportion for more."""
    return ceil(index.hnsw.efSearch * max(1, k / TUNED_FOR))


def _walked(index: Any, queries: Queries, k: int, metric: str, allowed: Allowed | None, ef: int) -> Found:
    """By the graph, which is walked further the fewer vectors are allowed.

    Where those it meets are fewer than their share, as with a filter that has nothing near the query, or where it
    finds too few because the graph falls into parts, the query is compared with all.
    """
    number, wanted = index.ntotal, k
    parameters: dict[str, Any] = {"efSearch": min(ef, index.ntotal)}
    if allowed is not None:
        number = int(np.count_nonzero(allowed))
        wanted = min(max(k, ef // 2), number)
        parameters = {"efSearch": min(ceil(ef * index.ntotal / number), index.ntotal), "sel": _selector(allowed)}
    scores, rows = index.search(queries, wanted, params=faiss.SearchParametersHNSW(**parameters))
    short = np.flatnonzero((rows < 0).any(1))
    scores, rows = _distances(scores[:, :k], metric), rows[:, :k]
    if len(short):
        scores[short], rows[short] = _exact(index, None, queries[short], k, metric, allowed)
    return scores, rows


def _probed(
    index: Any, raw: Vectors | None, queries: Queries, k: int, metric: str, allowed: Allowed | None, nprobe: int
) -> Found:
    """By the lists of the nearest centroids, of more of them the fewer vectors are allowed.

    Where these hold fewer than their share, as with a filter that has nothing near the query, or fewer than k, the
    query is compared with all. With compressed and `raw` vectors, the best are scored again.
    """
    parameters: dict[str, Any] = {"nprobe": min(nprobe, index.nlist)}
    lonely = np.zeros(len(queries), bool)
    if allowed is not None:
        probes = min(ceil(nprobe * index.ntotal / int(np.count_nonzero(allowed))), index.nlist)
        parameters = {"nprobe": probes, "sel": _selector(allowed)}
        lonely = 2 * _held(index, queries, allowed, probes) < nprobe * index.ntotal / index.nlist
    compressed = kind_of(index) == "ivf-pq" and raw is not None
    wanted = min(k * CANDIDATES, index.ntotal) if compressed else k
    scores, rows = index.search(queries, wanted, params=faiss.SearchParametersIVF(**parameters))
    if raw is not None and compressed:
        scores, rows = rescored(raw.__getitem__, queries, rows, k, metric=metric)
    else:
        scores = _distances(scores, metric)
    again = np.flatnonzero(lonely | (rows < 0).any(1))
    if not len(again) or parameters["nprobe"] == index.nlist:
        return scores, rows
    if allowed is None or (kind_of(index) == "ivf-pq" and raw is None):
        scores[again], rows[again] = _probed(index, raw, queries[again], k, metric, allowed, index.nlist)
    else:
        scores[again], rows[again] = _exact(index, raw, queries[again], k, metric, allowed)
    return scores, rows


def _held(index: Any, queries: Queries, allowed: Allowed, probes: int) -> Int64[np.ndarray, " q"]:
    """How many allowed vectors are in the lists that each query is to be compared with."""
    lists = faiss.rev_swig_ptr(index.direct_map.array.data(), index.ntotal) >> 32
    held = np.bincount(lists[allowed], minlength=index.nlist)
    return held[index.quantizer.search(queries, probes)[1]].sum(1)


def _selector(allowed: Allowed) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def _distances(scores: Float32[np.ndarray, "q k"], metric: str) -> Float32[np.ndarray, "q k"]:
    """FAISS gives the squares of Euclidean distances, and by rounding less than 0 now and then."""
    return np.sqrt(np.maximum(scores, 0)) if metric == "l2" else scores


def _filled_up(scores: Float32[np.ndarray, "q c"], rows: Int64[np.ndarray, "q c"], k: int, metric: str) -> Found:
    worst = np.float32(np.inf if metric == "l2" else -np.inf)
    scores = np.where(rows < 0, worst, scores)
    if rows.shape[1] == k:
        return scores, rows
    extra = ((0, 0), (0, k - rows.shape[1]))
    return np.pad(scores, extra, constant_values=worst), np.pad(rows, extra, constant_values=-1)
