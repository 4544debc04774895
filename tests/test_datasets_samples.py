"""Samples themselves: what they hold and refuse, that processes can share them, and that export takes them."""

import importlib
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader

import repkit
from repkit.datasets.cifar import read_cifar10
from repkit.datasets.hub import read_hub
from repkit.datasets.image_folder import read_image_folder
from repkit.datasets.samples import Samples
from repkit.datasets.voc import read_voc
from repkit.datasets.writing import write_list
from repkit.listing import list_images
from tests import mask_trees
from tests.dataset_trees import mask_values, write_cifar, write_image, write_image_folder

HUB: Any = importlib.import_module("datasets")  # Hugging Face's; as a statement, type checkers take it for ours

IMAGES = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 3, 5), np.uint8)
GREYS = Samples(("a", "b"), IMAGES, np.array([0, 1, 1, 0]), split="train", root=Path("/none"))


def grey(sample: dict[str, Any]) -> int:
    return sample["image"].getpixel((0, 0))[0]


def test_slices_and_rows_are_samples_whose_index_counts_anew() -> None:
    assert [grey(sample) for sample in GREYS[1:3]] == [1, 2]
    taken = GREYS.take([3, 0, 3])
    assert [(grey(one), one["label"], one["index"]) for one in taken] == [(3, 0, 0), (0, 0, 1), (3, 0, 2)]
    assert GREYS[-1]["index"] == 3 and grey(GREYS[-1]) == 3
    with pytest.raises(IndexError):
        GREYS[4]


def test_counts_labels_and_names_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="/none has 1 images, 3 labels; give at least one image, and as many of each"):
        Samples(("a",), (Path("a.png"),), np.zeros(3, np.int64), root=Path("/none"))
    with pytest.raises(ValueError, match="has 0 images"):
        GREYS[4:]
    for labels in ([0, 1, 2, 0], [0, -1, 1, 0]):
        with pytest.raises(ValueError, match=r"labels -?\d ... \d and 2 classes; give 0 ... classes - 1"):
            Samples(("a", "b"), IMAGES, np.array(labels))
    with pytest.raises(ValueError, match="two classes 'b'"):
        Samples(("a", "b", "b"), IMAGES, np.zeros(4, np.int64))


def test_images_stand_upright(tmp_path: Path) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned to the right
    Pillow.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(tmp_path / "turned.png", exif=exif)
    [sample] = Samples(("a",), (tmp_path / "turned.png",), np.zeros(1, np.int64))
    assert np.asarray(sample["image"])[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_samples_can_be_pickled(tmp_path: Path) -> None:
    mask_trees.write_voc(tmp_path)
    for samples in (read_voc(tmp_path), read_cifar10(write_cifar(tmp_path, 10).root), _hub()):
        copy = pickle.loads(pickle.dumps(samples))
        for ours, theirs in zip(samples, copy, strict=True):
            assert ours.keys() == theirs.keys() and np.array_equal(ours["image"], theirs["image"])
            assert np.array_equal(ours.get("mask", 0), theirs.get("mask", 0))


def collate(batch: list[dict[str, Any]]) -> tuple[torch.Tensor, list[int]]:
    return torch.tensor([sample["label"] for sample in batch]), [sample["index"] for sample in batch]


@pytest.mark.slow
def test_spawned_workers_read_them() -> None:
    loader = DataLoader(GREYS, 2, num_workers=1, multiprocessing_context="spawn", collate_fn=collate)  # type: ignore[type-var]
    assert [(labels.tolist(), index) for labels, index in loader] == [([0, 1], [0, 1]), ([1, 0], [2, 3])]


def test_export_takes_their_table(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images", ["train"], per_class=1)
    samples = read_image_folder(tmp_path / "images", "train")
    assert samples.table().equals(list_images(tmp_path / "images"))
    extract = repkit.DiffusionExtractor(repkit.load("mini-unet"), ["mid@50"])
    store = repkit.export(samples.table(), extract, tmp_path / "store", workers=0)
    assert store.table["label"].to_pylist() == ["ant", "bee"] and store.table["split"].to_pylist() == ["train"] * 2


def test_a_list_makes_files_of_arrays_and_leaves_files_where_they_are(tmp_path: Path) -> None:
    write_image(tmp_path / "far/2.png", 2)
    files = Samples(("a", "b"), (tmp_path / "far/2.png",), np.array([1]), split="test", root=tmp_path / "far")
    table = list_images(write_list([GREYS, files], tmp_path / "out"))
    assert table["label"].to_pylist() == ["a", "b", "b", "a", "b"]
    assert table["split"].to_pylist() == ["train"] * 4 + ["test"]
    assert table["path"].to_pylist()[-1] == str(tmp_path / "far/2.png")
    assert [Pillow.open(path).getpixel((0, 0))[0] for path in table["path"].to_pylist()] == [0, 1, 2, 3, 2]
    with pytest.raises(ValueError, match="images of /none are no files; .*write_list makes"):
        GREYS.table()
    with pytest.raises(ValueError, match="parts with the splits train, train; give at least one, each another split"):
        write_list([GREYS, GREYS], tmp_path / "out")
    again = replace(files, split="val")
    with pytest.raises(ValueError, match="2.png is in two parts; give parts that have different ids"):
        write_list([files, again], tmp_path / "out")


def _hub() -> Samples:
    pictures = [Pillow.new("RGB", (20, 16), (value,) * 3) for value in (5, 6)]
    masks = [Pillow.fromarray(mask_values(value, (0, 1, 255)).astype(np.uint8)) for value in (5, 6)]
    features = HUB.Features(
        picture=HUB.Image(), kind=HUB.ClassLabel(names=["cat", "dog"]), outline=HUB.Image(), word=HUB.Value("string")
    )
    rows = {"picture": pictures, "kind": [1, 0], "outline": masks, "word": ["wolf", "lynx"]}
    return read_hub(HUB.Dataset.from_dict(rows, features), image="picture", label="kind", mask="outline")


def test_columns_of_the_hub_are_read() -> None:
    samples = _hub()
    assert samples.classes == ("cat", "dog")
    for sample, value, label in zip(samples, (5, 6), (1, 0), strict=True):
        assert grey(sample) == value and sample["label"] == label
        assert np.array_equal(sample["mask"], mask_values(value, (0, 1, 255)))


def test_labels_of_the_hub_may_be_texts_or_numbers() -> None:
    pictures = [Pillow.new("RGB", (4, 4))] * 3
    rows = HUB.Dataset.from_dict(
        {"image": pictures, "word": ["b", "a", "b"], "number": [2, 0, 1], "half": [0.5, 1.0, 2.0]}
    )
    words, numbers = read_hub(rows, label="word"), read_hub(rows, label="number")
    assert words.classes == ("a", "b") and words.labels.tolist() == [1, 0, 1]
    assert numbers.classes == ("0", "1", "2") and numbers.labels.tolist() == [2, 0, 1]
    assert read_hub(rows, label="word", classes=["b", "a"]).labels.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="no column name; have image, word, number, half"):
        read_hub(rows, label="name")
    with pytest.raises(ValueError, match="no label and no mask; name one of the columns image, word"):
        read_hub(rows)
    with pytest.raises(ValueError, match="the masks of 'image' do not tell their classes"):
        read_hub(rows, mask="image")
    with pytest.raises(ValueError, match="column 'half' has the label 0.5; give one whole number or text"):
        read_hub(rows, label="half")


def test_images_of_the_hub_are_decoded_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [], HUB.Image.decode_example

    def count(self: Any, *rest: Any, **more: Any) -> Any:
        decoded.append(1)
        return decode(self, *rest, **more)

    monkeypatch.setattr(HUB.Image, "decode_example", count)
    samples = _hub()
    assert not decoded
    samples[1]
    assert len(decoded) == 2  # its image and its mask, each once


def test_a_function_may_stand_for_a_file() -> None:
    samples = Samples(("a",), (partial(Pillow.new, "RGB", (4, 3), (9, 9, 9)),), masks=(partial(np.zeros, (3, 4)),))
    assert grey(samples[0]) == 9 and samples[0]["mask"].tolist() == [[0] * 4] * 3
    wrong = Samples(("a",), samples.images, masks=(partial(np.ones, (3, 4)),))
    with pytest.raises(ValueError, match="mask in memory has the value 1, which is no class; have 0, 255"):
        wrong[0]
