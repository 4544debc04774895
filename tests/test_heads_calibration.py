"""ECE, Brier, NLL and reliability tables against definitions written out with loops, torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from repkit.heads.calibration import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)


@pytest.fixture
def rows(rng):
    logits = rng.normal(size=(500, 4)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p, rng.integers(0, 4, 500)


@pytest.mark.parametrize("bins", [15, 7])
def test_ece_is_torchmetrics(rows, bins):
    p, labels = rows
    expected = multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(labels), 4, n_bins=bins, norm="l1")
    assert expected_calibration_error(p, labels, bins) == pytest.approx(expected.item(), abs=1e-6)


def test_nll_is_scikit_learns_and_finite_for_sure_mistakes(rows):
    p, labels = rows
    assert negative_log_likelihood(np.log(p), labels) == pytest.approx(log_loss(labels, p, labels=range(4)))
    assert negative_log_likelihood([[0.0, -2000.0]], [1]) == 2000


def test_brier_is_a_sum_over_classes(rows):
    p, labels = rows
    expected = np.mean([sum((p[i, c] - (labels[i] == c)) ** 2 for c in range(4)) for i in range(500)])
    assert brier_score(p, labels) == pytest.approx(expected)
    assert brier_score([[1.0, 0.0]], [1]) == 2 and brier_score([[1.0, 0.0]], [0]) == 0


def test_a_table_by_hand():
    p = [[0.9, 0.1], [0.95, 0.05], [0.4, 0.6], [0.5, 0.5]]
    table = reliability(p, [0, 1, 1, 0], bins=4)
    assert [(one.low, one.high, one.n) for one in table] == [(0, 0.25, 0), (0.25, 0.5, 1), (0.5, 0.75, 1), (0.75, 1, 2)]
    assert [one.accuracy for one in table] == [None, 1, 1, 0.5]
    assert [one.confidence for one in table] == [None, 0.5, 0.6, pytest.approx(0.925)]
    assert expected_calibration_error(p, [0, 1, 1, 0], 4) == pytest.approx((0.5 + 0.4 + 2 * 0.425) / 4)


def test_a_calibrated_posterior_has_no_error(rng):
    p = rng.dirichlet([1, 1, 1], 50_000)
    labels = (rng.random((50_000, 1)) > p.cumsum(1)).sum(1).clip(max=2)
    assert expected_calibration_error(p, labels) < 0.01
    assert expected_calibration_error(p**3 / (p**3).sum(1, keepdims=True), labels) > 0.1


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        ([[0.5, 0.6]], [0], "sum to 1"),
        ([[-0.5, 1.5]], [0], "not logits"),
        ([0.5, 0.5], [0], r"shape \(2,\)"),
        (np.zeros((0, 3)), [], "at least one row"),
        ([[0.5, 0.5]], [0, 1], "2 labels for 1 rows"),
        ([[0.5, 0.5]], [2], r"classes \[2\]"),
    ],
)
def test_bad_rows_are_told(p, labels, message):
    with pytest.raises(ValueError, match=message):
        brier_score(p, labels)
