"""Cityscapes (Cordts et al. 2016): streets, in the 19 classes that are scored or the 27 of unsupervised papers."""

from functools import partial
from pathlib import Path

from repkit.datasets.layout import check_split, find_folder, paired, pictures
from repkit.datasets.masks import IGNORE, read_mask
from repkit.datasets.samples import Samples

# The ids 7 ... 33, of which those with a star are not scored.
_NAMES = (
    *("road", "sidewalk", "parking*", "rail track*", "building", "wall", "fence", "guard rail*", "bridge*", "tunnel*"),
    *("pole", "polegroup*", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car"),
    *("truck", "bus", "caravan*", "trailer*", "train", "motorcycle", "bicycle"),
)
_FIRST, _LAST = 7, 33
_CLASSES = {27: [name.strip("*") for name in _NAMES], 19: [name for name in _NAMES if "*" not in name]}
_IMAGE, _MASK = "_leftImg8bit", "_gtFine_labelIds"


def read_cityscapes(root: str | Path, split: str = "train", *, classes: int = 19) -> Samples:
    """The images of leftImg8bit (train, val) and the fine masks of gtFine, by city and name.

    classes: 19 (the train ids), or 27 (ids 7 ... 33); other ids are IGNORE. Raises FileNotFoundError for what is not
    there, ValueError for images without a mask and masks without an image.
    """
    check_split(split, ("train", "val"), "Cityscapes")
    if classes not in _CLASSES:
        raise ValueError(f"no {classes} classes of Cityscapes; have 19 and 27")
    needed = [f"leftImg8bit/{split}", f"gtFine/{split}"]
    folder = find_folder(root, "Cityscapes", needed)
    images, masks = [], []
    for city in sorted(path for path in (folder / needed[0]).iterdir() if path.is_dir()):
        images += [path for path in pictures(city) if path.stem.endswith(_IMAGE)]
        masks += [path for path in pictures(folder / needed[1] / city.name) if path.stem.endswith(_MASK)]
    return Samples(
        tuple(_CLASSES[classes]),
        tuple(images),
        masks=paired(images, masks, _IMAGE, _MASK),
        read_mask=partial(read_mask, classes=_values(classes)),
        split=split,
        root=folder,
    )


def _values(classes: int) -> dict[int, int]:
    """The class of each id that a mask can have."""
    kept = [number for number, name in enumerate(_NAMES, _FIRST) if classes == 27 or "*" not in name]
    return dict.fromkeys(range(_LAST + 1), IGNORE) | {number: place for place, number in enumerate(kept)}
