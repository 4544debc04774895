"""StoreData: features that were stored beforehand, read a batch at a time."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int

from repkit.heads.rows import StoredRows, read, stored_rows
from repkit.recipes.feature_data import PARTS, Batch, FeatureData, Lists
from repkit.store import FeatureStore
from repkit.tasks.probe import read_labels, split_rows


class StoreData(FeatureData):
    """Features that repkit extract has stored; the store's own splits are used where it has them.

    Args:
        store: folder that repkit extract wrote from labelled images
        taps: which of its taps; null for all
        batch: images a step, on all processes together
        epochs: passes over the training images
        validate_every: epochs between validations
        seed: decides the order of the images, and what is held out
    """

    def __init__(
        self,
        store: str,
        taps: list[str] | None = None,
        batch: int = 128,
        epochs: float = 1,
        validate_every: float = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch, epochs, validate_every, seed)
        self.store, self.taps = store, taps

    @cached_property
    def parts(self) -> dict[str, Int[np.ndarray, " _n"]]:
        """The rows of the store in each part."""
        table = FeatureStore(self.store).table
        self.classes, self.labels = read_labels(table["label"].to_pylist())
        splits = split_rows(self.labels, table["split"].to_pylist(), self.seed)
        return {part: getattr(splits, part) for part in PARTS}

    def count(self, part: str) -> int:
        return len(self.parts[part])

    @property
    def tested(self) -> bool:
        return True

    def setup(self, stage: str) -> None:
        """Open the store; ValueError for a tap that it does not have."""
        opened, _ = FeatureStore(self.store), self.parts
        self.features: dict[str, StoredRows] = {key: stored_rows(opened, key) for key in self.taps or opened.keys}
        self.sizes = {key: rows.shape[1:] for key, rows in self.features.items()}
        self.strides = {key: opened.taps[key]["stride"] for key in self.features}

    def train_dataloader(self) -> Iterator[Batch]:
        rows = self.step_rows()
        return (self.batch_of("train", [(row, True) for _, row in pairs]) for pairs in rows)

    def val_dataloader(self) -> Iterable[Batch]:
        return Stored(self, "validation")

    def test_dataloader(self) -> Iterable[Batch]:
        return Stored(self, "test")

    def batch_of(self, part: str, rows: Sequence[tuple[int, bool]]) -> Batch:
        places = self.parts[part][[row for row, _ in rows]]
        return {
            "features": {key: read(array, places) for key, array in self.features.items()},
            "label": torch.from_numpy(self.labels[places]),
            "index": torch.tensor([row if counts else -1 for row, counts in rows]),
        }


class Stored:
    """The batches of an evaluation, read when they are asked for; as often as that."""

    def __init__(self, data: StoreData, part: str) -> None:
        self.data, self.part, self.rows = data, part, Lists(data.shared_rows(part), data.share)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        return (self.data.batch_of(self.part, rows) for rows in self.rows)
