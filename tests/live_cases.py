"""A live index to test with, and what it must answer: a plain dict of items and numpy, as a shadow of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from repkit.indexfiles import DESCRIBED, write_index
from repkit.service.items import Item
from repkit.service.live import LiveIndex

DIMENSION = 8
LABELS = ("bag", "boot", "coat")


def vector_of(stamp: int, place: int) -> np.ndarray:
    """A vector of length 1 that no other stamp or place has."""
    vector = np.random.default_rng([stamp, place]).normal(size=DIMENSION)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def metadata_of(stamp: int, place: int) -> dict[str, Any]:
    return {"stamp": stamp, "label": LABELS[(stamp + place) % 3]}


def items_of(ids: list[str], stamp: int) -> list[Item]:
    return [Item(name, vector_of(stamp, place), metadata_of(stamp, place)) for place, name in enumerate(ids)]


def write_base(folder: Path, count: int = 30, metric: str = "cosine") -> "Shadow":
    """A built index of `count` items, and its shadow."""
    ids = [f"base-{place}" for place in range(count)]
    vectors = np.stack([vector_of(0, place) for place in range(count)])
    metadata = [metadata_of(0, place) for place in range(count)]
    index = faiss.IndexFlat(DIMENSION, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    table = pa.table({"id": ids, "stamp": [0] * count, "label": [one["label"] for one in metadata]})
    described = dict.fromkeys(DESCRIBED) | {"metric": metric, "kind": "flat", "recall": 1.0}
    write_index(folder, index, None, table, described)
    return Shadow({name: (vectors[place], metadata[place]) for place, name in enumerate(ids)}, metric)


@dataclass
class Shadow:
    """id -> (vector, metadata)."""

    items: dict[str, tuple[np.ndarray, dict[str, Any]]] = field(default_factory=dict)
    metric: str = "cosine"

    def copy(self) -> "Shadow":
        return Shadow(dict(self.items), self.metric)

    def upsert(self, ids: list[str], stamp: int) -> None:
        for place, name in enumerate(ids):
            self.items[name] = vector_of(stamp, place), metadata_of(stamp, place)

    def update(self, name: str, metadata: Mapping[str, Any]) -> None:
        vector, before = self.items[name]
        self.items[name] = vector, {key: value for key, value in {**before, **metadata}.items() if value is not None}

    def delete(self, ids: list[str]) -> None:
        for name in ids:
            self.items.pop(name, None)

    def nearest(self, query: np.ndarray, k: int, label: str | None = None) -> list[tuple[str, float, dict[str, Any]]]:
        """Brute force in float64; nearest first."""
        known = [(name, *one) for name, one in self.items.items() if label is None or one[1].get("label") == label]
        vectors = np.array([vector for _, vector, _ in known], float).reshape(len(known), DIMENSION)
        if self.metric == "l2":
            scores = np.linalg.norm(vectors - query, axis=1)
        else:
            scores = vectors @ query / (np.linalg.norm(query) if self.metric == "cosine" else 1)
        order = np.argsort(scores if self.metric == "l2" else -scores)[:k]
        return [(known[row][0], scores[row], known[row][2]) for row in order]


def assert_hits(hits: list[Any], expected: list[tuple[str, float, dict[str, Any]]]) -> None:
    assert [(hit.id, hit.metadata) for hit in hits] == [(name, metadata) for name, _, metadata in expected]
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score, _ in expected], atol=1e-5)


def assert_same(live: LiveIndex, shadow: Shadow, seed: int = 0, queries: int = 4) -> None:
    """Everything that can be asked gives what the shadow gives."""
    assert len(live) == len(shadow.items)
    assert {one.id: one.metadata for one in live.list(limit=100_000)} == {n: m for n, (_, m) in shadow.items.items()}
    asked = np.random.default_rng(seed).normal(size=(queries, DIMENSION)).astype(np.float32)
    for label in (None, *LABELS[:2]):
        where = None if label is None or "label" not in live.columns else {"label": label}
        answer = live.search(asked, 7, where=where)
        for query, hits in zip(asked, answer.hits, strict=True):
            assert_hits(hits, shadow.nearest(query, 7, None if where is None else label))
        assert live.count(where) == answer.scanned
    for name in sorted(shadow.items)[:: max(1, len(shadow.items) // 5)]:
        found = live.get(name)
        assert found is not None
        np.testing.assert_allclose(found.vector, shadow.items[name][0], atol=1e-6)
        assert found.metadata == shadow.items[name][1]
