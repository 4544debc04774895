"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the binary version: the Python version is pickled."""

from pathlib import Path

import numpy as np
from einops import rearrange

from repkit.datasets.layout import check_split, find_folder, present, read_lines
from repkit.datasets.samples import Samples

_PIXELS = 3 * 32 * 32
_FILES10 = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
_FILES100 = {"train": ["train.bin"], "test": ["test.bin"]}


def read_cifar10(root: str | Path, split: str = "train") -> Samples:
    """The 32x32 images of cifar-10-batches-bin (train, test), in the order of the files.

    Raises FileNotFoundError for what is not there, naming the archive; ValueError for damaged files.
    """
    check_split(split, _FILES10, "CIFAR-10")
    folder = _folder(Path(root), "CIFAR-10", "cifar-10-batches-bin", "batches.meta.txt", "cifar-10-batches-py")
    classes = tuple(read_lines(folder / "batches.meta.txt"))
    return _read(folder, _FILES10[split], classes, split, labels=1, label=0)


def read_cifar100(root: str | Path, split: str = "train", *, coarse: bool = False) -> Samples:
    """The same of cifar-100-binary, with its 100 classes, or with `coarse` the 20 that hold five of them each."""
    check_split(split, _FILES100, "CIFAR-100")
    names = f"{'coarse' if coarse else 'fine'}_label_names.txt"
    folder = _folder(Path(root), "CIFAR-100", "cifar-100-binary", names, "cifar-100-python")
    return _read(folder, _FILES100[split], tuple(read_lines(folder / names)), split, labels=2, label=0 if coarse else 1)


def _folder(root: Path, what: str, name: str, needed: str, pickled: str) -> Path:
    try:
        return find_folder(root, what, [needed], [name])
    except FileNotFoundError as error:
        old = next((path for path in (root, root / pickled) if path.name == pickled and path.is_dir()), None)
        if old is None:
            raise FileNotFoundError(f"{error} (the binary version, {what.lower()}-binary.tar.gz)") from None
        raise FileNotFoundError(
            f"{old} is the Python version of {what}, which is pickled, and pickles can run code when they are read; "
            f"unpack the binary version, {what.lower()}-binary.tar.gz, and give its folder {name}"
        ) from None


def _read(folder: Path, files: list[str], classes: tuple[str, ...], split: str, *, labels: int, label: int) -> Samples:
    """Records of `labels` bytes, of which that at `label` is meant, and 32x32 red, then green, then blue pixels."""
    paths = present([folder / name for name in files], folder)
    sizes = {path: path.stat().st_size for path in paths}
    if wrong := [path for path, size in sizes.items() if not size or size % (labels + _PIXELS)]:
        raise ValueError(
            f"{wrong[0]} has {sizes[wrong[0]]} bytes, which is no multiple of {labels + _PIXELS}; unpack it again"
        )
    content = np.concatenate([np.fromfile(path, np.uint8) for path in paths])
    records = content.reshape(-1, labels + _PIXELS)
    images = rearrange(records[:, labels:], "n (c h w) -> n h w c", c=3, h=32)
    return Samples(classes, np.ascontiguousarray(images), records[:, label].astype(np.int64), split=split, root=folder)
