"""Heads on the same features: what a seed decides, what the figures are, and few labels."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from repkit.heads.rows import Examples
from repkit.heads.scores import stratified_split
from repkit.heads.trained import Training
from repkit.tasks.ladder import Rung, few_shot_rows, fit_rung

TRAINING = Training(epochs=3, width=8)


@pytest.fixture(scope="module")
def parts():
    """Rows of 3 noisy clusters, to fit and to test on."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 100)
    x = (random.normal(size=(3, 16))[labels] + 1.5 * random.normal(size=(300, 16))).astype(np.float32)
    order = random.permutation(300)
    return Examples(x[order[:200]], labels[order[:200]]), Examples(x[order[200:]], labels[order[200:]])


@pytest.mark.parametrize("shots", [None, 5])
def test_a_rung_is_the_accuracy_of_a_fit_on_the_rows_that_do_not_choose(parts, shots):
    train, test = parts
    rung = fit_rung("ridge", train, test, n_classes=3, shots=shots)
    for seed, found, alpha in zip((0, 1, 2), rung.accuracies, rung.chosen, strict=True):
        fitted, _ = stratified_split(train.labels, 0.2, seed)
        fitted = fitted if shots is None else fitted[few_shot_rows(train.labels[fitted], shots, seed)]
        x, y = train.features[fitted], train.labels[fitted]
        mean, deviation = x.mean(0), x.std(0)
        oracle = Ridge(alpha=alpha).fit((x - mean) / deviation, 2 * np.eye(3)[y] - 1)
        predicted = oracle.predict((test.features - mean) / deviation).argmax(1)
        assert found == pytest.approx((predicted == test.labels).mean())
    assert rung.mean == pytest.approx(np.mean(rung.accuracies))
    assert rung.spread == pytest.approx(np.std(rung.accuracies, ddof=1))


@pytest.mark.parametrize("head", ["ridge", "logistic", "knn", "linear", "bn-linear", "mlp", "attention", "difformer"])
def test_every_head_climbs_and_repeats_itself(parts, head):
    train, test = parts
    if head in ("attention", "difformer"):
        given = [Examples(one.features.reshape(-1, 4, 2, 2), one.labels) for one in parts]
        many = [Examples({"mid@1": one.features, "mid@2": one.features}, one.labels) for one in given]
        train, test = many if head == "difformer" else given
    rungs = [fit_rung(head, train, test, n_classes=3, seeds=(0, 1), training=TRAINING) for _ in range(2)]
    assert rungs[0] == rungs[1]
    assert len(rungs[0].accuracies) == len(rungs[0].chosen) == 2
    assert rungs[0].mean > 0.4


def test_test_rows_never_choose(parts):
    train, test = parts
    shuffled = Examples(test.features, np.random.default_rng(1).permutation(test.labels))
    one, other = (fit_rung("linear", train, part, n_classes=3, training=TRAINING) for part in (test, shuffled))
    assert one.chosen == other.chosen and other.mean < one.mean


def test_the_spread_of_one_seed_is_zero():
    assert Rung("ridge", (0.5,), (1.0,)).spread == 0


def test_few_shots_are_balanced_seeded_and_nested():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    draws = {shots: few_shot_rows(labels, shots, seed=3) for shots in (1, 5, 20)}
    for shots, rows in draws.items():
        assert np.bincount(labels[rows]).tolist() == [shots] * 4
        assert (np.diff(rows) > 0).all()
    assert set(draws[1]) < set(draws[5]) < set(draws[20])
    assert (few_shot_rows(labels, 5, seed=3) == draws[5]).all()
    assert (few_shot_rows(labels, 5, seed=4) != draws[5]).any()


@pytest.mark.parametrize(
    ("shots", "message"), [(0, "shots=0; give at least 1 row"), (4, "class 1 has 3 rows and 4 are asked for")]
)
def test_impossible_shots_are_refused(shots, message):
    with pytest.raises(ValueError, match=message):
        few_shot_rows([0, 0, 0, 0, 1, 1, 1], shots)


def test_unknown_heads_and_no_seeds_are_refused(parts):
    with pytest.raises(ValueError, match="no head 'forest'; have ridge, logistic, knn, linear"):
        fit_rung("forest", *parts, n_classes=3)
    with pytest.raises(ValueError, match="seeds is empty"):
        fit_rung("ridge", *parts, n_classes=3, seeds=())
