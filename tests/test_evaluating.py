from collections.abc import Sequence

import numpy as np
import pytest
import torch

from repkit.images import digest, to_uint8
from repkit.noise import noise_like
from repkit.schedule import Schedule
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.evaluating import LOSSES, Evaluator
from repkit.zeroshot.levels import levels_at, strata
from repkit.zeroshot.racing import Racing
from repkit.zeroshot.strategies import Uniform
from repkit.zeroshot.weightings import weigh
from tests.oracles import (
    PREDICTIONS,
    SIGMA_DATA,
    ExactBackbone,
    class_means,
    express,
    gaussian_backbone,
    gaussian_images,
    noise_levels,
)

VARIANCE = 0.01
MEANS = class_means(3, size=2, spread=0.05)


def draw_images(per_class=2):
    return gaussian_images(MEANS, VARIANCE, torch.arange(3).repeat(per_class))


def judge(prediction="flow", evaluations=5, **options):
    options = {"strategy": Uniform(evaluations), "batch_size": 64, "weighting": "train"} | options
    return DiffusionClassifier(gaussian_backbone(prediction, MEANS, VARIANCE), range(3), **options)


def plain_losses(prediction, image, t, k, seed, sign):
    """The three losses of one row, from scratch in float64."""
    x0 = (image * 2 - 1).double()
    alpha, sigma = noise_levels(prediction, torch.tensor(t))
    name = digest(to_uint8(image[None])[0])
    x_t = alpha * x0 + sigma * sign * noise_like(x0.shape, seed=seed, digest=name, t=t, draw=0).double()
    mean = MEANS[k].double()
    estimate = mean + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x_t - alpha * mean)
    true, guess = (express(prediction, x, x_t, alpha, sigma).flatten() for x in (x0, estimate))
    return [
        torch.nn.functional.mse_loss(guess, true, reduction="sum"),
        torch.nn.functional.l1_loss(guess, true, reduction="sum"),
        torch.nn.functional.huber_loss(guess, true, reduction="sum"),
    ]


@pytest.mark.parametrize("signs", [(1,), (1, -1)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_errors_equal_a_plain_loop(prediction, signs):
    images = draw_images(1)
    table = judge(prediction, batch_size=7, seed=3, antithetic=len(signs) == 2).measure(images)
    expected = np.array(
        [
            [
                [np.mean([plain_losses(prediction, image, t, k, 3, sign) for sign in signs], 0) for t in table.levels.t]
                for k in range(3)
            ]
            for image in images
        ]
    )
    np.testing.assert_allclose(table.errors, expected, rtol=1e-3, atol=1e-5)  # the network's input is float32
    assert table.evaluations.tolist() == [15 * len(signs)] * 3


def evidence_of(prediction: str, x0: torch.Tensor, eps: torch.Tensor, logsnr: np.ndarray) -> np.ndarray:
    """The elbo of each image [b] under class 1, in float64, at a grid of log-SNR that all predictions share."""
    count = len(logsnr)
    schedule, spacing = {
        "flow": (Schedule.flow(), "logsnr"),
        "edm": (Schedule.edm(np.exp(-6.9), np.exp(6.9), SIGMA_DATA), "logsnr"),
    }.get(prediction, (Schedule.discrete((1 / (1 + np.exp(-logsnr))).tolist(), prediction), "native"))
    levels = levels_at(schedule, strata(count), spacing)
    np.testing.assert_allclose(levels.logsnr, logsnr, atol=1e-9)
    backbone = ExactBackbone(prediction, MEANS, VARIANCE, schedule=schedule)
    evaluator = Evaluator(backbone, backbone.condition([1], 1), ["class 1"], levels)
    pairs = torch.arange(len(x0) * count)
    told = backbone.condition(1, len(pairs))
    residual = evaluator.residual(
        x0.repeat_interleave(count, 0), eps.flatten(0, 1), np.tile(np.arange(count), len(x0)), pairs, told
    )
    assert residual.dtype == torch.float64
    losses = residual.flatten(1).pow(2).sum(1).reshape(len(x0), count).numpy()
    return (weigh("elbo", levels) * losses).mean(1)


def test_every_prediction_of_one_model_gives_the_same_likelihood(generator):
    x0 = draw_images().double() * 2 - 1
    eps = torch.randn(len(x0), 24, *x0.shape[1:], generator=generator, dtype=torch.float64)
    logsnr = 13.8 - strata(24) * 27.6
    found = {prediction: evidence_of(prediction, x0, eps, logsnr) for prediction in PREDICTIONS}
    for values in found.values():
        np.testing.assert_allclose(values, found["eps"], rtol=1e-9)
    assert np.ptp(found["eps"]) > 1


def recorded(classifier) -> list[Sequence[torch.Tensor]]:
    seen: list[Sequence[torch.Tensor]] = []
    classifier.backbone.model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(args), with_kwargs=True
    )
    return seen


def test_classes_share_the_noise_and_images_do_not():
    classifier = judge(evaluations=4, batch_size=8)
    seen = recorded(classifier)
    classifier.errors(draw_images(1))
    x_t, t = (torch.cat(rows) for rows in zip(*seen, strict=True))
    rows = x_t.reshape(3, 4, 3, *x_t.shape[1:])  # [image time class ...]
    assert (rows == rows[:, :, :1]).all()
    assert len(torch.unique(x_t.flatten(1), dim=0)) == 3 * 4
    assert (t.reshape(3, 4, 3) == torch.from_numpy(classifier.levels.t)[None, :, None]).all()


def test_batches_are_full_but_for_the_last():
    classifier = judge(evaluations=5, batch_size=8)
    seen = recorded(classifier)
    classifier.errors(draw_images())
    assert [len(args[0]) for args in seen] == [8] * 11 + [2]  # 6 images, 5 levels, 3 classes


def test_racing_batches_are_full_while_images_last():
    classifier = judge(strategy=Racing(max_evaluations=32), batch_size=16)
    seen = recorded(classifier)
    table = classifier.measure(draw_images(20))
    sizes = [len(args[0]) for args in seen]
    assert sum(sizes) == table.evaluations.sum() < 60 * 3 * 32
    assert sizes.count(16) > 0.8 * len(sizes)


@pytest.mark.parametrize("strategy", [Uniform(6), Racing(max_evaluations=16)])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batch_size_and_order_do_not_matter(batch_size, strategy):
    images = draw_images(1)
    reference = judge(strategy=strategy).measure(images).errors
    classifier = judge(strategy=strategy, batch_size=batch_size)
    np.testing.assert_allclose(classifier.measure(images).errors, reference, rtol=1e-5)
    np.testing.assert_allclose(classifier.measure(images.flip(0)).errors[::-1], reference, rtol=1e-5)
    alone = [classifier.measure(image[None]).errors[0] for image in images]
    np.testing.assert_allclose(alone, reference, rtol=1e-5)


def test_a_step_that_is_visited_twice_gets_another_draw():
    errors = judge("eps", evaluations=1200).measure(draw_images(1)[:1])
    t, found = errors.levels.t, errors.errors[0, 0, :, 0]
    assert t[2] == t[3] == 2 and found[2] != found[3]
    assert len(set(zip(t.tolist(), found.tolist(), strict=True))) == 1200


def test_another_seed_is_another_draw():
    images = draw_images(1)
    assert not torch.allclose(judge(seed=1).errors(images), judge(seed=0).errors(images), rtol=1e-2)


def test_antithetic_noise_makes_differences_of_a_linear_network_exact():
    images = draw_images(1)
    found = [judge("eps", antithetic=True, seed=seed).errors(images) for seed in (0, 1)]
    first, second = (errors - errors[:, :1] for errors in found)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    plain = [judge("eps", seed=seed).errors(images) for seed in (0, 1)]
    first, second = (errors - errors[:, :1] for errors in plain)
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_overflows_is_named(value):
    def overflow(module, args, kwargs, prediction):
        lost = (kwargs["labels"] == 2) & (args[1] == 300)
        return prediction.masked_fill(lost[:, None, None, None], value)

    classifier = judge(batch_size=7)
    classifier.backbone.model.register_forward_hook(overflow, with_kwargs=True)
    with pytest.raises(FloatingPointError, match="gaussian-flow returns no finite prediction for class 2 at t=300"):
        classifier.classify(draw_images(1))


def test_losses_are_named_in_the_order_of_their_columns():
    assert LOSSES == ("l2", "l1", "huber")
    images = draw_images(1)
    for column, loss in enumerate(LOSSES):
        classifier = judge(loss=loss)
        np.testing.assert_array_equal(classifier.errors(images), classifier.measure(images).errors[..., column])
