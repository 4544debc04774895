import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_blobs
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import confusion_matrix
from sklearn.preprocessing import StandardScaler

from repkit.heads.knn import fit_knn
from repkit.heads.logistic import fit_logistic
from repkit.heads.ridge import RidgeGram, fit_ridge
from repkit.heads.scores import accuracy, confusion, per_class, stratified_split, wilson_interval

FITS = [fit_ridge, fit_logistic, fit_knn]


def blobs(n, d, k=3, seed=0, spread=4.0, shift=0.0):
    x, y = make_blobs(n, d, centers=k, cluster_std=spread, random_state=seed)
    return x + shift, y


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32)
    rest, test = stratified_split(y, 0.3, seed=0)
    train, val = stratified_split(y[rest], 0.2, seed=1)
    rows = {"train": rest[train], "val": rest[val], "test": test}
    return {name: (x[i], y[i]) for name, i in rows.items()}


def scaled(x):
    return StandardScaler().fit_transform(x)


# ridge


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 10.0, 1e4])
@pytest.mark.parametrize("n, d", [(60, 7), (20, 50), (30, 30)])
def test_ridge_is_sklearns_solution(n, d, alpha):
    x, y = blobs(n, d, shift=3.0)
    probe = fit_ridge(x, y, alphas=[alpha], standardize=False)
    oracle = Ridge(alpha=alpha, solver="svd").fit(x, 2.0 * np.eye(3)[y] - 1)
    np.testing.assert_allclose(probe.weight, oracle.coef_.T, atol=1e-6)
    np.testing.assert_allclose(probe.bias, oracle.intercept_, atol=1e-6)
    classifier = RidgeClassifier(alpha=alpha).fit(x, y)
    np.testing.assert_allclose(probe.logits(x), classifier.decision_function(x), atol=1e-6)
    np.testing.assert_array_equal(probe.predict(x), classifier.predict(x))


@pytest.mark.parametrize("n, d", [(60, 7), (20, 50)])
def test_standardised_ridge_is_sklearns_on_scaled_features(n, d):
    x, y = blobs(n, d, shift=3.0)
    x[:, 1] = 0.1  # constant
    probe = fit_ridge(x, y, alphas=[2.0])
    oracle = Ridge(alpha=2.0, solver="svd").fit(scaled(x), 2.0 * np.eye(3)[y] - 1)
    np.testing.assert_allclose(probe.logits(x), oracle.predict(scaled(x)), atol=1e-6)


@pytest.mark.parametrize("n, d", [(40, 5), (40, 60)])
@pytest.mark.parametrize("k", [2, 4])
def test_leave_one_out_equals_n_refits(n, d, k):
    x, y = blobs(n, d, k, spread=12.0, shift=5.0)
    alphas = [1e-3, 1.0, 30.0, 1e3]
    scores = []
    for alpha in alphas:
        hits = 0
        for i in range(n):
            keep = np.arange(n) != i
            oracle = Ridge(alpha=alpha, solver="svd").fit(x[keep], 2.0 * np.eye(k)[y[keep]] - 1)
            hits += oracle.predict(x[i : i + 1]).argmax() == y[i]
        scores.append(hits / n)
    probe = fit_ridge(x, y, alphas=alphas, standardize=False)
    assert probe.chosen.by == "leave-one-out"
    assert probe.chosen.scores == pytest.approx(scores)
    assert len(set(scores)) > 1, "the case must tell the alphas apart"
    assert probe.alpha == max(a for a, s in zip(alphas, scores, strict=True) if s == max(scores))


def test_leave_one_out_of_an_exactly_separable_pair():
    # Closed form in one dimension: without either of two rows the other one's constant is all that is left to predict.
    probe = fit_ridge([[0.0], [1.0]], [0, 1], alphas=[1.0], standardize=False)
    assert probe.chosen.scores == (0.0,)


@pytest.mark.parametrize("cuts", [[1], [10, 11, 40], [59], list(range(1, 60))])
def test_gram_does_not_depend_on_the_batches(cuts):
    x, y = blobs(60, 7, shift=1e3)
    val = blobs(40, 7, seed=0, shift=1e3)
    whole, parts = RidgeGram(7, 3), RidgeGram(7, 3)
    whole.update(x, y)
    for rows in np.split(np.arange(60), cuts):
        parts.update(x[rows], y[rows])
    a, b, c = whole.fit(val), parts.fit(val), fit_ridge(x, y, validation=val)
    assert a.chosen == b.chosen == c.chosen
    np.testing.assert_allclose(b.weight, a.weight, atol=1e-9)
    np.testing.assert_allclose(b.bias, a.bias, rtol=1e-9)
    np.testing.assert_allclose(c.weight, a.weight, atol=1e-12)


def test_merged_grams_are_one_gram():
    x, y = blobs(60, 7, shift=1e3)
    whole, left, right = (RidgeGram(7, 3) for _ in range(3))
    whole.update(x, y)
    left.update(x[:13], y[:13])
    right.update(x[13:], y[13:])
    left.merge(right)
    left.merge(RidgeGram(7, 3))
    assert left.n == 60
    np.testing.assert_allclose(left.gram, whole.gram, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(left.cross, whole.cross, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(left.mean, x.mean(0))


@pytest.mark.parametrize("standardize", [True, False])
def test_kernel_form_equals_primal(standardize):
    x, y = blobs(25, 80, shift=2.0)
    val = blobs(50, 80, seed=0, shift=2.0)
    gram = RidgeGram(80, 3)
    gram.update(x, y)
    primal = gram.fit(val, standardize=standardize)  # always decomposes d x d
    kernel = fit_ridge(x, y, validation=val, standardize=standardize)
    assert kernel.chosen == primal.chosen
    np.testing.assert_allclose(kernel.weight, primal.weight, atol=1e-8)
    np.testing.assert_allclose(kernel.bias, primal.bias, atol=1e-8)


@pytest.mark.parametrize("standardize", [True, False])
def test_many_more_features_than_rows(standardize):
    x, y = blobs(30, 3000)
    x = np.concatenate([x, x[:5]])  # repeated rows: a rank-deficient kernel
    y = np.concatenate([y, y[:5]])
    probe = fit_ridge(x, y, standardize=standardize)
    test = blobs(90, 3000)[0][30:], blobs(90, 3000)[1][30:]
    assert probe.weight.shape == (3000, 3)
    assert accuracy(test[1], probe.predict(test[0])) == 1.0


def test_ridge_ties_go_to_the_larger_alpha():
    x, y = blobs(60, 5, spread=0.1)
    probe = fit_ridge(x, y, alphas=[1.0, 1e-2, 0.1])
    assert probe.chosen.scores == (1.0, 1.0, 1.0)
    assert probe.chosen.candidates == (1e-2, 0.1, 1.0)
    assert probe.alpha == 1.0


# knn


def brute_votes(bank, labels, queries, k, temperature, classes):
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (bank, queries)]
    votes = np.zeros((len(queries), classes))
    for i, similarity in enumerate(unit[1] @ unit[0].T):
        for j in np.argsort(-similarity)[:k]:
            votes[i, labels[j]] += np.exp(similarity[j] / temperature)
    return votes / votes.sum(1, keepdims=True)


@pytest.mark.parametrize("k", [1, 5, 60, 500])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_equals_a_brute_force_vote(k, temperature):
    x, y = blobs(60, 6, spread=8.0)
    val = blobs(100, 6, spread=8.0)
    probe = fit_knn(x, y, ks=[k], temperature=temperature, validation=val)
    votes = brute_votes(x, y, val[0], k, temperature, 3)
    np.testing.assert_allclose(np.exp(probe.logits(val[0])), votes, atol=1e-4)
    np.testing.assert_array_equal(probe.predict(val[0]), votes.argmax(1))
    assert probe.chosen.scores == (accuracy(val[1], votes.argmax(1)),)
    assert probe.chosen.value == min(k, 60)


def test_knn_chooses_k_on_validation():
    x, y = blobs(60, 6, spread=8.0)
    val = blobs(100, 6, spread=8.0)
    probe = fit_knn(x, y, validation=val)
    scores = [accuracy(val[1], brute_votes(x, y, val[0], k, 0.07, 3).argmax(1)) for k in (1, 5, 10, 20, 50, 60)]
    assert probe.chosen.candidates == (1, 5, 10, 20, 50, 60)  # 100 and 200 exceed the rows
    assert probe.chosen.scores == pytest.approx(scores)


def test_knn_leaves_each_row_out():
    x, y = blobs(40, 6, spread=8.0)
    x[1] = x[0]  # a duplicate may stand before the row itself
    x[7] = x[8] = x[9]
    y[1], y[7], y[8] = y[0], y[9], y[9]
    scores = []
    for k in (1, 5, 39):
        keep = ~np.eye(40, dtype=bool)
        hits = [brute_votes(x[m], y[m], x[~m], k, 0.07, 3).argmax() == label for m, label in zip(keep, y, strict=True)]
        scores.append(np.mean(hits))
    probe = fit_knn(x, y, ks=[1, 5, 100])
    assert probe.chosen.by == "leave-one-out"
    assert probe.chosen.scores == pytest.approx(scores)


def test_knn_on_identical_rows():
    probe = fit_knn(np.ones((9, 2)), [0, 1, 1] * 3, ks=[3], temperature=1e-4)
    assert np.isfinite(probe.logits(np.ones((2, 2))).max())


# logistic


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("c", [0.01, 1.0])
@pytest.mark.parametrize("refit", [True, False])
def test_logistic_equals_sklearns_fit(k, c, refit):
    x, y = blobs(90, 6, k, spread=8.0)
    val = blobs(150, 6, k, spread=8.0)
    probe = fit_logistic(x, y, cs=[c], validation=val, refit=refit, tol=1e-8)
    rows, labels = (np.concatenate([x, val[0]]), np.concatenate([y, val[1]])) if refit else (x, y)
    scaler = StandardScaler().fit(rows)
    oracle = LogisticRegression(C=c, tol=1e-8, max_iter=1000).fit(scaler.transform(rows), labels)
    logits = probe.logits(val[0])
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    np.testing.assert_allclose(p, oracle.predict_proba(scaler.transform(val[0])), atol=1e-5)
    assert probe.converged and probe.unconverged == ()


def test_logistic_path_scores_equal_cold_fits():
    x, y = blobs(90, 6, spread=8.0)
    val = blobs(150, 6, spread=8.0)
    cs = [1e-4, 1e-2, 1.0]
    scaler = StandardScaler().fit(x)
    cold = [LogisticRegression(C=c, tol=1e-8).fit(scaler.transform(x), y) for c in cs]
    scores = [m.score(scaler.transform(val[0]), val[1]) for m in cold]
    probe = fit_logistic(x, y, cs=cs[::-1], validation=val, tol=1e-8)
    assert probe.chosen.scores == pytest.approx(scores)
    assert probe.chosen.value == cs[int(np.argmax(scores))]


def test_logistic_reports_what_did_not_converge(recwarn):
    x, y = blobs(90, 6, spread=8.0)
    probe = fit_logistic(x, y, cs=[1e-6, 1e3], max_iter=2)
    assert not probe.converged or probe.chosen.value == 1e-6
    assert 1e3 in probe.unconverged
    assert not recwarn.list


def test_logistic_holds_out_a_seeded_tenth():
    x, y = blobs(90, 6, spread=8.0)
    train, val = stratified_split(y, 0.1, seed=3)
    a = fit_logistic(x, y, seed=3, refit=False)
    b = fit_logistic(x[train], y[train], validation=(x[val], y[val]), refit=False)
    assert (a.chosen.by, b.chosen.by) == ("held-out", "validation")
    assert a.chosen.scores == b.chosen.scores
    np.testing.assert_array_equal(a.weight, b.weight)


# all of them


@pytest.mark.parametrize("fit, floor", [(fit_ridge, 0.92), (fit_logistic, 0.95), (fit_knn, 0.96)])
def test_accuracy_on_digits(digits, fit, floor):
    probe = fit(*digits["train"], validation=digits["val"])
    x, y = digits["test"]
    assert accuracy(y, probe.predict(x)) > floor


@pytest.mark.parametrize("fit", FITS)
def test_test_labels_do_not_reach_the_probe(fit):
    x, y = blobs(120, 5, spread=8.0)
    train, val, test = slice(60), slice(60, 90), slice(90, 120)
    before = fit(x[train], y[train], validation=(x[val], y[val]))
    logits = before.logits(x[test])
    y[test] = np.random.default_rng(0).permutation(y[test])
    after = fit(x[train], y[train], validation=(x[val], y[val]))
    assert after.chosen == before.chosen
    np.testing.assert_array_equal(after.logits(x[test]), logits)
    np.testing.assert_array_equal(before.logits(x[test]), logits)


@pytest.mark.parametrize("fit, one", [(fit_ridge, {"alphas": [1.0]}), (fit_knn, {"ks": [5]})])
def test_validation_labels_only_choose(fit, one):
    x, y = blobs(60, 5)
    val, labels = blobs(30, 5)
    a, b = fit(x, y, validation=(val, labels), **one), fit(x, y, validation=(val, labels[::-1]), **one)
    np.testing.assert_array_equal(a.logits(val), b.logits(val))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", [np.float16, np.float32, torch.float32, "list"])
def test_arrays_and_tensors_are_equal(fit, kind):
    x, y = blobs(60, 5)
    x = x.astype(np.float16).astype(np.float64)
    given, labels = x.tolist(), y.tolist()
    if isinstance(kind, torch.dtype):
        given, labels = torch.tensor(x, dtype=kind), torch.tensor(y)
    elif kind != "list":
        given, labels = x.astype(kind), y.astype(np.int32)
    a, b = fit(x, y, validation=(x, y)), fit(given, labels, validation=(given, labels))
    np.testing.assert_allclose(b.logits(given), a.logits(x), atol=1e-4)


@pytest.mark.parametrize("fit", FITS)
def test_inputs_are_left_alone(fit):
    x, y = blobs(20, 30)
    copy = x.copy(), y.copy()
    fit(x, y, validation=(x, y)).predict(x)
    np.testing.assert_array_equal(x, copy[0])
    np.testing.assert_array_equal(y, copy[1])


@pytest.mark.parametrize("fit", FITS)
def test_a_probe_keeps_nothing_of_the_callers_arrays(fit):
    x, y = blobs(60, 5)
    queries = blobs(90, 5)[0]
    probe = fit(x, y)
    logits = probe.logits(queries)
    x[:], y[:] = 0, 0
    np.testing.assert_array_equal(probe.logits(queries), logits)


@pytest.mark.parametrize("fit", FITS)
def test_classes_without_rows(fit):
    x, y = blobs(60, 5)
    val = blobs(90, 5)
    probe = fit(x, 2 * y, validation=(val[0], 2 * val[1]), n_classes=7)
    assert probe.logits(val[0]).shape == (90, 7)
    assert set(probe.predict(val[0])) <= {0, 2, 4}
    wider = fit(x, y, validation=(val[0], np.full(90, 3)))  # a class that only the validation set has
    assert wider.logits(x).shape == (60, 4)


X, Y = blobs(12, 4)
HOLE = np.where(np.arange(12)[:, None] % 5 == 0, np.nan, X)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "x, y, options, message",
    [
        (X[:, 0], Y, {}, r"shape \(12,\)"),
        (X, Y[:7], {}, "12 rows of training features but 7 labels"),
        (X, Y[:, None], {}, r"expected integers \[n\]"),
        (X, Y.astype(float), {}, "expected integers"),
        (X, np.zeros(12, int), {}, "all 12 training labels are class 0"),
        (X, Y - 1, {}, "-1"),
        (X, Y, {"n_classes": 2}, "< 2"),
        (HOLE, Y, {}, "3 of 12 rows of training features hold NaN"),
        (X, Y, {"validation": (HOLE, Y)}, "3 of 12 rows of validation features"),
        (X, Y, {"validation": (X[:0], Y[:0])}, "validation features are empty"),
        (X, Y, {"validation": (X[:, :3], Y)}, "3 columns; expected 4"),
        (X[:0], Y[:0], {}, "training features are empty"),
    ],
)
def test_bad_input_is_refused(fit, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        fit(x, y, **options)


@pytest.mark.parametrize(
    "fit, option",
    [
        (fit_ridge, {"alphas": []}),
        (fit_ridge, {"alphas": [0.0]}),
        (fit_logistic, {"cs": [-1.0]}),
        (fit_logistic, {"cs": [np.nan]}),
        (fit_knn, {"ks": [0]}),
        (fit_knn, {"temperature": 0.0}),
    ],
)
def test_bad_candidates_are_refused(fit, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be finite numbers > 0"):
        fit(X, Y, **option)


@pytest.mark.parametrize("fit", FITS)
def test_features_of_another_width_are_refused(fit):
    probe = fit(X, Y, validation=(X, Y))
    with pytest.raises(ValueError, match="3 columns; expected 4"):
        probe.predict(X[:, :3])


def test_gram_of_one_class_or_none_is_refused():
    gram = RidgeGram(4, 3)
    with pytest.raises(ValueError, match="0 training rows"):
        gram.fit((X, Y))
    gram.update(X, np.ones(12, int))
    with pytest.raises(ValueError, match="fewer than two classes"):
        gram.fit((X, Y))
    with pytest.raises(ValueError, match="expected the same"):
        gram.merge(RidgeGram(5, 3))
    with pytest.raises(ValueError, match="< 3"):
        gram.update(X, Y + 1)


# scores


def test_confusion_and_per_class():
    random = np.random.default_rng(0)
    y, p = random.integers(0, 4, 200), random.integers(0, 4, 200)
    table = confusion(y, p, 5)
    assert table.dtype == np.int64
    np.testing.assert_array_equal(table, confusion_matrix(y, p, labels=range(5)))
    rows = per_class(y, p, 5)
    assert [r.label for r in rows] == [0, 1, 2, 3, 4]
    assert [r.n for r in rows] == [int((y == c).sum()) for c in range(5)]
    assert [r.accuracy for r in rows[:4]] == pytest.approx([(p[y == c] == c).mean() for c in range(4)])
    assert rows[4].accuracy is None
    assert accuracy(y, p) == pytest.approx(np.trace(table) / 200)


@pytest.mark.parametrize("correct, n", [(0, 10), (3, 10), (10, 10), (8123, 10000)])
def test_wilson_interval_solves_its_equation(correct, n):
    # Its ends are the rates p at which the observed share lies 1.96 standard deviations of p away.
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    for p in (low, high):
        assert (correct / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("correct, n", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError, match="expected 0 <= correct <= n"):
        wilson_interval(correct, n)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.9])
def test_stratified_split(fraction):
    y = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [100, 40, 2, 1]))
    train, val = stratified_split(y, fraction, seed=4)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(143))
    counts = np.bincount(y[val], minlength=6)
    assert counts.tolist() == [100 * fraction, 40 * fraction, 1, 0, 0, 0]
    again, other = stratified_split(y, fraction, seed=4), stratified_split(y, fraction, seed=5)
    np.testing.assert_array_equal(again[1], val)
    assert not np.array_equal(other[1], val)


@pytest.mark.parametrize("labels, fraction", [([0, 1, 2], 0.5), ([0, 0, 1, 1], 0.0), ([0, 0, 1, 1], 1.0)])
def test_stratified_split_refuses(labels, fraction):
    with pytest.raises(ValueError):
        stratified_split(labels, fraction)


@pytest.mark.parametrize("y, p", [([0, 1], [0]), ([], []), ([0.5], [0])])
def test_scores_refuse_bad_labels(y, p):
    with pytest.raises(ValueError):
        accuracy(np.asarray(y, dtype=float if 0.5 in y else int), np.asarray(p, dtype=int))
