"""Live indexes of what FAISS searches approximately: recall, exact answers, deletions, filters and merged segments."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from repkit.ann import build_vectors, sizes, unit
from repkit.indexfiles import DESCRIBED, write_index
from repkit.service import compaction
from repkit.service.items import Item
from repkit.service.live import LiveIndex

COUNT, DIMENSION, K = 2000, 16, 10


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Clusters, as features have them."""
    chance = np.random.default_rng(0)
    centres = chance.normal(size=(40, DIMENSION))
    return unit(
        (centres[chance.integers(40, size=COUNT + 300)] + 0.4 * chance.normal(size=(COUNT + 300, DIMENSION))).astype(
            np.float32
        )
    )


def write_built(folder: Path, vectors: np.ndarray, kind: str, metric: str = "cosine") -> None:
    built = build_vectors(vectors, kind, metric)
    items = pa.table(
        {"id": [f"i{row}" for row in range(len(vectors))], "odd": [row % 2 for row in range(len(vectors))]}
    )
    described = dict.fromkeys(DESCRIBED) | {"metric": metric, "kind": built.kind, "recall": built.recall}
    raw = vectors if kind == "ivf-pq" else None
    write_index(folder, built.vectors, raw, items, described | {"parameters": dict(built.parameters)})


def nearest(vectors: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> list[list[str]]:
    order = np.argsort(-(queries @ vectors[rows].T), axis=1)[:, :K]
    return [[f"i{row}" for row in rows[one]] for one in order]


def found(live: LiveIndex, queries: np.ndarray, **options: object) -> list[list[str]]:
    return [[hit.id for hit in hits] for hits in live.search(queries, K, **options).hits]  # type: ignore[arg-type]


def recall(given: list[list[str]], true: list[list[str]]) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(given, true, strict=True)]))


def assert_finds(live: LiveIndex, vectors: np.ndarray, rows: np.ndarray, queries: np.ndarray, exact: bool) -> None:
    """Near enough by default, all with exact=True, and with a filter."""
    for where, allowed in [(None, rows), ({"odd": 1}, rows[rows % 2 == 1])]:
        true = nearest(vectors, allowed, queries)
        assert recall(found(live, queries, where=where), true) >= 0.9
        assert found(live, queries, where=where, exact=True) == true
        answer = live.search(queries, K, where=where)
        assert (answer.exact, answer.scanned) == (exact, len(allowed))


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivf-pq"])
def test_an_approximate_index_that_changes(tmp_path, vectors, kind, monkeypatch, caplog):
    monkeypatch.setattr(sizes, "_CODES", 32)  # vectors enough to be compressed
    monkeypatch.setattr(compaction, "_FLAT_BELOW", 1000)
    folder, base, queries = tmp_path / "index", vectors[:COUNT], vectors[-100:]
    write_built(folder, base, kind)
    rows = np.arange(COUNT)
    with LiveIndex.open(folder) as live:
        assert live.stats()["segments"] == [{"rows": COUNT, "kind": kind}]
        assert_finds(live, vectors, rows, queries, False)
        live.delete([f"i{row}" for row in range(0, COUNT, 7)])
        live.upsert([Item(f"i{row}", vectors[row], {"odd": row % 2}) for row in range(COUNT, COUNT + 200)])
        rows = np.setdiff1d(np.arange(COUNT + 200), np.arange(0, COUNT, 7))
        assert_finds(live, vectors, rows, queries, False)
        live.compact()
        assert live.stats()["segments"] == [{"rows": len(rows), "kind": kind}]
        assert_finds(live, vectors, rows, queries, False)
    for path in (folder / "live" / "segments").glob("SEG-*/index.faiss"):
        path.write_bytes(b"damaged")
    for _ in range(2):
        with LiveIndex.open(folder) as live:
            assert live.stats()["segments"] == [{"rows": len(rows), "kind": kind}]
            assert_finds(live, vectors, rows, queries, False)
    assert caplog.text.count("built again") == 1


def test_small_segments_are_flat_whatever_the_index_is(tmp_path, vectors):
    write_built(tmp_path / "index", vectors[:COUNT], "hnsw")
    with LiveIndex.open(tmp_path / "index") as live:
        live.compact()
        assert live.stats()["segments"] == [{"rows": COUNT, "kind": "hnsw"}]  # nothing to do
        live.delete(["i0"])
        live.compact()
        assert live.stats()["segments"] == [{"rows": COUNT - 1, "kind": "flat"}]
        assert_finds(live, vectors, np.arange(1, COUNT), vectors[-100:], True)


def test_taking_over_tells_how_far_it_is(tmp_path, record_property):
    vectors = unit(np.random.default_rng(1).normal(size=(20_000, 64)).astype(np.float32))
    write_built(tmp_path / "index", vectors, "flat")
    told: list[tuple[int, int]] = []
    start = time.perf_counter()
    with LiveIndex.open(tmp_path / "index", progress=lambda *numbers: told.append(numbers)) as live:
        record_property("rows_per_second", 20_000 / (time.perf_counter() - start))
        assert len(live) == 20_000
        assert found(live, vectors[:20]) == nearest(vectors, np.arange(20_000), vectors[:20])
    assert told == [(0, 20_000), (8192, 20_000), (16_384, 20_000), (20_000, 20_000)]
