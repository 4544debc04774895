"""Readers of labelled data sets, each on a small tree in its published layout: what was written is what is read."""

import inspect
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as published
from torchvision.datasets import folder as torchvision_folder

from repkit.datasets import fashion_mnist
from repkit.datasets.aircraft import read_aircraft
from repkit.datasets.cifar import read_cifar10, read_cifar100
from repkit.datasets.cub import read_cub
from repkit.datasets.flowers102 import CLASSES as FLOWERS
from repkit.datasets.flowers102 import read_flowers102
from repkit.datasets.food101 import read_food101
from repkit.datasets.image_folder import read_image_folder
from repkit.datasets.imagenet import read_imagenet, read_tiny_imagenet
from repkit.datasets.medmnist import read_medmnist
from repkit.datasets.pets import read_pets
from repkit.datasets.samples import Samples
from tests import dataset_trees as trees
from tests.dataset_trees import Tree

READ: dict[str, tuple[Callable[[Path], Tree], Callable[..., Samples]]] = {
    "folder": (trees.write_image_folder, read_image_folder),
    "imagenet": (trees.write_imagenet, read_imagenet),
    "tiny-imagenet": (trees.write_tiny_imagenet, read_tiny_imagenet),
    "cub": (trees.write_cub, read_cub),
    "flowers102": (trees.write_flowers, read_flowers102),
    "aircraft": (trees.write_aircraft, read_aircraft),
    "food101": (trees.write_food, read_food101),
    "pets": (trees.write_pets, read_pets),
}


def greys(samples: Samples) -> list[tuple[int, int]]:
    """The grey value and label of each sample, after a look at all of its pixels."""
    found = []
    for place, sample in enumerate(samples):
        [value] = np.unique(np.asarray(sample["image"]))
        assert sample.keys() == {"image", "label", "index"} and sample["index"] == place
        assert sample["image"].mode == "RGB" and type(sample["label"]) is int
        found.append((int(value), sample["label"]))
    return found


def torchvision_greys(found: Iterable) -> list[tuple[int, int]]:
    return [(int(np.asarray(image)[0, 0, 0]), int(label)) for image, label in found]


@pytest.mark.parametrize("name", READ)
def test_every_split_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    write, read = READ[name]
    tree = write(tmp_path)
    for split, truth in tree.truth.items():
        samples = read(tree.root, split)
        assert greys(samples) == list(truth)
        # The folder above is as good where the archive has a folder of its own.
        assert greys(read(tmp_path, split)) == list(truth)


@pytest.mark.parametrize("name", READ)
def test_the_table_lists_the_files(name: str, tmp_path: Path) -> None:
    write, read = READ[name]
    tree = write(tmp_path)
    split = next(iter(tree.truth))
    samples = read(tree.root, split)
    table = samples.table()
    assert table.column_names == ["id", "path", "label", "split", "prompt"]
    assert set(table["split"].to_pylist()) == {"train"}
    assert table["label"].to_pylist() == [samples.classes[label] for _, label in tree.truth[split]]
    root = Path(table.schema.metadata[b"root"].decode())
    assert [str(root / name) for name in table["id"].to_pylist()] == table["path"].to_pylist()
    assert all(Path(path).is_file() for path in table["path"].to_pylist())


@pytest.mark.parametrize("name", READ)
def test_an_unknown_split_and_a_folder_without_the_set_are_refused(name: str, tmp_path: Path) -> None:
    write, read = READ[name]
    tree = write(tmp_path / "tree")
    with pytest.raises(ValueError, match=r"no split 'dev2'.*have .*(val|test)"):
        read(tree.root, "dev2")
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match="looked for") as error:
        read(tmp_path / "empty", next(iter(tree.truth)))
    assert str(tmp_path / "empty") in str(error.value) and "\n" not in str(error.value)


def test_torchvision_reads_the_same_trees_alike(tmp_path: Path) -> None:
    aircraft, food, pets = trees.write_aircraft(tmp_path), trees.write_food(tmp_path), trees.write_pets(tmp_path)
    for level in ("variant", "family", "manufacturer"):
        theirs = published.FGVCAircraft(tmp_path, "trainval", level)
        ours = read_aircraft(aircraft.root, "trainval", level=level)
        assert greys(ours) == torchvision_greys(theirs) and ours.classes == tuple(theirs.classes)
    for split in ("train", "test"):
        food101 = published.Food101(tmp_path, split)
        assert greys(read_food101(food.root, split)) == torchvision_greys(food101)
        assert read_food101(food.root, split).classes == tuple(name.replace("_", " ") for name in food101.classes)
    for split in ("trainval", "test"):
        pet = published.OxfordIIITPet(tmp_path, split)
        assert greys(read_pets(pets.root, split)) == torchvision_greys(pet)
        assert read_pets(pets.root, split).classes == tuple(pet.classes) == ("Abyssinian", "American Bulldog")


def test_torchvision_reads_folders_and_flowers_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, flowers = trees.write_image_folder(tmp_path / "own"), trees.write_flowers(tmp_path)
    theirs = torchvision_folder.ImageFolder(folder.root / "val")
    assert greys(read_image_folder(folder.root, "val")) == torchvision_greys(theirs)
    monkeypatch.setattr(published.Flowers102, "_check_integrity", lambda self: True)  # of the published files only
    for split in flowers.truth:
        assert greys(read_flowers102(flowers.root, split)) == torchvision_greys(published.Flowers102(tmp_path, split))
    assert getattr(published.Flowers102, "classes", list(FLOWERS)) == list(FLOWERS)


def test_a_folder_without_splits_is_read_whole(tmp_path: Path) -> None:
    tree = trees.write_image_folder(tmp_path, ["train"])
    samples = read_image_folder(tmp_path / "train")
    assert greys(samples) == tree.truth["train"] and samples.classes == ("ant", "bee")
    assert samples.table()["id"].to_pylist()[0] == "ant/000.jpg"
    trees.write_image(tmp_path / "train" / "stray.jpg", 1)
    with pytest.raises(ValueError, match="lie in no class folder: "):
        read_image_folder(tmp_path / "train")


def test_a_list_of_images_keeps_all_classes_and_a_list_of_classes_numbers_them_anew(tmp_path: Path) -> None:
    tree = trees.write_imagenet(tmp_path)
    images = trees.write_text(tmp_path / "1percent.txt", ["n01601694_1.JPEG", "n01440764_0.JPEG", "n01601694_1.JPEG"])
    samples = read_imagenet(tree.root, subset=images)
    assert greys(samples) == [(21, 2), (0, 0)] and len(samples.classes) == 3
    classes = trees.write_text(tmp_path / "imagenet_2.txt", ["n01601694 Dipper", "n01440764 Tench"])
    for split, expected in {"train": [(0, 0), (1, 0), (20, 1), (21, 1)], "val": [(100, 0), (102, 1)]}.items():
        samples = read_imagenet(tree.root, split, subset=classes)
        assert greys(samples) == expected and samples.classes == ("n01440764", "n01601694")


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (["dog.jpg"], ValueError, "lists dog.jpg; give images .n01440764_10026.JPEG. or classes"),
        (["n01440764", "n01601694_1.JPEG"], ValueError, "lists both.*all lines of one kind"),
        (["n01440764_77.JPEG"], FileNotFoundError, "1 of 1 files of .*list.txt are not there: .*n01440764_77.JPEG"),
        (["n99999999"], FileNotFoundError, "1 classes of .*list.txt are not in .*train: n99999999"),
        ([""], ValueError, "the list .*list.txt is empty"),
    ],
)
def test_a_subset_of_something_else_is_refused(tmp_path: Path, lines: list[str], error: type, message: str) -> None:
    tree = trees.write_imagenet(tmp_path)
    with pytest.raises(error, match=message):
        read_imagenet(tree.root, subset=trees.write_text(tmp_path / "list.txt", lines))


def test_validation_images_that_are_not_sorted_are_refused(tmp_path: Path) -> None:
    trees.write_image(tmp_path / "val/ILSVRC2012_val_00000001.JPEG", 1)
    with pytest.raises(FileNotFoundError, match="no class folders in .*val.*sort the images"):
        read_imagenet(tmp_path, "val")


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_from_its_records(classes: int, tmp_path: Path) -> None:
    tree, read = trees.write_cifar(tmp_path, classes), {10: read_cifar10, 100: read_cifar100}[classes]
    for split, truth in tree.truth.items():
        for root in (tree.root, tmp_path):
            samples = read(root, split)
            assert len(samples) == len(truth) and len(samples.classes) == classes
            for sample, (pixels, label) in zip(samples, truth, strict=True):
                assert np.array_equal(np.asarray(sample["image"]), pixels) and sample["label"] == label
    if classes == 100:
        coarse = read_cifar100(tmp_path, "test", coarse=True)
        assert [sample["label"] for sample in coarse] == [label // 5 for _, label in tree.truth["test"]]
        assert coarse.classes[19] == "coar 19"


def test_the_python_version_of_cifar_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        with pytest.raises(FileNotFoundError, match="Python version of CIFAR-10, .*pickled.*cifar-10-binary.tar.gz"):
            read_cifar10(root)
    with pytest.raises(FileNotFoundError, match="looked for fine_label_names.txt.*cifar-100-binary.tar.gz"):
        read_cifar100(tmp_path)


def test_damaged_cifar_files_are_refused(tmp_path: Path) -> None:
    root = trees.write_cifar(tmp_path, 10).root
    with (root / "test_batch.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="test_batch.bin has 9220 bytes, which is no multiple of 3073"):
        read_cifar10(root, "test")
    (root / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 5 files of .* are not there: .*data_batch_3.bin"):
        read_cifar10(root)


@pytest.mark.parametrize("rgb", [True, False])
def test_medmnist_is_read_from_its_npz(rgb: bool, tmp_path: Path) -> None:
    tree = trees.write_medmnist(tmp_path / "somemnist.npz", rgb=rgb)
    for split, truth in tree.truth.items():
        samples = read_medmnist(tree.root, split, classes=["a", "b", "c"])
        for sample, (pixels, label) in zip(samples, truth, strict=True):
            whole = pixels if rgb else np.stack([pixels] * 3, -1)
            assert np.array_equal(np.asarray(sample["image"]), whole) and sample["label"] == label
    assert read_medmnist(tree.root).classes == ("0", "1", "2")


def test_other_npz_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 14 labels"):
        read_medmnist(trees.write_medmnist(tmp_path / "chest.npz", labels=14).root)
    with pytest.raises(FileNotFoundError, match="no file .*give the .npz file of one set"):
        read_medmnist(tmp_path)
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="has the arrays images; it lacks test_labels, train_images"):
        read_medmnist(tmp_path / "other.npz")
    arrays = dict.fromkeys(("train_images", "train_labels", "val_labels", "test_labels"), np.zeros((2, 28, 28, 28)))
    np.savez(tmp_path / "volume.npz", **arrays)
    with pytest.raises(ValueError, match=r"float64 images \[2, 28, 28, 28\]; give a set of \[n H W\]"):
        read_medmnist(tmp_path / "volume.npz")
    np.savez(tmp_path / "pickled.npz", **{name: np.array([{}], object) for name in arrays})
    with pytest.raises(ValueError, match="cannot read .*pickled.npz as .npz .*allow_pickle=False"):
        read_medmnist(tmp_path / "pickled.npz")


def test_fashion_mnist_is_read_as_samples(tmp_path: Path) -> None:
    images, labels = fashion_mnist.load("test")
    samples = fashion_mnist.read_fashion_mnist(split="test")
    assert len(samples) == 10_000 and samples.classes == fashion_mnist.CLASSES
    for place in (0, 77, 9_999):
        assert np.array_equal(np.asarray(samples[place]["image"])[..., 1], images[place])
        assert samples[place]["label"] == labels[place]
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        fashion_mnist.read_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("name", "removed", "message"),
    [
        ("cub", "CUB_200_2011/images/001.Black_footed_Albatross/1.jpg", "1 of 4 files of .*images.txt are not there: "),
        ("cub", "CUB_200_2011/classes.txt", "looked for images.txt.* lacks classes.txt"),
        ("flowers102", "flowers-102/jpg/image_00005.jpg", "1 of 2 files of .*setid.mat"),
        ("aircraft", "fgvc-aircraft-2013b/data/variants.txt", "looked for .*lacks variants.txt"),
        ("food101", "food-101/meta/train.json", "looked for .*lacks meta/train.json"),
        ("pets", "oxford-iiit-pet/images/Abyssinian_70.jpg", "1 of 3 files of .*trainval.txt"),
        ("tiny-imagenet", "tiny-imagenet-200/wnids.txt", "looked for wnids.txt.*lacks wnids.txt"),
    ],
)
def test_what_is_missing_is_named(name: str, removed: str, message: str, tmp_path: Path) -> None:
    write, read = READ[name]
    split = next(iter(write(tmp_path).truth))
    (tmp_path / removed).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        read(tmp_path, split)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("cub", "CUB_200_2011/image_class_labels.txt", "1 1\n2 1\n", "do not list the same images"),
        ("cub", "CUB_200_2011/classes.txt", "1 001.A\n", "image 4 in .* is of class 2, which is none"),
        ("cub", "CUB_200_2011/images.txt", "1\n", "images.txt, line 1 has 1 words; it needs 2"),
        ("flowers102", "flowers-102/setid.mat", "none", "cannot read trnid of .*setid.mat"),
        ("aircraft", "fgvc-aircraft-2013b/data/variants.txt", "747-100\n", "has the class '747-200'.*none of the 1"),
        ("food101", "food-101/meta/train.json", "[1]", "train.json is no JSON of lists by class"),
        ("pets", "oxford-iiit-pet/annotations/trainval.txt", "a_1 x 1 1", "class 'x' of a_1 is no number"),
    ],
)
def test_damaged_lists_are_refused(name: str, file: str, content: str, message: str, tmp_path: Path) -> None:
    write, read = READ[name]
    split = next(iter(write(tmp_path).truth))
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, split)


def test_an_unknown_level_is_refused(tmp_path: Path) -> None:
    trees.write_aircraft(tmp_path)
    with pytest.raises(ValueError, match="no level 'engine' of FGVC-Aircraft; have variant, family, manufacturer"):
        read_aircraft(tmp_path, level="engine")


def test_kaggles_folder_of_imagenet_is_found(tmp_path: Path) -> None:
    tree = trees.write_imagenet(tmp_path / "imagenet")
    shutil.move(tmp_path / "imagenet", tmp_path / "kaggle/ILSVRC/Data/CLS-LOC")
    assert greys(read_imagenet(tmp_path / "kaggle")) == tree.truth["train"]


def test_readers_take_a_root_and_a_split() -> None:
    from repkit.datasets.readers import READERS

    for read in READERS.values():
        names = list(inspect.signature(read).parameters)
        assert names[:2] in (["root", "split"], ["path", "split"])
