"""Features with labels or masks, in batches that are functions of (seed, step): what recipes train heads on."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule

from repkit.recipes.rows import StepRows, evaluation_rows

Batch = dict[str, Any]  # features by tap, label or mask, index (-1: does not count), and in training step
PARTS = ("train", "validation", "test")


class FeatureData(LightningDataModule):
    """Batches of features for training, validation and test.

    Once `setup` was called, `sizes` says the shape [c] or [c h w] of each tap's features, `strides` the image pixels to
    a cell of its maps, and `classes` the names of the classes.
    """

    sizes: Mapping[str, Sequence[int]]
    strides: Mapping[str, int]
    classes: Sequence[str]

    def __init__(self, batch: int, epochs: float, validate_every: float, seed: int) -> None:
        super().__init__()
        if batch < 1 or not epochs > 0 or not validate_every > 0:
            raise ValueError(
                f"batch={batch}, epochs={epochs}, validate_every={validate_every}; give a batch of at least 1, and "
                "epochs above 0"
            )
        self.batch, self.epochs, self.validate_every, self.seed = batch, epochs, validate_every, seed

    @abstractmethod
    def count(self, part: str) -> int:
        """How many samples train, validation or test has."""

    @property
    @abstractmethod
    def tested(self) -> bool:
        """Whether there is a test split."""

    @property
    def steps(self) -> int:
        """Training steps in all epochs."""
        return self.steps_in(self.epochs)

    def steps_in(self, epochs: float) -> int:
        """Training steps in so many epochs, at least one."""
        n = self.count("train")
        return max(1, round(epochs * n / min(n, self.batch)))

    def step_rows(self) -> StepRows:
        """The rows of the steps from the one at which the trainer stands."""
        trainer = self.trainer
        assert trainer is not None
        share = {"rank": trainer.global_rank, "world": trainer.world_size}
        return StepRows(self.count("train"), self.batch, self.seed, first=trainer.global_step, **share)

    def shared_rows(self, part: str) -> list[tuple[int, bool]]:
        """This process's rows of an evaluation, and which of them count."""
        assert self.trainer is not None
        return evaluation_rows(self.count(part), rank=self.trainer.global_rank, world=self.trainer.world_size)

    @property
    def share(self) -> int:
        """The images of a batch on this process."""
        assert self.trainer is not None
        return max(1, self.batch // self.trainer.world_size)


class Lists:
    """Things in lists of `size`, the last one shorter, as often as they are asked for."""

    def __init__(self, things: Sequence[Any], size: int) -> None:
        self.lists = [list(things[start : start + size]) for start in range(0, len(things), size)]

    def __len__(self) -> int:
        return len(self.lists)

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.lists)
