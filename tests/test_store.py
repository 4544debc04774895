import json

import numpy as np
import pytest
import torch

from repkit.exporting import export
from repkit.publishing import publish
from repkit.shards import Shard, encode_shard, manifest_bytes, shards_of
from repkit.store import FeatureStore
from tests.export_cases import tiny_extractor, write_image


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store of two classes in two splits, with one failure, in shards of three."""
    root = tmp_path_factory.mktemp("images")
    for index in range(10):
        write_image(root / ("train", "test")[index % 2] / ("cat", "dog")[index // 5] / f"{index}.png", index)
    (root / "train" / "cat" / "1bad.png").write_text("no")
    out = tmp_path_factory.mktemp("stores") / "store"
    export(root, tiny_extractor(), out, shard_size=3, batch_size=2)
    return out


@pytest.fixture
def copy(path, tmp_path):
    """The store again, to be spoiled."""
    publish(tmp_path, {file.name: file.read_bytes() for file in path.iterdir()})
    return tmp_path


def rewrite(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(manifest_bytes({**manifest, **changes}))


def test_reads_like_a_dataset(path):
    store = FeatureStore(path)
    assert store.complete and len(store) == 10 and store.keys == ("mid@50", "up.0@50")
    assert store.table["row"].to_pylist() == list(range(10))
    rows = list(store)
    for key in store.keys:
        assert np.array_equal(np.stack([row[key] for row in rows]), store.array(key))
    assert [row["row"] for row in rows] == store.table.to_pylist()
    assert store[-1]["row"]["row"] == 9
    with pytest.raises(IndexError, match="there are 10"):
        store[10]


def test_rows_say_where_the_image_is(path):
    store = FeatureStore(path)
    first = store.table.to_pylist()[0]
    assert (first["id"], first["label"], first["split"]) == ("test/cat/1.png", "cat", "test")
    assert (first["width"], first["height"]) == (16, 20)
    assert store.images.num_rows == 11
    assert [row["path"][-8:] for row in store.failures.to_pylist()] == ["1bad.png"]


def test_splits_divide_the_rows(path):
    store = FeatureStore(path)
    splits = np.array(store.table["split"].to_pylist())
    for split in ("train", "test"):
        assert np.array_equal(store.array("mid@50", split), store.array("mid@50")[splits == split])
    with pytest.raises(ValueError, match="no split 'val'.*have test, train"):
        store.array("mid@50", "val")


def test_unknown_key(path):
    with pytest.raises(ValueError, match="no features 'up.9'.*have mid@50, up.0@50"):
        FeatureStore(path).array("up.9")
    with pytest.raises(ValueError, match="have mid@50, up.0@50"):
        FeatureStore(path).array()


def test_what_is_no_store(path, copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such feature store"):
        FeatureStore(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no manifest.json"):
        FeatureStore(path.parent)
    for content, message in ((b"{", "damaged"), (b"[]", "not one of ours"), (b'{"format": "x"}', "not one of ours")):
        (copy / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            FeatureStore(copy)


def test_a_later_format_is_refused(copy):
    rewrite(copy, version=99)
    with pytest.raises(ValueError, match="format version 99; this repkit reads 1"):
        FeatureStore(copy)


def test_an_incomplete_store_opens_but_is_not_read(copy):
    rewrite(copy, complete=False)
    store = FeatureStore(copy)
    assert not store.complete and "not complete" in repr(store)
    for read in (len, lambda it: it[0], lambda it: it.array("mid@50"), lambda it: it.table, lambda it: it.failures):
        with pytest.raises(ValueError, match="run the same export again"):
            read(store)


@pytest.mark.parametrize(
    "name", ["shard-00001.safetensors", "shard-00001.parquet", "failures.parquet", "images.parquet"]
)
@pytest.mark.parametrize("spoil", ["torn", "lost", "flipped"])
def test_verify_names_bad_files(name, spoil, copy):
    store = FeatureStore(copy)
    store.verify()
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if spoil != "lost":
        (copy / name).write_bytes(content[:-7] if spoil == "torn" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"1 of 14 files .*{name}"):
        store.verify()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("shard-00001.safetensors", lambda store: store.array("mid@50")),
        ("shard-00001.parquet", lambda store: store.table),
        ("failures.parquet", lambda store: store.failures),
    ],
)
@pytest.mark.parametrize("spoil", ["torn", "lost"])
def test_reading_a_bad_file_is_one_clear_error(name, read, spoil, copy):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if spoil == "torn":
        (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is missing or damaged"):
        read(FeatureStore(copy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_come_back_as_they_were(dtype, tmp_path, generator):
    """A store written by hand: maps of another shape and dtype, a shard without images in the middle."""
    values = torch.randn(5, 2, 3, 4, generator=generator).to(dtype)
    records, listing = [], []
    for shard, rows in zip(shards_of(7, 3), (values[:3], values[:0], values[3:]), strict=True):
        names = [{"id": f"{shard.index}-{row}", "path": "x", "row": row} for row in range(len(rows))]
        publish(tmp_path, encode_shard(shard, {"a@1": rows}, names, []))
        records.append({"name": shard.name, "rows": len(rows), "failures": 0, "sha256": {}})
        listing += names
    publish(tmp_path, {"images.parquet": (tmp_path / "shard-00000.parquet").read_bytes()})
    taps = {"a@1": {"shape": [2, 3, 4], "dtype": str(dtype).removeprefix("torch."), "channels": 2, "stride": 1}}
    head = {"format": "repkit-features", "version": 1, "complete": True, "identity": {}, "provenance": {}}
    publish(tmp_path, {"manifest.json": manifest_bytes({**head, "taps": taps, "shards": records})})
    store = FeatureStore(tmp_path)
    array = store.array()
    assert array.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    assert np.array_equal(array, values.float().numpy().astype(array.dtype))
    assert np.array_equal(store[3]["a@1"], array[3])
    assert store.table["id"].to_pylist() == [row["id"] for row in listing]


def test_batches_never_straddle_a_shard():
    for images, size, batch in ((10, 4, 3), (8, 4, 4), (1, 5, 2), (9, 1, 4)):
        found = shards_of(images, size)
        batches = [list(each) for shard in found for each in shard.batches(batch)]
        assert sum(batches, []) == list(range(images))
        assert all(len({index // size for index in each}) == 1 and len(each) <= batch for each in batches)
    assert Shard(3, 0, 1).files[-1] == "shard-00003.safetensors"
