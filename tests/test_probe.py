"""Probes of a store: what may choose, what is only measured, and that the numbers are those of the predictions."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import confusion_matrix

from repkit.exporting import export
from repkit.heads.trained import Training, fit_trained
from repkit.store import FeatureStore
from repkit.tasks.probe import HEADS, TRAINED, Splits, probe_features, probe_store, read_labels, split_rows
from tests.export_cases import tiny_extractor, write_image

CLASSES = ["a", "b", "c"]
OF_VECTORS = [head for head in HEADS if head != "attention"]


@pytest.fixture
def data(rng):
    """Two taps for 3 noisy clusters of 60: `near` tells them apart, `far` hardly."""
    labels = np.repeat(np.arange(3), 60)
    centres = rng.normal(size=(3, 5))
    features = {
        "far@1": centres[labels] + 6 * rng.normal(size=(180, 5)),
        "near@1": centres[labels] + 0.9 * rng.normal(size=(180, 5)),
    }
    return features, labels


@pytest.fixture
def splits():
    order = np.random.default_rng(1).permutation(180)
    return Splits(np.sort(order[:100]), np.sort(order[100:130]), np.sort(order[130:]), "made up")


def ridge(x, y, alpha):
    """An independent ridge classifier on standardised features; predicts classes."""
    mean, deviation = x.mean(0), x.std(0)
    fitted = Ridge(alpha=alpha).fit((x - mean) / deviation, 2 * np.eye(3)[y] - 1)
    return lambda other: fitted.predict((other - mean) / deviation).argmax(1)


def test_ridge_is_fitted_on_train_chosen_on_validation_and_refitted_on_both(data, splits):
    features, labels = data
    report = probe_features(features, labels, CLASSES, splits)
    for key, x in features.items():
        candidates = report.chosen.candidates
        fitted = [ridge(x[splits.train], labels[splits.train], alpha) for alpha in candidates]
        scores = [(predict(x[splits.validation]) == labels[splits.validation]).mean() for predict in fitted]
        assert report.validation[key] == pytest.approx(max(scores))
        if key == report.key:
            assert report.chosen.value == max(a for a, s in zip(candidates, scores, strict=True) if s == max(scores))
    assert report.key == "near@1"
    x, both = features["near@1"], np.concatenate([splits.train, splits.validation])
    predicted = ridge(x[both], labels[both], report.chosen.value)(x[splits.test])
    assert report.test == pytest.approx((predicted == labels[splits.test]).mean())
    assert (report.confusion == confusion_matrix(labels[splits.test], predicted)).all()


@pytest.mark.parametrize("head", OF_VECTORS)
def test_test_data_never_chooses(head, data, splits, rng):
    features, labels = data
    report = probe_features(features, labels, CLASSES, splits, head)
    shuffled = labels.copy()
    shuffled[splits.test] = rng.permutation(labels[splits.test])
    noised = {key: x.copy() for key, x in features.items()}
    for x in noised.values():
        x[splits.test] = rng.normal(size=(50, 5))
    for other in (
        probe_features(features, shuffled, CLASSES, splits, head),
        probe_features(noised, labels, CLASSES, splits, head),
    ):
        assert (other.key, other.chosen, other.validation) == (report.key, report.chosen, report.validation)
        assert other.test < report.test


@pytest.mark.parametrize("head", OF_VECTORS)
def test_numbers_of_a_report_agree(head, data, splits):
    features, labels = data
    report = probe_features(features, labels, CLASSES, splits, head)
    counts = np.bincount(labels[splits.test], minlength=3)
    assert report.confusion.sum(1).tolist() == counts.tolist()
    assert report.test == pytest.approx(np.trace(report.confusion) / 50)
    assert [score.n for score in report.per_class] == counts.tolist()
    assert [score.accuracy for score in report.per_class] == pytest.approx(np.diag(report.confusion) / counts)
    low, high = report.interval
    assert low < report.test < high
    told = report.to_json()
    assert told["test_accuracy"] == report.test
    assert told["split"] == {"train": 100, "validation": 30, "test": 50, "source": "made up"}
    assert told["chosen"]["by"] == "validation"
    assert sum(map(sum, told["confusion"])) == 50


def test_progress_is_told_for_each_tap(data, splits):
    features, labels = data
    told: list[tuple[int, int]] = []
    probe_features(features, labels, CLASSES, splits, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_an_unknown_head_is_refused(data, splits):
    with pytest.raises(ValueError, match="no head 'forest'; have ridge, logistic, knn"):
        probe_features(data[0], data[1], CLASSES, splits, "forest")


# --- splits


def check_partition(splits: Splits, rows: set[int]) -> None:
    """The parts are ascending, share no row, and together are `rows`."""
    parts = [splits.train, splits.validation, splits.test]
    assert all((np.diff(part) > 0).all() for part in parts)
    assert sum(map(len, parts)) == len(rows)
    assert set(np.concatenate(parts).tolist()) == rows


def names(**counts: int) -> list[str | None]:
    return [None if name == "none" else name for name, count in counts.items() for _ in range(count)]


def test_a_store_with_all_splits_keeps_them():
    splits = split_rows(np.arange(60) % 3, names(test=10, train=40, val=10))
    check_partition(splits, set(range(60)))
    assert splits.test.tolist() == list(range(10))
    assert splits.validation.tolist() == list(range(50, 60))


@pytest.mark.parametrize("held", ["val", "test"])
def test_one_held_split_is_reported_on_and_train_gives_the_validation(held):
    labels = np.arange(60) % 3
    splits = split_rows(labels, names(train=45, **{held: 15}))
    check_partition(splits, set(range(60)))
    assert splits.test.tolist() == list(range(45, 60))
    assert np.bincount(labels[splits.validation]).tolist() == [3, 3, 3]  # 20 % of 15 each
    assert held in splits.source


def test_no_split_gives_shares_of_each_class():
    labels = np.arange(75) % 3
    splits = split_rows(labels, [None] * 75)
    check_partition(splits, set(range(75)))
    for part, count in ((splits.train, 16), (splits.validation, 4), (splits.test, 5)):
        assert np.bincount(labels[part]).tolist() == [count] * 3
    again, other = split_rows(labels, [None] * 75), split_rows(labels, [None] * 75, seed=1)
    assert (again.test == splits.test).all() and (again.train == splits.train).all()
    assert (other.test != splits.test).any()


def test_rows_without_a_split_are_left_out_beside_rows_with_one():
    splits = split_rows(np.arange(60) % 3, names(train=30, test=15, none=15))
    check_partition(splits, set(range(45)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (names(test=6), "test but no train"),
        (names(val=3, test=3), "test, val but no train"),
        (names(train=6), "neither val nor test"),
    ],
)
def test_splits_that_allow_no_probe_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        split_rows(np.arange(6) % 3, given)


def test_labels_are_numbered_in_alphabetical_order():
    classes, numbers = read_labels(["owl", "cat", "owl"])
    assert classes == ["cat", "owl"]
    assert numbers.tolist() == [1, 0, 1]


def test_missing_labels_are_counted():
    with pytest.raises(ValueError, match="2 of 3 images have no label"):
        read_labels(["cat", None, None])


# --- stores


@pytest.fixture(scope="module")
def extractor():
    return tiny_extractor()


def store_of(folder, out, extractor, **options) -> FeatureStore:
    for seed in range(24):
        write_image(folder / "ab"[seed % 2] / f"{seed:02d}.png", seed)
    return export(folder, extractor, out, **options)


def test_a_store_is_probed_at_the_taps_that_are_asked_for(tmp_path, extractor):
    store = store_of(tmp_path / "images", tmp_path / "out", extractor)
    report = probe_store(store)
    assert set(report.validation) == {"mid@50", "up.0@50"}
    only = probe_store(store, keys=["up.0@50"])
    assert (only.key, set(only.validation)) == ("up.0@50", {"up.0@50"})
    assert only.validation["up.0@50"] == report.validation["up.0@50"]
    assert list(report.classes) == ["a", "b"]
    with pytest.raises(ValueError, match="no features up.1@50 in this store; have mid@50, up.0@50"):
        probe_store(store, keys=["up.1@50"])


def test_maps_are_not_probed(tmp_path, extractor):
    store = store_of(tmp_path / "images", tmp_path / "out", extractor, pool="none")
    with pytest.raises(ValueError, match="mid@50 is stored as maps .* --pool"):
        probe_store(store)


# --- trained heads


@pytest.mark.parametrize("head", TRAINED)
@pytest.mark.parametrize("pool", ["none", "2x2", "mean"])
def test_trained_heads_read_what_they_can(tmp_path, extractor, head, pool):
    store = store_of(tmp_path / "images", tmp_path / "out", extractor, pool=pool)
    settings = {"head": head, "lrs": [0.01], "training": Training(epochs=2, width=8)}
    if head == "attention" and pool == "mean":
        with pytest.raises(ValueError, match="attention needs maps, and mid@50 is pooled by mean; export with --pool"):
            probe_store(store, **settings)
        return
    report = probe_store(store, **settings)
    key, rows = report.key, report.splits.test
    shape = tuple(store.taps[key]["shape"])
    shape = (shape[0] // 4, 2, 2) if head == "attention" and pool == "2x2" else shape
    predicted = report.probe.predict(store.array(key).reshape(-1, *shape)[rows])
    labels = [report.classes.index(label) for label in store.table["label"].to_pylist()]
    assert report.test == pytest.approx((predicted == np.array(labels)[rows]).mean())


def test_a_trained_probe_is_refitted_on_both_at_the_chosen_rate(data, splits):
    features, labels = data
    training = Training(epochs=3)
    report = probe_features(features, labels, CLASSES, splits, "linear", lrs=[1e-6, 0.1], training=training)
    assert (report.key, report.chosen.value, report.chosen.by) == ("near@1", 0.1, "validation")
    both = np.concatenate([splits.train, splits.validation])
    x = features["near@1"]
    expected = fit_trained("linear", x[both], labels[both], lrs=[0.1], training=training)
    np.testing.assert_array_equal(report.probe.logits(x), expected.logits(x))


def test_progress_of_training_is_told_for_each_epoch(data, splits):
    features, labels = data
    told: list[tuple[int, int]] = []
    training = Training(epochs=2)
    probe_features(features, labels, CLASSES, splits, "mlp", lambda *counts: told.append(counts), training=training)
    assert list(dict.fromkeys(told)) == [(done, 6) for done in range(7)]  # two taps, and the refit


def test_rates_are_for_trained_heads(tmp_path, extractor):
    store = store_of(tmp_path / "images", tmp_path / "out", extractor)
    with pytest.raises(ValueError, match="ridge is solved, not trained; .* are for linear, bn-linear, mlp, attention"):
        probe_store(store, lrs=[0.1])
    with pytest.raises(ValueError, match="no head 'difformer'; have ridge"):
        probe_store(store, head="difformer")
