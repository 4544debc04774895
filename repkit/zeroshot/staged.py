"""Staged: elimination by a fixed schedule, as published; so many classes go on after so many evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from repkit.schedule import Schedule
from repkit.zeroshot.levels import Levels, Spacing, levels_at, levels_of_times, strata
from repkit.zeroshot.strategies import Rows, Run, visit_order

PUBLISHED_CODE = "diffusion-classifier"


@dataclass(frozen=True)
class Staged:
    """Elimination by a fixed schedule (Li et al. 2023): after samples[s] times, the best keep[s] classes go on.

    keep: falls to 1. samples: rises; times that were looked at by the end of each stage. trials: noises at each time.
    Stages are nested and each is spread over all times. A class is as good as the best of its prompts.

    compat: "diffusion-classifier" looks at the very times of the published code, on discrete schedules. Its stages are
    not nested, so that classes get more evaluations than `samples` says; prompts are ranked and dropped one by one,
    whatever their class (with mixture="best" the last one has the answer). The noise is repkit's own, each
    (time, trial) with its own, the same for all classes, as there.
    Raises ValueError for other lists, and for times that a schedule does not have.
    """

    keep: Sequence[int]
    samples: Sequence[int]
    compat: str | None = None
    trials: int = 1

    def __post_init__(self) -> None:
        _check_stages(self.keep, self.samples)
        if self.compat not in (None, PUBLISHED_CODE):
            raise ValueError(f"no compat {self.compat!r}; have {PUBLISHED_CODE}, or None")
        if self.trials < 1 or self.evaluations < 2:
            raise ValueError(f"trials={self.trials} at {self.samples[-1]} times; give at least 2 evaluations in all")

    @property
    def evaluations(self) -> int:
        return self.samples[-1] * self.trials

    def levels(self, schedule: Schedule, spacing: Spacing) -> Levels:
        count = self.samples[-1]
        if self.compat is None:
            return levels_at(schedule, np.repeat(strata(count), self.trials), spacing)
        steps = len(schedule.alphas_cumprod)
        if schedule.kind != "discrete" or spacing != "native" or count > steps:
            raise ValueError(
                f"compat={self.compat!r} has {count} steps of a discrete schedule in native spacing; this one is "
                f"{schedule.kind}, of {steps} steps, in {spacing} spacing; leave compat out"
            )
        times = range(steps // count // 2, steps, steps // count)[:count]
        return levels_of_times(schedule, np.repeat(times, self.trials).tolist())

    def run(self, conditions: Rows, owner: Rows) -> Run:
        group = owner if self.compat is None else np.arange(len(owner))
        alive, seen = conditions, np.arange(0)
        for keep, new in zip(self.keep, self._stages(), strict=True):
            if len(new):
                evidence = yield alive, new
            seen = np.sort(np.concatenate([seen, new]))
            alive = _best(alive, evidence[np.ix_(alive, seen)].mean(1), group, keep)
        return True

    def _stages(self) -> list[Rows]:
        """The levels that are new in each stage."""
        count = self.samples[-1]
        if self.compat is None:
            times = np.split(visit_order(count), self.samples[:-1])
        else:
            asked = [np.arange(count)[count // n // 2 :: count // n][:n] for n in self.samples]
            times = [np.setdiff1d(one, np.concatenate([np.arange(0), *asked[:s]])) for s, one in enumerate(asked)]
        return [(one[:, None] * self.trials + np.arange(self.trials)).reshape(-1) for one in times]


def _best(alive: Rows, means: Float64[np.ndarray, "a"], group: Rows, keep: int) -> Rows:
    """The conditions of the `keep` groups whose best condition is best, best group first.

    Ties fall as in torch.topk, which the published code calls, in the order of `alive`.
    """
    own = group[alive]
    groups = list(dict.fromkeys(own.tolist()))
    lowest = torch.tensor([means[own == one].min() for one in groups])
    kept = torch.topk(-lowest, min(keep, len(groups))).indices.tolist()
    return np.concatenate([alive[own == groups[index]] for index in kept])


def _check_stages(keep: Sequence[int], samples: Sequence[int]) -> None:
    if len(keep) != len(samples) or not keep:
        raise ValueError(f"keep={keep} and samples={samples}; give one number a stage in each")
    if keep[-1] != 1 or any(later > earlier for earlier, later in zip(keep, keep[1:], strict=False)):
        raise ValueError(f"keep={keep}; give numbers of classes that fall, the last one 1")
    if samples[0] < 1 or any(later <= earlier for earlier, later in zip(samples, samples[1:], strict=False)):
        raise ValueError(f"samples={samples}; give numbers of evaluations that rise, from 1 on")


@dataclass(frozen=True)
class Setting:
    """How a data set was classified with Stable Diffusion 2.0: classes, schedule, loss, and what a class is called."""

    classes: int
    keep: tuple[int, ...]
    samples: tuple[int, ...]
    loss: str
    template: str

    @property
    def strategy(self) -> Staged:
        """The schedule with the published code's own times."""
        return Staged(self.keep, self.samples, PUBLISHED_CODE)


PUBLISHED: Mapping[str, Setting] = {
    "food101": Setting(101, (20, 10, 5, 1), (20, 50, 100, 500), "l2", "a photo of {}, a type of food."),
    "cifar10": Setting(10, (5, 1), (50, 500), "l1", "a blurry photo of a {}."),
    "aircraft": Setting(100, (20, 10, 5, 1), (20, 50, 100, 500), "l2", "a photo of a {}, a type of aircraft."),
    "pets": Setting(37, (5, 1), (25, 250), "l1", "a photo of a {}, a type of pet."),
    "flowers102": Setting(102, (20, 10, 5, 1), (20, 50, 100, 500), "l1", "a photo of a {}, a type of flower."),
    "stl10": Setting(10, (5, 1), (100, 500), "l1", "a photo of a {}."),
    "imagenet": Setting(1000, (500, 50, 10, 1), (50, 100, 500, 1000), "l2", "a photo of a {}."),
    "objectnet": Setting(113, (25, 10, 5, 1), (50, 100, 500, 1000), "l2", "a photo of a {}."),
}
