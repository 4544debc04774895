import dataclasses
import pickle

import pytest
import torch

from repkit.features import Features, all_finite, check_finite, identity_differences, identity_hash


@pytest.fixture
def features():
    maps = {"mid@10": torch.ones(2, 3, 4, 4), "cls": torch.zeros(2, 5, 1, 1)}
    return Features(maps, (32, 32), identity={"seed": 0})


def test_it_is_a_mapping_in_order(features):
    assert list(features) == ["mid@10", "cls"] and len(features) == 2
    assert features["cls"].shape == (2, 5, 1, 1)
    assert dict(features).keys() == {"mid@10", "cls"}
    assert "up.0@10" not in features and features.get("up.0@10") is None


def test_a_missing_key_names_the_ones_there_are(features):
    with pytest.raises(KeyError, match=r"no features 'up.0@10'; have mid@10, cls"):
        features["up.0@10"]


def test_it_is_frozen(features):
    with pytest.raises(dataclasses.FrozenInstanceError):
        features.size = (1, 1)
    with pytest.raises(TypeError):
        features["cls"] = torch.zeros(2, 5, 1, 1)


def test_it_survives_pickling(features):
    copy = pickle.loads(pickle.dumps(features))
    assert copy.identity == {"seed": 0} and torch.equal(copy["mid@10"], features["mid@10"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_with_the_remedy(bad):
    maps = {"mid@10": torch.ones(3, 2, 1, 1), "up.0@10": torch.ones(3, 2, 2, 2)}
    check_finite(maps)
    maps["up.0@10"][1, 0, 1, 1] = bad
    with pytest.raises(
        FloatingPointError, match=r"^up.0@10 is not finite in 1 of 3 images; .*bfloat16 or torch.float32"
    ):
        check_finite(maps)


def test_the_hash_knows_values_and_not_the_order_of_keys():
    one = {"taps": {"mid@10": {"t": 10.0}}, "seed": 0}
    same = {"seed": 0, "taps": {"mid@10": {"t": 10.0}}}
    assert identity_hash(one) == identity_hash(same)
    assert len({identity_hash(one), identity_hash(one | {"seed": 1}), identity_hash({})}) == 3


@pytest.mark.parametrize(
    ("mine", "theirs", "lines"),
    [
        ({"seed": 0}, {"seed": 0}, []),
        ({"seed": 0}, {"seed": 1}, ["seed: 0 here, 1 there"]),
        ({"a": 1}, {"b": 2}, ["a: 1 here, nothing there", "b: nothing here, 2 there"]),
        (
            {"resize": {"size": [32, 32], "policy": "crop"}, "draws": 1},
            {"resize": {"size": [64, 64], "policy": "crop"}, "draws": 1},
            ["resize.size: [32, 32] here, [64, 64] there"],
        ),
        ({"cond": None}, {"cond": {"column": "prompt"}}, ["cond: None here, {'column': 'prompt'} there"]),
    ],
)
def test_differences_are_told_line_by_line(mine, theirs, lines):
    assert identity_differences(mine, theirs) == lines


@pytest.mark.parametrize(
    ("values", "finite"),
    [([3e38] * 9, True), ([], True), ([1.0, float("nan")], False), ([float("inf"), -float("inf")], False)],
)
def test_all_finite_is_not_fooled_by_its_shortcut(values, finite):
    assert all_finite(torch.tensor(values)) is finite
