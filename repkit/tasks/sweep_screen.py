"""Screening: ridge on every cell of a noise level, from one pass over the images and without a feature cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from repkit.extractors import Extractor
from repkit.heads.ridge import RidgeGram, RidgeProbe, fit_ridge
from repkit.tasks.sweep_cells import Cell
from repkit.tasks.sweep_reading import Pooled, Reader, Rows

ROWS = 1024  # added to the moments at a time: a product of few rows would mostly move the d x d matrix through memory


def screen(extractor: Extractor, cells: Sequence[Cell], reader: Reader, what: str) -> list[dict[str, Any]]:
    """The accuracy of ridge on the validation rows, and the alpha that gives it, for each cell of one noise level.

    One forward an image of the training and validation parts; `held_bytes` says what is in memory meanwhile.
    """
    splits, labels = reader.data.splits, reader.data.labels
    classes = len(reader.data.classes)
    found = {cell.name: Screened(cell.dim, len(splits.train), classes) for cell in cells}
    pools = list(dict.fromkeys(cell.pool for cell in cells))
    for rows, pooled in reader.pooled(extractor, pools, reader.data.seen, what):
        training = np.isin(rows, splits.train)
        for name, one in found.items():
            one.add(pooled[name][training], labels[rows[training]], training=True)
            one.add(pooled[name][~training], labels[rows[~training]], training=False)
    # Popped, so that the memory of a cell is free before the next is decomposed.
    return [_row(name, found.pop(name).fit()) for name in list(found)]


def _row(name: str, probe: RidgeProbe) -> dict[str, Any]:
    return {"cell": name, "alpha": probe.alpha, "validation": max(probe.chosen.scores)}


def held_bytes(dims: Sequence[int], train: int, validation: int) -> int:
    """What a pass over one noise level keeps for cells of so many values; solving one takes a few of its d x d more."""
    kept = sum(8 * dim**2 if moments(dim, train) else 4 * dim * train for dim in dims)
    return kept + sum(4 * dim * validation for dim in dims)


def moments(dim: int, train: int) -> bool:
    """Whether the float64 Gram matrix of a cell is smaller than its float32 training rows."""
    return 2 * dim < train


class Screened:
    """One cell's validation rows, and its training rows as moments or, where those would be larger, as they are."""

    def __init__(self, dim: int, train: int, classes: int) -> None:
        self.classes = classes
        self.gram = RidgeGram(dim, classes) if moments(dim, train) else None
        self.train: list[tuple[Pooled, Rows]] = []
        self.held: list[tuple[Pooled, Rows]] = []

    def add(self, features: Pooled, labels: Rows, *, training: bool) -> None:
        """Take in rows of a batch, of which there may be none."""
        if len(labels):
            (self.train if training else self.held).append((features, labels))
        if self.gram is not None and sum(len(part) for _, part in self.train) >= ROWS:
            self._sum_up(self.gram)

    def fit(self) -> RidgeProbe:
        """The probe at the alpha that is best on the validation rows."""
        if not self.held or not (self.train or self.gram and self.gram.n):
            raise ValueError("no training image, or no validation image, could be read; a sweep needs both to choose")
        if self.gram is None:
            return fit_ridge(*_joined(self.train), validation=_joined(self.held), n_classes=self.classes)
        if self.train:
            self._sum_up(self.gram)
        return self.gram.fit(_joined(self.held))

    def _sum_up(self, gram: RidgeGram) -> None:
        gram.update(*_joined(self.train))
        self.train.clear()


def _joined(parts: Sequence[tuple[Pooled, Rows]]) -> tuple[Pooled, Rows]:
    features, labels = zip(*parts, strict=True)
    return np.concatenate(features), np.concatenate(labels)


def by_cell(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Rows of `screen` by the name of the cell."""
    return {row["cell"]: row for row in rows}
