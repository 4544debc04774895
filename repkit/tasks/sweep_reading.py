"""Labelled images as pooled features, batch by batch: one forward serves every tap and pooling, nothing is stored."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from repkit.decoding import MAX_PIXELS, Decoded, decode_ahead
from repkit.extractors import Extractor
from repkit.images import Resize, to_tensor
from repkit.pooling import pool as pool_map
from repkit.tasks.probe import Splits, read_labels, split_rows
from repkit.tasks.seen_store import Watch, unwatched

Rows = Int[np.ndarray, " _n"]
Pooled = Float[np.ndarray, "_n _d"]


@dataclass(frozen=True)
class Running:
    """What does not decide the results but their last bits: images of a forward, decoding, who is told of progress."""

    batch_size: int = 16
    workers: int = 1
    max_pixels: int = MAX_PIXELS
    watch: Watch = unwatched

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; give at least 1")


@dataclass(frozen=True, eq=False)
class Labelled:
    """A list of images with their classes, what each is told, and which rows fit, choose and test."""

    paths: Sequence[str]
    labels: Rows
    classes: Sequence[str]
    splits: Splits
    conds: Sequence[str] | None = None

    @property
    def seen(self) -> Rows:
        """The rows that fit and choose, in order."""
        return np.sort(np.concatenate([self.splits.train, self.splits.validation]))


def label(listing: pa.Table, conds: Sequence[str] | None = None, seed: int = 0) -> Labelled:
    """The images of `list_images` with labels and splits; ValueError where labels are missing or all the same."""
    classes, labels = read_labels(listing["label"].to_pylist())
    if len(classes) < 2:
        raise ValueError(f"all {len(labels)} images are of class {classes[0]}; a sweep needs at least two classes")
    splits = split_rows(labels, listing["split"].to_pylist(), seed)
    return Labelled(listing["path"].to_pylist(), labels, classes, splits, conds)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Pooled features in memory, and the number of each row in the list: images that cannot be read have none."""

    rows: Rows
    features: Mapping[str, Pooled]

    def __add__(self, other: "Gathered") -> "Gathered":
        joined = {name: np.concatenate([one, other.features[name]]) for name, one in self.features.items()}
        return Gathered(np.concatenate([self.rows, other.rows]), joined)

    def only(self, name: str) -> "Gathered":
        """One cell's features."""
        return Gathered(self.rows, {name: self.features[name]})


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads rows of a list; `failures` grows by the path of each image that cannot be read, and why."""

    data: Labelled
    running: Running
    failures: dict[str, str] = field(default_factory=dict)

    def pooled(
        self, extractor: Extractor, pools: Sequence[str], rows: Rows, what: str
    ) -> Iterator[tuple[Rows, dict[str, Pooled]]]:
        """Rows of each batch that could be read, and their features by the name of the cell.

        Batches are the same for the same rows, so a second reading has the same bits.
        """
        for kept, decoded in self._decoded(extractor.resize, rows, what):
            conds = None if self.data.conds is None else [self.data.conds[row] for row in kept]
            maps = extractor(to_tensor(np.stack([_pixels(one) for one in decoded])), conds)
            mask = _masks(decoded)
            yield (
                kept,
                {
                    f"{key} {pool}": pool_map(one, pool, None if mask is None else mask.to(one.device)).cpu().numpy()
                    for pool in pools
                    for key, one in maps.items()
                },
            )

    def gather(self, extractor: Extractor, names: Sequence[str], rows: Rows, what: str) -> Gathered:
        """The features of the cells `names` in memory."""
        pools = list(dict.fromkeys(name.rpartition(" ")[2] for name in names))
        parts = list(self.pooled(extractor, pools, rows, what))
        if not parts:
            raise ValueError(f"none of {len(rows)} images could be read: {next(iter(self.failures.values()), '')}")
        found = {name: np.concatenate([values[name] for _, values in parts]) for name in names}
        return Gathered(np.concatenate([kept for kept, _ in parts]), found)

    def pixels(self, resize: Resize, side: int) -> Gathered:
        """The images themselves under the name "pixels": RGB in [0, 1], averaged to `side` pixels where larger."""
        parts: list[tuple[Rows, Pooled]] = []
        for kept, decoded in self._decoded(resize, np.concatenate([self.data.seen, self.data.splits.test]), "pixels"):
            images = to_tensor(np.stack([_pixels(one) for one in decoded]))
            small = (min(side, images.shape[-2]), min(side, images.shape[-1]))
            parts.append((kept, torch.nn.functional.adaptive_avg_pool2d(images, small).flatten(1).numpy()))
        rows, features = (np.concatenate(one) for one in zip(*parts, strict=True))
        return Gathered(rows, {"pixels": features})

    def _decoded(self, resize: Resize, rows: Rows, what: str) -> Iterator[tuple[Rows, list[Decoded]]]:
        """The images of each batch that can be read."""
        size = self.running.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        paths = ([self.data.paths[row] for row in batch] for batch in batches)
        ahead = decode_ahead(paths, resize, self.running.workers, self.running.max_pixels)
        done = 0
        with closing(ahead) as decoded, self.running.watch(what, "images") as progress:
            progress(0, len(rows))
            for batch, images in zip(batches, decoded, strict=True):
                good = np.array([image.error is None for image in images])
                for row, image in zip(batch, images, strict=True):
                    if image.error is not None:
                        self.failures[self.data.paths[row]] = image.error
                if good.any():
                    yield batch[good], [image for image in images if image.error is None]
                done += len(batch)
                progress(done, len(rows))

    def splits(self, gathered: Gathered) -> Splits:
        """The parts as positions in what was gathered."""
        found = self.data.splits
        parts: dict[str, Any] = {
            name: np.flatnonzero(np.isin(gathered.rows, getattr(found, name)))
            for name in ("train", "validation", "test")
        }
        return Splits(**parts, source=found.source)


def _pixels(image: Decoded) -> UInt8[np.ndarray, "H W 3"]:
    assert image.pixels is not None
    return image.pixels


def _masks(images: Sequence[Decoded]) -> Bool[Tensor, "b H W"] | None:
    masks = [image.mask for image in images if image.mask is not None]
    return torch.from_numpy(np.stack(masks)) if masks else None
