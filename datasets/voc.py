"""PASCAL VOC 2012 (Everingham et al. 2015) for segmentation, also with the masks of SBD (Hariharan et al. 2011)."""

from functools import partial
from pathlib import Path

import numpy as np

from repkit.datasets.layout import check_split, find_folder, present, read_lines
from repkit.datasets.masks import Mask, Source, read_class_mask
from repkit.datasets.matlab import read_mat
from repkit.datasets.proposal_flow import PASCAL
from repkit.datasets.samples import Samples

CLASSES = ("background", *PASCAL)


def read_voc(root: str | Path, split: str = "train", *, sbd: str | Path | None = None) -> Samples:
    """The images of VOC2012 (train, val, trainval) and their masks of 21 classes, in the order of its list.

    root: VOC2012, or a folder above it. sbd: SBD's folder (`dataset` with img, cls, train.txt and val.txt), only with
    train: all its images that are not in VOC's val follow, where VOC has no mask of them; this is known as trainaug.
    Raises FileNotFoundError for what is not there; ValueError for a damaged mask when it is read.
    """
    check_split(split, ("train", "val", "trainval"), "VOC2012")
    if sbd is not None and split != "train":
        raise ValueError(f"SBD adds to the split train, not to {split}; leave sbd out")
    needed = ["JPEGImages", "SegmentationClass", f"ImageSets/Segmentation/{split}.txt"]
    folder = find_folder(root, "VOC2012", needed, ["VOCdevkit/VOC2012", "VOC2012"])
    names = read_lines(folder / needed[2])
    images = present([folder / f"JPEGImages/{name}.jpg" for name in names], folder / needed[2])
    masks = present([folder / f"SegmentationClass/{name}.png" for name in names], folder / needed[2])
    if sbd is not None:
        more = _sbd(Path(sbd), {*names, *read_lines(folder / "ImageSets/Segmentation/val.txt")})
        images, masks = images + more[0], masks + more[1]
    return Samples(CLASSES, images, masks=masks, read_mask=_read_mask, split=split, root=folder)


def _sbd(root: Path, known: set[str]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Images and masks of SBD but for those that are known already."""
    names = ["benchmark_RELEASE/dataset", "dataset"]
    folder = find_folder(root, "SBD", ["img", "cls", "train.txt", "val.txt"], names)
    listed = [name for part in ("train", "val") for name in read_lines(folder / f"{part}.txt") if name not in known]
    images = present([folder / f"img/{name}.jpg" for name in listed], folder)
    return images, present([folder / f"cls/{name}.mat" for name in listed], folder)


def _read_mask(source: Source) -> Mask:
    if isinstance(source, Path) and source.suffix == ".mat":
        return read_class_mask(partial(_read_mat, source), len(CLASSES))
    return read_class_mask(source, len(CLASSES))


def _read_mat(path: Path) -> np.ndarray:
    return read_mat(path, "GTcls.Segmentation", lambda found: np.asarray(found["GTcls"]["Segmentation"][0, 0]))
