"""Error tables of a toy whose evidence is known: made from means and noise at each level, without any network."""

from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from repkit.schedule import Schedule
from repkit.zeroshot.errortable import ErrorTable
from repkit.zeroshot.levels import Levels, levels_at, strata

INFO = {"model": "toy", "weights_hash": "ab" * 32, "dtype": "float32"}


def toy_levels(count: int, spacing: Any = "native", shift: float = 1.0) -> Levels:
    return levels_at(Schedule.flow(shift), strata(count), spacing)


def table_of(
    errors: Float64[np.ndarray, "b j n"], levels: Levels | None = None, owner: Int[np.ndarray, "j"] | None = None
) -> ErrorTable:
    """Errors as l2, with their double and half as l1 and huber; one condition a class unless `owner` says so."""
    images, conditions, count = errors.shape
    owner = np.arange(conditions) if owner is None else owner
    return ErrorTable(
        ids=tuple(f"image {row}" for row in range(images)),
        classes=tuple(range(int(owner.max()) + 1)),
        conditions=tuple(f"prompt {row}" for row in range(conditions)),
        owner=owner,
        levels=toy_levels(count) if levels is None else levels,
        errors=np.stack([errors, 2 * errors, errors / 2], -1),
        decided=np.ones(images, dtype=bool),
        info=INFO,
    )


def draw_errors(
    rng: np.random.Generator,
    images: int,
    signal: Float64[np.ndarray, "n"],
    noise: Float64[np.ndarray, "n"],
    classes: int = 4,
    base: float = 50.0,
) -> tuple[ErrorTable, Int[np.ndarray, "b"]]:
    """Each level's error is `signal` lower for the true class, under noise of its own; what all share is large.

    -log p(class | errors) is then linear in them, with the weights signal / noise^2.
    """
    labels = rng.integers(0, classes, images)
    shared = base + 10 * rng.normal(size=(images, 1, len(signal)))
    errors = shared + noise * rng.normal(size=(images, classes, len(signal)))
    errors[np.arange(images), labels] -= signal
    return table_of(errors), labels
