import numpy as np
import pytest
import torch

from repkit.schedule import Schedule
from repkit.zeroshot.errortable import ErrorTable
from repkit.zeroshot.levels import levels_at, strata
from repkit.zeroshot.posterior import Rule, condition_scores, log_posterior, standard_error
from repkit.zeroshot.weightings import weigh
from tests.oracles import exact_eps_errors

VARIANCE = 0.5


def table_of(l2, levels, owner=None):
    """A table whose three losses are multiples of `l2` [b j n]."""
    owner = np.arange(l2.shape[1]) if owner is None else np.array(owner)
    classes, conditions = (
        tuple(f"{what} {k}" for k in range(n)) for what, n in (("c", owner.max() + 1), ("p", len(owner)))
    )
    ids = tuple(str(row) for row in range(len(l2)))
    errors = np.stack([l2, 2 * l2, 3 * l2], axis=-1)
    return ErrorTable(ids, classes, conditions, owner, levels, errors, np.ones(len(l2), dtype=bool))


def rule(levels, classes, **options):
    options = {"weights": weigh("train", levels), "bias": torch.zeros(classes, dtype=torch.float64)} | options
    return Rule(log_prior=torch.full((classes,), 1 / classes, dtype=torch.float64).log(), **options)


def random_table(rng, owner, images=6, count=5):
    levels = levels_at(Schedule.flow(), strata(count))
    return table_of(rng.gamma(3, size=(images, len(owner), count)), levels, owner), levels


@pytest.mark.parametrize("count", [16, 32, 64])
@pytest.mark.parametrize(("weighting", "spacing"), [("train", "native"), ("elbo", "native"), ("elbo", "logsnr")])
def test_intervals_cover_the_exact_difference(weighting, spacing, count):
    rng, repetitions, dims = np.random.default_rng(0), 2000, 8
    levels = levels_at(Schedule.flow(), strata(count), spacing)
    means = np.zeros((2, dims))
    means[1, 0] = VARIANCE**0.5
    x0 = rng.normal(size=(repetitions, dims)) * VARIANCE**0.5
    eps = rng.normal(size=(repetitions, count, dims))
    errors = exact_eps_errors(x0, means, VARIANCE, levels.alpha, levels.sigma, eps) / levels.alpha**2  # of the flow
    found = rule(levels, 2, weights=weigh(weighting, levels)).posterior(table_of(errors, levels))

    gains = levels.sigma / (levels.alpha**2 * VARIANCE + levels.sigma**2)
    distance = ((x0[:, None] - means) ** 2).sum(-1)
    exact = (weigh(weighting, levels) * gains**2).mean() * (distance[:, 1] - distance[:, 0])
    missed = np.abs((found.scores[:, 1] - found.scores[:, 0]).numpy() - exact)
    assert 0.93 <= (missed < 1.96 * found.standard_errors.max(1).values.numpy()).mean() <= 0.97


def test_standard_error_of_equal_noise_is_the_textbook_one(rng):
    noise = rng.normal(size=4000)
    assert standard_error(noise) == pytest.approx(4000**-0.5, rel=0.05)
    trend = 10 * np.linspace(-1, 1, 4000)
    assert standard_error(noise + trend) == pytest.approx(4000**-0.5, rel=0.05)


def test_standard_error_of_next_to_nothing():
    assert standard_error(np.array([])) == standard_error(np.array([1.0])) == np.inf
    assert standard_error(np.full(5, 3.0)) == 0
    # one difference has 2 degrees of freedom at least: 4.303 / 1.960
    assert standard_error(np.array([0.0, 2.0])) == pytest.approx(4.30265 / 1.95996, rel=1e-4)


def test_scores_are_means_and_paired_differences():
    nan = np.nan
    evidence = np.array([[1.0, 3, 5, 7], [2, 2, nan, nan], [nan] * 4, [nan, nan, 9, nan]])
    scores, spread = condition_scores(evidence)
    assert scores.tolist() == [4, 4 + 0, np.inf, 4 + 4]  # given up: the best's score plus the mean paired difference
    assert spread[0] == 0 and spread[2] == spread[3] == np.inf
    assert spread[1] == pytest.approx(standard_error(np.array([1.0, -1.0])))


def test_a_condition_seen_at_a_few_easy_levels_is_not_the_best():
    evidence = np.array([[5.0, 50, 500], [4, 40, 400], [5, np.nan, np.nan]])
    assert condition_scores(evidence)[0].argmin() == 1


def test_bayes_rule_against_numpy(rng):
    scores, prior = rng.normal(size=(7, 4)), np.log([0.1, 0.2, 0.3, 0.4])
    likelihood = np.exp(prior - scores / 0.7)
    expected = np.log(likelihood / likelihood.sum(1, keepdims=True))
    found = log_posterior(torch.from_numpy(scores), torch.from_numpy(prior), 0.7)
    np.testing.assert_allclose(found, expected)


def test_a_class_that_was_never_looked_at_has_probability_zero(rng):
    table, levels = random_table(rng, [0, 1, 2])
    table.errors[:, 1] = np.nan
    found = rule(levels, 3).posterior(table)
    assert (found.probabilities[:, 1] == 0).all() and found.scores[:, 1].isinf().all()
    np.testing.assert_allclose(found.probabilities.sum(1), 1)
    assert found.evaluations.tolist() == [10] * 6


def test_prior_bias_and_temperature_enter_as_in_bayes_rule(rng):
    table, levels = random_table(rng, [0, 1, 2])
    prior, bias = np.array([0.5, 0.3, 0.2]), np.array([0.0, -1.0, 2.0])
    options = {"log_prior": torch.from_numpy(np.log(prior)), "bias": torch.from_numpy(bias), "temperature": 0.4}
    found = Rule(weights=np.arange(1.0, 6), **options).posterior(table)
    scores = (table.errors[..., 0] * np.arange(1, 6)).mean(2)
    joint = prior * np.exp(bias - scores / 0.4)
    np.testing.assert_allclose(found.probabilities, joint / joint.sum(1, keepdims=True))
    np.testing.assert_allclose(found.scores, scores)
    assert found.labels == [f"c {k}" for k in joint.argmax(1)]


@pytest.mark.parametrize(("loss", "column"), [("l2", 0), ("l1", 1), ("huber", 2)])
def test_the_loss_picks_its_column(rng, loss, column):
    table, levels = random_table(rng, [0, 1])
    found = rule(levels, 2, loss=loss).posterior(table)
    np.testing.assert_allclose(found.scores, table.errors[..., column].mean(2))
    assert found.loss == loss


OWNER = [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_prompts_are_mixed_evenly(rng, temperature):
    table, levels = random_table(rng, OWNER)
    found = rule(levels, 3, temperature=temperature).posterior(table)
    likelihood = np.exp(-table.errors[..., 0].mean(2) / temperature)
    classes = np.stack([likelihood[:, :3].mean(1), likelihood[:, 3], likelihood[:, 4:].mean(1)], 1)
    np.testing.assert_allclose(found.probabilities, classes / classes.sum(1, keepdims=True))
    np.testing.assert_allclose(np.exp(-found.scores.numpy() / temperature), classes)


def test_the_best_prompt_speaks_for_its_class(rng):
    table, levels = random_table(rng, OWNER)
    found = rule(levels, 3, mixture="best").posterior(table)
    each = table.errors[..., 0].mean(2)
    best = np.stack([each[:, :3].min(1), each[:, 3], each[:, 4:].min(1)], 1)
    np.testing.assert_allclose(found.scores, best)
    spread = np.stack([condition_scores(errors[..., 0])[1] for errors in table.errors])
    prompt = np.stack([each[:, :3].argmin(1), np.full(6, 3), 4 + each[:, 4:].argmin(1)], 1)
    np.testing.assert_allclose(found.standard_errors, np.take_along_axis(spread, prompt, 1))


def test_top_is_sorted_and_ends_with_the_classes(rng):
    table, levels = random_table(rng, [0, 1, 2])
    found = rule(levels, 3).posterior(table)
    for row, first in enumerate(found.top(2)):
        values = np.sort(found.probabilities[row].numpy())[::-1]
        assert first[0][0] == found.labels[row]
        np.testing.assert_allclose([p for _, p in first], values[:2])
    assert len(found.top(99)[0]) == 3
