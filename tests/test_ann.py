import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from repkit.ann import METRICS, build_vectors, nearest, reconstruct, search_vectors, unit
from repkit.ann.changing import extend, without
from repkit.ann.searching import kind_of, sees_all
from tests.vectors import brute_force, pixels, recall

KINDS = ("flat", "hnsw", "ivf", "ivf-pq")
COUNT = 11_000  # a little over what "ivf-pq" learns from, once a tenth is held out


@pytest.fixture(scope="module")
def images():
    """Vectors to index and queries, of other images."""
    vectors, _ = pixels(10_000)
    mirrored = vectors.reshape(-1, 7, 7)[:1300, :, ::-1].reshape(-1, 49)
    everything = np.concatenate([vectors, mirrored])
    order = np.random.default_rng(0).permutation(len(everything))
    return everything[order[:COUNT]], everything[order[COUNT:]]


@pytest.fixture(params=["ours", "faiss"])
def products(request):
    """Who multiplies matrices in a flat search: FAISS does from its threshold on."""
    before = faiss.cvar.distance_compute_blas_threshold
    if request.param == "faiss":
        faiss.cvar.distance_compute_blas_threshold = 1
    yield request.param
    faiss.cvar.distance_compute_blas_threshold = before


@pytest.fixture(scope="module")
def built(images):
    return {kind: build_vectors(unit(images[0]), kind) for kind in KINDS}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [1, 2, 300])
@pytest.mark.parametrize("share", [None, 1, 0.9, 0.5, 0.1, 0.01, 0.001])
@pytest.mark.usefixtures("products")
def test_exact_search_is_brute_force(rng, metric, queries, share):
    vectors, asked = rng.normal(size=(5000, 24)).astype(np.float32), rng.normal(size=(queries, 24)).astype(np.float32)
    if metric == "cosine":
        vectors, asked = unit(vectors), unit(asked)
    allowed = None if share is None else rng.random(5000) < share
    expected, rows = brute_force(vectors, asked, 10, metric, allowed)
    index = build_vectors(vectors, "flat", metric).vectors
    for found in (
        nearest(vectors, asked, 10, metric=metric, allowed=allowed),
        search_vectors(index, asked, 10, metric=metric, allowed=allowed),
    ):
        count = rows.shape[1]
        assert (found[1][:, :count] == rows).all()
        np.testing.assert_allclose(found[0][:, :count], expected, rtol=1e-4, atol=1e-5)
        assert (found[1][:, count:] == -1).all()
        assert (found[0][:, count:] == (np.inf if metric == "l2" else -np.inf)).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.usefixtures("products")
def test_scores_do_not_depend_on_the_batch(images, metric):
    vectors, asked = images[0][:3000], images[1][:40]
    index = build_vectors(vectors, "flat", metric).vectors
    scores, rows = search_vectors(index, asked, 10, metric=metric)
    alone = [search_vectors(index, asked[i : i + 1], 10, metric=metric) for i in range(40)]
    np.testing.assert_array_equal(np.concatenate([one[0] for one in alone]), scores)
    np.testing.assert_array_equal(np.concatenate([one[1] for one in alone]), rows)


@pytest.mark.usefixtures("products")
def test_of_equally_near_vectors_the_lower_rows_come_first():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    for queries in (1, 5):
        rows = nearest(vectors, np.repeat(np.eye(3, dtype=np.float32)[1:2], queries, 0), 4, metric="ip")[1]
        assert (rows == [4, 5, 6, 7]).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [None, 0.97, 0.8, 0.3])
def test_of_very_many_equally_near_vectors_one_query_finds_the_lower_rows(rng, metric, share):
    vectors = np.repeat(np.float32([[0.6, 0.8], [0, 1], [1, 0]]), [3000, 3000, 12], 0)
    vectors = vectors[[*range(2000), *range(6000, 6012), *range(2000, 6000)]]  # the nearest come after many of the next
    allowed = np.ones(len(vectors), bool) if share is None else rng.random(len(vectors)) < share
    asked = np.float32([[1, 0.001]])
    for k in (10, 20, 150):
        expected = brute_force(vectors, asked, k, metric, allowed)[1]
        rows = nearest(vectors, asked, k, metric=metric, allowed=None if share is None else allowed)[1]
        assert (rows == expected).all()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [None, 0.8, 0.3])
def test_of_very_many_equally_near_vectors_a_batch_finds_what_one_query_does(rng, metric, share):
    vectors = unit(rng.normal(size=(60, 12)).astype(np.float32))[rng.integers(0, 60, 9000)]
    allowed = None if share is None else rng.random(len(vectors)) < share
    index = build_vectors(vectors, "flat", metric).vectors
    for found in (
        search_vectors(index, vectors[:9], 20, metric=metric, allowed=allowed),
        nearest(vectors, vectors[:9], 20, metric=metric, allowed=allowed),
    ):
        for query, (scores, rows) in enumerate(zip(*found, strict=True)):
            same = (vectors == vectors[query]).all(1) & (True if allowed is None else allowed)
            assert (rows == np.flatnonzero(same)[:20]).all()
            one = search_vectors(index, vectors[query : query + 1], 20, metric=metric, allowed=allowed)
            assert (one[0] == scores).all() and (one[1] == rows).all()


def test_one_query_whose_neighbours_are_not_allowed(rng):
    vectors, asked = rng.normal(size=(20_000, 8)).astype(np.float32), rng.normal(size=(1, 8)).astype(np.float32)
    allowed = np.ones(20_000, bool)
    allowed[brute_force(vectors, asked, 4000, "l2")[1]] = False
    for metric in ("ip", "l2"):
        expected = brute_force(vectors, asked, 10, metric, allowed)[1]
        assert (nearest(vectors, asked, 10, metric=metric, allowed=allowed)[1] == expected).all()


@pytest.mark.usefixtures("products")
def test_many_blocks_and_many_hits(rng):
    vectors, asked = rng.normal(size=(9000, 512)).astype(np.float32), rng.normal(size=(3, 512)).astype(np.float32)
    for part in (asked, asked[:1]):
        scores, rows = nearest(vectors, part, 3000, metric="l2")
        expected, right = brute_force(vectors, part, 3000, "l2")
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
        for mine, theirs in zip(rows, right, strict=True):  # of equal scores, the order is one of rounding
            assert len({*mine} & {*theirs}) >= 2998


@pytest.mark.usefixtures("products")
def test_what_overflows_does_not_hide_the_others():
    vectors = np.eye(4, dtype=np.float32)
    vectors[2] *= np.float32(3e38)
    asked = np.full((3, 4), 2, np.float32)
    for queries in (asked, asked[:1]):
        rows = nearest(vectors, queries, 4, metric="l2")[1]
        assert (rows == [0, 1, 3, -1]).all()


@pytest.mark.parametrize("share", [None, 0.8, 0.3])
def test_many_products_that_overflow_do_not_hide_the_others(rng, share):
    vectors = rng.choice(np.float32([3e38, -3e38, 1, 2]), (400, 1))
    allowed = np.ones(400, bool) if share is None else rng.random(400) < share
    expected = [row for value in (2, 1) for row in np.flatnonzero((vectors[:, 0] == value) & allowed)]
    asked = np.float32([[2]])
    rows = nearest(vectors, asked, 150, metric="ip", allowed=None if share is None else allowed)[1][0]
    assert (rows[rows >= 0] == expected[:150]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_finds_what_it_says(images, built, kind):
    vectors, asked = (unit(array) for array in images)
    index = built[kind]
    assert (index.kind, kind_of(index.vectors)) == (kind, kind)
    rows = search_vectors(index.vectors, asked, 10, metric="cosine", raw=vectors)[1]
    assert recall(vectors, asked, rows, "cosine") > index.recall - 0.03
    assert index.recall >= 0.945 and (kind != "flat" or index.recall == 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1, 0.9, 0.5, 0.1, 0.01, 0.001])
def test_a_filter_costs_no_recall(images, built, rng, kind, share):
    vectors, asked = unit(images[0]), unit(images[1])
    allowed = rng.random(COUNT) < share
    rows = search_vectors(built[kind].vectors, asked, 10, metric="cosine", allowed=allowed, raw=vectors)[1]
    assert allowed[rows[rows >= 0]].all() and (rows >= 0).sum(1).min() == min(10, allowed.sum())
    assert recall(vectors, asked, rows[:, : allowed.sum()], "cosine", allowed) > built[kind].recall - 0.03


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivf-pq"])
def test_a_filter_of_what_is_far_from_the_query(images, built, kind):
    vectors = unit(images[0])
    asked = unit(images[1])[:20]
    allowed = np.zeros(COUNT, bool)
    far = brute_force(vectors, asked[:1], COUNT, "cosine")[1][0, -COUNT // 2 :]
    allowed[far] = True
    for queries in (asked[:1], asked):
        rows = search_vectors(built[kind].vectors, queries, 10, metric="cosine", allowed=allowed, raw=vectors)[1]
        assert recall(vectors, queries, rows, "cosine", allowed) >= (1 if len(queries) == 1 else 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_brute_force(images, built, kind):
    vectors, asked = unit(images[0]), unit(images[1])[:20]
    allowed = np.arange(COUNT) % 2 == 0
    for mask in (None, allowed):
        expected, rows = brute_force(vectors, asked, 10, "cosine", mask)
        options = {"allowed": mask, "exact": True, "raw": vectors}
        found = search_vectors(built[kind].vectors, asked, 10, metric="cosine", **options)
        np.testing.assert_allclose(found[0], expected, atol=1e-6)
        assert (found[1] == rows).mean() > 0.99
    assert sees_all(built[kind].vectors, COUNT, 20, 10, exact=True)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_more_effort_finds_more_and_changes_nothing_for_others(images, built, kind):
    vectors, asked = unit(images[0]), unit(images[1])
    index, name = built[kind].vectors, {"hnsw": "ef", "ivf": "nprobe"}[kind]
    before = search_vectors(index, asked, 10, metric="cosine")[1]
    found = [
        recall(vectors, asked, search_vectors(index, asked, 10, metric="cosine", **{name: effort})[1], "cosine")
        for effort in (1, 8, 1000)
    ]
    assert found[0] < found[1] <= found[2] > 0.999
    np.testing.assert_array_equal(search_vectors(index, asked, 10, metric="cosine")[1], before)


def test_raw_vectors_make_up_for_compression(images, built):
    vectors, asked = unit(images[0]), unit(images[1])
    index = built["ivf-pq"].vectors
    with_raw, without_raw = (
        recall(vectors, asked, search_vectors(index, asked, 10, metric="cosine", raw=raw)[1], "cosine")
        for raw in (vectors, None)
    )
    assert with_raw > max(0.94, without_raw + 0.02)
    with pytest.raises(ValueError, match="compressed vectors only; give raw="):
        search_vectors(index, asked, 10, metric="cosine", exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_come_back_in_their_rows(images, built, kind):
    rows = np.array([0, COUNT - 1, 17, 17])
    found = reconstruct(built[kind].vectors, rows)
    if kind == "ivf-pq":
        assert np.linalg.norm(found - unit(images[0])[rows], axis=1).max() < 0.5
    else:
        np.testing.assert_array_equal(found, unit(images[0])[rows])
    assert reconstruct(built[kind].vectors, rows[:0]).shape == (0, 49)
    with pytest.raises(ValueError, match=f"rows 0 to {COUNT}; the index has 0 to {COUNT - 1}"):
        reconstruct(built[kind].vectors, np.array([0, COUNT]))


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_leave_and_join(images, built, kind):
    vectors, asked = unit(images[0]), unit(images[1])[:100]
    left = np.setdiff1d(np.arange(COUNT), np.arange(0, COUNT, 3))
    index = without(built[kind].vectors, np.arange(0, COUNT, 3), vectors)
    assert (built[kind].vectors.ntotal, index.ntotal, kind_of(index)) == (COUNT, len(left), kind)
    found = search_vectors(index, asked, 10, metric="cosine", raw=vectors[left])[1]
    assert recall(vectors[left], asked, found, "cosine") > 0.9
    extend(index, vectors[::3])
    both = np.concatenate([vectors[left], vectors[::3]])
    found = search_vectors(index, both[-100:], 1, metric="cosine", raw=both)[1][:, 0]
    assert (found == np.arange(COUNT - 100, COUNT)).mean() > 0.95
    allowed = np.arange(COUNT) >= len(left)
    found = search_vectors(index, asked, 10, metric="cosine", raw=both, allowed=allowed)[1]
    assert recall(both, asked, found, "cosine", allowed) > 0.9


def test_removing_from_compressed_vectors_needs_the_whole_ones(built):
    with pytest.raises(ValueError, match="compressed vectors only; give raw="):
        without(built["ivf-pq"].vectors, np.array([1]))


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_copies_of_one_vector_do_not_hide_the_others(rng, kind):
    vectors = np.concatenate([np.repeat(rng.normal(size=(1, 16)), 3000, 0), rng.normal(size=(3000, 16))])
    vectors = unit(vectors.astype(np.float32))
    index = build_vectors(vectors, kind)
    rows = search_vectors(index.vectors, vectors[3000:3200], 10, metric="cosine")[1]
    assert (rows >= 0).all() and recall(vectors, vectors[3000:3200], rows, "cosine") > 0.75
    assert (search_vectors(index.vectors, vectors[:1], 4000, metric="cosine")[1] >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_more_hits_than_vectors(images, built, kind):
    few = np.zeros(COUNT, bool)
    few[:3] = True
    for allowed in (few, ~few & False):
        scores, rows = search_vectors(built[kind].vectors, unit(images[1][:2]), 5, metric="cosine", allowed=allowed)
        count = allowed.sum()
        assert (np.sort(rows[:, :count]) == np.arange(count)).all() and (rows[:, count:] == -1).all()
        assert (scores[:, count:] == -np.inf).all()
    scores, rows = search_vectors(built[kind].vectors, np.empty((0, 49), np.float32), 5, metric="cosine")
    assert scores.shape == rows.shape == (0, 5)


def test_an_empty_index_has_no_hits():
    scores, rows = search_vectors(faiss.IndexFlatL2(3), np.zeros((2, 3), np.float32), 4, metric="l2")
    assert (rows == -1).all() and (scores == np.inf).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": np.zeros((2, 48), np.float32)}, r"shape \(2, 48\); give \[q 49\]"),
        ({"queries": np.full((2, 49), np.nan, np.float32)}, "not finite"),
        ({"queries": np.full((2, 49), np.inf, np.float32)}, "not finite"),
        ({"k": 0}, "k=0; give at least 1"),
        ({"ef": 0}, "ef=0; give at least 1"),
        ({"nprobe": -1}, "nprobe=-1; give at least 1"),
        ({"allowed": np.ones(3, bool)}, f"one value for each of {COUNT} vectors"),
    ],
)
def test_what_cannot_be_searched_is_told(built, kind, change, message):
    options = {"queries": np.ones((2, 49), np.float32), "k": 3, "metric": "cosine"} | change
    with pytest.raises(ValueError, match=message):
        search_vectors(built[kind].vectors, **options)


def test_an_index_of_another_kind_is_told():
    with pytest.raises(ValueError, match="a FAISS IndexLSH is not one of"):
        kind_of(faiss.IndexLSH(8, 16))


def test_it_needs_no_torch():
    code = "import sys, repkit.ann.changing, repkit.where, repkit.indexfiles; print('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
