"""Which rows a step or an evaluation sees on each process: functions of (seed, step) and of the row's number."""

from collections.abc import Iterator
from itertools import count

from repkit.heads.training import sample_order


class StepRows:
    """The (step, row) pairs of each training step from `first` on, this process's share of them.

    Every `batch` rows of all processes together are a step's, and each row comes once an epoch. Raises ValueError
    where the processes would get unequal shares: their gradients are averaged with equal weights.
    """

    def __init__(self, n: int, batch: int, seed: int, *, first: int = 0, rank: int = 0, world: int = 1) -> None:
        if min(n, batch) % world:
            raise ValueError(f"a step of {min(n, batch)} images does not divide among {world} processes; change batch")
        self.order, self.first, self.rank, self.world = sample_order(n, batch, seed), first, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in count(self.first):
            yield [(step, int(row)) for row in self.order(step)[self.rank :: self.world]]


def evaluation_rows(n: int, *, rank: int = 0, world: int = 1) -> list[tuple[int, bool]]:
    """This process's rows of an evaluation, each with whether it counts.

    All processes get as many, since they wait for each other; rows that only fill up do not count.
    """
    rows = [(row, True) for row in range(rank, n, world)]
    return rows + [(0, False)] * (-(-n // world) - len(rows))
