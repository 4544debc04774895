"""FGVC-Aircraft (Maji et al. 2013): 100 variants of aircraft, of 70 families and 30 manufacturers."""

from pathlib import Path

from repkit.datasets.layout import check_split, find_folder, numbered, present, read_fields, read_lines
from repkit.datasets.samples import Samples

_LISTS = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}


def read_aircraft(root: str | Path, split: str = "train", *, level: str = "variant") -> Samples:
    """The images of fgvc-aircraft-2013b (train, val, trainval, test), in the order of its lists.

    level: variant, family or manufacturer. The 20 rows of pixels at the bottom, which name the photographer, are kept.
    Raises FileNotFoundError for what is not there, ValueError for another level and for damaged lists.
    """
    check_split(split, ("train", "val", "trainval", "test"), "FGVC-Aircraft")
    if level not in _LISTS:
        raise ValueError(f"no level {level!r} of FGVC-Aircraft; have {', '.join(_LISTS)}")
    listed = f"images_{level}_{split}.txt"
    names = ["fgvc-aircraft-2013b/data", "data"]
    folder = find_folder(root, "FGVC-Aircraft", [listed, _LISTS[level], "images"], names)
    rows = read_fields(folder / listed, 2)
    classes = tuple(read_lines(folder / _LISTS[level]))
    return Samples(
        classes,
        present([folder / "images" / f"{name}.jpg" for name, _ in rows], folder / listed),
        numbered([label for _, label in rows], classes, folder / listed),
        split=split,
        root=folder,
    )
