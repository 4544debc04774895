"""Racing: looks at all classes a little, and goes on with those that could still turn out to be the best."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64
from scipy.special import stdtr

from repkit.schedule import Schedule
from repkit.zeroshot.levels import Levels, Spacing, levels_at, strata
from repkit.zeroshot.strategies import Rows, Run, check_budget, remaining, visit_order

FIRST, GROWTH = 8, 1.1  # evaluations a class at the first look; each later look has about a tenth more
POOLED = 8.0  # degrees of freedom, at most, that the variance of all classes counts for in each class's own
DEGREES = 2 / 3  # of freedom that a successive difference brings: neighbours share an evaluation


@dataclass(frozen=True)
class Racing:
    """Nested looks at more and more of the strata; a class is given up when it would hardly win at full budget.

    The first look is at 8 evaluations a class: a max_evaluations of no more saves nothing.
    delta: bound on the probability that the answer differs from that of the full budget, max_evaluations for every
    class. Each class given up spends the chance it had left; what remains is shared by those still in the race, so
    that the bound holds over all classes and looks (to the extent that the differences are Student's).
    """

    delta: float = 0.01
    max_evaluations: int = 64

    def __post_init__(self) -> None:
        check_budget(self.max_evaluations)
        if not 0 < self.delta < 1:
            raise ValueError(f"delta={self.delta}; give a probability between 0 and 1")

    @property
    def evaluations(self) -> int:
        return self.max_evaluations

    def levels(self, schedule: Schedule, spacing: Spacing) -> Levels:
        return levels_at(schedule, strata(self.max_evaluations), spacing)

    def run(self, conditions: Rows, owner: Rows) -> Run:
        order, alive, before, left = visit_order(self.max_evaluations), conditions, 0, self.delta
        for look in looks(self.max_evaluations):
            evidence = yield alive, order[before:look]
            before = look
            if look < self.max_evaluations:
                chances = chances_to_win(evidence[alive][:, np.sort(order[:look])], self.max_evaluations)
                kept = _affordable(chances, left)
                left, alive = left - chances[~kept].sum(), alive[kept]
            if remaining(alive, owner) == 1:
                return True
        return False


def looks(budget: int) -> list[int]:
    """How many evaluations a class has had at each look; the last is the budget."""
    found = [min(FIRST, budget)]
    while found[-1] < budget:
        found.append(min(budget, max(found[-1] + 1, round(found[-1] * GROWTH))))
    return found


def chances_to_win(evidence: Float64[np.ndarray, "a m"], budget: int) -> Float64[np.ndarray, "a"]:
    """Probability that each condition beats the present leader once the budget is spent; 1 for the leader.

    evidence: at m of `budget` strata, in their order. The mean of a difference over the strata still to come is Student
    distributed around the mean so far. Variances come from successive differences, in which the trend over the strata
    hardly enters, each condition's own shrunk towards that of all; noise that changes over the strata costs degrees of
    freedom.
    """
    conditions, count = evidence.shape
    if conditions == 1:
        return np.ones(1)
    leader = evidence.mean(1).argmin()
    differences = evidence - evidence[leader]
    own = (np.diff(differences) ** 2).mean(1) / 2
    squares = np.diff(evidence - evidence.mean(0)) ** 2 / 2  # without the noise that all conditions share
    each = DEGREES * (count - 1) * _evenness(squares.mean(0), conditions - 1)
    freedom = min(POOLED, (conditions - 1) * each)
    pooled = 2 * squares.mean() * conditions / (conditions - 1)  # a difference has the variance of two
    variance = (freedom * pooled + each * own) / (freedom + each) * (1 / count - 1 / budget)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = differences.mean(1) / np.sqrt(variance)
    chances = stdtr(freedom + each, -np.nan_to_num(distance, nan=0.0))
    return np.where(np.arange(conditions) == leader, 1.0, chances)


def _evenness(variances: Float64[np.ndarray, "m"], freedom: int) -> float:
    """The share of the degrees of freedom that is left where variances differ (Satterthwaite 1946).

    freedom: of each of the variances, which differ by chance as well.
    """
    total = (variances**2).mean()
    return min(1.0, float(variances.mean() ** 2 / total * (1 + 2 / freedom))) if total > 0 else 1.0


def _affordable(chances: Float64[np.ndarray, "a"], left: float) -> Bool[np.ndarray, "a"]:
    """Which conditions stay: the least likely go, each as long as its share of what is left covers its chance."""
    kept = np.ones(len(chances), dtype=bool)
    for row in np.argsort(chances, kind="stable")[: len(chances) - 1]:
        if chances[row] > left / (kept.sum() - 1):
            break
        kept[row], left = False, left - chances[row]
    return kept
