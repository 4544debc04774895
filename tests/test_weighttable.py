"""Whitened and learned weights against their definitions, and against the best weights of a toy."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from repkit.zeroshot.learning import learn
from repkit.zeroshot.weighttable import WeightTable, whiten, with_temperature
from tests.error_tables import INFO, draw_errors, table_of, toy_levels

COUNT = 16
NOISE = np.linspace(1, 6, COUNT)
SIGNAL = np.linspace(1, 0.5, COUNT)  # so little that a third of the labels stay in doubt


@pytest.fixture
def toy(rng):
    return draw_errors(rng, 300, SIGNAL, NOISE)


def accuracy(table, labels, weights):
    return ((table.errors[..., 0] @ weights).argmin(1) == labels).mean()


def test_whitened_weights_are_one_over_the_deviation_of_all_paired_differences(toy):
    table, _ = toy
    errors = table.errors[..., 0]
    pairs = np.stack([errors[:, a] - errors[:, b] for a, b in combinations(range(errors.shape[1]), 2)], 1)
    both = np.concatenate([pairs, -pairs], 1)  # a difference has no sign of its own
    expected = 1 / both.std((0, 1))
    made = whiten(table)
    np.testing.assert_allclose(made.weights, expected / expected.mean(), rtol=1e-5)
    assert (made.name, made.loss, made.temperature) == ("whitened", "l2", None)
    np.testing.assert_array_equal(made.t, table.levels.t)


@pytest.mark.parametrize(("loss", "scale"), [("l1", 2), ("huber", 0.5)])
def test_other_losses_have_weights_and_temperatures_of_their_own(toy, loss, scale):
    table, labels = toy
    squared, other = whiten(table, labels), whiten(table, labels, loss=loss)
    assert other.loss == loss and squared.temperature is not None
    np.testing.assert_allclose(other.weights, squared.weights, rtol=1e-5)
    assert other.temperature == pytest.approx(scale * squared.temperature, rel=1e-6)


def test_times_visited_twice_have_one_weight(rng):
    errors = rng.normal(size=(50, 3, 4)) * np.array([1, 2, 3, 4]) + 20
    levels = toy_levels(4)
    levels = replace(levels, t=levels.t[[0, 1, 1, 3]])
    made = whiten(table_of(errors, levels))
    differences = errors - errors.mean(1, keepdims=True)
    pooled = np.sqrt((differences[..., 1:3] ** 2).mean())
    assert len(made.t) == 3
    assert made.weights[0] / made.weights[1] == pytest.approx(
        pooled / np.sqrt((differences[..., 0] ** 2).mean()), rel=1e-4
    )


def test_shifted_levels_get_the_weight_of_their_time(rng):
    """On any spacing, w * density / deviation is what counts at a level; the table keeps what belongs to the time."""
    levels = toy_levels(8, "shifted", shift=3.0)
    assert np.ptp(levels.density) > 0.5
    table = table_of(rng.normal(size=(400, 3, 8)) * (1 + levels.t / 1000) + 20, levels)
    made = whiten(table)
    errors = table.errors[..., 0]
    deviation = (errors - errors.mean(1, keepdims=True)).std((0, 1))
    used = made.at(levels) / levels.density * deviation
    np.testing.assert_allclose(used, used[0], rtol=1e-5)


def test_weights_between_times_are_log_linear_and_constant_beyond():
    made = WeightTable("learned", "l2", (250.0, 750.0), (4.0, 1.0), classes=("0", "1"), evaluations=4, **INFO)
    levels = toy_levels(4)  # 125, 375, 625, 875
    np.testing.assert_allclose(made.at(levels), [4, 4**0.75, 4**0.25, 1])


def test_a_level_without_differences_is_told():
    errors = np.full((3, 2, 4), 5.0)
    errors[:, 1, 1:] += 1
    with pytest.raises(ValueError, match="the same error at t=125"):
        whiten(table_of(errors))


def test_temperature_of_a_table_is_the_likeliest(toy):
    table, labels = toy
    made = with_temperature(whiten(table), table, labels)
    scores = torch.from_numpy(table.errors[..., 0] @ made.at(table.levels) / COUNT)
    grid = np.geomspace(0.5, 2, 401) * made.temperature
    losses = [torch.nn.functional.cross_entropy(-scores / t, torch.from_numpy(labels)).item() for t in grid]
    assert np.argmin(losses) == 200


def test_learned_weights_reach_the_best_ones(rng):
    """Where noise differs between levels, the best weights are signal / noise^2, and whitening goes half the way."""
    table, labels = draw_errors(rng, 1000, SIGNAL, NOISE)
    fresh, answers = draw_errors(rng, 4000, SIGNAL, NOISE)
    best = SIGNAL / NOISE**2
    learned, white = (made.at(table.levels) for made in (learn(table, labels, knots=6), whiten(table)))
    found = {
        name: accuracy(fresh, answers, one) for name, one in [("learned", learned), ("white", white), ("best", best)]
    }
    assert found["best"] - 0.015 <= found["learned"] <= found["best"] + 0.01
    assert found["learned"] > found["white"] + 0.02 > accuracy(fresh, answers, np.ones(COUNT)) + 0.04
    falls = [np.log(one[0] / one[-1]) for one in (white, learned, best)]
    assert falls[1] > falls[0] + 1 and abs(falls[1] - falls[2]) < 1


def test_learned_weights_carry_the_temperature_of_the_posterior(rng):
    """-log p = sum of signal/noise^2 * error: the mean over levels of that, with temperature, has to be it again."""
    table, labels = draw_errors(rng, 1500, SIGNAL, NOISE)
    made = learn(table, labels, knots=6, strength=1.0)
    found = made.at(table.levels).mean() / COUNT / made.temperature
    assert found == pytest.approx((SIGNAL / NOISE**2).mean(), rel=0.15)
    again = with_temperature(made, table, labels)
    assert again.temperature == pytest.approx(made.temperature, rel=1e-3)


def test_a_strong_penalty_leaves_the_whitened_weights(toy):
    table, labels = toy
    held, white = learn(table, labels, strength=1e6), whiten(table, labels)
    np.testing.assert_allclose(held.at(table.levels), white.at(table.levels), rtol=0.02)
    assert held.temperature == pytest.approx(white.temperature, rel=0.02)


def test_few_images_do_not_overfit(rng):
    table, labels = draw_errors(rng, 40, SIGNAL, NOISE)
    fresh, answers = draw_errors(rng, 2000, SIGNAL, NOISE)
    chosen, white, free = (
        made.at(table.levels) for made in (learn(table, labels), whiten(table), learn(table, labels, strength=0.0))
    )
    assert accuracy(fresh, answers, chosen) >= accuracy(fresh, answers, white) - 0.02
    assert accuracy(fresh, answers, chosen) > accuracy(fresh, answers, free) + 0.01


def test_learning_is_deterministic_and_invariant_to_what_classes_share(toy, rng):
    table, labels = toy
    first = learn(table, labels, strength=1.0)
    assert learn(table, labels, strength=1.0) == first
    shifted = table_of(table.errors[..., 0] + rng.normal(size=(300, 1, COUNT)))
    np.testing.assert_allclose(learn(shifted, labels, strength=1.0).weights, first.weights, rtol=1e-3)


def test_several_prompts_of_a_class_are_learned_as_their_mixture(toy):
    """A second prompt that never explains anything halves each class's likelihood, and changes no weight."""
    table, labels = toy
    alone = learn(table, labels, strength=1.0)
    useless = table.errors[..., 0].max() + 1e4
    errors = np.concatenate([table.errors[..., 0], np.full((300, 4, COUNT), useless)], 1)
    both = learn(table_of(errors, owner=np.tile(np.arange(4), 2)), labels, strength=0.0)
    free = learn(table, labels, strength=0.0)
    np.testing.assert_allclose(np.log(both.weights), np.log(free.weights), atol=0.3)
    assert alone.name == both.name == "learned"


def test_saved_tables_come_back(toy, tmp_path):
    made = whiten(*toy)
    assert (made.classes, made.evaluations) == (("0", "1", "2", "3"), COUNT)
    assert made.made_from.endswith("; temperature by 300 labelled images")
    assert "temperature" not in whiten(toy[0]).made_from
    made.save(tmp_path / "weights.json")
    assert WeightTable.load(tmp_path / "weights.json") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "no JSON"),
        ({"format": 1}, "no table of weights of format 2"),
        ({"format": 2, "name": "learned"}, "lacks or has too much: .*weights"),
        (
            {
                "format": 2,
                **dict.fromkeys("name loss t weights classes evaluations temperature made_from".split()),
                **INFO,
                "x": 1,
            },
            "much: x",
        ),
    ],
)
def test_other_files_are_told(tmp_path, change, message):
    path = tmp_path / "weights.json"
    path.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(ValueError, match=message):
        WeightTable.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature 0, where a positive number"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": "1"}, "temperature '1'"),
        ({"weights": [1.0, 0.0]}, "weights that are not positive"),
        ({"weights": [1.0]}, "not as many finite numbers"),
        ({"weights": [1.0, float("nan")]}, "not as many finite numbers"),
        ({"t": [250.0, 250.0]}, "times that do not ascend"),
        ({"t": [], "weights": []}, "not as many"),
        ({"classes": "cat"}, "classes that are no list of texts"),
        ({"classes": [1, 2]}, "classes that are no list of texts"),
        ({"evaluations": None}, "evaluations None, where a whole number"),
        ({"loss": "l3"}, "a loss that is none of l2, l1, huber"),
    ],
)
def test_wrong_values_are_told_with_the_file(tmp_path, change, message):
    path = tmp_path / "weights.json"
    WeightTable("learned", "l2", (250.0, 750.0), (4.0, 1.0), classes=("0", "1"), evaluations=4, **INFO).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"weights.json, a table of weights, has .*{message}"):
        WeightTable.load(path)


def test_gaps_and_lengths_are_told(toy):
    table, labels = toy
    with pytest.raises(ValueError, match="no loss 'l3'"):
        whiten(table, loss="l3")
    holes = table.errors.copy()
    holes[0, 0, 0] = np.nan
    for fit in (whiten, learn):
        with pytest.raises(ValueError, match="has gaps"):
            fit(replace(table, errors=holes), labels)
    with pytest.raises(ValueError, match="299 labels for 300 images"):
        learn(table, labels[1:])


def test_a_table_is_for_one_model(toy):
    made = whiten(toy[0])
    made.check_model(INFO)
    made.check_model(INFO | {"dtype": "bfloat16", "weights_hash": "cd" * 32})  # hashes of two dtypes say nothing
    with pytest.raises(
        ValueError, match=r"whitened table: it was fitted to toy \(float32, weights abab.* take 'train'"
    ):
        made.check_model(INFO | {"weights_hash": "cd" * 32})
    with pytest.raises(ValueError, match="this is other"):
        made.check_model(INFO | {"dtype": "bfloat16", "model": "other"})
