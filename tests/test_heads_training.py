"""Many heads at once: the same as each alone, the optimum where it is known, rows read a few at a time."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression

from repkit.exporting import export
from repkit.heads.attention import AttentionHead
from repkit.heads.building import KINDS
from repkit.heads.linear import BatchNormLinear, LinearHead
from repkit.heads.mlp import MlpHead
from repkit.heads.rows import Examples, ScaledRows, channel_moments, read, stored_rows
from repkit.heads.trained import Training, fit_trained
from repkit.heads.training import Candidate, cosine, logits_of, sample_order, train_heads
from tests.export_cases import tiny_extractor, write_image

K = 3


def blobs(n=90, d=6, seed=0, spread=4.0):
    x, y = make_blobs(n, d, centers=K, cluster_std=spread, random_state=seed)
    return x.astype(np.float32), y.astype(np.int64)


def maps(n=90, seed=0):
    """Maps [n 4 2 2] whose class is which cell is bright, less the mean, so that averages show nothing."""
    random = np.random.default_rng(seed)
    y = random.integers(0, K, n)
    x = random.normal(size=(n, 4, 2, 2)).astype(np.float32)
    for row, label in enumerate(y):
        x[row, :, label // 2, label % 2] += 3
    return x - x.mean((2, 3), keepdims=True), y


# --- the order of rows


@pytest.mark.parametrize(("n", "size"), [(10, 4), (10, 5), (7, 7), (5, 8)])
def test_every_epoch_has_every_row_once(n, size):
    order = sample_order(n, size, seed=1)
    per_batch = min(n, size)
    rows = np.concatenate([order(step) for step in range(n)])  # per_batch whole epochs
    assert np.bincount(rows, minlength=n).tolist() == [per_batch] * n
    assert all(len(order(step)) == per_batch for step in range(n))


def test_the_rows_of_a_step_depend_on_seed_and_step_alone():
    forward, backward = sample_order(50, 8, 3), sample_order(50, 8, 3)
    steps = range(20)
    there = [forward(step).tolist() for step in steps]
    assert [backward(step).tolist() for step in reversed(steps)] == there[::-1]
    assert [sample_order(50, 8, 4)(step).tolist() for step in steps] != there


def test_cosine_starts_at_one_and_falls_toward_zero():
    shares = [cosine(step, 8) for step in range(9)]
    assert shares[0] == 1 and shares[4] == pytest.approx(0.5) and shares[8] == pytest.approx(0)
    assert (np.diff(shares) < 0).all()


# --- many at once


def candidates():
    torch.manual_seed(0)
    heads = [LinearHead(4, K, pool=2), BatchNormLinear(4, K), MlpHead(4, K, hidden=(5,)), LinearHead(6, K)]
    heads += [AttentionHead((4, 2, 2), K, width=8)]
    keys = ["maps", "maps", "maps", "rows", "maps"]
    pairs = [(head, key) for head, key in zip(heads, keys, strict=True)]
    return [Candidate(deepcopy(head), lr, key, decay) for head, key in pairs for lr, decay in ((0.1, 0.0), (0.02, 0.1))]


def alone(candidate, features, labels, steps, batch_size, seed):
    """Plain torch: the optimizer of torch, its cosine schedule, one head."""
    head = candidate.head.train()
    decayed = [one.weight for one in head.modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)]
    others = [one for one in head.parameters() if all(one is not weight for weight in decayed)]
    groups = [{"params": decayed, "weight_decay": candidate.weight_decay}, {"params": others}]
    sgd = torch.optim.SGD(groups, lr=candidate.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    order = sample_order(len(labels), batch_size, seed)
    for step in range(steps):
        rows = order(step)
        sgd.zero_grad()
        x = torch.from_numpy(features[candidate.key][rows])
        F.cross_entropy(head(x), torch.from_numpy(labels[rows])).backward()
        sgd.step()
        schedule.step()
    return head.eval()


@pytest.fixture(scope="module")
def together():
    x, y = maps()
    features = {"maps": x, "rows": blobs()[0]}
    heads = candidates()
    train_heads(heads, features, y, steps=25, batch_size=16, seed=2)
    return features, y, heads


@pytest.mark.parametrize("place", range(10))
def test_heads_trained_together_are_those_trained_alone(together, place):
    features, y, heads = together
    expected = alone(candidates()[place], features, y, 25, 16, 2)
    for (name, value), other in zip(
        expected.state_dict().items(), heads[place].head.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, value, atol=2e-6, rtol=2e-5, msg=name)


def test_training_twice_gives_the_same_bits(together):
    features, y, heads = together
    again = candidates()
    train_heads(again, features, y, steps=25, batch_size=16, seed=2)
    for one, other in zip(heads, again, strict=True):
        for a, b in zip(one.head.state_dict().values(), other.head.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_a_head_that_diverges_leaves_the_others_alone():
    x, y = blobs()
    torch.manual_seed(0)
    head = LinearHead(6, K)
    wild = [Candidate(deepcopy(head), lr, "x") for lr in (1e38, 0.01)]
    calm = [Candidate(deepcopy(head), lr, "x") for lr in (0.02, 0.01)]
    for one in (wild, calm):
        train_heads(one, {"x": x}, y, steps=20, batch_size=16)
    assert not torch.isfinite(wild[0].head.linear.weight).all()
    torch.testing.assert_close(wild[1].head.linear.weight, calm[1].head.linear.weight, atol=1e-6, rtol=1e-5)


def test_each_batch_is_read_once_for_all_heads():
    x, y = blobs()
    reads = []

    class Counted(np.ndarray):
        def __getitem__(self, rows):
            reads.append(rows)
            return np.asarray(self)[rows]

    torch.manual_seed(0)
    heads = [Candidate(LinearHead(6, K), lr, "x") for lr in (0.1, 0.01)] + [Candidate(MlpHead(6, K), 0.1, "x")]
    train_heads(heads, {"x": x.view(Counted), "unread": x.view(Counted)}, y, steps=7, batch_size=16)
    assert len(reads) == 7


@pytest.mark.parametrize("decay", [0.3, 0.03])
def test_linear_sgd_reaches_the_logistic_optimum(decay):
    x, y = blobs(60, 4)
    x = (x - x.mean(0)) / x.std(0)
    head = LinearHead(4, K)
    train_heads([Candidate(head, 0.5, "x", decay)], {"x": x}, y, steps=800, batch_size=60)
    oracle = LogisticRegression(C=1 / (decay * len(x)), tol=1e-10, max_iter=10_000).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(head.linear.weight.detach(), oracle.coef_, atol=1e-4)
    bias = head.linear.bias.detach().numpy()
    np.testing.assert_allclose(bias - bias.mean(), oracle.intercept_ - oracle.intercept_.mean(), atol=1e-4)


# --- rows


def test_moments_are_those_of_each_channel():
    x = maps()[0] * 5 + 1000
    x[:, 2] = 7.1
    mean, deviation = channel_moments(x, chunk=13)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean((0, 2, 3)), rtol=1e-6)
    expected = x.astype(np.float64).std((0, 2, 3))
    np.testing.assert_allclose(deviation[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-5)
    assert deviation[2] == 1
    rows = blobs()[0]
    np.testing.assert_allclose(channel_moments(rows), (rows.mean(0), rows.std(0)), rtol=1e-4)


def test_scaled_rows_have_no_mean_and_unit_deviation():
    x = maps()[0] * 5 + 1000
    scaled = ScaledRows(x, *channel_moments(x))
    np.testing.assert_allclose(np.asarray(scaled).mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(scaled).std((0, 2, 3)), 1, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(scaled[5:9][[1]]), np.asarray(scaled)[[6]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_rows_are_those_of_the_store(tmp_path, dtype):
    for seed in range(7):
        write_image(tmp_path / "images" / f"{seed}.png", seed)
    store = export(tmp_path / "images", tiny_extractor(), tmp_path / "out", pool="none", dtype=dtype, shard_size=3)
    key = store.keys[0]
    whole, rows = store.array(key), stored_rows(store, key)
    assert rows.shape == whole.shape and len(rows) == 7
    np.testing.assert_array_equal(np.asarray(rows), whole)
    chosen = np.array([6, 0, 3, 3])
    np.testing.assert_array_equal(np.asarray(rows[chosen]), whole[chosen])
    np.testing.assert_array_equal(np.asarray(rows[chosen][1:3]), whole[[0, 3]])
    np.testing.assert_array_equal(read(rows, chosen).numpy(), whole[chosen].astype(np.float32))
    flat = stored_rows(store, key, fold=(whole[0].size,))
    np.testing.assert_array_equal(np.asarray(flat[2:5]), whole[2:5].reshape(3, -1))
    with pytest.raises(ValueError, match="no features 'up.9@1'"):
        stored_rows(store, "up.9@1")


def test_rows_that_are_not_finite_are_refused():
    x, y = blobs()
    x[[3, 8]] = np.nan
    with pytest.raises(ValueError, match="2 of 90 rows of features hold NaN"):
        fit_trained("linear", x, y, lrs=[0.1])


# --- fitting


@pytest.mark.parametrize("kind", list(KINDS))
def test_heads_learn_what_they_can_see(kind):
    x, y = maps(240)
    x, y = (x, y) if kind in ("attention", "difformer") else blobs(240)
    given = {"mid@1": x, "mid@2": x} if kind == "difformer" else x
    data = Examples(given, y)
    train, held, test = (data[rows] for rows in np.split(np.arange(240), [120, 160]))
    training = Training(width=16, epochs=20, batch_size=16)
    validation = held.features, held.labels
    probe = fit_trained(kind, train.features, train.labels, validation=validation, training=training, lrs=[0.01, 0.05])
    assert (probe.predict(test.features) == test.labels).mean() > 0.8
    assert probe.chosen.by == "validation" and probe.chosen.candidates == (0.01, 0.05)
    logits = probe.logits(held.features)
    assert max(probe.chosen.scores) == pytest.approx((logits.argmax(1) == held.labels).mean())


def test_a_rate_is_chosen_on_rows_held_out_and_all_rows_train():
    x, y = blobs()
    probe = fit_trained("linear", x, y, lrs=[1e-6, 0.1])
    assert probe.chosen.by == "held-out" and probe.chosen.value == 0.1
    whole = fit_trained("linear", x, y, lrs=[0.1])
    np.testing.assert_array_equal(probe.logits(x), whole.logits(x))
    assert whole.chosen.by == "given" and whole.chosen.scores == ()


def test_the_seed_draws_the_weights_and_leaves_torchs_own_state():
    x, y = blobs()
    state = torch.random.get_rng_state()
    logits = [fit_trained("mlp", x, y, lrs=[0.01], training=Training(seed=seed)).logits(x) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(logits[0], logits[1])
    assert (logits[0] != logits[2]).any()


def test_features_may_be_of_any_scale():
    x, y = blobs()
    one, other = (fit_trained("linear", x * scale + shift, y, lrs=[0.05]) for scale, shift in ((1, 0), (100, 50)))
    np.testing.assert_allclose(one.logits(x), other.logits(x * 100 + 50), atol=1e-3)


def test_progress_is_told_epochs():
    x, y = blobs()
    told = []
    training = Training(epochs=3, batch_size=20)
    fit_trained("linear", x, y, lrs=[0.1], training=training, progress=lambda *counts: told.append(counts))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


X, Y = blobs(12, 4)


@pytest.mark.parametrize(
    ("kind", "x", "y", "options", "message"),
    [
        ("linear", X, Y[:7], {}, "12 rows of training features but 7 labels"),
        ("linear", X, np.zeros(12, int), {}, "all 12 training labels are class 0"),
        ("linear", X, Y, {"n_classes": 2}, "< 2"),
        ("linear", X, Y, {"lrs": [0.0]}, "lrs must be finite numbers > 0"),
        ("linear", X, Y, {"validation": (X[:3], Y)}, "3 rows of validation features but 12 labels"),
        ("linear", X[:, 0], Y, {}, r"shape \(12,\); expected \[n c\] or \[n c h w\]"),
        ("linear", X, Y, {"lrs": [1e38, 2e38], "validation": (X, Y)}, "linear diverged at every learning rate of 1e"),
        ("attention", X, Y, {}, "attention needs maps"),
        ("forest", X, Y, {}, "no head 'forest'"),
    ],
)
def test_bad_input_is_refused(kind, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        fit_trained(kind, x, y, **options)


def test_impossible_training_is_refused():
    with pytest.raises(ValueError, match="epochs=0; give at least 1"):
        Training(epochs=0)


def test_logits_do_not_depend_on_the_batch():
    x, y = blobs()
    torch.manual_seed(0)
    head = Candidate(BatchNormLinear(6, K), 0.1, "x")
    train_heads([head], {"x": x}, y, steps=5, batch_size=16)
    (whole,), (parts,) = logits_of([head], {"x": x}), logits_of([head], {"x": x}, batch_size=7)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
