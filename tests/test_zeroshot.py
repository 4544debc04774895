import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from repkit.images import to_uint8
from repkit.schedule import Schedule
from repkit.zeroshot.calibration import fit_temperature
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.errortable import replay
from repkit.zeroshot.posterior import log_posterior, standard_error
from repkit.zeroshot.racing import Racing
from repkit.zeroshot.strategies import Uniform
from tests import tiny
from tests.oracles import (
    PREDICTIONS,
    bayes_log_posterior,
    class_means,
    gain,
    gaussian_backbone,
    gaussian_images,
    squared_distances,
)

VARIANCE = 0.01
MEANS = class_means(5, spread=0.03)  # near enough to each other that Bayes errs too
SMALL = class_means(5, size=2, spread=0.05)  # 12 dimensions
PRIOR = [0.5, 0.2, 0.1, 0.1, 0.1]


def draw_images(per_class, seed=0, means=MEANS):
    labels = torch.arange(len(means)).repeat(per_class)
    return gaussian_images(means, VARIANCE, labels, seed=seed), labels


def classifier(prediction="flow", classes=None, means=MEANS, evaluations=16, schedule=None, **options):
    options = {"strategy": Uniform(evaluations), "batch_size": 512} | options
    backbone = gaussian_backbone(prediction, means, VARIANCE, schedule=schedule)
    return DiffusionClassifier(backbone, range(len(means)) if classes is None else classes, **options)


def likelihood(prediction="flow", **options):
    """A classifier whose scores are negative log-likelihoods, exact but for a thousandth of the signal."""
    options = {"weighting": "elbo", "spacing": "logsnr", "means": SMALL, "antithetic": True} | options
    return classifier(prediction, **options)


def nll(posterior, labels):
    return -posterior.log_posterior[torch.arange(len(labels)), labels].mean().item()


def total_variation(found, truth):
    return (found.exp() - truth.exp()).abs().sum(1).mean().item() / 2


def agreement(found, truth):
    return (found.argmax(1) == truth.argmax(1)).double().mean().item()


def expected_calibration_error(log_posterior, labels):
    sure, right = log_posterior.exp().max(1).values.numpy(), (log_posterior.argmax(1) == labels).numpy()
    place = np.minimum((sure * 15).astype(int), 14)
    return sum(abs((right[place == k] - sure[place == k]).sum()) for k in range(15)) / len(labels)


def exact_temperature(prediction, levels):
    """2 * variance * mean gain: an x0-error is gain*||x0 - mean||^2 + noise, and Bayes wants ||.||^2 / (2 variance)."""
    return 2 * VARIANCE * (gain(prediction, levels.alpha, levels.sigma, VARIANCE) ** 2).mean()


@pytest.fixture(scope="module")
def exam():
    """4,000 images drawn as PRIOR says, their labels, and their posterior by the elbo with an even prior."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.multinomial(torch.tensor(PRIOR), 4000, replacement=True, generator=generator)
    images = gaussian_images(SMALL, VARIANCE, labels, seed=6)
    return images, labels, likelihood(batch_size=20_000).classify(images)


def with_prior(posterior, temperature=1.0):
    return log_posterior(posterior.scores, likelihood(prior=PRIOR).rule.log_prior, temperature)


def test_the_elbo_gives_the_answers_of_bayes(exam):
    images, _, found = exam
    assert not found.calibrated and found.weighting == "elbo"  # nothing was fitted: only this denoiser is perfect
    for prior, answer in ((None, found.log_posterior), (PRIOR, with_prior(found))):
        truth = bayes_log_posterior(images, SMALL, VARIANCE, prior)
        assert agreement(answer, truth) >= 0.999
        assert total_variation(answer, truth) < 1e-3
        ratios, exact = (one - one[:, :1] for one in (answer, truth))
        assert (ratios - exact).square().mean().sqrt() < 2e-3 * exact.square().mean().sqrt()


def test_priors_matter_and_are_right(exam):
    images, labels, even = exam
    truth = bayes_log_posterior(images, SMALL, VARIANCE, PRIOR)
    answers = (with_prior(even), even.log_posterior, truth)
    right, without, best = ((one.argmax(1) == labels).double().mean().item() for one in answers)
    assert right == pytest.approx(best, abs=1e-3) and right > without + 0.02
    assert total_variation(even.log_posterior, truth) > 0.05


def test_summed_errors_are_calibrated_and_mean_errors_are_not(exam):
    _, labels, found = exam
    assert expected_calibration_error(with_prior(found), labels) < 0.02
    assert expected_calibration_error(with_prior(found, temperature=12.0), labels) > 0.1  # the mean over 12 dimensions
    log_prior = likelihood(prior=PRIOR).rule.log_prior
    assert fit_temperature(found.scores, labels, log_prior) == pytest.approx(1, abs=0.05)


def test_the_training_weight_is_not_the_likelihood():
    images, _ = draw_images(20, means=SMALL)
    truth = bayes_log_posterior(images, SMALL, VARIANCE)
    judge = likelihood(evaluations=32)
    table, train = judge.measure(images), likelihood(evaluations=32, weighting="train").rule
    assert total_variation(judge.rule.posterior(table).log_posterior, truth) < 1e-3
    assert total_variation(train.posterior(table).log_posterior, truth) > 0.03
    assert not train.posterior(table).calibrated


def test_noise_that_the_classes_do_not_share_is_clearly_worse():
    images, _ = draw_images(30, means=SMALL)
    truth = bayes_log_posterior(images, SMALL, VARIANCE)
    judges = [likelihood(evaluations=24, antithetic=False, seed=seed, batch_size=5000) for seed in range(5)]
    tables = [judge.measure(images) for judge in judges]
    own = replace(tables[0], errors=np.stack([table.errors[:, k] for k, table in enumerate(tables)], axis=1))
    shared, independent = (judges[0].rule.posterior(table).log_posterior for table in (tables[0], own))
    assert agreement(shared, truth) > agreement(independent, truth) + 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_decides_like_bayes(prediction):
    images, _ = draw_images(20, means=SMALL)
    truth = bayes_log_posterior(images, SMALL, VARIANCE).argmax(1)
    assert likelihood(prediction).predict(images) == truth.tolist()


@pytest.mark.parametrize("weighting", ["train", "elbo", "min-snr"])
def test_a_shift_does_not_change_a_score(weighting):
    images, _ = draw_images(2, means=SMALL)
    native, shifted, plain = (
        likelihood(evaluations=96, schedule=Schedule.flow(shift), spacing=spacing, weighting=weighting).classify(images)
        for shift, spacing in ((3.0, "native"), (3.0, "shifted"), (1.0, "native"))
    )
    torch.testing.assert_close(native.scores, plain.scores)
    differences = [one.scores - one.scores[:, :1] for one in (native, shifted)]
    torch.testing.assert_close(*differences, rtol=1e-2, atol=2e-3 * differences[0].abs().max().item())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_scores_differ_by_what_the_distances_to_the_means_say(prediction):
    images, _ = draw_images(2, means=SMALL)
    judge = likelihood(prediction, spacing="native", weighting="train", evaluations=12)
    scores, distances = judge.classify(images).scores.numpy(), squared_distances(images, SMALL)
    gains = gain(prediction, judge.levels.alpha, judge.levels.sigma, VARIANCE)
    expected = (gains**2).mean() * (distances - distances[:, :1])
    np.testing.assert_allclose(scores - scores[:, :1], expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


def test_racing_sees_what_its_replay_says():
    images, _ = draw_images(6)
    judge = classifier(strategy=Racing(max_evaluations=32), batch_size=50)
    raced, complete = judge.measure(images), judge.complete.measure(images)
    again = replay(complete, judge.strategy, judge.rule.weights)
    np.testing.assert_allclose(raced.errors, again.errors, rtol=1e-5)
    assert raced.evaluations.tolist() == again.evaluations.tolist() and raced.evaluations.sum() < 30 * 5 * 32
    assert raced.decided.tolist() == again.decided.tolist()
    assert judge.classify(images).labels == judge.rule.posterior(again).labels


def test_a_table_gives_the_posterior_again(tmp_path):
    images, _ = draw_images(1)
    judge = classifier()
    table = judge.measure(images, ids=["a", "b", "c", "d", "e"])
    table.write(tmp_path / "errors.parquet")
    read = type(table).read(tmp_path / "errors.parquet")
    for name in ("log_posterior", "scores", "standard_errors", "evaluations"):
        again, expected = (getattr(found, name) for found in (judge.rule.posterior(read), judge.classify(images)))
        assert torch.equal(again, expected)


def test_several_prompts_make_a_class():
    images, _ = draw_images(2)
    single = classifier().classify(images).scores
    classes = {"low": [0, "class 3"], "high": [1], "other": [2, 4]}
    mixed, best = (classifier(classes=classes, mixture=mixture).classify(images) for mixture in ("logsumexp", "best"))
    each = [single[:, rows] for rows in ([0, 3], [1], [2, 4])]
    torch.testing.assert_close(best.scores, torch.stack([one.min(1).values for one in each], 1))
    even = [-torch.log(torch.exp(-one).mean(1)) for one in each]
    torch.testing.assert_close(mixed.scores, torch.stack(even, 1))
    assert mixed.classes == ("low", "high", "other") and set(mixed.labels) <= set(classes)
    assert mixed.evaluations.tolist() == [5 * 16] * 10


def test_templates_are_filled_with_the_names():
    images, _ = draw_images(1)
    filled = classifier(classes=["0", "3"], templates=["class {}"])
    assert filled.prompts == ("class 0", "class 3")
    torch.testing.assert_close(filled.classify(images).scores, classifier(classes=[0, 3]).classify(images).scores)


@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize(("prediction", "tolerance"), [("x0", 0.02), ("flow", 0.08)])  # flow: noisier evidence
def test_the_right_temperature_gives_the_bayes_posterior(prediction, tolerance, prior):
    images, _ = draw_images(8)
    temperature = exact_temperature(prediction, classifier(prediction, evaluations=64).levels)
    found = classifier(prediction, evaluations=64, temperature=temperature, prior=prior).classify(images)
    assert total_variation(found.log_posterior, bayes_log_posterior(images, MEANS, VARIANCE, prior)) < tolerance


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
    spread = [[standard_error(differences) for differences in image] for image in paired]
    np.testing.assert_allclose(posterior.standard_errors, spread)
    assert (posterior.standard_errors[torch.arange(10), best] == 0).all()
    np.testing.assert_allclose(posterior.probabilities.sum(1), 1)
    torch.testing.assert_close(judge.predict_log_proba(images), posterior.log_posterior)


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
    assert fitted.rule.calibrated and not judge.rule.calibrated and judge.rule.temperature == 1.0
    assert fitted.rule.temperature == pytest.approx(exact_temperature(prediction, judge.levels), rel=0.25)
    fresh, answers = draw_images(10, seed=2)
    before, after = judge.classify(fresh), fitted.classify(fresh)
    assert nll(after, answers) < nll(before, answers)
    assert after.calibrated and after.labels == before.labels


def test_fit_takes_names_arrays_and_tensors():
    images, labels = draw_images(8)
    names = [f"class {label}" for label in labels]
    temperatures = {
        classifier(classes=names[:5]).fit(images, names).rule.temperature,
        classifier().fit(images, labels).rule.temperature,
        classifier().fit(images, labels.numpy()).rule.temperature,
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
        ({"weighting": "vlb"}, "no weighting 'vlb'; have train"),
        ({"evaluations": 0}, "0 evaluations a class; give a whole number, at least 2"),
        ({"evaluations": 1}, "1 evaluations a class; give a whole number, at least 2"),
        ({"prior": [1e308] * 5}, "with a finite sum"),
        ({"loss": "l3"}, "no loss 'l3'; have l2, l1, huber"),
        ({"weighting": "elbo", "loss": "l1"}, "defined for l2 errors, not l1"),
        ({"bias": [0.0]}, "5 classes; give one number for each"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"temperature": 0.0}, "positive number"),
        ({"prior": [1, 1]}, "5 classes; give one positive number for each"),
        ({"prior": [1, 1, 1, 1, 0]}, "one positive number"),
        ({"classes": "cats"}, "give a sequence"),
        ({"classes": []}, "give a sequence"),
        ({"classes": {}}, "give a sequence"),
        ({"classes": [2]}, "one class, 2, leaves nothing to decide; give at least two"),
        ({"classes": {"a": [1, 2]}}, "one class, 'a', leaves nothing to decide"),
        ({"classes": [2, 1, 2]}, "class 2 is given twice"),
        ({"classes": {"a": [1, 1], "b": [2]}}, "1 and 1 are the same to gaussian-flow; drop one"),
        ({"classes": {"a": [1], "b": ["class 1"]}}, "1 and 'class 1' are the same"),
        ({"classes": {"a": [1], "b": []}}, "class 'b' has prompts .*; give a sequence of at least one"),
        ({"classes": {"a": [1], "b": "class 2"}}, "class 'b' has prompts 'class 2'; give a sequence"),
        ({"classes": ["0", "1"], "templates": ["class {}", "class {}"]}, "template 'class {}' is given twice"),
        ({"classes": ["0", "1"], "templates": ["class"]}, "template 'class' has no {}"),
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


def test_one_class_under_two_names_is_refused() -> None:
    backbone = tiny.grey_unet()
    with pytest.raises(ValueError, match="'owl' and 2 are the same"):
        DiffusionClassifier(backbone, ["cat", "owl", 2])


def test_ids_are_one_for_each_image():
    images, _ = draw_images(1)
    with pytest.raises(ValueError, match="2 ids for 5 images; give one for each"):
        classifier().measure(images, ids=["a", "b"])


def test_progress_is_told_of_every_image():
    images, _ = draw_images(1)
    told: list[tuple[int, int]] = []
    classifier().measure(images, progress=lambda done, count: told.append((done, count)))
    assert told == [(done, 5) for done in range(1, 6)]
