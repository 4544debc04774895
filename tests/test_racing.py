import numpy as np
import pytest
from scipy.stats import norm

from repkit.zeroshot.racing import Racing, chances_to_win, looks
from repkit.zeroshot.strategies import Uniform, check_budget, visit_order

BUDGET = 64


def drive(strategy, evidence):
    """What a strategy sees of complete evidence [j n], and whether it stopped decided: written without the library."""
    count = len(evidence)
    run, seen = strategy.run(np.arange(count), np.arange(count)), np.full(evidence.shape, np.nan)
    asked = next(run)
    while True:
        for condition in asked[0]:
            for level in asked[1]:
                assert np.isnan(seen[condition, level])  # nothing is evaluated twice
                seen[condition, level] = evidence[condition, level]
        try:
            asked = run.send(seen)
        except StopIteration as stop:
            return seen, stop.value


def random_evidence(rng, classes=10, gap=3.0):
    """Errors whose level and noise change over the strata, as real ones do; classes differ by a random amount."""
    place = (np.arange(BUDGET) + 0.5) / BUDGET
    quality = gap * rng.exponential(size=(classes, 1))
    shared = 100 * place + rng.normal(size=BUDGET)  # the noise all classes have in common
    return shared + quality * (0.5 + place) + rng.normal(size=(classes, BUDGET)) * (0.7 + 0.6 * place)


def leader_of(seen):
    """The class that is left: of those with the most evaluations, the one with the lowest mean."""
    counts = (~np.isnan(seen)).sum(1)
    means = np.array([np.nanmean(row) if count == counts.max() else np.inf for row, count in zip(seen, counts)])  # noqa: B905
    return int(means.argmin())


def test_looks_begin_small_and_end_with_the_budget():
    assert looks(64)[:4] == [8, 9, 10, 11]
    assert looks(64)[-1] == 64
    assert all(a < b for a, b in zip(looks(1000), looks(1000)[1:], strict=False))
    assert looks(3) == [3]


@pytest.mark.parametrize("count", [2, 7, 64, 100])
def test_every_prefix_of_the_visit_order_is_spread_over_the_strata(count):
    order = visit_order(count)
    assert sorted(order) == list(range(count))
    if count == 64:
        for prefix in (2, 4, 8, 16, 32):
            assert sorted(order[:prefix] * prefix // 64) == list(range(prefix))


def test_chances_are_those_of_a_simulation():
    rng, seen, trials, budget = np.random.default_rng(0), 16, 4000, 64
    promised, won = [], []
    for _ in range(trials):
        # a difference of unknown mean: under a flat prior the chance to end below 0 is what is promised
        mean = rng.uniform(-1, 1)
        draws = mean + rng.normal(size=budget)
        evidence = np.stack([np.zeros(budget), draws])
        chance = chances_to_win(evidence[:, :seen], budget)
        leads = draws[:seen].mean() < 0
        promised.append(chance[0] if leads else chance[1])
        won.append((draws.mean() < 0) != leads)
    chances, turned = np.array(promised), np.array(won)
    for low, high in ((0, 0.02), (0.02, 0.1), (0.1, 0.3), (0.3, 0.5)):
        chosen = (chances >= low) & (chances < high)
        error = 3 * np.sqrt(chances[chosen].mean() / chosen.sum())
        assert abs(turned[chosen].mean() - chances[chosen].mean()) < error + 0.01


def test_the_leader_is_certain_and_ties_are_even():
    evidence = np.array([[1.0, 2.0, 1.0, 2.0], [1.5, 2.0, 1.5, 2.5], [1.0, 2.0, 1.0, 2.0]])
    chances = chances_to_win(evidence, 64)
    assert chances[0] == 1
    assert chances[2] == pytest.approx(0.5)
    assert chances[1] < 0.5


@pytest.mark.parametrize("delta", [0.01, 0.1])
def test_answers_differ_from_the_full_budgets_in_less_than_delta_and_cost_less(delta):
    rng = np.random.default_rng(1)
    wrong = decided = used = 0
    for _ in range(600):
        evidence = random_evidence(rng)
        seen, sure = drive(Racing(delta, BUDGET), evidence)
        used += (~np.isnan(seen)).sum()
        decided += sure
        wrong += sure and leader_of(seen) != evidence.mean(1).argmin()
    assert wrong <= delta * 600 + norm.ppf(0.99) * np.sqrt(delta * 600)
    assert used < 600 * 10 * BUDGET / 3
    assert decided > 400


def test_an_undecided_race_ends_with_the_full_budget_of_those_left():
    rng = np.random.default_rng(2)
    evidence = np.concatenate([rng.normal(size=(2, BUDGET)) * 1e-3, 5 + rng.normal(size=(3, BUDGET))])
    evidence[1] = evidence[0][::-1]  # the same mean
    seen, sure = drive(Racing(0.01, BUDGET), evidence)
    assert not sure
    assert (~np.isnan(seen[:2])).all()
    assert (~np.isnan(seen[2:])).sum() == 3 * 8  # gone after the first look


def test_prompts_of_one_class_need_no_decision_between_them():
    rng = np.random.default_rng(3)
    good = rng.normal(size=BUDGET)
    evidence = np.stack([good, good + 1e-6, 9 + rng.normal(size=BUDGET)])
    run = Racing(0.01, BUDGET).run(np.arange(3), np.array([0, 0, 1]))
    seen = np.full(evidence.shape, np.nan)
    asked = next(run)
    with pytest.raises(StopIteration) as stop:
        while True:
            seen[np.ix_(*asked)] = evidence[np.ix_(*asked)]
            asked = run.send(seen)
    assert stop.value.value is True
    assert np.isnan(seen[0]).any()


def test_uniform_asks_for_everything_at_once():
    seen, sure = drive(Uniform(8), np.ones((3, 8)))
    assert sure
    assert not np.isnan(seen).any()


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_a_delta_that_is_no_probability_is_refused(delta):
    with pytest.raises(ValueError, match="delta=.*between 0 and 1"):
        Racing(delta)


@pytest.mark.parametrize("budget", [0, 1])
def test_a_budget_without_comparison_is_refused(budget):
    with pytest.raises(ValueError, match="at least 2"):
        Racing(max_evaluations=budget)
    with pytest.raises(ValueError, match="at least 2"):
        Uniform(budget)


def test_budgets_are_whole_numbers():
    with pytest.raises(ValueError, match="2.5 evaluations a class; give a whole number, at least 2"):
        check_budget(2.5)
