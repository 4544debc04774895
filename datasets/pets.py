"""Oxford-IIIT Pet (Parkhi et al. 2012): 37 breeds of cats and dogs, and the outline of each animal."""

from functools import partial
from pathlib import Path

import numpy as np

from repkit.datasets.layout import check_split, find_folder, present, read_fields
from repkit.datasets.masks import IGNORE, read_mask
from repkit.datasets.samples import Samples

_PET, _BACKGROUND, _BORDER = 1, 2, 3  # values of a trimap


def read_pets(root: str | Path, split: str = "trainval") -> Samples:
    """The images of oxford-iiit-pet (trainval, test) with their breeds, as "American Bulldog", in the list's order.

    Raises FileNotFoundError for what is not there, ValueError for a damaged list.
    """
    folder, listed, rows = _rows(root, split)
    breeds = {int(row[1]): row[0].rpartition("_")[0].replace("_", " ").title() for row in rows}
    numbers = sorted(breeds)
    return Samples(
        tuple(breeds[number] for number in numbers),
        present([folder / f"images/{row[0]}.jpg" for row in rows], listed),
        np.array([numbers.index(int(row[1])) for row in rows], np.int64),
        split=split,
        root=folder,
    )


def read_pet_masks(root: str | Path, split: str = "trainval", *, border: bool = False) -> Samples:
    """The same images with masks: background 0, pet 1, and the border between them IGNORE, or with `border` 2."""
    folder, listed, rows = _rows(root, split)
    values = {_BACKGROUND: 0, _PET: 1, _BORDER: 2 if border else IGNORE}
    return Samples(
        ("background", "pet", "border") if border else ("background", "pet"),
        present([folder / f"images/{row[0]}.jpg" for row in rows], listed),
        masks=present([folder / f"annotations/trimaps/{row[0]}.png" for row in rows], listed),
        read_mask=partial(read_mask, classes=values),
        split=split,
        root=folder,
    )


def _rows(root: str | Path, split: str) -> tuple[Path, Path, list[list[str]]]:
    """The folder, its list, and image and class (from 1) in each row of it."""
    check_split(split, ("trainval", "test"), "Oxford-IIIT Pet")
    folder = find_folder(root, "Oxford-IIIT Pet", ["images", f"annotations/{split}.txt"], ["oxford-iiit-pet"])
    listed = folder / f"annotations/{split}.txt"
    rows = [row for row in read_fields(listed, 3) if not row[0].startswith("#")]
    if wrong := [row for row in rows if not row[1].isdecimal()]:
        raise ValueError(f"{listed}: class {wrong[0][1]!r} of {wrong[0][0]} is no number; unpack it again")
    return folder, listed, rows
