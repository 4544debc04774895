"""Index: FAISS vectors with the ids of their images and the identity of the extractor that made them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64

from repkit.ann import METRICS, build_vectors, search_vectors, unit
from repkit.ann.changing import extend, without
from repkit.ann.searching import kind_of, sees_all
from repkit.ann.sizes import size
from repkit.features import Features, Identity
from repkit.indexfiles import DESCRIBED, read_index, read_raw, write_index
from repkit.indexitems import Metadata, joined, rows_of, table_of
from repkit.indexsources import Vectors, check_same, check_vectors, pooled, read_store
from repkit.store import FeatureStore
from repkit.where import Masks, Where

_EFFORT = {"ef": ("hnsw",), "nprobe": ("ivf", "ivf-pq")}


@dataclass(frozen=True, eq=False)
class Hits:
    """The nearest items of each query, nearest first: `ids` and `rows` name the same items, in the index's order.

    scores: the cosine or inner product, of which more is nearer, or for "l2" the Euclidean distance. exact: whether
    every item that was allowed has been compared, so that no other is nearer.
    """

    ids: list[list[str]]
    scores: Float32[np.ndarray, "q k"]
    rows: Int64[np.ndarray, "q k"]
    exact: bool = True


@dataclass(eq=False)
class Index:
    """Vectors to search, one an image; make one with `Index.build` or `Index.load`.

    items: a row a vector: id, path, label and whatever else the store's table, or `metadata`, has. kind, parameters,
    recall: as `build` chose and measured them; vectors added or removed later do not count in the recall. raw: the
    vectors beside compressed ones, of "ivf-pq". `key`, `pool`, `identity` (of the extractor) and `provenance` say where
    the vectors come from; they are None or empty for one built from an array.
    """

    vectors: Any  # a faiss.Index
    items: pa.Table
    metric: str
    kind: str = "flat"
    key: str | None = None
    pool: str | None = None
    identity: Identity | None = None
    provenance: Mapping[str, Any] | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    recall: float | None = 1.0
    raw: Float32[np.ndarray, "n d"] | None = field(default=None, repr=False)
    mapped: bool = False
    _masks: Masks | None = field(default=None, init=False, repr=False)

    @classmethod
    def build(
        cls,
        source: FeatureStore | Vectors,
        key: str | None = None,
        kind: str = "auto",
        metric: str = "cosine",
        *,
        ids: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        metadata: Metadata = None,
        recall: float = 0.95,
        memory: int | None = None,
        queries: Features | Vectors | None = None,
        seed: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> "Index":
        """Index a store's features under `key` (needed if it has several) or the rows of an array.

        kind: "flat" compares with every vector; "hnsw", "ivf" and "ivf-pq" miss a few, in less time, and "ivf-pq" in
        less memory, with the vectors themselves in a file; "auto" takes the fastest that reaches the `recall`
        (recall@10) within the `memory` (bytes; None: any), which for few vectors is "flat".
        metric: "cosine" (vectors of zeros are like nothing, 0), "ip" or "l2".
        ids, labels, metadata: of an array's rows; ids default to the row numbers. queries: to measure the recall with,
        and to tune by; by default vectors that are held out until that is done. progress: called with (done, total).
        Raises ValueError for maps that were not pooled, for NaN, for nothing to index and for what is not known.
        """
        described: dict[str, Any] = {}
        if isinstance(source, FeatureStore):
            if ids is not None or labels is not None or metadata is not None:
                raise ValueError("a store has ids, labels and metadata of its own; leave these out")
            vectors, items, described = read_store(source, key)
        else:
            if key is not None:
                raise ValueError(f"an array has no keys; leave key={key!r} out")
            vectors = check_vectors(source)
            items = table_of(len(vectors), ids, labels, metadata)
        index = cls(None, items, metric, **described)
        vectors, asked = index._scaled(vectors), None if queries is None else index._scaled(index._asked(queries))
        tuned: dict[str, Any] = {"recall": recall, "memory": memory, "queries": asked, "seed": seed}
        built = build_vectors(vectors, kind, metric, progress=progress, **tuned)
        index.vectors, index.kind = built.vectors, built.kind
        index.parameters, index.recall = built.parameters, built.recall
        index.raw = vectors if built.kind == "ivf-pq" else None
        return index

    def __len__(self) -> int:
        """How many vectors there are."""
        return self.vectors.ntotal

    def __repr__(self) -> str:
        return f"Index({len(self)} vectors of {self.dimension}, {self.metric}, {self.kind}, key={self.key!r})"

    @property
    def dimension(self) -> int:
        """The length of each vector."""
        return self.vectors.d

    @property
    def size(self) -> int:
        """Bytes in memory, as they are computed from the kind and its parameters; the items are not counted."""
        return size(self.kind, len(self), self.dimension, self.parameters)

    def search(
        self,
        queries: Features | Vectors,
        k: int = 10,
        *,
        where: Where | None = None,
        exact: bool = False,
        ef: int | None = None,
        nprobe: int | None = None,
    ) -> Hits:
        """The k nearest items of each query, or all of them if there are fewer.

        Features must come from the extractor that made the index, and are pooled as its store was; an array [q d] is
        checked by its dimension only. where: conditions on the items' columns, such as {"label": "bag", "width":
        {"gte": 64}}; `repkit.where.mask` has all of them. exact: leave out no vector; a flat index never does.
        ef (of "hnsw"), nprobe (of "ivf" and "ivf-pq"): more of it finds more, later; by default the tuned one.
        Raises ValueError for other queries, naming how they differ, for NaN, for k below 1, for a condition that is
        not one, and for ef or nprobe that the kind does not have.
        """
        vectors = self._asked(queries)
        if vectors.shape[1] != self.dimension:
            raise ValueError(f"queries have {vectors.shape[1]} dimensions and the index has {self.dimension}")
        _check_count("k", k)
        self.check_effort(ef, nprobe)
        allowed = None if where is None else self._allowed(where)
        number = len(self) if allowed is None else int(np.count_nonzero(allowed))
        options: dict[str, Any] = {"exact": exact, "ef": ef, "nprobe": nprobe, "raw": self.raw}
        k = min(k, number)
        if k == 0 or len(vectors) == 0:
            empty = np.empty((len(vectors), k))
            return Hits([[] for _ in vectors], empty.astype(np.float32), empty.astype(np.int64))
        full = sees_all(self.vectors, number, len(vectors), k, **options)
        found = search_vectors(self.vectors, self._scaled(vectors), k, metric=self.metric, allowed=allowed, **options)
        scores, rows = found
        if (rows < 0).any():
            raise ValueError('the vectors are so large that float32 overflows; scale them down or use metric="cosine"')
        names = self.items["id"].take(pa.array(rows.ravel())).to_pylist()
        return Hits([names[row * k : (row + 1) * k] for row in range(len(rows))], scores, rows, full)

    def add(
        self,
        source: FeatureStore | Features | Vectors,
        ids: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        metadata: Metadata = None,
    ) -> None:
        """Add a store's items, or Features or the rows of an array with their ids; not while another thread searches.

        A store and Features must come from the extractor that made the index. ids: by default the row numbers.
        Raises ValueError for ids that are there already, for what `build` refuses, and for a memory-mapped index.
        """
        self._check_whole()
        if isinstance(source, FeatureStore):
            if ids is not None or labels is not None or metadata is not None:
                raise ValueError("a store has ids, labels and metadata of its own; leave these out")
            vectors, items, described = read_store(source, self.key)
            check_same(self.identity, described["identity"], self.pool, described["pool"])
        else:
            vectors = self._asked(source)
            items = table_of(len(vectors), ids, labels, metadata, first=len(self))
        if vectors.shape[1] != self.dimension:
            raise ValueError(f"the vectors have {vectors.shape[1]} dimensions and the index has {self.dimension}")
        vectors, both = self._scaled(vectors), joined(self.items, items)
        extend(self.vectors, vectors)
        self.items = both
        self.raw = None if self.raw is None else np.concatenate([self.raw, vectors])

    def remove(self, ids: Sequence[str]) -> None:
        """Remove items; those after them move up. This builds the index anew from its vectors, without tuning.

        Raises ValueError for an id that is not there, and for a memory-mapped index.
        """
        self._check_whole()
        rows = rows_of(self.items, ids)
        kept = np.setdiff1d(np.arange(len(self)), rows)
        self.vectors = without(self.vectors, rows, self.raw)
        self.items = self.items.take(pa.array(kept))
        self.raw = None if self.raw is None else self.raw[kept]

    def save(self, folder: str | Path) -> None:
        """Write index.faiss, items.parquet, for "ivf-pq" vectors.npy, and with their sha256 last manifest.json.

        An index that is there is replaced; a kill at that moment can leave one that `load` refuses, so a service
        should get a new folder. Raises ValueError for a folder that holds anything else, and for a memory-mapped index.
        """
        self._check_whole()  # of mapped lists FAISS would write only where they are
        described = {name: getattr(self, name) for name in DESCRIBED}
        write_index(Path(folder), self.vectors, self.raw, self.items, described)

    @classmethod
    def load(cls, folder: str | Path, mmap: bool = False) -> "Index":
        """Read what `save` wrote, after comparing every file with its sha256.

        mmap: leave the vectors in their file, of which a search reads what it needs; this cannot be changed or saved.
        Raises FileNotFoundError for a missing folder, ValueError for one that is damaged or no index.
        """
        vectors, items, described = read_index(Path(folder), mmap)
        if METRICS.get(described["metric"]) != vectors.metric_type or kind_of(vectors) != described["kind"]:
            raise ValueError(f"{folder} does not hold what its manifest says; build the index again")
        raw = read_raw(Path(folder), described["kind"])
        return cls(vectors, items, **described, raw=raw, mapped=mmap)

    def _scaled(self, vectors: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
        return unit(vectors) if self.metric == "cosine" else vectors

    def _allowed(self, where: Where) -> Bool[np.ndarray, " n"]:
        masks = self._masks
        if masks is None or masks.items is not self.items:
            self._masks = masks = Masks(self.items)
        return masks(where)

    def _asked(self, queries: Features | Vectors) -> Float32[np.ndarray, "q d"]:
        if isinstance(queries, Features):
            queries = pooled(queries, self.identity, self.key, self.pool)
        return check_vectors(queries)

    def _check_whole(self) -> None:
        if self.mapped:
            raise ValueError("the index is memory-mapped; load it without mmap=True to change or save it")

    def check_effort(self, ef: int | None = None, nprobe: int | None = None) -> None:
        """Raise ValueError for what the kind does not have, or below 1."""
        for name, value in (("ef", ef), ("nprobe", nprobe)):
            if value is not None:
                _check_count(name, value)
            if value is not None and self.kind not in _EFFORT[name]:
                raise ValueError(f"{name}={value} is for {' and '.join(_EFFORT[name])}; this index is {self.kind}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}={value!r}; give at least 1, and a whole number")
