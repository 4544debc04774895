"""Readers of data sets with masks, each on a small tree in its published layout: what was written is what is read."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as published

from repkit.datasets import ade20k, coco_stuff, label_efficient
from repkit.datasets.ade20k import read_ade20k
from repkit.datasets.cityscapes import read_cityscapes
from repkit.datasets.coco_stuff import read_coco_stuff
from repkit.datasets.image_masks import read_image_masks
from repkit.datasets.label_efficient import read_label_efficient
from repkit.datasets.pets import read_pet_masks
from repkit.datasets.samples import Samples
from repkit.datasets.voc import CLASSES as VOC
from repkit.datasets.voc import read_voc
from tests import mask_trees as trees
from tests.dataset_trees import Tree, mask_values, write_image, write_mask, write_pets, write_text

Rule = Callable[[np.ndarray], np.ndarray]


def assert_read(samples: Samples, tree: Tree, split: str, rule: Rule) -> None:
    """Images in the order they were written in, with masks that are what `rule` makes of what was written."""
    assert len(samples) == len(tree.truth[split])
    for sample, (grey, values) in zip(samples, tree.truth[split], strict=True):
        assert sample.keys() == {"image", "mask", "index"}
        assert np.unique(np.asarray(sample["image"])).tolist() == [grey]
        assert sample["mask"].dtype == np.int64 and sample["mask"].shape == sample["image"].size[::-1]
        assert np.array_equal(sample["mask"], rule(values))
        assert sample["mask"].max() == 255 or sample["mask"].max() == len(samples.classes) - 1


def same(values: np.ndarray) -> np.ndarray:
    return values


def test_voc(tmp_path: Path) -> None:
    tree = trees.write_voc(tmp_path)
    for split in ("train", "val"):
        assert_read(read_voc(tree.root, split), tree, split, same)
        theirs = published.VOCSegmentation(tmp_path, "2012", split)
        for sample, (image, mask) in zip(read_voc(tmp_path, split), theirs, strict=True):
            assert np.array_equal(sample["image"], image) and np.array_equal(sample["mask"], mask)
    assert len(VOC) == 21 and VOC[:2] == ("background", "aeroplane") and VOC[-1] == "tvmonitor"


def test_voc_with_sbd_adds_what_is_not_in_val_and_has_no_mask_yet(tmp_path: Path) -> None:
    voc, sbd = trees.write_voc(tmp_path), trees.write_sbd(tmp_path)
    samples = read_voc(tmp_path, "train", sbd=tmp_path)
    assert_read(samples[:2], voc, "train", same)
    assert_read(samples[2:], sbd, "train", same)
    theirs = published.SBDataset(sbd.root, "train", "segmentation")
    assert np.array_equal(samples[2]["mask"], theirs[1][1])
    with pytest.raises(ValueError, match="SBD adds to the split train, not to val"):
        read_voc(tmp_path, "val", sbd=tmp_path)
    (sbd.root / "cls/2008_own.mat").write_bytes(b"none")
    with pytest.raises(ValueError, match="cannot read .*GTcls.Segmentation of .*2008_own.mat"):
        samples[2]


def test_ade20k(tmp_path: Path) -> None:
    tree = trees.write_ade(tmp_path)
    for split in ("train", "val"):
        assert_read(read_ade20k(tree.root, split), tree, split, lambda values: np.where(values == 0, 255, values - 1))
    assert len(set(ade20k.CLASSES)) == 150
    classes = read_ade20k(tmp_path).classes
    assert [classes[number] for number in (0, 7, 56, 89, 149)] == ["wall", "bed", "pool table", "television", "flag"]


@pytest.mark.parametrize("classes", [19, 27])
def test_cityscapes(classes: int, tmp_path: Path) -> None:
    tree = trees.write_cityscapes(tmp_path)
    if classes == 19:
        known = {row.id: row.train_id for row in published.Cityscapes.classes}
        names = [row.name for row in published.Cityscapes.classes if row.train_id not in (-1, 255)]
    else:
        known = {number: number - 7 if number >= 7 else 255 for number in range(34)}
        names = [row.name for row in published.Cityscapes.classes if row.id >= 7]
    table = np.array([known[number] for number in range(34)])
    for split in ("train", "val"):
        samples = read_cityscapes(tmp_path, split, classes=classes)
        assert samples.classes == tuple(names)
        assert_read(samples, tree, split, lambda values: table[values])
    with pytest.raises(ValueError, match="no 20 classes of Cityscapes; have 19 and 27"):
        read_cityscapes(tmp_path, classes=20)


REMOVED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # ids from 1 that nobody annotated
# The group of values that lie at the borders of runs, and of some stuff, from the table that STEGO and PiCIE share.
GROUP_OF = {0: 9, 1: 11, 8: 11, 9: 8, 14: 8, 15: 7, 24: 7, 25: 6, 32: 6, 33: 10, 42: 10, 43: 5, 50: 5, 51: 2, 60: 2,
            61: 3, 70: 3, 71: 0, 76: 0, 77: 1, 82: 1, 83: 4, 90: 4, 91: 17, 93: 22, 94: 20, 97: 15, 98: 25, 99: 16,
            100: 13, 101: 12, 105: 23, 110: 21, 119: 26, 120: 14, 129: 15, 147: 26, 156: 23, 158: 21, 161: 24, 165: 20,
            170: 18, 176: 18, 179: 19, 180: 19, 181: 24}  # fmt: skip


def test_coco_stuff_in_171_classes(tmp_path: Path) -> None:
    tree = trees.write_coco_stuff(tmp_path)
    kept = [value for value in range(182) if value + 1 not in REMOVED]
    table = np.full(256, -1)
    table[kept], table[255] = range(171), 255
    for split in ("train", "val"):
        samples = read_coco_stuff(tmp_path, split, classes=171)
        with pytest.raises(ValueError, match="has the value 11, 25, 28, which is no class"):
            samples[0]
        for number in range(2):
            name = f"stuffthingmaps/{split}2017/{number:012d}.png"
            values = np.where(table[tree.truth[split][number][1]] < 0, 255, tree.truth[split][number][1])
            write_mask(tmp_path / name, values)
            assert np.array_equal(samples[number]["mask"], table[values])
    assert samples.classes[:1] + samples.classes[-1:] == ("person", "wood") and len(samples.classes) == 171


@pytest.mark.parametrize("masks", ["stuffthingmaps", "annotations"])
def test_coco_stuff_in_27_groups(masks: str, tmp_path: Path) -> None:
    tree = trees.write_coco_stuff(tmp_path, masks)
    for split in ("train", "val"):
        for sample, (_, values) in zip(read_coco_stuff(tmp_path, split), tree.truth[split], strict=True):
            found = sample["mask"]
            assert {value: set(found[values == value].tolist()) for value in (*GROUP_OF, 255)} == {
                value: {group} for value, group in (*GROUP_OF.items(), (255, 255))
            }
            # How many values each group has.
            counts = Counter(int(found[values == value][0]) for value in range(182))
            assert [counts[group] for group in range(27)] == [
                *(6, 6, 10, 10, 8, 8, 8, 10, 6, 1, 10, 8, 2, 6, 4, 11, 4, 11, 7, 2, 6, 11, 9, 2, 6, 5, 5)
            ]
    assert len(coco_stuff.GROUPS) == 27


def test_coco_stuff_takes_a_list_of_images(tmp_path: Path) -> None:
    tree = trees.write_coco_stuff(tmp_path)
    listed = write_text(tmp_path / "curated.txt", ["000000000001", "000000000000.jpg"])
    samples = read_coco_stuff(tmp_path, listed=listed)
    assert [np.asarray(sample["image"])[0, 0, 0] for sample in samples] == [tree.truth["val"][n][0] for n in (1, 0)]
    write_text(listed, ["000000000007"])
    with pytest.raises(FileNotFoundError, match="1 of 1 files of .*curated.txt are not there: .*000000000007.jpg"):
        read_coco_stuff(tmp_path, listed=listed)


def test_label_efficient_sets(tmp_path: Path) -> None:
    tree = trees.write_label_efficient(tmp_path)
    for split in ("train", "test"):
        for root in (tmp_path, tree.root):
            assert_read(read_label_efficient(root, split, name="cat_15"), tree, split, same)
    bedroom = trees.write_label_efficient(tmp_path, "bedroom_28", range(29))
    samples = read_label_efficient(tmp_path, name="bedroom_28")
    assert_read(samples, bedroom, "train", lambda values: np.where(values == 0, 255, values - 1))
    with pytest.raises(ValueError, match="no set 'cat'; have bedroom_28, ffhq_34"):
        read_label_efficient(tmp_path, name="cat")
    assert {name: len(names.split(", ")) for name, names in label_efficient.CLASSES.items()} == {
        name: int(name.rpartition("_")[2]) for name in label_efficient.CLASSES
    }


def test_label_efficient_masks_of_twice_the_size_are_resized(tmp_path: Path) -> None:
    tree = trees.write_label_efficient(tmp_path)
    grey, values = tree.truth["train"][0]
    write_mask(tree.root / "real/train/img_0.npy", values.repeat(2, 0).repeat(2, 1).astype(np.float64))
    assert np.array_equal(read_label_efficient(tmp_path, name="cat_15")[0]["mask"], values)


def test_pickled_masks_are_refused(tmp_path: Path) -> None:
    tree = trees.write_label_efficient(tmp_path)
    np.save(tree.root / "real/train/img_0.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot read the mask .*img_0.npy: .*allow_pickle=False"):
        read_label_efficient(tmp_path, name="cat_15")[0]


@pytest.mark.parametrize("border", [False, True])
def test_pet_trimaps(border: bool, tmp_path: Path) -> None:
    tree = write_pets(tmp_path)
    table = np.array([-1, 1, 0, 2 if border else 255])
    for split, truth in tree.truth.items():
        samples = read_pet_masks(tree.root, split, border=border)
        for sample, (grey, _) in zip(samples, truth, strict=True):
            assert np.array_equal(sample["mask"], table[mask_values(grey, (1, 2, 3))])
            assert sample["image"].getpixel((0, 0)) == (grey,) * 3


def test_images_with_masks(tmp_path: Path) -> None:
    tree = trees.write_image_masks(tmp_path)
    for split in ("train", "val"):
        assert_read(read_image_masks(tmp_path, split), tree, split, same)
        assert read_image_masks(tmp_path, split).classes == ("0", "1", "2")
    write_text(tmp_path / "classes.txt", ["ground", "cat", "dog"])
    assert read_image_masks(tmp_path, "val").classes == ("ground", "cat", "dog")
    assert read_image_masks(tmp_path, "val", classes="abcd").classes == tuple("abcd")
    few = read_image_masks(tmp_path, "val", classes="ab")
    with pytest.raises(ValueError, match=r"masks/val/0.png has the value 2, which is no class; have 0 ... 1, 255"):
        few[0]


def test_black_and_white_masks_and_masks_of_numpy(tmp_path: Path) -> None:
    tree = trees.write_image_masks(tmp_path / "white", (0, 255))
    samples = read_image_masks(tmp_path / "white", "val", values={0: 0, 255: 1})
    assert_read(samples, tree, "val", lambda values: values // 255)
    with pytest.raises(ValueError, match="values has the class 1, and there are 1; give 0 ... classes - 1"):
        read_image_masks(tmp_path / "white", "val", values={0: 0, 255: 1}, classes=["all"])
    mask = mask_values(1, (0, 1), (8, 8))
    write_image(tmp_path / "own/pictures/a.png", 9, (8, 8))
    write_mask(tmp_path / "own/truth/a.npy", mask)
    [sample] = read_image_masks(tmp_path / "own", images="pictures", masks="truth")
    assert np.array_equal(sample["mask"], mask)


READ = {
    "voc": (trees.write_voc, read_voc, "val"),
    "ade20k": (trees.write_ade, read_ade20k, "val"),
    "cityscapes": (trees.write_cityscapes, read_cityscapes, "val"),
    "coco-stuff": (trees.write_coco_stuff, read_coco_stuff, "val"),
    "image-masks": (trees.write_image_masks, read_image_masks, "val"),
}


@pytest.mark.parametrize("name", READ)
def test_a_wrong_split_and_a_missing_layout_are_one_clear_error(name: str, tmp_path: Path) -> None:
    write, read, split = READ[name]
    write(tmp_path / "tree")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="dev"):
        read(tmp_path / "tree", "dev")
    for root in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="looked for .*lacks .*give the folder") as error:
            read(root, split)
        assert str(root) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in READ if name != "voc"])
def test_names_that_do_not_match_are_listed(name: str, tmp_path: Path) -> None:
    write, read, split = READ[name]
    write(tmp_path)
    samples = read(tmp_path, split)
    assert samples.masks is not None
    lost = [samples.masks[0], samples.images[1]]
    kept = [samples.images[0], samples.masks[1]]
    for path in lost:
        path.rename(path.with_name("other" + path.name))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(tmp_path, split)
    assert isinstance(error.value, ValueError)
    assert "images without a mask" in str(error.value) and "masks without an image" in str(error.value)
    assert all(str(path) in str(error.value) for path in kept)


@pytest.mark.parametrize("name", READ)
def test_a_mask_of_another_size_is_refused_naming_both(name: str, tmp_path: Path) -> None:
    write, read, split = READ[name]
    write(tmp_path)
    samples = read(tmp_path, split)
    write_mask(samples.masks[0], np.ones((5, 6)))
    with pytest.raises(ValueError, match=r"0.*\.png has 6x5 pixels, but its image .*0.*\.(jpg|png) 20x16; give"):
        samples[0]
    write_image(samples.masks[0].with_suffix(".png"), 3)
    with pytest.raises(ValueError, match="cannot read the mask .*: it is of mode RGB; give palette or grey"):
        samples[0]
    samples.masks[0].write_bytes(b"none")
    with pytest.raises(ValueError, match="cannot read the mask .*cannot identify image file"):
        samples[0]
    samples.masks[0].unlink()
    with pytest.raises(FileNotFoundError, match=samples.masks[0].name):
        samples[0]
