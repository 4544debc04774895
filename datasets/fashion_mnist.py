"""Fashion-MNIST (Zalando, MIT licence): the part that ships with repkit, and the whole of it where it is installed.

Bundled are 4,000 of the 60,000 training images (the first 400 of each class) and all 10,000 test images. The bundled
models were trained on the 60,000, so they have seen the 4,000; they have never seen a test image.
"""

import argparse
import gzip
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from repkit.datasets.samples import Samples

Split = Literal["train", "test"]
Images = UInt8[np.ndarray, "n 28 28"]
Labels = Int64[np.ndarray, " n"]

# By label. Names of folders too, hence no "T-shirt/top".
CLASSES = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
DEBIAN = "/usr/share/datasets/fashion-mnist"
BUNDLED = Path(__file__).parent / "data" / "fashion-mnist"
PER_CLASS = 400

_STEMS = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08  # idx's code of the element type


def load(split: Split) -> tuple[Images, Labels]:
    """The bundled images, grey 0 (background) to 255, and labels: 4,000 for "train", 10,000 for "test".

    In the order of the original files. Raises ValueError for another split.
    """
    return _read_split(BUNDLED, split)


def load_full(folder: str | Path, split: Split) -> tuple[Images, Labels]:
    """All 60,000 training or 10,000 test images and labels, from a folder with the four original *-ubyte.gz files.

    Raises FileNotFoundError, with a way to get them, if they are not there; ValueError for another split.
    """
    missing = [name for name in _names(split) if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"no {' and no '.join(missing)} in {folder}; install Debian's package dataset-fashion-mnist "
            f"(apt-get install dataset-fashion-mnist puts it in {DEBIAN}), or name a folder with the original files"
        )
    return _read_split(Path(folder), split)


def read_fashion_mnist(root: str | Path | None = None, split: Split = "train") -> Samples:
    """The images of `load_full(root, split)`, or without a root those that are bundled, as Samples."""
    images, labels = load(split) if root is None else load_full(root, split)
    return Samples(CLASSES, images, labels, split=split, root=BUNDLED if root is None else Path(root))


def write_folder(root: str | Path, split: Split, count_per_class: int | None = None) -> Path:
    """Write bundled images as root/<split>/<class>/<index>.png and return root/<split>.

    `index` counts from 0 in what `load` returns. The first `count_per_class` of each class, or without it all.
    """
    images, labels = load(split)
    for label, name in enumerate(CLASSES):
        folder = Path(root) / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in np.flatnonzero(labels == label)[:count_per_class]:
            Image.fromarray(images[index]).save(folder / f"{index:05d}.png")
    return Path(root) / split


def bundle(source: str | Path, target: str | Path = BUNDLED) -> None:
    """Write the bundled files from the original ones: the same bytes each time."""
    images, labels = load_full(source, "train")
    kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in range(len(CLASSES))]))
    Path(target).mkdir(parents=True, exist_ok=True)
    _write_split(Path(target), "train", images[kept], labels[kept])
    _write_split(Path(target), "test", *load_full(source, "test"))


def _names(split: str) -> tuple[str, str]:
    if split not in _STEMS:
        raise ValueError(f"no split {split!r} of Fashion-MNIST; have {', '.join(_STEMS)}")
    return f"{_STEMS[split]}-images-idx3-ubyte.gz", f"{_STEMS[split]}-labels-idx1-ubyte.gz"


def _read_split(folder: Path, split: str) -> tuple[Images, Labels]:
    images, labels = (_read_idx(folder / name) for name in _names(split))
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(f"{folder} has images {images.shape} and labels {labels.shape}; give [n 28 28] and [n]")
    return images, labels.astype(np.int64)


def _read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """The array of an idx file: two zero bytes, element type, number of axes, big-endian sizes, elements."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3] if len(content) > 3 else 0
    shape = np.frombuffer(content, ">u4", axes, 4).astype(int) if len(content) >= 4 + 4 * axes else ()
    if content[:3] != bytes([0, 0, _UNSIGNED_BYTE]) or len(content) != 4 + 4 * axes + np.prod(shape):
        raise ValueError(f"{path} is no idx file of bytes; give the original *-ubyte.gz")
    # Copied, because torch warns of arrays that cannot be written to.
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _write_split(folder: Path, split: str, images: Images, labels: Labels) -> None:
    for name, array in zip(_names(split), (images, labels.astype(np.uint8)), strict=True):
        header = bytes([0, 0, _UNSIGNED_BYTE, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        # Without a time in the header the same array gives the same file.
        (folder / name).write_bytes(gzip.compress(header + array.tobytes(), mtime=0))


def main() -> None:
    """Rebuild the bundled files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--from", dest="source", default=DEBIAN, help="folder with the four original files")
    parser.add_argument("--to", dest="target", default=BUNDLED, help="folder to write")
    arguments = parser.parse_args()
    bundle(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
