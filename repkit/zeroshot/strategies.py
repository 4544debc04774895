"""Strategies: which (class, level) to look at next, given the evidence so far; none of them runs a network.

A strategy is asked for one image at a time: its `run` yields what it wants evaluated and is sent the evidence, so that
the same code decides while a network runs and when errors are replayed from a table.
"""

from collections.abc import Generator
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int

from repkit.schedule import Schedule
from repkit.zeroshot.levels import Levels, Spacing, levels_at, strata

Rows = Int[np.ndarray, "_"]  # numbers of conditions, of levels, or of each condition's class
Evidence = Float64[np.ndarray, "j n"]  # weighted errors; NaN where nothing was evaluated
Run = Generator[tuple[Rows, Rows], Evidence, bool]  # yields (conditions, levels); returns whether it stopped decided


@runtime_checkable
class Strategy(Protocol):
    """evaluations: levels of the grid, the most that a class can get."""

    @property
    def evaluations(self) -> int: ...

    def levels(self, schedule: Schedule, spacing: Spacing) -> Levels:
        """The grid."""

    def run(self, conditions: Rows, owner: Rows) -> Run:
        """Decide between `conditions`; owner[j] is the class of condition j."""


@dataclass(frozen=True)
class Uniform:
    """Every class at every level."""

    evaluations: int = 32

    def __post_init__(self) -> None:
        check_budget(self.evaluations)

    def levels(self, schedule: Schedule, spacing: Spacing) -> Levels:
        return levels_at(schedule, strata(self.evaluations), spacing)

    def run(self, conditions: Rows, owner: Rows) -> Run:
        yield conditions, np.arange(self.evaluations)
        return True


def visit_order(count: int) -> Rows:
    """0 .. count-1 in bit-reversed order: every prefix of a power of two is spread evenly over the strata."""
    bits = max(1, (count - 1).bit_length())
    reverse = [int(f"{index:0{bits}b}"[::-1], 2) for index in range(2**bits)]
    return np.array([index for index in reverse if index < count])


def remaining(conditions: Rows, owner: Rows) -> int:
    """How many classes `conditions` belong to."""
    return len(np.unique(owner[conditions]))


def check_budget(evaluations: int | float) -> None:
    """Raise ValueError for a budget that allows no comparison, or is no whole number."""
    if not isinstance(evaluations, Integral) or evaluations < 2:
        raise ValueError(f"{evaluations} evaluations a class; give a whole number, at least 2")
