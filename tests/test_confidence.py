"""Doubt from finitely many noises, against brute-force simulation."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from repkit.zeroshot.confidence import marginal_log_posterior, top_probability
from repkit.zeroshot.posterior import Posterior, Rule
from tests.error_tables import table_of

DRAWS = 100_000


def posterior_of(log_posterior, errors, temperature=1.0):
    count = len(log_posterior)
    return Posterior(
        log_posterior=log_posterior,
        scores=-log_posterior * temperature,
        standard_errors=errors * temperature,
        evaluations=torch.full((count,), 8),
        decided=torch.ones(count, dtype=torch.bool),
        classes=tuple(range(log_posterior.shape[1])),
        calibrated=True,
        weighting="train",
        temperature=temperature,
    )


LOGITS = torch.tensor([[0.0, -1.0, -2.0, -5.0], [-0.5, 0.0, -0.1, -0.2], [-30.0, 0.0, -20.0, -9.0]]).double()
SPREAD = torch.tensor([[0.0, 1.0, 0.5, 2.0], [0.7, 0.0, 0.6, 0.5], [1.0, 0.0, 1.0, 1.0]]).double()


def simulated(rng, own):
    """How often each row's top class stays on top when class c's log-likelihood has independent noise own[c]."""
    noisy = LOGITS.numpy() + own * rng.normal(size=(DRAWS, 3, 4))
    return (noisy.argmax(2) == LOGITS.argmax(1).numpy()).mean(0)


def paired(own):
    """Standard errors of the differences to the top class, where class c has independent noise own[c]."""
    top = LOGITS.argmax(1, keepdim=True).numpy()
    spread = np.sqrt(own**2 + np.take_along_axis(own, top, 1) ** 2)
    np.put_along_axis(spread, top, 0.0, 1)
    return torch.from_numpy(spread)


@pytest.mark.parametrize("size", [0.2, 0.7, 3.0])
def test_equal_noises_are_exact(rng, size):
    own = np.full((3, 4), size)
    np.testing.assert_allclose(top_probability(LOGITS, paired(own)), simulated(rng, own), atol=0.005)


def test_unequal_noises_are_near(rng):
    own = np.array([[0.8, 0.5, 0.9, 0.4], [0.5, 0.6, 0.8, 0.4], [1.0, 0.7, 2.0, 1.5]])
    np.testing.assert_allclose(top_probability(LOGITS, paired(own)), simulated(rng, own), atol=0.06)


def test_two_classes_are_a_normal_probability():
    logits, spread = torch.tensor([[[0.0, -1.3]], [[0.0, 0.9]]], dtype=torch.float64)
    found = top_probability(logits, spread)
    assert found.item() == pytest.approx(NormalDist().cdf(1.3 / 0.9), abs=1e-9)


def test_no_doubt_and_no_knowledge():
    told = torch.tensor([[0.0, -1.0, -torch.inf]]).double()
    assert top_probability(told, torch.zeros(1, 3).double()).item() == pytest.approx(1)
    half = pytest.approx(0.5)
    assert top_probability(told, torch.tensor([[0.0, torch.inf, torch.inf]]).double()).item() == half
    assert top_probability(torch.zeros(1, 2).double(), torch.zeros(1, 2).double()).item() == half


def test_a_class_that_its_prior_puts_on_top_has_its_own_error_too():
    """Class 1 has the best score, so class 0's error is that of their difference, whichever of them is on top."""
    errors = torch.tensor([[1.0, 0.0]]).double()
    for logits in ([0.0, -1.0], [-1.0, 0.0]):
        found = top_probability(torch.tensor([logits]).double(), errors)
        assert found.item() == pytest.approx(torch.special.ndtr(torch.tensor(1.0)).item(), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_the_marginal_posterior_is_the_mean_over_the_noise(rng, temperature):
    found = marginal_log_posterior(posterior_of(torch.log_softmax(LOGITS, 1), SPREAD, temperature)).exp()
    noise = (rng.normal(size=(DRAWS, 3, 4)) + rng.normal(size=(DRAWS, 3, 1))) / 2**0.5  # correlation 1/2
    noisy = np.exp(LOGITS.numpy() + SPREAD.numpy() * noise)
    np.testing.assert_allclose(found, (noisy / noisy.sum(2, keepdims=True)).mean(0), atol=0.01)
    np.testing.assert_allclose(found.sum(1), 1)
    assert found[0].max() < torch.softmax(LOGITS, 1)[0].max()


def test_without_noise_the_marginal_posterior_is_the_posterior():
    posterior = posterior_of(torch.log_softmax(LOGITS, 1), torch.zeros_like(SPREAD))
    torch.testing.assert_close(marginal_log_posterior(posterior), posterior.log_posterior)


def test_confidence_is_how_often_the_top_class_is_the_true_one(rng):
    """Of measurements of all kinds of true scores, as many have the truly best class on top as is said."""
    means = 50 + 2 * rng.normal(size=(3000, 4))
    errors = means[:, :, None] + 1.5 * rng.normal(size=(3000, 4, 16))
    rule = Rule(np.ones(16), torch.zeros(4).double(), torch.zeros(4).double(), temperature=0.3)
    posterior = rule.posterior(table_of(errors))
    right = posterior.log_posterior.argmax(1).numpy() == means.argmin(1)
    said = posterior.confidence.numpy()
    assert said.mean() == pytest.approx(right.mean(), abs=0.02)
    for low, high in ((0.4, 0.7), (0.7, 0.9), (0.9, 1.01)):
        rows = (said > low) & (said <= high)
        assert said[rows].mean() == pytest.approx(right[rows].mean(), abs=0.06)
    few = Rule(np.ones(4), rule.log_prior, rule.bias, temperature=0.3).posterior(table_of(errors[:, :, :4]))
    assert few.confidence.mean() < said.mean() - 0.02
