"""Building of FAISS indexes: of a kind, or of the kind that fits best, tuned to a recall on vectors held out."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import faiss as _faiss
import numpy as np
from jaxtyping import Float32, Float64, Int64

from repkit.ann.nearest import METRICS, Found, Vectors
from repkit.ann.searching import search_vectors
from repkit.ann.sizes import KINDS, Parameters, kinds_for, parameters_for, size
from repkit.ann.tuning import NEGLIGIBLE, Trial, distinct, held_out, reaches, smallest, trials

faiss: Any = _faiss  # whose stubs lack what its Python adds
_EFFORT = {"hnsw": "ef", "ivf": "nprobe", "ivf-pq": "nprobe"}
_MOST_EF = 2048
_ROUNDS, _MOST_TRAINING = 10, 64  # of k-means, and vectors for each of its centroids
_CHUNK = 8192  # vectors added between two words of progress
_log = logging.getLogger("repkit")

Told = Callable[[int, int], object] | None


@dataclass(frozen=True, eq=False)
class Built:
    """A FAISS index with what was chosen for it.

    kind: never "auto". parameters: those of the kind, with the tuned `ef` or `nprobe`, which the index has as its
    own. recall: recall@10 on held-out queries other than those it was tuned on, 1.0 for "flat"; None where there
    were too few different vectors to hold any out.
    """

    vectors: Any  # a faiss.Index
    kind: str
    parameters: Mapping[str, int]
    recall: float | None


def build_vectors(
    vectors: Vectors,
    kind: str = "auto",
    metric: str = "cosine",
    *,
    recall: float = 0.95,
    memory: int | None = None,
    seed: int = 0,
    queries: Float32[np.ndarray, "q d"] | None = None,
    progress: Told = None,
) -> Built:
    """Index vectors in their order: of length 1 for "cosine".

    kind: "flat" compares with every vector; "hnsw" walks a graph of neighbours; "ivf" looks into the lists of the
    nearest centroids; "ivf-pq" has vectors compressed in such lists, and is to be searched with the raw ones at hand;
    "auto" is the fastest of these that reaches the recall and fits the memory, and "flat" for a few thousand vectors.
    recall: the recall@10 that ef or nprobe is tuned to. memory: bytes that the index may take, None for any number; one
    of "ivf" just built takes up to twice as many, until it has been written and read.
    queries: to tune on half of, and to measure recall with the other half; by default a tenth of the vectors, at most
    4,000, which join the index only when that is done; of identical ones, one is asked. Thousands of identical vectors
    stand in the way of the graph of "hnsw", whose recall then tells so; "ivf" does not mind them.
    Raises ValueError for what is not known, not finite or empty, and for too little memory or too few vectors.
    """
    _check(vectors, kind, metric, recall, memory, queries)
    if kind != "auto":
        if memory is not None and (least := _bytes(kind, len(vectors), vectors.shape[1], memory)) > memory:
            raise ValueError(f'memory={memory} bytes and kind="{kind}" takes {least}; use "auto" or give more')
        built = _build(vectors, kind, metric, recall, memory, seed, queries, progress)
        if built.recall is not None and built.recall < recall - NEGLIGIBLE:
            _log.warning("%s reaches a recall of %.3f, not %g", kind, built.recall, recall)
        return built
    return _build_fastest(vectors, metric, recall, memory, seed, queries, progress)


def _bytes(kind: str, count: int, dimension: int, memory: int) -> int:
    return size(kind, count, dimension, parameters_for(kind, count, dimension, memory))


def _build_fastest(
    vectors: Vectors, metric: str, recall: float, memory: int | None, seed: int, queries: Any, progress: Told
) -> Built:
    best: Built | None = None
    for kind in kinds_for(len(vectors), vectors.shape[1], recall, memory):
        built = _build(vectors, kind, metric, recall, memory, seed, queries, progress)
        if kind == "flat" or built.recall is None or _is_worth_it(built, recall):
            return built
        best = built if best is None or (best.recall or 0) < built.recall else best
    assert best is not None
    _log.warning("no kind that fits reaches a recall of %g; %s, the best, has %.3f", recall, best.kind, best.recall)
    return best


def _is_worth_it(built: Built, recall: float) -> bool:
    """Whether it finds enough, and that without looking into most lists, which "flat" does in less time."""
    lists = built.parameters.get("nlist", 0)
    enough = built.recall is not None and built.recall >= recall - NEGLIGIBLE
    return enough and (built.kind != "ivf" or 4 * built.parameters["nprobe"] <= max(lists, 4))


def _build(
    vectors: Vectors,
    kind: str,
    metric: str,
    recall: float,
    memory: int | None,
    seed: int,
    queries: Float32[np.ndarray, "q d"] | None,
    progress: Told,
) -> Built:
    parameters = parameters_for(kind, len(vectors), vectors.shape[1], memory)
    index = _empty(kind, vectors.shape[1], metric, parameters, seed)
    late = held_out(len(vectors), seed) if kind != "flat" and queries is None else np.empty(0, np.int64)
    first = np.setdiff1d(np.arange(len(vectors)), late)
    _train(index, vectors, first, parameters, seed)
    _add(index, kind, vectors, first, 0, progress)
    if kind == "flat":
        return Built(index, kind, parameters, 1.0)
    asked = distinct(vectors[late]) if queries is None else queries
    measured = None
    if len(asked) > 1:
        allowed = np.ones(len(vectors), bool)
        allowed[late] = False
        tuning, measuring = trials(vectors, asked, metric, allowed)
        known = first if kind == "hnsw" else np.arange(len(vectors))
        effort = _tune(index, kind, known, tuning, recall)
        measured = float(_recalls(index, kind, known, measuring, effort).mean())
        parameters |= {_EFFORT[kind]: effort}
    else:
        parameters |= {_EFFORT[kind]: _most(index, kind)}
    _add(index, kind, vectors, late, len(first), progress)
    _finish(index, kind, np.concatenate([first, late]), parameters)
    return Built(index, kind, parameters, measured)


def _check(vectors: Vectors, kind: str, metric: str, recall: float, memory: int | None, queries: Any) -> None:
    if kind not in KINDS or metric not in METRICS:
        raise ValueError(f"kind={kind!r}, metric={metric!r}; have {', '.join(KINDS)} and {', '.join(METRICS)}")
    if vectors.size == 0:
        raise ValueError(f"nothing to index: the vectors have shape {vectors.shape}; give at least one of one number")
    if not 0 < recall <= 1:
        raise ValueError(f"recall={recall}; give a share from above 0 to 1")
    if memory is not None and memory < 1:
        raise ValueError(f"memory={memory}; give bytes, or None for no limit")
    if queries is not None and (queries.ndim != 2 or queries.shape[1] != vectors.shape[1] or len(queries) < 2):
        raise ValueError(f"queries have shape {queries.shape}; give [q {vectors.shape[1]}], two or more")
    for name, values in (("vectors", vectors), ("queries", queries)):
        if values is not None and not (np.isfinite(values.sum()) or np.isfinite(values).all()):  # the sum is cheap
            raise ValueError(f"the {name} are not finite; leave out NaN and infinities")


def _empty(kind: str, dimension: int, metric: str, parameters: Parameters, seed: int) -> Any:
    measure = METRICS[metric]
    if kind == "flat":
        return faiss.IndexFlat(dimension, measure)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, parameters["M"], measure)
        index.hnsw.efConstruction = parameters["efConstruction"]
        return index
    coarse = faiss.IndexFlat(dimension, measure)
    if kind == "ivf":
        index = faiss.IndexIVFFlat(coarse, dimension, parameters["nlist"], measure)
    else:
        index = faiss.IndexIVFPQ(coarse, dimension, parameters["nlist"], parameters["m"], 8, measure)
        index.use_precomputed_table = -1  # it would take more memory than the vectors
        _set(index.pq.cp, seed)
    _set(index.cp, seed)
    return index


def _set(clustering: Any, seed: int) -> None:
    clustering.seed, clustering.niter = seed, _ROUNDS
    clustering.min_points_per_centroid = 1  # below its own, FAISS would only print a warning


def _train(index: Any, vectors: Vectors, rows: Int64[np.ndarray, " m"], parameters: Parameters, seed: int) -> None:
    if index.is_trained:
        return
    most = _MOST_TRAINING * max(parameters["nlist"], 256)
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:most])
    index.train(vectors[chosen])


def _add(index: Any, kind: str, vectors: Vectors, rows: Int64[np.ndarray, " m"], before: int, progress: Told) -> None:
    """Lists keep the rows' numbers; the others number vectors as they come."""
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        if kind in ("ivf", "ivf-pq"):
            index.add_with_ids(vectors[part], part)
        else:
            index.add(vectors[part])
        if progress is not None:
            progress(before + start + len(part), len(vectors))


def _finish(index: Any, kind: str, order: Int64[np.ndarray, " n"], parameters: Parameters) -> None:
    """Put vectors that came in some order back into that of their rows, and make the tuned effort the index's own."""
    if kind == "hnsw":
        index.permute_entries(np.argsort(order))
        index.hnsw.efSearch = parameters["ef"]
    else:
        index.make_direct_map()
        index.nprobe = parameters["nprobe"]


def _most(index: Any, kind: str) -> int:
    return min(_MOST_EF, max(index.ntotal, 16)) if kind == "hnsw" else index.nlist


def _tune(index: Any, kind: str, known: Int64[np.ndarray, " m"], trial: Trial, recall: float) -> int:
    """The least effort that reaches the recall, or else comes as near to it as the most effort does."""

    @cache
    def found(effort: int) -> Float64[np.ndarray, " q"]:
        return _recalls(index, kind, known, trial, effort)

    most = _most(index, kind)
    effort = smallest(lambda effort: reaches(found(effort), recall), most)
    if effort < most or reaches(found(most), recall):
        return effort
    return smallest(lambda effort: bool(found(effort).mean() >= found(most).mean() - NEGLIGIBLE), most)


def _recalls(
    index: Any, kind: str, known: Int64[np.ndarray, " m"], trial: Trial, effort: int
) -> Float64[np.ndarray, " q"]:
    """Each query's recall; `known` is the row of each vector that the index names."""
    options: dict[str, Any] = {_EFFORT[kind]: effort, "raw": trial.vectors if kind == "ivf-pq" else None}

    def search(queries: Float32[np.ndarray, "q d"], k: int) -> Found:
        scores, rows = search_vectors(index, queries, k, metric=trial.metric, **options)
        return scores, np.where(rows < 0, -1, known[rows])

    return trial.recalls(search)
