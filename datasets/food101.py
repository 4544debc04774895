"""Food-101 (Bossard et al. 2014): 101 dishes."""

import json
from pathlib import Path

from repkit.datasets.layout import check_split, find_folder, numbered, present
from repkit.datasets.samples import Samples


def read_food101(root: str | Path, split: str = "train") -> Samples:
    """The images of food-101 (train, test), by class, in the order of its lists; classes as "apple pie".

    Raises FileNotFoundError for what is not there, ValueError for a damaged list.
    """
    check_split(split, ("train", "test"), "Food-101")
    folder = find_folder(root, "Food-101", [f"meta/{split}.json", "images"], ["food-101"])
    listed = folder / f"meta/{split}.json"
    try:
        found = json.loads(listed.read_text(encoding="utf-8"))
        rows = [(str(label), str(name)) for label, names in found.items() for name in names]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{listed} is no JSON of lists by class ({error}); unpack it again") from error
    classes = sorted(found)
    return Samples(
        tuple(name.replace("_", " ") for name in classes),
        present([folder / "images" / f"{name}.jpg" for _, name in rows], listed),
        numbered([label for label, _ in rows], classes, listed),
        split=split,
        root=folder,
    )
