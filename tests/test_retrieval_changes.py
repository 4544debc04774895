import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from repkit.exporting import export
from repkit.extractors import DiffusionExtractor
from repkit.images import to_uint8
from repkit.retrieval import Index
from tests.oracles import class_means, gaussian_backbone, gaussian_images
from tests.vectors import brute_force, pixels, recall

LABELS = np.array(["bag", "coat", "shoe"])


@pytest.fixture(scope="module")
def images():
    return pixels(3000)


@pytest.fixture(scope="module")
def table():
    widths = np.arange(2900) % 7
    return pa.table({"label": LABELS[np.arange(2900) % 3], "width": widths, "sure": np.arange(2900) < 3})


@pytest.fixture(scope="module", params=["flat", "hnsw", "ivf"])
def index(request, images, table):
    return Index.build(images[0][:2900], kind=request.param, metadata=table)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_a_filter_is_brute_force_over_what_it_allows(images, table, metric):
    vectors, queries = images[0][:2900], images[0][2900:]
    index = Index.build(vectors, metric=metric, metadata=table)
    allowed = (np.arange(2900) % 3 == 1) & (np.arange(2900) % 7 >= 3)
    hits = index.search(queries, 10, where={"label": "coat", "width": {"gte": 3}})
    scores, rows = brute_force(vectors, queries, 10, metric, allowed)
    assert (hits.rows == rows).mean() > 0.999 and hits.exact
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-4, atol=1e-5)
    assert hits.ids == [[str(row) for row in found] for found in hits.rows]


def test_a_filter_finds_what_it_allows(images, index):
    queries = images[0][2900:]
    for where, count in [({"sure": True}, 3), ({"sure": {"not": True}, "label": "bag"}, 10), ({"width": 99}, 0)]:
        hits = index.search(queries, 10, where=where)
        assert hits.rows.shape == (100, count) and all(len(names) == count for names in hits.ids)
    half = index.search(queries, 10, where={"width": [0, 1, 2, 3]})
    allowed = np.arange(2900) % 7 < 4
    assert recall(images[0][:2900], queries, half.rows, "cosine", allowed) > 0.93
    assert allowed[half.rows].all()


def test_hits_say_whether_all_was_compared(images, index):
    queries = images[0][2900:]
    assert index.search(queries[:1]).exact == (index.kind == "flat")
    assert index.search(queries[:1], exact=True).exact
    assert index.search(queries[:1], where={"sure": True}).exact
    rows = index.search(queries, exact=True).rows
    assert recall(images[0][:2900], queries, rows, "cosine") == 1


def test_effort_is_for_the_kinds_that_have_it(images, index):
    queries, options = images[0][2900:], {"flat": {}, "hnsw": {"ef": 500}, "ivf": {"nprobe": 500}}
    rows = index.search(queries, **options[index.kind]).rows
    assert recall(images[0][:2900], queries, rows, "cosine") > 0.999
    for name, kinds in (("ef", ("hnsw",)), ("nprobe", ("ivf", "ivf-pq"))):
        with pytest.raises(ValueError, match=f"{name}=0; give at least 1"):
            index.search(queries, **{name: 0})
        if index.kind not in kinds:
            with pytest.raises(ValueError, match=f"{name}=3 is for {' and '.join(kinds)}; this index is {index.kind}"):
                index.search(queries, **{name: 3})


def test_what_is_no_filter_is_told(images, index):
    for where, message in [
        ({"weight": 3}, "no column 'weight' to filter by; have id, label, path, sure, width"),
        ({"width": "3"}, "width holds int"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search(images[0][:1], where=where)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_items_come_and_go(images, kind):
    vectors, queries = images[0][:2000], images[0][2900:]
    index = Index.build(vectors[:1500], kind=kind, metadata={"width": list(range(1500))})
    index.add(vectors[1500:], labels=["new"] * 500, metadata={"height": [1.5] * 500})
    assert len(index) == len(index.items) == 2000
    assert index.items["id"].to_pylist() == [str(row) for row in range(2000)]
    assert index.items["width"].to_pylist()[1498:1502] == [1498, 1499, None, None]
    assert index.items["height"].to_pylist()[1498:1502] == [None, None, 1.5, 1.5]
    assert recall(vectors, queries, index.search(queries).rows, "cosine") > 0.9
    assert all(int(name) >= 1500 for name in index.search(queries[:1], where={"label": "new"}).ids[0])
    index.remove([str(row) for row in range(0, 2000, 2)])
    assert index.items["id"].to_pylist() == [str(row) for row in range(1, 2000, 2)]
    assert all(int(name) >= 1500 for name in index.search(queries[:1], where={"label": "new"}).ids[0])
    hits = index.search(queries)
    assert recall(vectors[1::2], queries, hits.rows, "cosine") > 0.9
    assert hits.ids == [[str(2 * row + 1) for row in found] for found in hits.rows]
    index.remove([str(row) for row in range(1, 2000, 2)])
    assert len(index) == 0 and index.search(queries).ids == [[]] * 100
    index.add(vectors[:3], ids=["a", "b", "c"])
    assert index.search(vectors[1:2], 1).ids == [["b"]]


def test_compressed_vectors_come_and_go_with_the_whole_ones(tmp_path):
    vectors = pixels(10_000)[0]
    index = Index.build(vectors, kind="ivf-pq", memory=400_000)
    index.save(tmp_path)
    index = Index.load(tmp_path)
    index.add(vectors[:5] + 0.1, ids=list("abcde"))
    index.remove(["0", "7", "c"])
    left = np.delete(np.concatenate([vectors, vectors[:5] + 0.1]), [0, 7, 10_002], axis=0)
    assert len(index) == len(index.raw) == len(index.items) == 10_002
    queries = vectors[5000:5100] + 0.02
    assert (index.search(queries, exact=True).rows == brute_force(left, queries, 10, "cosine")[1]).mean() > 0.99
    index.save(tmp_path)
    assert len(Index.load(tmp_path)) == 10_002
    assert index.size / len(index) < 40 < 4 * 49


def test_a_change_that_fails_changes_nothing(images, tmp_path):
    vectors = images[0][:60]
    index = Index.build(vectors, ids=[f"i{row}" for row in range(60)], metadata={"width": list(range(60))})
    nan = vectors[:2].copy()
    nan[1] = np.nan
    for options, message in [
        ({"source": vectors[:2], "ids": ["i3", "x"]}, "id 'i3' is given twice"),
        ({"source": vectors[:2], "ids": ["x", "x"]}, "id 'x' is given twice"),
        ({"source": vectors[:2], "ids": ["x"]}, "1 ids and 2 labels for 2 vectors"),
        ({"source": vectors[:2, :40]}, "40 dimensions and the index has 49"),
        ({"source": nan}, "row 1 is not finite"),
        ({"source": vectors[:2], "metadata": {"width": ["a", "b"]}}, "do not go with those of the index"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.add(**options)
    with pytest.raises(ValueError, match="no item 'i60' in the index, which has 60"):
        index.remove(["i0", "i60"])
    with pytest.raises(ValueError, match=r"give a list of ids, such as \['i0'\]"):
        index.remove("i0")
    assert len(index) == len(index.items) == 60 and index.search(vectors, 1).rows[:, 0].tolist() == list(range(60))
    index.save(tmp_path)
    mapped = Index.load(tmp_path, mmap=True)
    for change in (lambda: mapped.add(vectors[:1], ids=["x"]), lambda: mapped.remove(["i0"])):
        with pytest.raises(ValueError, match="memory-mapped; load it without mmap=True to change"):
            change()
    assert mapped.search(vectors, 1).ids == [[f"i{row}"] for row in range(60)]


def test_auto_says_what_it_chose(images):
    index = Index.build(images[0])
    assert (index.kind, index.recall, index.parameters, index.size) == ("flat", 1.0, {}, 3000 * 49 * 4)
    given = Index.build(images[0][:2900], kind="hnsw", queries=images[0][2900:], recall=0.9)
    assert given.parameters.keys() == {"M", "efConstruction", "ef"} and given.recall >= 0.85


def extractor(seed=0):
    backbone = gaussian_backbone("eps", class_means(3, size=8, spread=0.1), 0.02)
    return DiffusionExtractor(backbone, "posterior@100", seed=seed)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    images = to_uint8(gaussian_images(class_means(3, size=8, spread=0.1), 0.02, torch.arange(6) % 3))
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    paths = sorted(folder.iterdir())
    out = tmp_path_factory.mktemp("stores")
    first, second = (
        export(part, extractor(), out / str(n), workers=0) for n, part in enumerate((paths[:4], paths[4:]))
    )
    return paths, first, second, export(paths[4:], extractor(7), out / "seed", workers=0)


def test_a_store_of_the_same_extractor_is_added(stores):
    paths, first, second, other = stores
    index = Index.build(first)
    index.add(second)
    assert index.items["id"].to_pylist() == [*first.table["id"].to_pylist(), *second.table["id"].to_pylist()]
    assert [names[0] for names in index.search(extractor()(paths), 1).ids] == index.items["id"].to_pylist()
    with pytest.raises(ValueError, match="seed: 0 here, 7 there"):
        index.add(other)
    with pytest.raises(ValueError, match="given twice"):
        index.add(first)
    with pytest.raises(ValueError, match="of its own"):
        index.add(second, ids=["a", "b"])
    with pytest.raises(ValueError, match="pool: mean here, 2x2 there"):
        index.add(export(paths[:1], extractor(), first.path.parent / "pooled", pool="2x2", workers=0))


def test_features_are_added_by_their_extractor(stores):
    paths, first, _, _ = stores
    index = Index.build(first)
    index.add(extractor()(paths[4:5]), ids=["new"], labels=["bag"])
    assert index.search(extractor()(paths[4:5]), 1, where={"label": "bag"}).ids == [["new"]]
    with pytest.raises(ValueError, match="seed: 0 here, 7 there"):
        index.add(extractor(7)(paths[5:]), ids=["newer"])
    with pytest.raises(ValueError, match="built from an array"):
        Index.build(first.array()).add(extractor()(paths[5:]), ids=["newer"])
