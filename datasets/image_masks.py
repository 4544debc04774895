"""People's own data for segmentation: a folder of images and one of masks of the same names."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from repkit.datasets.layout import find_folder, paired, pictures, read_lines
from repkit.datasets.masks import IGNORE, read_mask, read_values
from repkit.datasets.samples import Samples


def read_image_masks(
    root: str | Path,
    split: str | None = None,
    *,
    images: str = "images",
    masks: str = "masks",
    classes: Sequence[str] | None = None,
    values: Mapping[int, int] | None = None,
) -> Samples:
    """The images of root/<images>[/<split>] and their masks in root/<masks>[/<split>], by name.

    Masks are pictures of palette or grey, or .npy, whose values are numbers of classes, IGNORE (255) where a pixel does
    not count; `values` maps other ones (black and white: {0: 0, 255: 1}). classes: their names, else the lines of
    root/classes.txt; without either they are "0", "1", ... to the largest value, for which all masks are read.
    Raises FileNotFoundError for what is not there, ValueError that lists images without a mask and masks without an
    image.
    """
    places = [name if split is None else f"{name}/{split}" for name in (images, masks)]
    folder = find_folder(root, "images with masks", places)
    files = pictures(folder / places[0])
    arrays = [path for path in (folder / places[1]).iterdir() if path.suffix == ".npy"]
    labelled = paired(files, arrays or pictures(folder / places[1]))
    listed = folder / "classes.txt"
    if classes is None:
        classes = read_lines(listed) if listed.is_file() else _numbers(labelled, values)
    known = {number: number for number in range(len(classes))} | {IGNORE: IGNORE} if values is None else values
    if outside := [value for value in known.values() if value != IGNORE and not 0 <= value < len(classes)]:
        raise ValueError(f"values has the class {outside[0]}, and there are {len(classes)}; give 0 ... classes - 1")
    read = partial(read_mask, classes=dict(known))
    return Samples(tuple(classes), tuple(files), masks=labelled, read_mask=read, split=split, root=folder)


def _numbers(masks: Sequence[Path], values: Mapping[int, int] | None) -> list[str]:
    """Names of classes as many as there are numbers."""
    if values is not None:
        found = set(values.values())
    else:
        found = {int(value) for path in masks for value in np.unique(read_values(path))}
    return [str(number) for number in range(1 + max(found - {IGNORE}, default=0))]
