"""CUB-200-2011 (Wah et al. 2011): 200 species of birds."""

from pathlib import Path

import numpy as np

from repkit.datasets.layout import check_split, find_folder, present, read_fields
from repkit.datasets.samples import Samples

_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def read_cub(root: str | Path, split: str = "train") -> Samples:
    """The images of CUB_200_2011 (train, test), in the order of its list; classes as "Black footed Albatross".

    Raises FileNotFoundError for what is not there, ValueError for lists that do not fit together.
    """
    check_split(split, ("train", "test"), "CUB-200-2011")
    folder = find_folder(root, "CUB-200-2011", [*_LISTS, "images"], ["CUB_200_2011"])
    names, labels, training, classes = (dict(read_fields(folder / name, 2)) for name in _LISTS)
    if not names.keys() == labels.keys() == training.keys():
        raise ValueError(f"{', '.join(_LISTS[:3])} in {folder} do not list the same images; unpack them again")
    wanted = "1" if split == "train" else "0"
    ids = [number for number in names if training[number] == wanted]
    places = {number: place for place, number in enumerate(classes)}
    if unknown := [number for number in ids if labels[number] not in places]:
        raise ValueError(f"image {unknown[0]} in {folder / _LISTS[1]} is of class {labels[unknown[0]]}, which is none")
    return Samples(
        tuple(name.partition(".")[2].replace("_", " ") for name in classes.values()),
        present([folder / "images" / names[number] for number in ids], folder / _LISTS[0]),
        np.array([places[labels[number]] for number in ids], np.int64),
        split=split,
        root=folder,
    )
