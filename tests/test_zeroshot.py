import math

import numpy as np
import pytest
import torch
from PIL import Image

from repkit.images import digest, to_uint8
from repkit.noise import noise_like
from repkit.zeroshot import DiffusionClassifier, fit_temperature
from tests import tiny
from tests.oracles import (
    PREDICTIONS,
    bayes_log_posterior,
    class_means,
    express,
    gaussian_backbone,
    gaussian_images,
    noise_levels,
)

VARIANCE = 0.01
MEANS = class_means(5, spread=0.03)  # near enough to each other that Bayes errs too


def draw_images(per_class, seed=0):
    labels = torch.arange(len(MEANS)).repeat(per_class)
    return gaussian_images(MEANS, VARIANCE, labels, seed=seed), labels


def classifier(prediction="flow", classes=None, means=MEANS, **options):
    options = {"evaluations": 16, "batch_size": 512} | options
    return DiffusionClassifier(gaussian_backbone(prediction, means, VARIANCE), classes or range(len(means)), **options)


def nll(posterior, labels):
    return -posterior.log_posterior[torch.arange(len(labels)), labels].mean().item()


def exact_temperature(prediction, times):
    """2 * variance * mean gain: an x0-error is gain*||x0 - mean||^2 + noise, and Bayes wants ||.||^2 / (2 variance)."""
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = noise_levels(prediction, t)
    gain = sigma**2 / (alpha**2 * VARIANCE + sigma**2)  # of x0 - E[x0 | x_t] in x0 - mean
    if prediction == "flow":
        gain = gain / sigma  # flow = (x_t - x0) / sigma
    return (2 * VARIANCE * (gain**2).mean()).item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_decides_like_bayes(prediction):
    means = 2 * MEANS
    images = gaussian_images(means, VARIANCE, torch.arange(5).repeat(20))
    truth = bayes_log_posterior(images, means, VARIANCE).argmax(1)
    found = torch.tensor(classifier(prediction, means=means, evaluations=48).predict(images))
    assert (found == truth).double().mean() >= 0.95


@pytest.mark.parametrize("prior", [None, [0.5, 0.2, 0.1, 0.1, 0.1]])
@pytest.mark.parametrize(("prediction", "tolerance"), [("x0", 0.02), ("flow", 0.08)])  # flow: noisier evidence
def test_the_right_temperature_gives_the_bayes_posterior(prediction, tolerance, prior):
    images, _ = draw_images(8)
    temperature = exact_temperature(prediction, classifier(prediction, evaluations=64).times)
    found = classifier(prediction, evaluations=64, temperature=temperature, prior=prior).classify(images)
    truth = bayes_log_posterior(images, MEANS, VARIANCE, prior).exp()
    total_variation = (found.probabilities - truth).abs().sum(1).mean() / 2
    assert total_variation < tolerance


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_errors_equal_a_plain_loop(prediction):
    images, _ = draw_images(1)
    judge = classifier(prediction, evaluations=6, batch_size=7, seed=3)
    expected = np.empty((5, 5, 6))
    for i, image in enumerate(to_uint8(images)):
        x0 = (images[i] * 2 - 1).double()
        for n, t in enumerate(judge.times):
            alpha, sigma = noise_levels(prediction, torch.tensor(t))
            eps = noise_like(x0.shape, seed=3, digest=digest(image), t=t, draw=0).double()
            x_t = alpha * x0 + sigma * eps
            target = express(prediction, x0, x_t, alpha, sigma)
            for k in range(5):
                told = judge.backbone.condition(k, 1)
                guess = judge.backbone.predict(judge.backbone.model, x_t[None], torch.tensor([t]), told)
                expected[i, k, n] = ((target - guess[0]) ** 2).sum()
    np.testing.assert_allclose(judge.errors(images).numpy(), expected, rtol=1e-3, atol=1e-5)
    assert judge.errors(images).dtype == torch.float64


def test_times_are_the_middles_of_equal_strata():
    assert classifier("flow", evaluations=4).times == (125, 375, 625, 875)
    assert classifier("eps", evaluations=4).times == (125, 375, 625, 875)
    times = np.log(classifier("edm", evaluations=4).times)
    np.testing.assert_allclose(np.diff(times), math.log(1000) / 4)


def test_classes_share_the_noise_and_images_do_not():
    images, _ = draw_images(1)
    judge, seen = classifier(evaluations=3, batch_size=8), []
    judge.backbone.model.register_forward_hook(lambda module, args, kwargs, out: seen.append(args), with_kwargs=True)
    judge.errors(images)
    x_t, t = (torch.cat(rows) for rows in zip(*seen, strict=True))
    rows = x_t.reshape(5, 3, 5, *x_t.shape[1:])  # [image time class ...]
    assert (rows == rows[:, :, :1]).all() and len(rows) == 5
    assert len(torch.unique(x_t.flatten(1), dim=0)) == 15
    assert (t.reshape(5, 3, 5) == torch.tensor(judge.times)[None, :, None]).all()


def test_a_step_that_is_visited_twice_gets_another_draw():
    images, _ = draw_images(1)
    judge = classifier("eps", classes=[0], evaluations=1200)
    assert judge.times[2] == judge.times[3] == 2
    errors = judge.errors(images[:1])[0, 0]
    assert errors[2] != errors[3]
    assert len(set(zip(judge.times, errors.tolist(), strict=True))) == 1200


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batching_does_not_matter(batch_size):
    images, _ = draw_images(1)
    reference = classifier(evaluations=4).errors(images)
    judge = classifier(evaluations=4, batch_size=batch_size)
    torch.testing.assert_close(judge.errors(images), reference, rtol=1e-5, atol=0)
    alone = torch.cat([judge.errors(image[None]) for image in images.flip(0)])
    torch.testing.assert_close(alone.flip(0), reference, rtol=1e-5, atol=0)


def test_another_seed_is_another_draw():
    images, _ = draw_images(1)
    assert not torch.allclose(classifier(seed=1).errors(images), classifier(seed=0).errors(images), rtol=1e-3)


def test_permuted_classes_permute_the_posterior():
    images, _ = draw_images(2)
    order = [3, 0, 4, 1, 2]
    plain, permuted = (classifier(classes=classes).classify(images) for classes in (range(5), order))
    torch.testing.assert_close(permuted.log_posterior, plain.log_posterior[:, order], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(permuted.standard_errors, plain.standard_errors[:, order], rtol=1e-4, atol=1e-6)
    assert permuted.labels == plain.labels


def test_prior_moves_the_posterior_by_its_log_odds():
    images, _ = draw_images(2)
    prior = [6, 1, 1, 1, 1]  # normalised to .6 and .1
    even, weighted = (classifier(prior=weights).classify(images).log_posterior for weights in (None, prior))
    moved = (weighted[:, 0] - weighted[:, 1]) - (even[:, 0] - even[:, 1])
    torch.testing.assert_close(moved, torch.full_like(moved, math.log(6)))
    torch.testing.assert_close(weighted.logsumexp(1), torch.zeros(10, dtype=torch.float64))


def test_posterior_tells_what_it_rests_on():
    images, _ = draw_images(2)
    judge = classifier(classes=["class 4", "class 1", "class 0"], evaluations=8)
    posterior, errors = judge.classify(images), judge.errors(images).numpy()
    np.testing.assert_allclose(posterior.scores, errors.mean(2))
    assert posterior.evaluations.tolist() == [24] * 10
    assert (posterior.calibrated, posterior.weighting) == (False, "train")
    best = errors.mean(2).argmin(1)
    assert posterior.labels == judge.predict(images) == [judge.classes[index] for index in best]
    paired = errors - errors[np.arange(10), best][:, None]
    np.testing.assert_allclose(posterior.standard_errors, paired.std(2, ddof=1) / 8**0.5)
    assert (posterior.standard_errors[torch.arange(10), best] == 0).all()
    np.testing.assert_allclose(posterior.probabilities.sum(1), 1)
    torch.testing.assert_close(judge.predict_log_proba(images), posterior.log_posterior)


def test_top_is_sorted_and_ends_with_the_classes():
    images, _ = draw_images(1)
    posterior = classifier().classify(images)
    first = posterior.top(2)[0]
    assert [label for label, _ in first][:1] == posterior.labels[:1]
    values = np.sort(posterior.probabilities[0].numpy())[::-1]
    np.testing.assert_allclose([p for _, p in first], values[:2])
    assert len(posterior.top(99)[0]) == 5


def test_files_and_pictures_are_prepared_like_tensors(tmp_path):
    pixels = to_uint8(draw_images(1)[0])
    pictures = [Image.fromarray(image) for image in pixels]
    paths = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    expected = classifier().errors(tensors)
    torch.testing.assert_close(classifier().errors(pictures), expected)
    torch.testing.assert_close(classifier().errors(paths), expected)
    assert classifier().classify([pictures[0].resize((9, 7))]).scores.shape == (1, 5)


@pytest.mark.parametrize("prediction", ["x0", "flow"])
def test_fit_finds_the_temperature(prediction):
    images, labels = draw_images(30, seed=1)
    judge = classifier(prediction, evaluations=24)
    fitted = judge.fit(images, labels)
    assert fitted.calibrated and not judge.calibrated and judge.temperature == 1.0
    assert fitted.temperature == pytest.approx(exact_temperature(prediction, judge.times), rel=0.25)
    fresh, answers = draw_images(10, seed=2)
    before, after = judge.classify(fresh), fitted.classify(fresh)
    assert nll(after, answers) < nll(before, answers)
    assert after.calibrated and after.labels == before.labels


def test_fit_takes_names_arrays_and_tensors():
    images, labels = draw_images(8)
    names = [f"class {label}" for label in labels]
    temperatures = {
        classifier(classes=names[:5]).fit(images, names).temperature,
        classifier().fit(images, labels).temperature,
        classifier().fit(images, labels.numpy()).temperature,
    }
    assert len(temperatures) == 1


def test_fit_temperature_equals_a_grid_search(rng):
    scores, labels = rng.normal(size=(200, 4)) * 30, rng.integers(0, 4, 200)
    scores[np.arange(200), labels] -= 20
    prior = np.log([0.4, 0.3, 0.2, 0.1])
    grid = np.geomspace(1, 1000, 20_001)
    logits = prior - scores[None] / grid[:, None, None]
    log_p = logits - np.log(np.exp(logits).sum(2, keepdims=True))
    best = grid[log_p[:, np.arange(200), labels].mean(1).argmax()]
    found = fit_temperature(*(torch.from_numpy(array) for array in (scores, labels, prior)))
    assert found == pytest.approx(best, rel=1e-3)


def test_fit_refuses_what_does_not_determine_a_temperature():
    images, labels = draw_images(10)
    easy = bayes_log_posterior(images, MEANS, VARIANCE).argmax(1)
    judge = classifier()
    with pytest.raises(ValueError, match="do not determine a temperature"):
        judge.fit(images, judge.predict(images))
    with pytest.raises(ValueError, match="do not determine a temperature"):
        judge.fit(images, (easy + 2) % 5)
    with pytest.raises(ValueError, match="49 labels for 50 images"):
        judge.fit(images, labels[1:])
    with pytest.raises(ValueError, match="no class 5; have 0, 1, 2, 3, 4"):
        judge.fit(images, labels + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "elbo"}, "no weighting 'elbo'; have train"),
        ({"evaluations": 1}, "at least 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"temperature": 0.0}, "positive number"),
        ({"prior": [1, 1]}, "5 classes; give one positive number for each"),
        ({"prior": [1, 1, 1, 1, 0]}, "one positive number"),
        ({"classes": "cats"}, "give a sequence"),
        ({"classes": [2, 1, 2]}, "class 2 is given twice"),
        ({"classes": ["class 1", "cat"]}, "no class 'cat'"),
        ({"classes": [4, 5]}, "no class 5"),
    ],
)
def test_bad_arguments_are_told_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_no_images_and_wrong_sizes_are_told():
    for none in (torch.zeros(0, 3, 4, 4), []):
        with pytest.raises(ValueError, match="no images given"):
            classifier().classify(none)
    with pytest.raises(ValueError, match="range from"):
        classifier().classify(torch.full((1, 3, 4, 4), 255.0))


def test_a_network_that_overflows_is_named():
    images, _ = draw_images(1)
    judge = classifier()
    judge.backbone.model.posterior.means.data[2] = math.nan
    with pytest.raises(FloatingPointError, match="no finite prediction for image 0, class . at t=.*bfloat16"):
        judge.classify(images)


def test_one_class_under_two_names_is_refused() -> None:
    backbone = tiny.grey_unet()
    with pytest.raises(ValueError, match="'owl' and 2 are the same"):
        DiffusionClassifier(backbone, ["cat", "owl", 2])
