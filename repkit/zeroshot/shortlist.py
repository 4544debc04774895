"""Shortlist: the few classes of an image that are worth a denoiser's time, as a cheaper method sees them.

A class that is not on an image's list is never evaluated: its score is infinite and its probability 0.
"""

from collections.abc import Callable, Sequence

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int

from repkit.extractors import Extractor, Images
from repkit.pooling import pool

Retriever = Callable[[Images], Int[np.ndarray, "b m"]]

EXTRACTED = 32  # images that are extracted at once


def nearest_classes(extractor: Extractor, images: Images, labels: Sequence[int] | np.ndarray, k: int) -> Retriever:
    """A retriever of the k classes that have the examples most like an image, likest first.

    images, labels: examples and the numbers of their classes. Likeness is the cosine of the features, mean over the
    map, and a class is as like as its likest example; the search is exact.
    Raises ValueError for an extractor of several keys, for labels that do not fit the images, and for a k beyond the
    number of classes that have examples.
    """
    owner = np.asarray(labels)
    if len(extractor.blocks) != 1:
        raise ValueError(f"the extractor has keys {', '.join(extractor.blocks)}; give one of a single key")
    if owner.shape != (len(images),) or owner.dtype.kind not in "iu":
        raise ValueError(f"labels of shape {owner.shape} and {owner.dtype} for {len(images)} images; give one int each")
    classes = len(np.unique(owner))
    if not 1 <= k <= classes:
        raise ValueError(f"k={k} of the {classes} classes that have examples; give 1 to {classes}")
    vectors = _vectors(extractor, images)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)

    def retrieve(images: Images) -> Int[np.ndarray, "b m"]:
        return np.stack([_nearest(index, query, owner, k) for query in _vectors(extractor, images)])

    return retrieve


def listed_conditions(listed: np.ndarray, owner: Int[np.ndarray, "j"], count: int) -> list[Int[np.ndarray, "_a"]]:
    """The conditions of the classes [b m] that a retriever listed for `count` images; owner[j]: class of condition j.

    A class may be listed twice, so that lists of other lengths can be filled up.
    Raises ValueError for anything but at least one of the classes' numbers for each image.
    """
    numbers, classes = np.asarray(listed), owner.max() + 1
    if numbers.ndim != 2 or len(numbers) != count or not numbers.size or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"the shortlist of {count} images has shape {numbers.shape} and {numbers.dtype}; give class numbers [b m]"
        )
    if (unknown := numbers[(numbers < 0) | (numbers >= classes)]).size:
        raise ValueError(f"the shortlist has class number {unknown[0]}; have 0 to {classes - 1}")
    return [np.nonzero(np.isin(owner, row))[0] for row in numbers]


def _vectors(extractor: Extractor, images: Images) -> Float32[np.ndarray, "n d"]:
    """One vector of length 1 an image."""
    found = []
    for first in range(0, len(images), EXTRACTED):
        features = extractor(images[first : first + EXTRACTED])
        (maps,) = features.values()
        found.append(F.normalize(pool(maps.float(), "mean", features.mask), dim=1).cpu())
    return np.ascontiguousarray(torch.cat(found).numpy())


def _nearest(
    index: faiss.Index, query: Float32[np.ndarray, "d"], owner: Int[np.ndarray, "n"], k: int
) -> Int[np.ndarray, "k"]:
    """The first k classes among the neighbours; so many of these are looked up as that takes."""
    depth = 4 * k
    while True:
        depth = min(depth, index.ntotal)
        near = owner[index.search(query[None], depth)[1][0]]
        _, first = np.unique(near, return_index=True)
        if len(first) >= k:
            return near[np.sort(first)[:k]]
        depth *= 4
