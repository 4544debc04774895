"""Real features to search: what mini-dit makes of the bundled images, at every block and many times.

14,000 images x 8 blocks x 10 times are 1,120,000 maps of 128 channels; the averages of a map's upper and its lower half
are a vector of 256. The last images are queries, none of whose vectors are among those to search.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32
from PIL import Image

from repkit.datasets import fashion_mnist
from repkit.extractors import DiffusionExtractor
from repkit.images import Resize, to_tensor
from repkit.progress import Progress
from repkit.zoo import load

TIMES = ("clean:100", "10", "25", "50", "100", "150", "200", "300", "400", "600")
BLOCKS, DIMENSION, BATCH, HELD_OUT = 8, 256, 100, 500

Vectors = Float32[np.ndarray, "n 256"]


def real_vectors(count: int, folder: Path) -> tuple[Vectors, Vectors]:
    """`count` unit vectors and those of the held-out images, [n 256] each, from files in `folder`, which are made once.

    Fewer vectors come from fewer images, each at all blocks and times.
    """
    each = BLOCKS * len(TIMES)
    images = _images()
    if not 0 < count <= (len(images) - HELD_OUT) * each:
        raise ValueError(f"{count} vectors; have 1 to {(len(images) - HELD_OUT) * each:,}")
    needed = -(-count // each)
    base, queries = _made(images[:needed], folder / f"base-{needed}"), _made(images[-HELD_OUT:], folder / "queries")
    return base[:count], queries


def _images() -> np.ndarray:
    return np.concatenate([fashion_mnist.load(split)[0] for split in ("train", "test")])


def _made(images: np.ndarray, stem: Path) -> Vectors:
    """The vectors of all images, an image after the other, memory-mapped."""
    path = stem.with_suffix(".npy")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = stem.with_suffix(".part.npy")
        shape = (len(images), BLOCKS * len(TIMES), DIMENSION)
        _fill(np.lib.format.open_memmap(part, "w+", np.float32, shape), images)
        part.rename(path)
    return np.load(path, mmap_mode="r").reshape(-1, DIMENSION)


def _fill(out: np.ndarray, images: np.ndarray) -> None:
    backbone = load("mini-dit")
    extract, resize = DiffusionExtractor(backbone, [f"block.*@{','.join(TIMES)}"]), Resize(backbone.size)
    with Progress("features") as progress:
        progress(0, len(images))
        for start in range(0, len(images), BATCH):
            batch = [resize(Image.fromarray(one).convert("RGB"))[0] for one in images[start : start + BATCH]]
            features = extract(to_tensor(np.stack(batch)))
            halves = torch.stack([F.adaptive_avg_pool2d(maps, (2, 1)).flatten(1) for maps in features.values()], 1)
            out[start : start + BATCH] = F.normalize(halves, dim=-1).numpy()
            progress(start + len(batch), len(images))
