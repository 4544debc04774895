import logging

import faiss
import numpy as np
import pytest

from repkit.ann import build_vectors, building, nearest, search_vectors, sizes, unit
from repkit.ann.tuning import Trial, held_out, reaches, smallest
from tests.vectors import pixels, recall


@pytest.fixture(scope="module")
def images():
    """8,000 vectors to index, and queries of 2,000 other images."""
    vectors, _ = pixels(10_000)
    order = np.random.default_rng(0).permutation(10_000)
    return unit(vectors[order[:8000]]), unit(vectors[order[8000:]])


@pytest.fixture
def small_is_large(monkeypatch):
    """Let "auto" take these few vectors for many."""
    monkeypatch.setattr(sizes, "FEW", 0)


@pytest.mark.parametrize("asked", [0.8, 0.9, 0.98])
def test_auto_is_tuned_to_the_recall_asked_for(images, small_is_large, asked):
    built = build_vectors(images[0], recall=asked, queries=images[1][:1500])
    assert built.kind == "hnsw" and built.parameters["ef"] == built.vectors.hnsw.efSearch
    others = images[1][1500:]
    rows = search_vectors(built.vectors, others, 10, metric="cosine")[1]
    assert recall(images[0], others, rows, "cosine") > asked - 0.015  # 500 other queries: 2 standard errors
    assert built.recall > asked - 0.005
    less = search_vectors(built.vectors, others, 10, metric="cosine", ef=max(1, built.parameters["ef"] // 2))[1]
    assert recall(images[0], others, less, "cosine") < asked + 0.005  # no more effort than is needed


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_recall_is_measured_on_vectors_that_join_later(images, kind):
    told = []
    built = build_vectors(images[0], kind, "l2", progress=lambda done, total: told.append((done, total)))
    rows = search_vectors(built.vectors, images[1], 10, metric="l2")[1]
    assert abs(recall(images[0], images[1], rows, "l2") - built.recall) < 0.015
    itself = search_vectors(built.vectors, images[0][::7], 1, metric="l2", **{"ef": 64, "nprobe": 64})[1][:, 0]
    assert (itself == np.arange(0, 8000, 7)).mean() > 0.99  # each has its own row
    assert told == sorted(told) and told[-1] == (8000, 8000)


def test_seeds_and_what_is_held_out():
    assert len(held_out(60, 0)) == 6 and len(held_out(10**6, 0)) == 4000
    assert (held_out(500, 1) == held_out(500, 1)).all() and (held_out(500, 1) != held_out(500, 2)).any()
    assert len({*held_out(500, 1)}) == 50 and held_out(500, 1).max() < 500


def test_of_equally_near_vectors_whichever_is_found_counts(rng):
    vectors = np.repeat(rng.normal(size=(4, 3)), 20, 0).astype(np.float32)
    queries = vectors[::20] + np.float32(0.01)
    trial = Trial(vectors, queries, nearest(vectors, queries, 10, metric="l2")[0][:, -1], "l2")
    rows = np.arange(10) + 20 * np.arange(4)[:, None]
    for found, share in ((rows, 1), (rows + 10, 1), ((rows + 20) % 80, 0), (rows - 5, 0.5)):
        found = np.where(found < 0, 20, found)
        answer = found.astype(np.float32), found
        assert trial.recalls(lambda queries, k, answer=answer: answer).mean() == pytest.approx(share, abs=0.13)  # type: ignore[misc]


@pytest.mark.parametrize("right", range(1, 14))
def test_the_smallest_that_is_good(right):
    assert smallest(lambda value: value >= right, 12) == min(right, 12)


def test_a_recall_is_reached_when_other_queries_would_reach_it(rng):
    sure, unsure = np.full(2000, 0.96), (rng.permutation(100) < 96).astype(float)
    assert reaches(sure, 0.95) and not reaches(sure, 0.97)
    assert unsure.mean() == 0.96 and not reaches(unsure, 0.95) and reaches(np.tile(unsure, 100), 0.95)


def test_memory_decides_the_kind(images, small_is_large):
    count, dimension = 10**6, 256
    flat, hnsw, ivf = (
        sizes.size(kind, count, dimension, sizes.parameters_for(kind, count, dimension))
        for kind in ("flat", "hnsw", "ivf")
    )
    for memory, kinds in [
        (None, ["hnsw", "ivf", "flat", "ivf-pq"]),
        (hnsw, ["hnsw", "ivf", "flat", "ivf-pq"]),
        (hnsw - 1, ["ivf", "flat", "ivf-pq"]),
        (ivf - 1, ["flat", "ivf-pq"]),
        (flat - 1, ["ivf-pq"]),
        (25 * count, ["ivf-pq"]),
    ]:
        assert sizes.kinds_for(count, dimension, 0.95, memory) == kinds
    assert sizes.kinds_for(count, dimension, 1.0, None)[0] == "flat"
    with pytest.raises(ValueError, match="memory=1000 bytes for 1000000 vectors of 256; the smallest kind takes 19"):
        sizes.kinds_for(count, dimension, 0.95, 1000)
    built = build_vectors(images[0], memory=8000 * 4 * 49 + 300_000)
    assert built.kind == "ivf"


@pytest.mark.parametrize("memory", [None, 80 * 10**6, 30 * 10**6])
def test_compressed_vectors_fit_the_memory(memory):
    parameters = sizes.parameters_for("ivf-pq", 10**6, 256, memory)
    assert 256 % parameters["m"] == 0
    assert memory is None or sizes.size("ivf-pq", 10**6, 256, parameters) <= memory
    assert parameters["m"] == {None: 64, 80 * 10**6: 32, 30 * 10**6: 8}[memory]
    assert sizes.parameters_for("ivf-pq", 10**5, 37)["m"] == 37  # a prime number of dimensions has no other part


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_sizes_are_those_of_faiss(images, kind):
    built = build_vectors(images[0], kind)
    written = len(faiss.serialize_index(built.vectors))
    assert sizes.size(kind, 8000, 49, built.parameters) == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("count", [1, 2, 9, 60])
@pytest.mark.parametrize("kind", ["auto", "flat", "hnsw", "ivf"])
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_few_vectors_are_no_mistake(images, count, kind, metric, capfd):
    built = build_vectors(images[0][:count], kind, metric)
    assert built.kind == ("flat" if kind == "auto" else kind)
    rows = search_vectors(built.vectors, images[1][:5], 10, metric=metric)[1]
    assert ((rows >= 0).sum(1) == min(count, 10)).all()
    assert capfd.readouterr() == ("", "")  # FAISS warns on stderr of centroids that learn from too few


def test_identical_vectors_are_no_mistake():
    for kind in ("hnsw", "ivf"):
        built = build_vectors(np.ones((500, 8), np.float32), kind, "l2")
        assert (search_vectors(built.vectors, np.ones((1, 8), np.float32), 20, metric="l2")[0] == 0).all()


def test_identical_vectors_do_not_hide_what_is_missed(images, small_is_large):
    vectors = np.concatenate([images[0][:4000], np.repeat(images[0][:1], 8000, 0)])
    vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    for kind in ("hnsw", "auto"):
        built = build_vectors(vectors, kind)
        rows = search_vectors(built.vectors, images[1], 10, metric="cosine")[1]
        assert built.recall < recall(vectors, images[1], rows, "cosine") + 0.02
    assert built.kind == "ivf" and built.recall > 0.945


def test_a_recall_that_cannot_be_reached_is_told(images, caplog, monkeypatch, small_is_large):
    monkeypatch.setattr(building, "_MOST_EF", 2)
    with caplog.at_level(logging.WARNING, "repkit"):
        built = build_vectors(images[0][:3000], "hnsw", recall=0.99)
    assert f"hnsw reaches a recall of {built.recall:.3f}, not 0.99" in caplog.text
    assert build_vectors(images[0][:3000], recall=0.99).kind == "ivf"  # the next that reaches it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lsh"}, "kind='lsh', metric='l2'; have auto, flat, ivf, hnsw, ivf-pq and cosine, ip, l2"),
        ({"metric": "l1"}, "metric='l1'"),
        ({"vectors": np.zeros((0, 3), np.float32)}, "nothing to index"),
        ({"vectors": np.zeros((3, 0), np.float32)}, "nothing to index"),
        ({"vectors": np.full((3, 3), np.nan, np.float32)}, "the vectors are not finite"),
        ({"queries": np.full((3, 3), np.inf, np.float32)}, "the queries are not finite"),
        ({"queries": np.zeros((1, 3), np.float32)}, r"queries have shape \(1, 3\); give \[q 3\], two or more"),
        ({"recall": 0.0}, "recall=0.0; give a share"),
        ({"recall": 1.5}, "recall=1.5"),
        ({"memory": 0}, "memory=0"),
        ({"memory": 50}, "memory=50 bytes for 100 vectors of 3; the smallest kind takes 1200"),
        ({"memory": 50, "kind": "hnsw"}, 'memory=50 bytes and kind="hnsw" takes 15627; use "auto"'),
        ({"memory": 50, "kind": "ivf-pq"}, "learns from 9984 vectors"),
        ({"kind": "ivf-pq"}, '"ivf-pq" learns from 9984 vectors or more and has 100'),
    ],
)
def test_what_cannot_be_built_is_told(change, message):
    options = {"vectors": np.ones((100, 3), np.float32), "kind": "auto", "metric": "l2"} | change
    with pytest.raises(ValueError, match=message):
        build_vectors(**options)
