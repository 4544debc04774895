import hashlib
import json
from dataclasses import replace
from types import MappingProxyType

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from repkit.ann import METRICS
from repkit.exporting import export
from repkit.extractors import DiffusionExtractor
from repkit.features import Features
from repkit.images import Resize, to_uint8
from repkit.indexfiles import ITEMS, MANIFEST, VECTORS
from repkit.retrieval import Index, _check_count
from tests.oracles import class_means, gaussian_backbone, gaussian_images
from tests.vectors import brute_force


@pytest.fixture
def vectors(rng):
    return rng.normal(size=(300, 24)).astype(np.float32) + 1


def extractor(taps="posterior@100,400", seed=0, **options):
    backbone = gaussian_backbone("eps", class_means(3, size=8, spread=0.1), 0.02)
    return DiffusionExtractor(backbone, taps, seed=seed, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    images = to_uint8(gaussian_images(class_means(3, size=8, spread=0.1), 0.02, torch.arange(9) % 3))
    for i, image in enumerate(images):
        (folder / f"class-{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"class-{i % 3}" / f"{i}.png")
    (folder / "class-0" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def store(photos, tmp_path_factory):
    return export(photos, extractor(), tmp_path_factory.mktemp("out") / "store", pool="2x2", workers=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [1, 200])
def test_finds_what_brute_force_finds(vectors, rng, metric, queries):
    asked = rng.normal(size=(queries, 24)).astype(np.float32) + 1
    scores, rows = brute_force(vectors, asked, 10, metric)
    hits = Index.build(vectors, metric=metric).search(asked)
    assert (hits.rows == rows).all()
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-4, atol=1e-4)
    assert hits.ids == [[str(row) for row in found] for found in rows]
    assert (hits.scores.dtype, hits.rows.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("metric", METRICS)
def test_an_item_finds_itself(vectors, metric):
    index = Index.build(torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)), metric=metric)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    hits = index.search(torch.from_numpy(unit), 1, exact=True)
    assert hits.rows[:, 0].tolist() == list(range(300))
    np.testing.assert_allclose(hits.scores, 0 if metric == "l2" else 1, atol=2e-3)


def test_more_asked_than_there_is(vectors):
    index = Index.build(vectors[:3], ids=["a", "b", "c"], labels=["x", "x", "y"])
    hits = index.search(vectors[:2], 10)
    assert hits.rows.shape == hits.scores.shape == (2, 3)
    assert [sorted(names) for names in hits.ids] == [["a", "b", "c"]] * 2
    assert index.items["label"].to_pylist() == ["x", "x", "y"]
    assert len(index) == 3 and index.dimension == 24


def test_no_queries_give_no_hits(vectors):
    hits = Index.build(vectors).search(vectors[:0], 4)
    assert hits.ids == [] and hits.rows.shape == hits.scores.shape == (0, 4)


def test_zeros_are_like_nothing_in_cosine(vectors):
    vectors[5] = 0
    index = Index.build(vectors)
    scores = index.search(vectors[:1], 300)
    assert scores.scores[0, scores.rows[0] == 5] == 0
    assert (index.search(np.zeros((1, 24)), 3).scores == 0).all()


def test_huge_and_tiny_vectors_keep_their_direction():
    directions = np.eye(4, dtype=np.float32)
    hits = Index.build(directions * np.float32(1e30)).search(directions * np.float32(1e-30), 1)
    assert hits.rows[:, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(hits.scores, 1, rtol=1e-6)


@pytest.mark.parametrize("queries", [1, 300])
def test_vectors_too_large_for_a_distance_are_told(queries):
    huge = np.full((3, 500), 1e30, np.float32) * np.arange(1, 4)[:, None]
    with pytest.raises(ValueError, match="float32 overflows"):
        Index.build(huge, metric="l2").search(-np.repeat(huge[:1], queries, 0), 2)


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((0, 4)), {}, "nothing to index"),
        (np.zeros((4, 0)), {}, "nothing to index"),
        (np.zeros(4), {}, "give numbers of shape"),
        (np.zeros((2, 3, 3)), {}, "give numbers of shape"),
        (np.array([["a"]]), {}, "give numbers"),
        (np.array([[1.0], [np.nan]]), {}, "row 1 is not finite"),
        (np.array([[1e300]]), {}, "row 0 is not finite"),
        (np.ones((2, 2)), {"kind": "lsh"}, "have auto, flat, ivf, hnsw, ivf-pq and cosine, ip, l2"),
        (np.ones((2, 2)), {"metric": "hamming"}, "have auto, flat, ivf, hnsw, ivf-pq and cosine, ip, l2"),
        (np.ones((2, 2)), {"kind": "ivf-pq"}, "learns from 9984 vectors or more"),
        (np.ones((2, 2)), {"key": "mid@50"}, "an array has no keys"),
        (np.ones((2, 2)), {"ids": ["a", "a"]}, "'a' is given twice"),
        (np.ones((2, 2)), {"labels": ["a"]}, "1 labels for 2 vectors"),
        (np.ones((2, 2)), {"metadata": {"x": [1]}}, "1 rows of metadata for 2 vectors"),
        (np.ones((2, 2)), {"metadata": {"x": [1, "a"]}}, "metadata columns of one type"),
        (np.ones((2, 2)), {"metadata": pa.table([[1, 2], [3, 4]], names=["x", "x"])}, "columns of one name: x, x"),
        (np.ones((2, 2)), {"metadata": {"id": ["a", "b"]}}, "metadata has a column 'id'; give ids="),
        (np.ones((2, 2)), {"metadata": {"label": [1, 2]}, "labels": ["a", "b"]}, "a column 'label'; give labels="),
    ],
)
def test_what_cannot_be_indexed_is_told(array, options, message):
    with pytest.raises(ValueError, match=message):
        Index.build(array, **options)


def test_metadata_may_be_any_mapping_of_columns(vectors):
    index = Index.build(vectors[:3], metadata=MappingProxyType({"width": [1, 2, 3]}))
    assert index.search(vectors[:1], where={"width": {"gt": 1}}).rows.shape == (1, 2)


def test_what_cannot_be_searched_is_told(vectors):
    index = Index.build(vectors)
    bad = vectors[:3].copy()
    bad[2, 7] = np.nan
    for queries, k, message in [
        (vectors[:, :23], 10, "23 dimensions and the index has 24"),
        (vectors[0], 10, r"give numbers of shape \[n d\]"),
        (bad, 10, "row 2 is not finite"),
        (vectors, 0, "k=0; give at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search(queries, k)
    for count in (1.5, "3", True, np.float32(2)):  # which without the tests' checks of types come so far
        with pytest.raises(ValueError, match="give at least 1, and a whole number"):
            _check_count("k", count)


def test_a_store_is_searched_with_features(store, photos):
    index = Index.build(store, "posterior@400")
    assert len(index) == len(store) == 9  # the broken image has no row
    paths = store.table["path"].to_pylist()
    hits = index.search(extractor()(paths), 3)
    assert [names[0] for names in hits.ids] == store.table["id"].to_pylist()
    by_array = index.search(store.array("posterior@400"), 3)
    assert (by_array.rows == hits.rows).all()
    np.testing.assert_allclose(by_array.scores, hits.scores, atol=1e-5)
    assert index.items["label"].to_pylist() == store.table["label"].to_pylist()
    assert (index.pool, index.key) == ("2x2", "posterior@400")


def test_the_mask_of_a_query_counts(photos, tmp_path):
    pad = extractor("posterior@100", resize=Resize(8, "pad"))
    picture = Image.open(photos / "class-0" / "0.png").resize((8, 4))
    picture.save(tmp_path / "wide.png")
    padded = export([tmp_path / "wide.png"], pad, tmp_path / "store", workers=0)
    features = pad([tmp_path / "wide.png"])
    index = Index.build(padded, metric="l2")
    assert index.search(features, 1).scores[0, 0] < 1e-5
    assert index.search(replace(features, mask=None), 1).scores[0, 0] > 1e-3


def test_features_of_another_extractor_are_refused(store, photos):
    index = Index.build(store, "posterior@100")
    path = [photos / "class-0" / "0.png"]
    with pytest.raises(ValueError, match="seed: 0 here, 7 there"):
        index.search(extractor(seed=7)(path))
    with pytest.raises(ValueError, match=r"resize.policy: crop here, squash there"):
        index.search(extractor(resize=Resize(8, "squash"))(path))
    with pytest.raises(ValueError, match=r"taps.posterior@400"):
        index.search(extractor("posterior@100")(path))


def test_features_need_an_index_that_knows_its_extractor(vectors, photos):
    features = extractor()([photos / "class-0" / "0.png"])
    assert isinstance(features, Features)
    with pytest.raises(ValueError, match="built from an array"):
        Index.build(vectors).search(features)


def test_a_store_must_say_which_key_and_be_pooled(store, photos, tmp_path):
    with pytest.raises(ValueError, match="has 2 keys; choose one with key=: posterior@100, posterior@400"):
        Index.build(store)
    with pytest.raises(ValueError, match="no features 'mid@1'"):
        Index.build(store, "mid@1")
    with pytest.raises(ValueError, match="of its own"):
        Index.build(store, "posterior@100", ids=["a"] * 9)
    dense = export(photos, extractor("posterior@100"), tmp_path / "dense", pool="none", workers=0)
    with pytest.raises(ValueError, match="holds maps, not vectors"):
        Index.build(dense)


@pytest.mark.parametrize("metric", METRICS)
def test_a_saved_index_is_the_same(vectors, tmp_path, metric):
    index = Index.build(vectors, metric=metric, ids=[f"i{row}" for row in range(300)])
    index.save(tmp_path / "a" / "index")
    loaded = Index.load(tmp_path / "a" / "index")
    for mine, theirs in zip(*(vars(found.search(vectors[:9])).values() for found in (index, loaded)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert loaded.items.equals(index.items) and loaded.metric == metric
    assert sorted(path.name for path in (tmp_path / "a" / "index").iterdir()) == [VECTORS, ITEMS, MANIFEST]


def test_a_saved_index_keeps_the_identity(store, photos, tmp_path):
    Index.build(store, "posterior@100").save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    path = [photos / "class-1" / "1.png"]
    assert loaded.search(extractor()(path), 1).ids == [["class-1/1.png"]]
    assert loaded.identity == store.identity["extractor"] and loaded.provenance == store.provenance
    with pytest.raises(ValueError, match="seed: 0 here, 7 there"):
        loaded.search(extractor(seed=7)(path))


def test_an_index_can_be_replaced_and_nothing_else(vectors, store, tmp_path):
    Index.build(vectors).save(tmp_path / "index")
    Index.build(vectors[:5]).save(tmp_path / "index")
    assert len(Index.load(tmp_path / "index")) == 5
    before = (store.path / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="holds other files"):
        Index.build(vectors).save(store.path)
    assert (store.path / MANIFEST).read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="is no index"):
        Index.build(vectors).save(tmp_path / "other")


@pytest.mark.parametrize("name", [VECTORS, ITEMS])
@pytest.mark.parametrize("place", [0, 60, -5])
def test_a_flipped_byte_is_refused(vectors, tmp_path, name, place):
    Index.build(vectors).save(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[place] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Index.load(tmp_path)


def test_what_is_no_index_is_told(vectors, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such index"):
        Index.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no manifest.json"):
        Index.load(tmp_path)
    Index.build(vectors).save(tmp_path)
    good = json.loads((tmp_path / MANIFEST).read_text())
    for text, message in [
        ("{", "is damaged"),
        ("[]", "is no index"),
        (json.dumps(good | {"version": 9}), "format version 9; this repkit reads 1 and 2"),
        (json.dumps({"format": good["format"], "version": 2}), "no count, dimension, identity"),
        (json.dumps(good | {"sha256": {}}), "sha256 is .*, not None"),
        (json.dumps(good | {"count": 299}), "does not hold what its manifest says"),
        (json.dumps(good | {"metric": "l2"}), "does not hold what its manifest says"),
    ]:
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=message):
            Index.load(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(good))
    (tmp_path / VECTORS).unlink()
    with pytest.raises(ValueError, match="its sha256 is missing"):
        Index.load(tmp_path)


@pytest.mark.parametrize("kept", [10, 60, 1000])
def test_bytes_that_faiss_refuses_are_one_clear_error(vectors, tmp_path, kept):
    Index.build(vectors).save(tmp_path)
    truncated = (tmp_path / VECTORS).read_bytes()[:kept]
    (tmp_path / VECTORS).write_bytes(truncated)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["sha256"][VECTORS] = hashlib.sha256(truncated).hexdigest()
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    limits = [name for name in dir(faiss) if name.startswith("get_deserialization_")]  # older versions lack some
    before = [getattr(faiss, name)() for name in limits]
    with pytest.raises(ValueError, match="no index that FAISS reads"):
        Index.load(tmp_path)
    assert [getattr(faiss, name)() for name in limits] == before


def test_items_are_plain_parquet(store, tmp_path):
    Index.build(store, "posterior@100").save(tmp_path)
    table = pq.read_table(tmp_path / ITEMS)
    assert table.column_names[:3] == ["id", "path", "label"]
    assert table["id"].to_pylist() == store.table["id"].to_pylist()
