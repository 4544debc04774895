"""Temperatures, biases and their files; fits against scipy's optimisers and closed forms."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from repkit.zeroshot.calibration import Calibration, content_free_offset, fit_calibration, fit_rule, mixed
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.posterior import Rule
from repkit.zeroshot.strategies import Uniform
from tests.error_tables import INFO, table_of
from tests.oracles import class_means, gaussian_backbone, gaussian_images

PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
BIAS = np.array([1.0, -0.5, 0.3, -0.8])


def draw_scores(rng, count=400, temperature=5.0, bias=BIAS):
    """Scores and labels for which log p(c|x) = log prior_c + bias_c - score_c / temperature is true."""
    scores = rng.normal(size=(count, 4)) * 3 * temperature
    logits = PRIOR.numpy() + bias - scores / temperature
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((count, 1)) > p.cumsum(1)).sum(1).clip(max=3)
    return torch.from_numpy(scores), torch.from_numpy(labels)


def penalised(values, scores, labels, ridge):
    logits = PRIOR.numpy() + values[1:] - scores.numpy() * np.exp(values[0])
    logits = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -logits[np.arange(len(labels)), labels].mean() + ridge / 2 * (values[1:] ** 2).sum() / len(labels)


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_temperature_and_bias_are_scipys_optimum(rng, ridge):
    scores, labels = draw_scores(rng)
    temperature, bias = fit_calibration(scores, torch.arange(4), labels, PRIOR, bias=True, ridge=ridge)
    start = np.array([-np.log(4.0), 0, 0, 0, 0])
    expected = minimize(penalised, start, (scores, labels, ridge), method="BFGS", options={"gtol": 1e-8}).x
    assert temperature == pytest.approx(np.exp(-expected[0]), rel=1e-4)
    np.testing.assert_allclose(bias, expected[1:], atol=1e-4)
    assert abs(float(bias.sum())) < 1e-6


def test_the_true_bias_is_found_again(rng):
    scores, labels = draw_scores(rng, 20_000)
    temperature, bias = fit_calibration(scores, torch.arange(4), labels, PRIOR, bias=True)
    assert temperature == pytest.approx(5, rel=0.03)
    np.testing.assert_allclose(bias, BIAS - BIAS.mean(), atol=0.08)


def test_a_strong_ridge_leaves_the_temperature_alone(rng):
    scores, labels = draw_scores(rng)
    plain, none = fit_calibration(scores, torch.arange(4), labels, PRIOR)
    held, bias = fit_calibration(scores, torch.arange(4), labels, PRIOR, bias=True, ridge=1e9)
    assert held == pytest.approx(plain, rel=1e-6) and float(bias.abs().max()) < 1e-6 and not none.any()


def test_fits_are_deterministic(rng):
    scores, labels = draw_scores(rng)
    first, again = (fit_calibration(scores, torch.arange(4), labels, PRIOR, bias=True) for _ in range(2))
    assert first[0] == again[0] and torch.equal(first[1], again[1])


def test_mixtures_are_fitted_as_mixtures(rng):
    """Two prompts a class: the optimum in 1/T of the mixture's own likelihood, by a grid written out in numpy."""
    scores, labels = torch.from_numpy(rng.normal(size=(300, 8)) * 20), torch.from_numpy(rng.integers(0, 4, 300))
    owner = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    scores[torch.arange(300), 2 * labels] -= 25
    found, bias = fit_calibration(scores, owner, labels, PRIOR)
    grid = np.geomspace(0.5, 2, 2001) * found
    pairs = np.exp(-scores.numpy()[None] / grid[:, None, None]).reshape(len(grid), 300, 4, 2).mean(3)
    p = pairs * np.exp(PRIOR.numpy())
    p = p / p.sum(2, keepdims=True)
    assert np.log(p[:, np.arange(300), labels]).mean(1).argmax() in (999, 1000, 1001) and not bias.any()


def test_mixed_is_the_even_mixture(rng):
    logits, owner = rng.normal(size=(5, 4)), torch.tensor([1, 0, 1, 1])
    p = np.exp(logits)
    expected = np.log(np.stack([p[:, 1], p[:, [0, 2, 3]].mean(1)], 1))
    np.testing.assert_allclose(mixed(torch.from_numpy(logits), owner, 2), expected)


def test_content_free_bias_makes_mean_scores_equal(rng):
    scores = torch.from_numpy(rng.normal(size=(50, 4)) + np.array([3.0, -1, 0, 2]))
    corrected = scores - content_free_offset(scores)
    np.testing.assert_allclose(corrected.mean(0), scores.mean(), atol=1e-12)


def test_an_offset_of_the_scores_is_taken_back_without_labels(rng):
    """Errors of class c are 40*c too large; images without content show it, and the posterior is as without it."""
    true, labels = draw_scores(rng, bias=0 * BIAS)
    excess = 40.0 * np.arange(4)
    empty = rng.normal(size=(200, 4)) * 0.01

    def table(scores):
        return table_of(np.repeat(np.asarray(scores)[:, :, None], 3, 2) + 500)

    rule = Rule(np.ones(3), PRIOR, torch.zeros(4, dtype=torch.float64))
    plain, _ = fit_rule(rule, table(true), labels)
    temperature, bias = fit_rule(rule, table(true.numpy() + excess), labels, content_free=table(empty + excess))
    assert temperature == pytest.approx(plain, rel=1e-3)
    np.testing.assert_allclose(bias, (excess - excess.mean()) / temperature, atol=0.01)
    with pytest.raises(ValueError, match="take one of them"):
        fit_rule(rule, table(true), labels, bias=True, content_free=table(empty))


def test_a_table_with_gaps_is_refused(rng):
    errors = rng.normal(size=(10, 4, 3)) + 50
    errors[2, 1, 0] = np.nan
    rule = Rule(np.ones(3), PRIOR, torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="has gaps"):
        fit_rule(rule, table_of(errors), torch.zeros(10, dtype=torch.int64))


MEANS = class_means(4, spread=0.03)


def classifier(**options):
    backbone = gaussian_backbone("flow", MEANS, 0.01)
    return DiffusionClassifier(backbone, range(4), **({"strategy": Uniform(8), "batch_size": 512} | options))


def test_a_classifier_is_fitted_saved_and_read(tmp_path):
    labels = torch.arange(4).repeat(25)
    images = gaussian_images(MEANS, 0.01, labels, seed=1)
    judge = classifier()
    fitted = judge.fit(images, labels, bias=True)
    assert fitted.rule.calibrated and fitted.rule.bias.any() and not judge.rule.bias.any()
    fitted.calibration.save(tmp_path / "calibration.json")
    again = classifier(seed=3).with_calibration(Calibration.load(tmp_path / "calibration.json"))
    assert again.rule.calibrated and again.rule.temperature == fitted.rule.temperature
    assert torch.equal(again.rule.bias, fitted.rule.bias)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"loss": "l1"}, "loss l2, not l1"),
        ({"strategy": Uniform(9)}, "evaluations 8, not 9"),
        ({"classes": [0, 1, 2]}, "classes 0, 1, 2, 3, not 0, 1, 2"),
        ({"weighting": "elbo", "antithetic": True}, "antithetic False, not True; weighting train, not elbo"),
    ]
    for options, message in changes:
        classes = options.pop("classes", range(4))
        other = DiffusionClassifier(judge.backbone, classes, **({"strategy": Uniform(8)} | options))
        with pytest.raises(ValueError, match=message):
            other.with_calibration(fitted.calibration)


def test_a_calibration_of_other_weights_is_refused():
    made = Calibration(2.0, (0.0, 0.0), ("cat", "owl"), {**INFO, "loss": "l2"})
    made.check(("cat", "owl"), {**INFO, "loss": "l2"})
    with pytest.raises(ValueError, match="it was fitted to toy .*fit one for this classifier"):
        made.check(("cat", "owl"), {**INFO, "loss": "l2", "weights_hash": "ff"})


@pytest.mark.parametrize("text", ["", "[]", '{"format": 7}', '{"format": 1, "temperature": 2}'])
def test_other_files_are_no_calibration(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no calibration of format 1"):
        Calibration.load(path)


def test_a_replaced_rule_keeps_what_was_not_fitted():
    judge = classifier(bias=[0.0, 1.0, 0.0, 0.0])
    labels = torch.arange(4).repeat(10)
    table = judge.measure(gaussian_images(MEANS, 0.01, labels, seed=2))
    fitted = judge.calibrated(table, labels)
    assert torch.equal(fitted.rule.bias, judge.rule.bias)
    assert replace(fitted.rule, temperature=1.0).temperature == judge.rule.temperature
