"""Index: FAISS vectors with the ids of their images and the identity of the extractor that made them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64
from torch import Tensor

from repkit.features import Features, Identity, identity_differences
from repkit.indexfiles import DESCRIBED, read_index, write_index
from repkit.pooling import pool
from repkit.store import FeatureStore

Vectors = np.ndarray | Tensor  # [n d] of numbers, which is checked in `_check_vectors`

KINDS = ("auto", "flat")
METRICS: Mapping[str, int] = {
    "cosine": faiss.METRIC_INNER_PRODUCT,
    "ip": faiss.METRIC_INNER_PRODUCT,
    "l2": faiss.METRIC_L2,
}


@dataclass(frozen=True, eq=False)
class Hits:
    """The nearest items of each query, nearest first: `ids` and `rows` name the same items, in the index's order.

    scores: the cosine or inner product, of which more is nearer, or for "l2" the Euclidean distance.
    """

    ids: list[list[str]]
    scores: Float32[np.ndarray, "q k"]
    rows: Int64[np.ndarray, "q k"]


@dataclass(frozen=True, eq=False)
class Index:
    """Vectors to search, one an image; make one with `Index.build` or `Index.load`.

    items: a row a vector: id, path, label and whatever else the store's table has. `key`, `pool`, `identity` (of the
    extractor) and `provenance` say where the vectors come from; they are None or empty for one built from an array.
    """

    vectors: Any  # a faiss.Index
    items: pa.Table
    metric: str
    kind: str = "flat"
    key: str | None = None
    pool: str | None = None
    identity: Identity | None = None
    provenance: Mapping[str, Any] | None = None

    @classmethod
    def build(
        cls,
        source: FeatureStore | Vectors,
        key: str | None = None,
        kind: str = "flat",
        metric: str = "cosine",
        *,
        ids: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
    ) -> "Index":
        """Index a store's features under `key` (needed if it has several) or the rows of an array.

        kind: "flat" compares with every vector; "auto" is that as well. metric: "cosine" (vectors of zeros are like
        nothing, 0), "ip" or "l2". ids, labels: of an array's rows; ids default to the row numbers.
        Raises ValueError for maps that were not pooled, for NaN, for nothing to index and for what is not known.
        """
        if kind not in KINDS or metric not in METRICS:
            raise ValueError(f"kind={kind!r}, metric={metric!r}; have {', '.join(KINDS)} and {', '.join(METRICS)}")
        if isinstance(source, FeatureStore):
            if ids is not None or labels is not None:
                raise ValueError("a store has ids and labels of its own; leave ids and labels out")
            return _build_from_store(source, key, metric)
        if key is not None:
            raise ValueError(f"an array has no keys; leave key={key!r} out")
        found = _check_vectors(source)
        return cls(_flat(found, metric), _array_items(len(found), ids, labels), metric)

    def __len__(self) -> int:
        """How many vectors there are."""
        return self.vectors.ntotal

    def __repr__(self) -> str:
        return f"Index({len(self)} vectors of {self.dimension}, {self.metric}, {self.kind}, key={self.key!r})"

    @property
    def dimension(self) -> int:
        """The length of each vector."""
        return self.vectors.d

    def search(self, queries: Features | Vectors, k: int = 10, *, exact: bool = False) -> Hits:
        """The k nearest items of each query, or all of them if there are fewer.

        Features must come from the extractor that made the index, and are pooled as its store was; an array [q d] is
        checked by its dimension only. exact: leave out no vector; a flat index never does.
        Raises ValueError for other queries, naming how they differ, for NaN and for k below 1.
        """
        if k < 1:
            raise ValueError(f"k={k}; give at least 1")
        vectors = _check_vectors(self._pooled(queries) if isinstance(queries, Features) else queries)
        if vectors.shape[1] != self.dimension:
            raise ValueError(f"queries have {vectors.shape[1]} dimensions and the index has {self.dimension}")
        k = min(k, len(self))
        if k == 0 or len(vectors) == 0:  # FAISS would end in an assertion
            empty = np.empty((len(vectors), k))
            return Hits([[] for _ in vectors], empty.astype(np.float32), empty.astype(np.int64))
        scores, rows = self.vectors.search(_unit(vectors) if self.metric == "cosine" else vectors, k)
        if (rows < 0).any():
            raise ValueError('the vectors are so large that float32 overflows; scale them down or use metric="cosine"')
        if self.metric == "l2":  # FAISS gives the square, and by rounding less than 0 now and then
            scores = np.sqrt(np.maximum(scores, 0))
        names = self.items["id"].take(pa.array(rows.ravel())).to_pylist()
        return Hits([names[row * k : (row + 1) * k] for row in range(len(rows))], scores, rows)

    def save(self, folder: str | Path) -> None:
        """Write index.faiss, items.parquet and manifest.json; the manifest, with the others' sha256, comes last.

        An index that is there is replaced; a kill at that moment can leave one that `load` refuses, so a service
        should get a new folder. Raises ValueError for a folder that holds anything else.
        """
        write_index(Path(folder), self.vectors, self.items, {name: getattr(self, name) for name in DESCRIBED})

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Read what `save` wrote, after comparing every file with its sha256.

        Raises FileNotFoundError for a missing folder, ValueError for one that is damaged or no index.
        """
        vectors, items, described = read_index(Path(folder))
        if METRICS.get(described["metric"]) != vectors.metric_type:
            raise ValueError(f"{folder} does not hold what its manifest says; build the index again")
        return cls(vectors, items, **described)

    def _pooled(self, queries: Features) -> Tensor:
        if self.identity is None or self.key is None or self.pool is None:
            raise ValueError(
                "the index was built from an array, so nothing says which extractor made it; pool the features "
                "yourself and give the array"
            )
        mine, theirs = _as_json(self.identity), _as_json(queries.identity)
        if (told := prompts_of_their_own(mine.get("cond"))) and mine["cond"] != theirs.get("cond"):
            raise ValueError(
                f"each image of the index was told {told}, so Features of another condition do not compare; pool them "
                "yourself and give the array"
            )
        if differences := identity_differences(mine, theirs):
            raise ValueError(
                "the queries come from another extractor than the index (index here, queries there): "
                + "; ".join(differences)
            )
        return pool(queries[self.key].float(), self.pool, queries.mask)


def _build_from_store(store: FeatureStore, key: str | None, metric: str) -> Index:
    if key is None and len(store.keys) != 1:
        raise ValueError(f"{store.path} has {len(store.keys)} keys; choose one with key=: {', '.join(store.keys)}")
    key = store.keys[0] if key is None else key
    how = store.identity["pool"]
    if how == "none":
        raise ValueError(f'{store.path} holds maps, not vectors; export it with pool="mean" or another pooling')
    vectors = _check_vectors(store.array(key))
    items = store.table.drop_columns(["row"])
    return Index(
        _flat(vectors, metric),
        items,
        metric,
        key=key,
        pool=how,
        identity=_told(store),
        provenance=store.provenance,
    )


def _flat(vectors: Float32[np.ndarray, "n d"], metric: str) -> Any:
    if vectors.size == 0:
        raise ValueError(f"nothing to index: the vectors have shape {vectors.shape}; give at least one of one number")
    index = faiss.IndexFlat(vectors.shape[1], METRICS[metric])
    index.add(_unit(vectors) if metric == "cosine" else vectors)
    return index


def _unit(vectors: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Rows scaled to length 1; in float64, since squares of float32 overflow. Zeros stay zeros."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.ascontiguousarray((vectors / np.where(norms == 0, 1, norms)).astype(np.float32))


def _check_vectors(vectors: Vectors) -> Float32[np.ndarray, "n d"]:
    """The array in float32; ValueError for what is not a finite matrix."""
    values = vectors.detach().float().cpu().numpy() if isinstance(vectors, Tensor) else np.asarray(vectors)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise ValueError(f"have {values.dtype} of shape {values.shape}; give numbers of shape [n d], a row an image")
    with np.errstate(over="ignore"):  # told just below
        values = np.ascontiguousarray(values, np.float32)
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise ValueError(f"row {int(finite.argmin())} is not finite (of {len(values)}); leave out NaN and infinities")
    return values


def _array_items(count: int, ids: Sequence[str] | None, labels: Sequence[str] | None) -> pa.Table:
    names = [str(row) for row in range(count)] if ids is None else list(ids)
    classes = [None] * count if labels is None else list(labels)
    if len(names) != count or len(classes) != count:
        raise ValueError(f"{len(names)} ids and {len(classes)} labels for {count} vectors; give one for each")
    if len(set(names)) != count:
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"id {twice!r} is given twice; ids must be distinct")
    text = pa.string()
    columns = [pa.array(names, text), pa.nulls(count, text), pa.array(classes, text)]
    return pa.table(columns, names=["id", "path", "label"])


def _told(store: FeatureStore) -> Identity:
    """The extractor's identity, with the condition that the export told it where there was one."""
    cond = store.identity["cond"]
    return store.identity["extractor"] if cond is None else {**store.identity["extractor"], "cond": cond}


def prompts_of_their_own(cond: Any) -> str | None:
    """What each image of a store was told, where that was not the same for all; None where it was."""
    if isinstance(cond, Mapping):
        return "the prompt that its list has for it"
    if isinstance(cond, str) and "{" in cond:
        return f"its own form of {cond!r}"
    return None if cond is None or isinstance(cond, str | int) else f"one of {len(cond)} prompts"


def _as_json(identity: Identity) -> Any:
    """As it comes back from a manifest, where a tuple is a list."""
    return json.loads(json.dumps(identity))
