"""MedMNIST (Yang et al. 2023): small medical images, a .npz file for each of its sets."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repkit.datasets.layout import check_split
from repkit.datasets.samples import Samples


def read_medmnist(path: str | Path, split: str = "train", *, classes: Sequence[str] | None = None) -> Samples:
    """The images of a set's .npz file (train, val, test), grey or RGB; classes None are "0", "1", ...

    The names of classes are not in the file. Raises FileNotFoundError without it, ValueError for what is no such file,
    for sets of volumes, and for those where an image has several labels.
    """
    check_split(split, ("train", "val", "test"), "MedMNIST")
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}; give the .npz file of one set, such as pathmnist.npz")
    arrays = _arrays(source, split)
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.ndim == 4 and images.shape[-1] != 3:
        raise ValueError(f"{source} has {images.dtype} images {list(images.shape)}; give a set of [n H W] or [n H W 3]")
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ValueError(f"each image of {source} has {labels.shape[1]} labels; give a set with one an image")
    count = 1 + max(int(arrays[f"{name}_labels"].max()) for name in ("train", "val", "test"))
    names = tuple(map(str, range(count))) if classes is None else tuple(classes)
    return Samples(names, images, labels.reshape(-1).astype(np.int64), split=split, root=source)


def _arrays(path: Path, split: str) -> dict[str, np.ndarray]:
    """The images of a split and the labels of all."""
    needed = {f"{split}_images", "train_labels", "val_labels", "test_labels"}
    try:
        with np.load(path, allow_pickle=False) as found:
            have = set(found)
            if needed <= have:
                return {name: found[name] for name in needed}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path} as .npz ({error}); download it again") from error
    raise ValueError(f"{path} has the arrays {', '.join(sorted(have))}; it lacks {', '.join(sorted(needed - have))}")
