import json

import faiss
import numpy as np
import pyarrow as pa
import pytest

from repkit.indexfiles import ITEMS, MANIFEST, RAW, VECTORS, VERSION, read_raw, read_vectors, write_vectors
from repkit.publishing import file_sha256, parquet_bytes, sha256
from repkit.retrieval import Index
from tests.vectors import pixels

KINDS = ("flat", "hnsw", "ivf", "ivf-pq")
MEMORY = {"ivf-pq": 400_000}  # for 7 bytes a vector, which are learned in less time than 49


@pytest.fixture(scope="module")
def vectors():
    return pixels(10_000)[0]


@pytest.fixture(scope="module")
def saved(vectors, tmp_path_factory):
    """A folder of each kind, and what it finds for some queries."""
    folders = {}
    for kind in KINDS:
        index = Index.build(vectors, kind=kind, metric="l2", memory=MEMORY.get(kind), seed=3)
        index.save(folder := tmp_path_factory.mktemp("saved") / kind)
        folders[kind] = folder, index
    return folders


def answers(index, vectors):
    queries = vectors[:40] + 0.01
    found = [index.search(queries, 10), index.search(queries, 10, exact=True), index.search(queries[:2], 3)]
    return [array for hits in found for array in (hits.scores, hits.rows)]


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_index_finds_the_same(saved, vectors, kind, mmap):
    folder, index = saved[kind]
    loaded = Index.load(folder, mmap=mmap)
    for mine, theirs in zip(answers(index, vectors), answers(loaded, vectors), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert (loaded.kind, loaded.parameters, loaded.recall) == (kind, index.parameters, index.recall)
    assert loaded.size == index.size
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["version"], manifest["kind"], manifest["recall"]) == (VERSION, kind, index.recall)
    assert manifest["sha256"] == {path.name: file_sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
    assert (folder / RAW).exists() == (kind == "ivf-pq")


def test_raw_vectors_stay_on_the_disk(saved, vectors):
    raw = read_raw(saved["ivf-pq"][0], "ivf-pq")
    assert isinstance(raw, np.memmap)
    np.testing.assert_array_equal(raw, vectors)
    assert read_raw(saved["flat"][0], "flat") is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_and_swapped_files_are_refused(vectors, tmp_path, kind):
    for name, part in (("a", vectors), ("b", vectors[::-1])):
        Index.build(part, kind=kind, metric="l2", memory=MEMORY.get(kind)).save(tmp_path / name)
    for name in (VECTORS, RAW, ITEMS) if kind == "ivf-pq" else (VECTORS, ITEMS):
        path = tmp_path / "a" / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        for bad in (bytes(flipped), whole[:-1], b"", (tmp_path / "b" / name).read_bytes()):
            path.write_bytes(bad)
            if bad != whole:
                with pytest.raises(ValueError, match=f"{name} is damaged"):
                    Index.load(tmp_path / "a")
        path.unlink()
        with pytest.raises(ValueError, match=f"{name} is damaged: its sha256 is missing"):
            Index.load(tmp_path / "a", mmap=True)
        path.write_bytes(whole)
    assert len(Index.load(tmp_path / "a")) == len(vectors)


def test_an_index_of_the_first_version_is_read(vectors, tmp_path):
    flat = faiss.IndexFlat(49, faiss.METRIC_L2)
    flat.add(vectors[:50])
    ids = [str(row) for row in range(50)]
    text = pa.string()
    items = pa.table({"id": pa.array(ids, text), "path": pa.nulls(50, text), "label": pa.nulls(50, text)})
    files = {VECTORS: faiss.serialize_index(flat).tobytes(), ITEMS: parquet_bytes(items)}
    manifest = {"format": "repkit-index", "version": 1, "count": 50, "dimension": 49, "metric": "l2", "kind": "flat"}
    manifest |= {"key": None, "pool": None, "identity": None, "provenance": None}
    manifest["sha256"] = {name: sha256(content) for name, content in files.items()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    index = Index.load(tmp_path)
    assert (index.kind, index.recall, dict(index.parameters)) == ("flat", 1.0, {})
    assert index.search(vectors[:50], 1).rows[:, 0].tolist() == list(range(50))
    index.save(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text())["version"] == VERSION
    for version in (0, VERSION + 1, "2"):
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"version": version}))
        with pytest.raises(ValueError, match=f"format version {version}; this repkit reads 1 and {VERSION}"):
            Index.load(tmp_path)


def test_raw_vectors_of_an_index_before_do_not_stay(saved, vectors, tmp_path):
    saved["ivf-pq"][1].save(tmp_path)
    assert (tmp_path / RAW).exists()
    saved["flat"][1].save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([VECTORS, ITEMS, MANIFEST])
    assert Index.load(tmp_path).kind == "flat"


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_may_be_saved_over_its_own_files(saved, vectors, tmp_path, kind):
    saved[kind][1].save(tmp_path)
    loaded = Index.load(tmp_path)
    loaded.save(tmp_path)
    for mine, theirs in zip(answers(Index.load(tmp_path), vectors), answers(loaded, vectors), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(ValueError, match="memory-mapped; load it without mmap=True to change or save it"):
        Index.load(tmp_path, mmap=True).save(tmp_path)
    assert len(Index.load(tmp_path)) == 10_000


def test_what_a_service_has_changed_is_not_replaced(saved, tmp_path):
    saved["flat"][1].save(tmp_path)
    (tmp_path / "live").mkdir()
    before = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="changes that repkit serve has made"):
        saved["hnsw"][1].save(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == before
    assert Index.load(tmp_path).kind == "flat"


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_an_error_of_the_disk(saved, kind):
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        write_vectors(saved[kind][1].vectors, full)


def test_what_is_no_faiss_index_is_told(tmp_path):
    for content in (b"", b"Iw", b"IwFl" + bytes(100), b"no index at all" * 100):
        (tmp_path / "x").write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(ValueError, match="no index that FAISS reads"):
                read_vectors(tmp_path / "x", mmap)
