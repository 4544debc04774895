"""Small trees in the published layouts of sets with masks, and what was written: per split, in the reader's order."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from tests.dataset_trees import SIZE, Tree, mask_values, write_image, write_mask, write_text


def write_masked(
    folders: Callable[[str, int], tuple[Path, Path]], root: Path, splits: Sequence[str], values: Sequence[int]
) -> Tree:
    """Two images a split with masks of the same size, at the places that `folders` gives for split and number."""
    truth: dict[str, list[tuple[int, Any]]] = {}
    for place, split in enumerate(splits):
        for number in range(2):
            grey, size = 10 * place + number, (SIZE[0] + number, SIZE[1])
            image, mask = folders(split, number)
            write_image(image, grey, size)
            truth.setdefault(split, []).append((grey, mask_values(grey, values, size)))
            write_mask(mask, truth[split][-1][1])
    return Tree(root, truth)


def write_voc(folder: Path) -> Tree:
    """VOCdevkit/VOC2012 with two images a split, whose truth is what the masks hold: 0 ... 20 and 255."""
    root = folder / "VOCdevkit/VOC2012"

    def places(split: str, number: int) -> tuple[Path, Path]:
        name = f"2012_{split}{number}"
        return root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png"

    tree = write_masked(places, root, ("train", "val"), (*range(21), 255))
    for split in tree.truth:
        names = [f"2012_{split}{number}" for number in range(2)]
        write_text(root / f"ImageSets/Segmentation/{split}.txt", names)
        for name in names:
            mask = Image.open(root / f"SegmentationClass/{name}.png").convert("P")
            mask.putpalette([value * 5 % 256 for value in range(768)])
            mask.save(root / f"SegmentationClass/{name}.png")
    return tree


def write_sbd(folder: Path) -> Tree:
    """SBD's folder with an image of VOC's val, one of its train, and one of its own: the truth is that one's."""
    root = folder / "benchmark_RELEASE/dataset"
    for number, name in enumerate(("2012_val0", "2012_train1", "2008_own")):
        write_image(root / f"img/{name}.jpg", 200 + number)
        record = np.zeros((1, 1), [("Boundaries", object), ("Segmentation", object), ("CategoriesPresent", object)])
        record[0, 0] = (np.zeros(1), mask_values(200 + number, range(21)).astype(np.uint8), np.zeros(1))
        (root / "cls").mkdir(exist_ok=True)
        savemat(root / f"cls/{name}.mat", {"GTcls": record})
    write_text(root / "train.txt", ["2012_val0", "2008_own"])
    write_text(root / "val.txt", ["2012_train1"])
    return Tree(root, {"train": [(202, mask_values(202, range(21)))]})


def write_ade(folder: Path) -> Tree:
    """ADEChallengeData2016, whose truth is what the masks hold: 0 (other) ... 150."""
    root, names = folder / "ADEChallengeData2016", {"train": "training", "val": "validation"}
    return write_masked(
        lambda split, number: (
            root / f"images/{names[split]}/ADE_{split}_{number:08d}.jpg",
            root / f"annotations/{names[split]}/ADE_{split}_{number:08d}.png",
        ),
        root,
        ("train", "val"),
        range(151),
    )


def write_cityscapes(root: Path) -> Tree:
    """leftImg8bit and gtFine with a city each image, whose truth is the label ids 0 ... 33."""

    def places(split: str, number: int) -> tuple[Path, Path]:
        city = ("aachen", "zurich")[number]
        name = f"{city}_00000{number}_000019"
        write_mask(root / f"gtFine/{split}/{city}/{name}_gtFine_instanceIds.png", np.zeros((2, 2)))
        return (
            root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png",
            root / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png",
        )

    return write_masked(places, root, ("train", "val"), range(34))


def write_coco_stuff(root: Path, masks: str = "stuffthingmaps") -> Tree:
    """images and masks of COCO-Stuff, whose truth is the values 0 ... 181 and 255."""
    return write_masked(
        lambda split, number: (
            root / f"images/{split}2017/{number:012d}.jpg",
            root / f"{masks}/{split}2017/{number:012d}.png",
        ),
        root,
        ("train", "val"),
        (*range(182), 255),
    )


def write_label_efficient(folder: Path, name: str = "cat_15", values: Sequence[int] = (*range(15), 255)) -> Tree:
    """<name>/real/<train|test>/img_<n>.png with .npy masks beside."""
    root = folder / name
    return write_masked(
        lambda split, number: (root / f"real/{split}/img_{number}.png", root / f"real/{split}/img_{number}.npy"),
        root,
        ("train", "test"),
        values,
    )


def write_image_masks(root: Path, values: Sequence[int] = (0, 1, 2, 255)) -> Tree:
    """root/images/<split>/<n>.jpg with root/masks/<split>/<n>.png."""
    return write_masked(
        lambda split, number: (root / f"images/{split}/{number}.jpg", root / f"masks/{split}/{number}.png"),
        root,
        ("train", "val"),
        values,
    )
