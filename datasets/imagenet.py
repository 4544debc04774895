"""ImageNet-1k (Russakovsky et al. 2015) in class folders, the parts of it that papers train on, and Tiny-ImageNet."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from repkit.datasets.layout import check_split, find_folder, numbered, pictures, present, read_fields, read_lines
from repkit.datasets.samples import Samples

_ENTRY = re.compile(r"(?:.*/)?(n\d{8})(_[^/]+)?")  # a class, or an image that begins with its class


def read_imagenet(root: str | Path, split: str = "train", *, subset: str | Path | None = None) -> Samples:
    """The images of root/<split>/<wnid>/ (train, val), classes and images in the order of their names.

    root: also the folder of the Kaggle archive, ILSVRC/Data/CLS-LOC. subset: a text file whose lines begin with an
    image (n01440764_10026.JPEG, as the lists of 1 and 10 percent; all classes stay) or with a class (n01440764, as
    ImageNet-50; only these classes, numbered anew). Raises FileNotFoundError where these are not there, ValueError for
    a list of anything else.
    """
    check_split(split, ("train", "val"), "ImageNet")
    folder = find_folder(root, "ImageNet", [split], ["ILSVRC/Data/CLS-LOC"]) / split
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and _ENTRY.fullmatch(path.name))
    if not classes:
        raise FileNotFoundError(
            f"no class folders in {folder}: looked for n01440764 and so on; sort the images into folders of their class"
        )
    if subset is None:
        return _all_of(folder, classes)
    entries = _entries(Path(subset))
    if entries[0][1]:
        paths = [folder / name / f"{name}{rest}" for name, rest in entries]
        labels = numbered([name for name, _ in entries], classes, Path(subset))
        return Samples(tuple(classes), present(paths, Path(subset)), labels, split=split, root=folder.parent)
    chosen = sorted(name for name, _ in entries)
    if missing := [name for name in chosen if name not in classes]:
        raise FileNotFoundError(f"{len(missing)} classes of {subset} are not in {folder}: {', '.join(missing[:3])}")
    return _all_of(folder, chosen)


def read_tiny_imagenet(root: str | Path, split: str = "train") -> Samples:
    """The 64x64 images of tiny-imagenet-200 (train, val), whose classes are the sorted names of its folders.

    Raises FileNotFoundError for what is not there, ValueError for a damaged list.
    """
    check_split(split, ("train", "val"), "Tiny-ImageNet")
    folder = find_folder(root, "Tiny-ImageNet", ["wnids.txt", split], ["tiny-imagenet-200"])
    classes = sorted(read_lines(folder / "wnids.txt"))
    if split == "train":
        found = [path for name in classes for path in pictures(folder / "train" / name / "images")]
        labels = [path.parent.parent.name for path in found]
    else:
        source = folder / "val/val_annotations.txt"
        rows = read_fields(source, 2)
        found = list(present([folder / "val/images" / name for name, _ in rows], source))
        labels = [rest.split()[0] for _, rest in rows]
    return Samples(
        tuple(classes), tuple(found), numbered(labels, classes, folder / "wnids.txt"), split=split, root=folder
    )


def _entries(path: Path) -> list[tuple[str, str]]:
    """Class and rest of the name in each line, none twice; the rest is empty in a list of classes."""
    words = [line.split()[0] for line in read_lines(path)]
    found = [(match[1], match[2] or "") for word in words if (match := _ENTRY.fullmatch(word))]
    if len(found) < len(words) or len({bool(rest) for _, rest in found}) > 1:
        strange = next((word for word in words if not _ENTRY.fullmatch(word)), "both")
        raise ValueError(
            f"{path} lists {strange}; give images (n01440764_10026.JPEG) or classes (n01440764), all lines of one kind"
        )
    return list(dict.fromkeys(found))


def _all_of(folder: Path, classes: Sequence[str]) -> Samples:
    """All images of a split's folder that are of these classes."""
    found = [pictures(folder / name) for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
    return Samples(tuple(classes), tuple(chain.from_iterable(found)), labels, split=folder.name, root=folder.parent)
