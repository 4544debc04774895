from collections.abc import Iterator

import numpy as np
import pytest
import torch

from repkit.backbones.unet import UNet
from repkit.images import digest, to_uint8
from repkit.noise import noise_like
from repkit.schedule import Schedule
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.errortable import replay
from repkit.zeroshot.evaluating import LOSSES
from repkit.zeroshot.racing import Racing
from repkit.zeroshot.staged import PUBLISHED, Staged
from repkit.zeroshot.strategies import Strategy, Uniform
from tests import tiny
from tests.oracles import alphas_cumprod, class_means, gaussian_backbone, gaussian_images

STEPS = 1000
NFE = {  # of the published code, an image
    "food101": 5570,
    "cifar10": 2750,
    "aircraft": 5550,
    "pets": 2050,
    "flowers102": 5590,
    "stl10": 3000,
    "imagenet": 124500,
    "objectnet": 14400,
}
MEANS, VARIANCE = class_means(5, spread=0.03), 0.01


def looks(strategy: Strategy, evidence: np.ndarray, owner: np.ndarray | None = None) -> Iterator[tuple[list, list]]:
    """What a strategy asks for of one image, given the evidence of every (condition, level)."""
    conditions = np.arange(len(evidence))
    known, run = np.full(evidence.shape, np.nan), strategy.run(conditions, conditions if owner is None else owner)
    asked = next(run)
    while True:
        assert np.isnan(known[np.ix_(*asked)]).all(), "asked for twice"
        known[np.ix_(*asked)] = evidence[np.ix_(*asked)]
        yield asked[0].tolist(), asked[1].tolist()
        try:
            asked = run.send(known)
        except StopIteration as stop:
            assert stop.value is True
            return


def published(errors: np.ndarray, keep: list[int], samples: list[int], trials: int = 1) -> list[tuple[list, list]]:
    """The published algorithm on errors [prompt time trial]: (prompts, times) of each stage, plain and slow."""
    grid = list(range(STEPS // max(samples) // 2, STEPS, STEPS // max(samples)))[: max(samples)]
    done: list[int] = []
    losses: dict[int, list[float]] = {prompt: [] for prompt in range(len(errors))}
    remaining, stages = list(losses), []
    for kept, count in zip(keep, samples, strict=True):
        stage = grid[len(grid) // count // 2 :: len(grid) // count][:count]
        fresh = [t for t in stage if t not in done]
        done.extend(fresh)
        for prompt in remaining:
            for t in fresh:
                losses[prompt].extend(errors[prompt, t, trial] for trial in range(trials))
        stages.append((list(remaining), fresh))
        scores = torch.tensor([-np.mean(losses[prompt]) for prompt in remaining])
        remaining = [remaining[place] for place in torch.topk(scores, k=kept).indices.tolist()]
    return [*stages, (remaining, [])]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("keep", "samples", "trials"),
    [([5, 1], [50, 500], 1), ([6, 3, 1], [7, 20, 60], 1), ([20, 10, 5, 1], [20, 50, 100, 500], 1), ([4, 1], [3, 8], 3)],
)
def test_looks_and_survivors_are_the_published_ones(rng, ties, keep, samples, trials) -> None:
    strategy = Staged(keep, samples, compat="diffusion-classifier", trials=trials)
    levels = strategy.levels(Schedule.discrete(alphas_cumprod().tolist(), "eps"), "native")
    prompts = max(samples[0], 12)
    for _ in range(5):
        errors = rng.integers(0, 2, (prompts, STEPS, trials)) if ties else rng.random((prompts, STEPS, trials))
        if ties:
            errors[1::2] = errors[::2]  # every prompt has a twin
        found = list(looks(strategy, errors[:, levels.t.astype(int), levels.draw].astype(float)))
        *stages, _ = published(errors, keep, samples, trials)
        assert [prompts for prompts, _ in found] == [prompts for prompts, _ in stages]
        for (_, places), (_, times) in zip(found, stages, strict=True):
            told = list(zip(levels.t[places].astype(int).tolist(), levels.draw[places].tolist(), strict=True))
            assert told == [(t, trial) for t in times for trial in range(trials)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_tables_cost_what_the_published_code_did(rng, name) -> None:
    setting = PUBLISHED[name]
    evidence = rng.random((setting.classes, setting.samples[-1]))
    asked = looks(setting.strategy, evidence)
    assert sum(len(classes) * len(levels) for classes, levels in asked) == NFE[name]
    assert setting.loss in LOSSES and "{}" in setting.template


def test_plain_stages_are_nested_even_and_cost_what_they_say(rng) -> None:
    strategy = Staged((4, 2, 1), (8, 16, 64))
    found = list(looks(strategy, rng.random((10, 64))))
    assert [(len(classes), len(levels)) for classes, levels in found] == [(10, 8), (4, 8), (2, 48)]
    assert sorted(found[0][1]) == list(range(0, 64, 8))
    assert sorted(found[0][1] + found[1][1]) == list(range(0, 64, 4))
    assert sorted(sum((levels for _, levels in found), [])) == list(range(64))


def test_plain_stages_keep_the_classes_of_the_best_prompts() -> None:
    evidence = np.array([5.0, 1.0, 2.0, 9.0, 3.0, 4.0])[:, None].repeat(8, 1)  # best of each class: 1, 2, 3
    owner = np.array([0, 0, 1, 1, 2, 2])
    plain = list(looks(Staged((2, 1), (2, 8)), evidence, owner))
    assert [classes for classes, _ in plain] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]]
    compat = list(looks(Staged((2, 1), (2, 8), compat="diffusion-classifier"), evidence, owner))
    assert [classes for classes, _ in compat] == [[0, 1, 2, 3, 4, 5], [1, 2]]


def labelled_unet() -> UNet:
    """Predicts eps, told one of three classes."""
    return UNet(tiny.unet_model(num_class_embeds=4), tiny.linear("eps"), class_names=tiny.NAMES)


def errors_by_hand(backbone: UNet, images: torch.Tensor, times: list[int], trials: int) -> dict[str, torch.Tensor]:
    """[image class time*trials] of each loss, one forward at a time; the mean over dimensions, as published."""
    kept = torch.from_numpy(alphas_cumprod())
    losses = {
        "l2": lambda target, found: torch.nn.functional.mse_loss(found, target),
        "l1": lambda target, found: torch.nn.functional.l1_loss(found, target),
        "huber": lambda target, found: torch.nn.functional.huber_loss(found, target),
    }
    shape = (len(images), len(tiny.NAMES), len(times) * trials)
    table = {name: torch.zeros(shape, dtype=torch.float64) for name in losses}
    for row, image in enumerate(images):
        x0, name = 2 * image - 1, digest(to_uint8(image[None])[0])
        for place, (t, trial) in enumerate((t, trial) for t in times for trial in range(trials)):
            eps = noise_like(x0.shape, seed=3, digest=name, t=t, draw=trial)
            x_t = (kept[t].sqrt() * x0.double() + (1 - kept[t]).sqrt() * eps.double()).float()
            for label in range(len(tiny.NAMES)):
                found = backbone.model(x_t[None], t, class_labels=torch.tensor([label])).sample[0]
                for loss, rho in losses.items():
                    table[loss][row, label, place] = rho(eps, found)
    return table


@pytest.mark.parametrize("trials", [1, 2])
def test_parity_with_a_loop_over_the_network(trials) -> None:
    backbone, images, keep, samples = labelled_unet(), tiny.images(2), [2, 1], [2, 5]
    grid = list(range(STEPS // 5 // 2, STEPS, STEPS // 5))
    with torch.no_grad():
        expected = errors_by_hand(backbone, images, grid, trials)
    strategy = Staged(keep, samples, compat="diffusion-classifier", trials=trials)
    for loss in LOSSES:
        judge = DiffusionClassifier(
            backbone, tiny.NAMES, strategy=strategy, weighting="train", loss=loss, mixture="best", seed=3, batch_size=5
        )
        assert judge.levels.t.tolist() == np.repeat(grid, trials).tolist()
        errors = judge.errors(images) / images[0].numel()
        torch.testing.assert_close(errors, expected[loss], rtol=1e-5, atol=0)
        posterior = judge.classify(images)
        for row in range(len(images)):
            by_time = np.full((len(tiny.NAMES), STEPS, trials), np.nan)
            by_time[:, grid] = expected[loss][row].numpy().reshape(len(tiny.NAMES), len(grid), trials)
            stages = published(by_time, keep, samples, trials)
            assert posterior.evaluations[row] == sum(len(prompts) * len(times) * trials for prompts, times in stages)
            assert posterior.labels[row] == tiny.NAMES[stages[-1][0][0]]


@pytest.mark.parametrize(
    "strategy",
    [
        Uniform(16),
        Staged((3, 2, 1), (3, 6, 16)),
        Staged((3, 1), (3, 16), trials=2),
        Staged((3, 2, 1), (3, 6, 16), compat="diffusion-classifier"),
        Racing(delta=0.05, max_evaluations=16),
    ],
    ids=repr,
)
def test_live_and_replayed_runs_are_the_same(strategy) -> None:
    backbone = gaussian_backbone("eps", MEANS, VARIANCE)
    images = gaussian_images(MEANS, VARIANCE, torch.arange(5).repeat(4))
    judge = DiffusionClassifier(backbone, range(5), strategy=strategy, weighting="train", batch_size=32)
    live = judge.measure(images)
    replayed = replay(judge.complete.measure(images), strategy, judge.rule.weights)
    np.testing.assert_array_equal(np.isnan(live.errors), np.isnan(replayed.errors))
    np.testing.assert_allclose(live.errors, replayed.errors, rtol=1e-6)
    assert live.decided.tolist() == replayed.decided.tolist()
    found, again = judge.rule.posterior(live), judge.rule.posterior(replayed)
    assert found.labels == again.labels and found.evaluations.equal(again.evaluations)


def test_what_a_schedule_does_not_have_is_told() -> None:
    strategy = PUBLISHED["cifar10"].strategy
    with pytest.raises(ValueError, match="500 steps of a discrete schedule.*this one is flow"):
        strategy.levels(Schedule.flow(), "native")
    with pytest.raises(ValueError, match="in logsnr spacing; leave compat out"):
        strategy.levels(tiny.linear(), "logsnr")
    with pytest.raises(ValueError, match="of 10 steps"):
        strategy.levels(Schedule.from_betas("linear", steps=10), "native")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": [5, 1], "samples": [50]}, "one number a stage in each"),
        ({"keep": [], "samples": []}, "one number a stage in each"),
        ({"keep": [5, 2], "samples": [5, 50]}, "the last one 1"),
        ({"keep": [2, 5, 1], "samples": [5, 50, 60]}, "numbers of classes that fall"),
        ({"keep": [5, 1], "samples": [50, 50]}, "numbers of evaluations that rise"),
        ({"keep": [5, 1], "samples": [0, 50]}, "rise, from 1 on"),
        ({"keep": [1], "samples": [1]}, "at least 2 evaluations"),
        ({"keep": [1], "samples": [4], "trials": 0}, "trials=0"),
        ({"keep": [1], "samples": [4], "compat": "dc"}, "no compat 'dc'; have diffusion-classifier"),
    ],
)
def test_bad_schedules_are_told(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Staged(**options)
