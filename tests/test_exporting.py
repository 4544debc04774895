import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image

from repkit import exporting
from repkit.dino import DinoExtractor
from repkit.exporting import estimate_bytes, export
from repkit.extractors import DiffusionExtractor, Extractor
from repkit.features import Features
from repkit.images import Resize
from repkit.listing import list_images
from repkit.publishing import publish
from repkit.shards import locked
from repkit.store import FeatureStore
from tests.export_cases import TAPS, hashes, tiny_extractor, tiny_unet, write_image, write_images

NUMPY_POOLS = {
    "mean": lambda maps: maps.mean((1, 2)),
    "max": lambda maps: maps.max((1, 2)),
    "gem": lambda maps: (np.maximum(maps, 1e-6) ** 3).mean((1, 2)) ** (1 / 3),
    "2x2": lambda maps: np.stack(
        [half.mean((1, 2)) for row in np.split(maps, 2, 1) for half in np.split(row, 2, 2)], 1
    ).reshape(-1),
    "none": lambda maps: maps,
}


@pytest.fixture(scope="module")
def extractor() -> DiffusionExtractor:
    return tiny_extractor()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 11)


@contextmanager
def warned(caplog, *words):
    with caplog.at_level(logging.WARNING, "repkit"):
        yield
    assert all(any(word in message for message in caplog.messages) for word in words), caplog.messages


def with_weights(seed: int) -> DiffusionExtractor:
    return DiffusionExtractor(tiny_unet(weights_seed=seed), TAPS)


def write_nasty(folder: Path) -> set[str]:
    """Good images between every kind of bad file; the ids of the bad ones."""
    for index in range(6):
        write_image(folder / f"{index}-good.png", index)
    (folder / "0-zero.png").write_bytes(b"")
    (folder / "1-text.png").write_text("not an image")
    whole = write_image(folder / "2-truncated.jpg", 9, (64, 64)).read_bytes()
    (folder / "2-truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "3-gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "4-pipe.png")
    Image.new("L", (8000, 7000)).save(folder / "5-large.png")
    Image.new("CMYK", (9, 9), (10, 20, 30, 40)).save(folder / "0-cmyk.jpg")
    Image.new("RGB", (1, 1)).save(folder / "1-one.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999).save(folder / "2-deep.png")
    frames = [Image.new("P", (8, 8), color) for color in (1, 2)]
    frames[0].save(folder / "3-moving.gif", save_all=True, append_images=frames[1:])
    write_image(folder / "4-folder.png" / "inside.png", 77)
    return {"0-zero.png", "1-text.png", "2-truncated.jpg", "3-gone.png", "4-pipe.png", "5-large.png"}


@pytest.mark.parametrize("how", NUMPY_POOLS)
def test_rows_are_the_pooled_features_of_each_image(how, images, extractor, tmp_path):
    store = export(images, extractor, tmp_path / "out", pool=how, batch_size=4, shard_size=6)
    assert store.table["id"].to_pylist() == [f"{index:03d}.png" for index in range(11)]
    for key in extractor.taps:
        alone = [extractor([path])[key][0].numpy() for path in store.table["path"].to_pylist()]
        expected = np.stack([NUMPY_POOLS[how](maps) for maps in alone])
        np.testing.assert_allclose(store.array(key), expected, atol=1e-5 * np.abs(expected).max())
        assert store.taps[key]["shape"] == list(expected.shape[1:])


def test_bad_files_move_no_row_and_workers_change_no_byte(tmp_path, extractor):
    """In line, in a thread, in two processes: one folder, to the last byte."""
    bad = write_nasty(tmp_path / "images")
    folders = []
    for workers in (0, 1, 2):
        out = tmp_path / f"out{workers}"
        store = export(tmp_path / "images", extractor, out, batch_size=5, shard_size=7, workers=workers)
        folders.append(hashes(out))
    assert folders[0] == folders[1] == folders[2]
    failed = {Path(path).relative_to(tmp_path / "images").as_posix() for path in store.failures["path"].to_pylist()}
    assert failed == bad and all(store.failures["error"].to_pylist())
    assert {*store.table["id"].to_pylist()} == {*list_images(tmp_path / "images")["id"].to_pylist()} - bad
    for row in (store[index] for index in range(len(store))):
        expected = extractor([row["row"]["path"]])["mid@50"].mean((2, 3))[0].numpy()
        np.testing.assert_allclose(row["mid@50"], expected, atol=1e-5)
    assert str(tmp_path) not in "".join(map(repr, (store._manifest, (out / "failures.parquet").read_bytes())))


def test_batches_and_order_do_not_matter(images, extractor, tmp_path):
    paths = sorted(images.iterdir())
    one = export(paths, extractor, tmp_path / "one", batch_size=1, pool="none")
    other = export(paths[::-1], extractor, tmp_path / "other", batch_size=7, shard_size=5, pool="none")
    assert other.table["id"].to_pylist() == one.table["id"].to_pylist()[::-1]
    for key in one.keys:
        values = one.array(key)
        np.testing.assert_allclose(values, other.array(key)[::-1], atol=1e-5 * np.abs(values).max(), rtol=0)


def test_padding_is_left_out_of_the_mean(tmp_path):
    extractor = tiny_extractor("down.0.resnet.0@50", resize=Resize(16, "pad"))
    write_image(tmp_path / "images" / "wide.png", 0, (8, 16))
    (tmp_path / "images" / "xbad.png").write_bytes(b"")
    store = export(tmp_path / "images", extractor, tmp_path / "out")
    maps = extractor([tmp_path / "images" / "wide.png"])["down.0.resnet.0@50"][0].numpy()
    np.testing.assert_allclose(store.array()[0], maps[:, 4:12].mean((1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "options", "named"),
    [
        (lambda: tiny_extractor(seed=1), {}, "seed: 1 here, 0 there"),
        (lambda: tiny_extractor("mid@50"), {}, "up.0@50"),
        (lambda: tiny_extractor("mid,up.0@51"), {}, "mid@51"),
        (lambda: tiny_extractor(resize=Resize(32)), {}, "resize.size: [32, 32] here"),
        (lambda: with_weights(1), {}, "weights"),
        (tiny_extractor, {"pool": "max"}, "pool: max here, mean there"),
        (tiny_extractor, {"dtype": "float16"}, "dtype: float16 here"),
    ],
)
def test_a_store_of_another_identity_is_refused(other, options, named, images, extractor, tmp_path):
    export(images, extractor, tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="other settings") as error:
        export(images, other(), tmp_path, **options)
    assert named in str(error.value)
    assert hashes(tmp_path) == before


def test_a_complete_store_returns_at_once(images, extractor, tmp_path):
    first = export(images, extractor, tmp_path)
    assert first.timing is not None and first.timing.images == 11
    assert first.timing.bottleneck in first.timing.sentence
    inodes = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    again = export(images, extractor, tmp_path)
    assert again.timing is not None and again.timing.images == 0
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == inodes


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_interrupted_and_resumed_is_byte_identical(stop_at, images, extractor, tmp_path):
    options = {"batch_size": 3, "shard_size": 4}
    export(images, extractor, tmp_path / "whole", **options)

    def interrupt(done, total, failed):
        if done >= 2 * stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(images, extractor, tmp_path / "parts", **options, progress=interrupt)
    assert not FeatureStore(tmp_path / "parts").complete
    calls = []
    export(images, extractor, tmp_path / "parts", **options, progress=lambda *call: calls.append(call))
    assert calls[-1] == (11, 11, 0)
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")


def tear(path):
    os.truncate(path, path.stat().st_size - 5)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.parquet", "shard-00001.failures.parquet"])
@pytest.mark.parametrize("spoil", [tear, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_torn_or_lost_file_is_done_again(name, spoil, images, extractor, tmp_path):
    export(images, extractor, tmp_path, shard_size=4)
    before = hashes(tmp_path)
    spoil(tmp_path / name)
    (tmp_path / "shard-00002.parquet.part").write_bytes(b"left over")
    store = export(images, extractor, tmp_path, shard_size=4)
    assert store.timing is not None and store.timing.images == 4
    assert hashes(tmp_path) == before
    store.verify()


def test_a_flipped_byte_is_found_and_mended(images, extractor, tmp_path):
    store = export(images, extractor, tmp_path)
    before = hashes(tmp_path)
    path = tmp_path / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        store.verify()
    path.unlink()
    export(images, extractor, tmp_path)
    assert hashes(tmp_path) == before


def test_two_exports_into_one_folder(images, extractor, tmp_path):
    with locked(tmp_path), pytest.raises(BlockingIOError, match="another export"):
        export(images, extractor, tmp_path)
    assert len(export(images, extractor, tmp_path)) == 11


@pytest.mark.parametrize("name", ["thesis.tex", "movie.mkv.part"])
def test_a_folder_with_other_things_is_left_alone(name, images, extractor, tmp_path):
    (tmp_path / name).write_text("years of work")
    (tmp_path / "manifest.json.part").write_text("of a store that was never begun")
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match=name):
        export(images, extractor, tmp_path)
    assert hashes(tmp_path) == before


def test_a_list_of_the_user_is_not_written_over(images, extractor, tmp_path):
    path = tmp_path / "images.parquet"
    pa.parquet.write_table(pa.table({"path": [str(images / "000.png")]}), path)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="it has images.parquet"):
        export(path, extractor, tmp_path)
    assert hashes(tmp_path) == before


def test_only_what_a_store_has_left_is_removed(images, extractor, tmp_path):
    (tmp_path / "manifest.json.part").write_text("of a store that was never begun")
    export(images, extractor, tmp_path)
    own, foreign = ("shard-00000.parquet.part", "images.parquet.part"), ("movie.mkv.part", "shard-x.parquet.part")
    for name in (*own, *foreign):
        (tmp_path / name).write_text("left over")
    export(images, extractor, tmp_path)
    assert {path.name for path in tmp_path.glob("*.part")} == {*foreign}


def test_a_write_that_fails_removes_its_own_files_and_names_the_one(tmp_path):
    (tmp_path / "movie.mkv.part").write_text("precious")
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        publish(tmp_path, {"a": b"1", "b": b"2"})
    assert error.value.filename == str(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "movie.mkv.part"}


def test_files_that_came_or_went_are_told_and_the_list_stays(extractor, tmp_path, caplog):
    source = write_images(tmp_path / "images", 6)
    whole = export(source, extractor, tmp_path / "out", shard_size=2)
    (tmp_path / "out" / "shard-00002.parquet").unlink()
    (source / "005.png").unlink()
    write_image(source / "new.png", 50)
    with warned(caplog, "1 images went", "005.png", "1 images came", "new.png"):
        store = export(source, extractor, tmp_path / "out", shard_size=2)
    assert store.table["id"].to_pylist() == whole.table["id"].to_pylist()[:5]
    assert store.failures.to_pylist() == [{"path": str(source / "005.png"), "error": "No such file or directory"}]


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("listed", [False, True])
def test_a_store_is_of_one_place(complete, listed, extractor, tmp_path):
    """Images of the same names elsewhere are others; the same place by another way is the same."""
    here, there = write_images(tmp_path / "here", 5), tmp_path / "there"
    shutil.copytree(here, there)
    (tmp_path / "link").symlink_to(here)

    def given(folder):
        return sorted(folder.iterdir()) if listed else folder

    export(given(here), extractor, tmp_path / "out", shard_size=2)
    whole = hashes(tmp_path / "out")
    if not complete:
        (tmp_path / "out" / "shard-00001.parquet").unlink()
    before = hashes(tmp_path / "out")
    with pytest.raises(ValueError, match=f"was made from {here}.*, not from {there}.*another folder"):
        export(given(there), extractor, tmp_path / "out", shard_size=2)
    assert hashes(tmp_path / "out") == before
    export(given(tmp_path / "link"), extractor, tmp_path / "out", shard_size=2)
    assert hashes(tmp_path / "out") == whole


def write_mended(folder: Path) -> tuple[Path, Path]:
    """Five images, of which two are broken, and the same five whole."""
    good = write_images(folder / "good", 5)
    bad = shutil.copytree(good, folder / "images")
    for name in ("001.png", "004.png"):
        (bad / name).write_bytes(b"")
    return bad, good


def test_failed_images_stay_until_they_are_tried_again(extractor, tmp_path):
    source, good = write_mended(tmp_path)
    out = tmp_path / "out"
    assert export(source, extractor, out, shard_size=2).failures.num_rows == 2
    before = hashes(out)
    export(source, extractor, out, shard_size=2, retry_failed=True)
    assert hashes(out) == before
    shutil.copy(good / "001.png", source)
    assert len(export(source, extractor, out, shard_size=2)) == 3
    store = export(source, extractor, out, shard_size=2, retry_failed=True)
    assert store.timing is not None and store.timing.images == 3  # the shards of 001 and of 004
    assert (len(store), store.failures.num_rows) == (4, 1)
    store.verify()


def test_another_try_may_be_interrupted(extractor, tmp_path):
    source, good = write_mended(tmp_path)
    out = tmp_path / "out"
    export(source, extractor, out, shard_size=2)
    shutil.copytree(good, source, dirs_exist_ok=True)

    def interrupt(done, total, failed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(source, extractor, out, shard_size=2, retry_failed=True, progress=interrupt)
    assert not FeatureStore(out).complete
    export(source, extractor, out, shard_size=2)
    export(source, extractor, tmp_path / "whole", shard_size=2)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_max_pixels_of_an_export(extractor, tmp_path):
    source = write_images(tmp_path / "images", 2)
    write_image(source / "large.png", 9, (40, 40))
    store = export(source, extractor, tmp_path / "out", max_pixels=1599)
    assert [row["error"] for row in store.failures.to_pylist()] == [
        "40x40 pixels, over the limit of 1599; shrink it or raise max_pixels"
    ]
    store = export(source, extractor, tmp_path / "out", max_pixels=1600, retry_failed=True)
    assert (len(store), store.failures.num_rows) == (3, 0)


def test_a_name_that_is_no_text_is_a_failure(extractor, tmp_path):
    source = write_images(tmp_path / "images", 2)
    try:
        shutil.copy(source / "000.png", source / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system holds only names in UTF-8")
    store = export(source, extractor, tmp_path / "out")
    assert len(store) == 2
    assert store.failures["path"].to_pylist() == [str(source / "\\xff.png")]


def test_the_store_of_other_images_is_refused(images, extractor, tmp_path):
    export(images, extractor, tmp_path / "out")
    write_image(tmp_path / "images" / "other.png", 1)
    with pytest.raises(ValueError, match="other images"):
        export(tmp_path / "images", extractor, tmp_path / "out")


def test_another_provenance_and_shard_size_only_warn(images, extractor, tmp_path, caplog):
    export(images, extractor, tmp_path, batch_size=4, shard_size=5)
    before = hashes(tmp_path)
    with warned(caplog, "batch_size: 3 here, 4 there", "5 images a shard"):
        export(images, extractor, tmp_path, batch_size=3, shard_size=6)
    assert hashes(tmp_path) == before


def test_every_image_fails(extractor, tmp_path):
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(b"")
    store = export(tmp_path, extractor, tmp_path / "out", shard_size=2)
    assert len(store) == 0 and store.failures.num_rows == 5
    assert store.array("mid@50").shape == (0, 16)
    store.verify()


class Spoiled(Extractor):
    """The extractor with the values of one image of a batch made too large."""

    def __init__(self, extractor, index, factor):
        self.extractor, self.index, self.factor = extractor, index, factor
        self.resize, self.blocks, self.provenance = extractor.resize, extractor.blocks, {}

    @property
    def shapes(self):
        return self.extractor.shapes

    @property
    def identity(self):
        return {**self.extractor.identity, "factor": self.factor}

    def __call__(self, images, cond=None, *, grad=False, check=True):
        features = self.extractor(images, cond, grad=grad, check=check)
        for maps in features.values():
            maps[self.index] *= self.factor
        return Features(features.maps, features.size, features.mask, self.identity)


@pytest.mark.parametrize(
    ("factor", "dtype", "remedy"),
    [
        (float("nan"), "float32", "the weights may be damaged"),
        (float("inf"), "bfloat16", "mid@50 is not finite"),
        (1e7, "float16", "dtype='bfloat16'"),
        (1e7, "bfloat16", None),
    ],
)
@pytest.mark.parametrize("pool", ["max", "none"])
def test_values_that_are_not_finite_become_failures(factor, dtype, remedy, pool, images, extractor, tmp_path):
    store = export(images, Spoiled(extractor, 2, factor), tmp_path, dtype=dtype, pool=pool, batch_size=11)
    failed = store.failures.to_pylist()
    assert [Path(row["path"]).name for row in failed] == (["002.png"] if remedy else [])
    assert all("mid@50" in row["error"] and remedy in row["error"] for row in failed)
    assert len(store) == 11 - len(failed) and np.isfinite(store.array("mid@50")).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_dtype(dtype, images, extractor, tmp_path):
    store = export(images, extractor, tmp_path, dtype=dtype)
    exact = torch.cat([extractor([path])["mid@50"].mean((2, 3)) for path in store.table["path"].to_pylist()])
    assert store.array("mid@50").dtype == (np.float16 if dtype == "float16" else np.float32)
    limit = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}[dtype] * exact.abs().max()
    assert np.abs(store.array("mid@50") - exact.numpy()).max() <= limit


def test_estimate(images, extractor, tmp_path):
    """Exact for the features; the tables' share is a guess that must not be far off."""
    estimates = [estimate_bytes(11, extractor, "none", dtype) for dtype in ("float32", "float16")]
    assert 2 * (estimates[0] - estimates[1]) == 11 * 4 * (16 * 8 * 8 + 16 * 16 * 16)
    export(images, extractor, tmp_path, pool="none")
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert abs(written - estimates[0]) < 16_000


def test_a_shard_is_bounded_in_bytes(images, extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARD_BYTES", 3 * 4 * (16 + 16) + 1)
    store = export(images, extractor, tmp_path)
    assert [shard["rows"] for shard in store._manifest["shards"]] == [3, 3, 3, 2]


def test_no_space_before_the_run(images, extractor, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(OSError, match="5 are free") as error:
        export(images, extractor, tmp_path / "out")
    assert error.value.errno == errno.ENOSPC
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_no_space_left_during_the_run(small_disk, images, extractor, tmp_path):
    with pytest.raises(OSError, match="run the same export again") as error:
        export(images, extractor, small_disk / "out", shard_size=1)
    assert error.value.errno == errno.ENOSPC
    assert not list((small_disk / "out").glob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    export(images, extractor, small_disk / "out", shard_size=1)
    export(images, extractor, tmp_path / "whole", shard_size=1)
    assert hashes(small_disk / "out") == hashes(tmp_path / "whole")


def test_a_file_that_cannot_be_written(images, extractor, tmp_path):
    """Where no disk can be mounted, a limit on the size of files stands in for one that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="the whole store takes about") as error:
            export(images, extractor, tmp_path / "out", pool="none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    export(images, extractor, tmp_path / "out", pool="none")
    export(images, extractor, tmp_path / "whole", pool="none")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "median"}, "no pooling 'median'"),
        ({"dtype": "int8"}, "no dtype 'int8'; have float32"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"workers": -1}, "workers=-1; give at least 0"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"cond": "a photo of a {label}"}, "11 of 11 images have no label"),
        ({"cond": "a {thing}"}, "no field {thing}"),
        ({"cond": "{foo"}, "cond='{foo' is no template"),
        ({"cond": "{id:d}"}, "cond='{id:d}' is no template"),
        ({"cond": "a {label.__class__}"}, "no field"),
        ({"cond": "a cat"}, "unconditional"),
    ],
)
def test_bad_settings_write_nothing(options, message, images, extractor, tmp_path):
    with pytest.raises(ValueError) as error:
        export(images, extractor, tmp_path / "out", **options)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_extractor_that_takes_no_condition(images, tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=2, img_size=32).eval()
    extractor = DinoExtractor(network, "norm,cls")
    with pytest.raises(ValueError, match="takes no condition"):
        export(images, extractor, tmp_path / "out", cond="a photo")
    assert not (tmp_path / "out").exists()
    store = export(images, extractor, tmp_path / "out", pool="2x2")
    assert {key: store.array(key).shape for key in store.keys} == {"norm": (11, 48), "cls": (11, 48)}


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """A tree of two classes of two images."""
    root = tmp_path_factory.mktemp("classes")
    for index, label in enumerate(("cat", "cat", "dog", "dog")):
        write_image(root / label / f"{index}.png", index)
    return root


def conditional() -> DiffusionExtractor:
    return DiffusionExtractor(tiny_unet(classes=("cat", "dog")), TAPS)


def test_a_template_tells_each_image_its_label(classes, tmp_path):
    extractor = conditional()
    told = export(classes, extractor, tmp_path / "told", cond="{label}")
    untold = export(classes, extractor, tmp_path / "untold")
    for index, row in enumerate(told.table.to_pylist()):
        expected = extractor([row["path"]], row["label"])["up.0@50"].mean((2, 3))[0].numpy()
        np.testing.assert_allclose(told.array("up.0@50")[index], expected, atol=1e-5)
    assert np.abs(told.array("up.0@50") - untold.array("up.0@50")).max() > 1e-3
    with pytest.raises(ValueError, match="cond: None here, {label} there"):
        export(classes, extractor, tmp_path / "told")


def test_an_unknown_class_is_an_error_before_the_run(classes, tmp_path):
    extractor = DiffusionExtractor(tiny_unet(classes=("cat", "cow")), TAPS)
    with pytest.raises(ValueError, match="no class 'dog'"):
        export(classes, extractor, tmp_path / "out", cond="{label}")
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_list(classes, tmp_path):
    def write_list(*prompts):
        lines = [f"{path},{prompt}" for path, prompt in zip(sorted(classes.rglob("*.png")), prompts, strict=True)]
        (tmp_path / "list.csv").write_text("\n".join(["path,prompt", *lines]))
        return tmp_path / "list.csv"

    extractor = conditional()
    store = export(write_list("dog", "cat", "dog", "cat"), extractor, tmp_path / "out")
    for index, prompt in enumerate(["dog", "cat", "dog", "cat"]):
        expected = extractor([store.table["path"][index].as_py()], prompt)["mid@50"].mean((2, 3))[0].numpy()
        np.testing.assert_allclose(store.array("mid@50")[index], expected, atol=1e-5)
    with pytest.raises(ValueError, match="1 images have another label, split or prompt"):
        export(write_list("dog", "cat", "dog", "dog"), extractor, tmp_path / "out")
    with pytest.raises(ValueError, match="1 of 4 images have no prompt"):
        export(write_list("dog", "", "dog", "dog"), extractor, tmp_path / "other")


def test_a_label_that_changed_only_warns_where_nothing_was_told(classes, tmp_path, caplog):
    table = list_images(classes)
    export(table, conditional(), tmp_path)
    other = table.set_column(2, "label", pa.array(["cow"] * 4))
    with warned(caplog, "4 images have another label"):
        export(other, conditional(), tmp_path)


def test_manifest(images, extractor, tmp_path):
    store = export(images, extractor, tmp_path, batch_size=4)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["identity"] == store.identity
    assert store.identity["extractor"] == json.loads(json.dumps(extractor.identity))
    assert store.provenance["torch"] == torch.__version__.partition("+")[0]
    assert (store.provenance["batch_size"], store.provenance["threads"]) == (4, 1)
    assert manifest["taps"]["mid@50"] == {"shape": [16], "dtype": "float32", "channels": 16, "stride": 2}


@pytest.mark.slow
def test_processes_need_no_main_guard(images, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from repkit.exporting import export\n"
        "from tests.export_cases import tiny_extractor\n"
        f"print(len(export({str(images)!r}, tiny_extractor(), {str(tmp_path / 'out')!r}, workers=2)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("11\n", 0), done.stderr


def test_noise_that_is_different_each_time_is_not_stored(images, tmp_path):
    fresh = DiffusionExtractor(tiny_unet(), TAPS, noise="fresh")
    with pytest.raises(ValueError, match="cannot be stored; use noise='image'"):
        export(images, fresh, tmp_path / "out")
    assert not (tmp_path / "out").exists()
