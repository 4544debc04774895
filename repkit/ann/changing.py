"""Vectors that join a FAISS index or leave it; what it was tuned to stays, and is not measured again."""

from typing import Any

import faiss as _faiss
import numpy as np
from jaxtyping import Int64

from repkit.ann.nearest import Vectors
from repkit.ann.searching import kind_of, reconstruct

faiss: Any = _faiss  # whose stubs lack what its Python adds
_CHUNK = 8192


def extend(index: Any, vectors: Vectors) -> None:
    """Give the index more vectors, in rows after its own; not while another thread searches it."""
    if len(vectors):
        index.add(vectors)


def without(index: Any, rows: Int64[np.ndarray, " m"], raw: Vectors | None = None) -> Any:
    """A new index of all but some rows, in their order, which takes about as long as adding the others does.

    raw: the vectors that were indexed, which "ivf-pq" needs. The graph of "hnsw" is made anew: it cannot lose vectors.
    """
    if kind_of(index) == "ivf-pq" and raw is None:
        raise ValueError('"ivf-pq" holds compressed vectors only; give raw= to add the others again')
    kept = np.setdiff1d(np.arange(index.ntotal), rows)
    made = _emptied(index)
    for start in range(0, len(kept), _CHUNK):
        part = kept[start : start + _CHUNK]
        made.add(reconstruct(index, part) if raw is None else raw[part])
    return made


def _emptied(index: Any) -> Any:
    """One with the same parameters, and with the centroids and codes that the other has learned."""
    kind = kind_of(index)
    if kind == "flat":
        return faiss.IndexFlat(index.d, index.metric_type)
    if kind == "hnsw":
        made = faiss.IndexHNSWFlat(index.d, index.hnsw.nb_neighbors(1), index.metric_type)
        made.hnsw.efConstruction, made.hnsw.efSearch = index.hnsw.efConstruction, index.hnsw.efSearch
        return made
    made = faiss.clone_index(index)
    made.reset()
    made.make_direct_map()
    return made
