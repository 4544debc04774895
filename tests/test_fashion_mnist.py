"""The bundled part of Fashion-MNIST: what is in it, and that it is what the original files say."""

import gzip
import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repkit.datasets.fashion_mnist import BUNDLED, CLASSES, DEBIAN, bundle, load, load_full, write_folder

original = pytest.mark.skipif(not Path(DEBIAN).is_dir(), reason="needs Debian's package dataset-fashion-mnist")


def read_original(name: str, header: int) -> np.ndarray:
    return np.frombuffer(gzip.open(Path(DEBIAN) / name).read()[header:], np.uint8)


@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("test", 1000)])
def test_classes_are_balanced(split, per_class):
    images, labels = load(split)
    assert images.dtype == np.uint8 and images.shape == (10 * per_class, 28, 28)
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [per_class] * 10
    assert images.min() == 0 and images.max() == 255


def test_class_names_can_name_folders():
    assert len(set(CLASSES)) == 10
    assert all(name.isascii() and name.replace("-", "").isalpha() and name.islower() for name in CLASSES)


def test_no_training_image_is_a_test_image():
    train, test = ({image.tobytes() for image in load(split)[0]} for split in ("train", "test"))
    assert not train & test


@original
def test_training_images_are_the_first_400_of_each_class_in_file_order():
    labels = read_original("train-labels-idx1-ubyte.gz", 8)
    pixels = read_original("train-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    seen = [0] * 10
    kept = []
    for index, label in enumerate(labels.tolist()):
        seen[label] += 1
        if seen[label] <= 400:
            kept.append(index)
    images, bundled_labels = load("train")
    assert np.array_equal(images, pixels[kept]) and np.array_equal(bundled_labels, labels[kept])


@original
def test_test_images_are_all_of_them():
    images, labels = load("test")
    assert np.array_equal(images.ravel(), read_original("t10k-images-idx3-ubyte.gz", 16))
    assert np.array_equal(labels, read_original("t10k-labels-idx1-ubyte.gz", 8))


@original
def test_the_whole_set_has_60000_training_images():
    images, labels = load_full(DEBIAN, "train")
    assert images.shape == (60000, 28, 28) and np.bincount(labels).tolist() == [6000] * 10


@pytest.mark.slow
@original
def test_bundling_again_gives_the_bundled_arrays(tmp_path):
    bundle(DEBIAN, tmp_path)
    for path in sorted(BUNDLED.glob("*.gz")):
        # The content, not the file: another zlib may compress it otherwise.
        assert gzip.decompress((tmp_path / path.name).read_bytes()) == gzip.decompress(path.read_bytes())


def test_the_files_carry_no_time():
    for path in BUNDLED.glob("*.gz"):
        assert path.read_bytes()[4:8] == bytes(4)


def test_the_licence_lies_beside_the_files():
    text = (BUNDLED / "LICENSE.md").read_text(encoding="utf-8")
    assert "MIT License" in text and "Zalando SE" in text


def test_write_folder_writes_what_load_returns(tmp_path):
    assert write_folder(tmp_path, "test", 3) == tmp_path / "test"
    images, labels = load("test")
    written = sorted((tmp_path / "test").rglob("*.png"))
    assert len(written) == 30
    for path in written:
        index = int(path.stem)
        assert CLASSES[labels[index]] == path.parent.name
        assert np.array_equal(np.asarray(Image.open(path)), images[index])
    first = np.flatnonzero(labels == 9)[:3]
    assert [path.stem for path in sorted((tmp_path / "test" / "ankle-boot").iterdir())] == [f"{i:05d}" for i in first]


def test_a_folder_without_the_files_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz.*apt-get install dataset-fashion-mnist"):
        load_full(tmp_path, "train")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'val'.*train, test"):
        inspect.unwrap(load)("val")  # past the type check, which only the tests have


@pytest.mark.parametrize("content", [b"", b"not idx", bytes([0, 0, 8, 3, 0, 0, 0, 9])])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    for path in BUNDLED.glob("*.gz"):
        shutil.copy(path, tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="no idx file of bytes"):
        load_full(tmp_path, "train")
