import numpy as np
import pytest
import torch

from repkit.images import digest, to_uint8
from repkit.noise import noise_like
from repkit.zeroshot.antithetic import antithetic_correlation
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.staged import Staged
from repkit.zeroshot.strategies import Uniform
from tests import tiny
from tests.oracles import bayes_log_posterior, class_means, gaussian_backbone, gaussian_images

MEANS, VARIANCE = class_means(4, spread=0.03), 0.01
IMAGES = gaussian_images(MEANS, VARIANCE, torch.arange(4).repeat(2))


def judge(**options) -> DiffusionClassifier:
    given = {"strategy": Uniform(8), "weighting": "train", "batch_size": 64} | options
    return DiffusionClassifier(gaussian_backbone("eps", MEANS, VARIANCE), range(4), **given)


@pytest.mark.parametrize("strategy", [Uniform(8), Staged((2, 1), (2, 4), "diffusion-classifier", trials=2)], ids=repr)
def test_noise_cancels_where_the_network_is_linear_in_it(strategy) -> None:
    assert antithetic_correlation(judge(strategy=strategy), IMAGES) == pytest.approx(-1, abs=1e-4)


def test_both_signs_leave_only_the_truth_of_equal_covariances() -> None:
    truth = bayes_log_posterior(IMAGES, MEANS, VARIANCE)
    rest = []
    for antithetic in (False, True):
        options = {"antithetic": antithetic, "weighting": "elbo", "spacing": "logsnr", "strategy": Uniform(32)}
        posterior = judge(**options).classify(IMAGES)
        ratios = posterior.log_posterior - posterior.log_posterior[:, :1]
        rest.append((ratios - (truth - truth[:, :1])).abs().max().item())
        assert posterior.evaluations.tolist() == [4 * 32 * (1 + antithetic)] * len(IMAGES)
    assert rest[1] < 0.05 * rest[0]


def test_it_is_the_variance_that_a_second_sign_leaves() -> None:
    """By hand on a network that is not linear: the correlation of class differences over noises, without the signal."""
    backbone = tiny.grey_unet()
    classifier = DiffusionClassifier(backbone, tiny.NAMES[:2], strategy=Uniform(2), weighting="train", batch_size=64)
    images = torch.cat([tiny.images(1, seed=seed) for seed in range(6)])
    found = antithetic_correlation(classifier, images, levels=2)
    pairs = []
    for image in images:
        x0, name = backbone.encode(image[None]), digest(to_uint8(image[None])[0])
        for t in classifier.levels.t.tolist():
            draws = [noise_like(x0.shape[1:], seed=0, digest=name, t=t, draw=draw)[None] for draw in (0, 1)]
            fresh = np.array([[difference(backbone, x0, sign * eps, int(t)) for sign in (1, -1)] for eps in draws])
            pairs.append(fresh[0] - fresh[1])
    plus, minus = np.array(pairs).T
    assert found == pytest.approx((plus * minus).sum() / np.sqrt((plus**2).sum() * (minus**2).sum()), abs=1e-3)
    assert -1 < found < 1


def difference(backbone, x0: torch.Tensor, eps: torch.Tensor, t: int) -> float:
    """Squared v-error told the first class, less that told the second."""
    kept = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t]
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    x_t, v = (alpha * x0 + sigma * eps).float(), (alpha * eps - sigma * x0)
    with torch.no_grad():
        each = [backbone.model(x_t, t, class_labels=torch.tensor([label])).sample[:, :1] for label in (0, 1)]
    return float(((v - each[0]) ** 2).sum() - ((v - each[1]) ** 2).sum())


def test_levels_are_limited_and_the_classifier_is_as_it_was() -> None:
    classifier = judge(strategy=Uniform(16), shortlist=lambda images: pytest.fail("all classes are looked at"))
    before = dict(vars(classifier))
    assert antithetic_correlation(classifier, IMAGES[:2], levels=2) == pytest.approx(-1, abs=1e-4)
    assert vars(classifier) == before


def test_noise_without_effect_is_told() -> None:
    classifier = DiffusionClassifier(tiny.grey_unet(), tiny.NAMES, strategy=Uniform(2), weighting="train")
    embedding = classifier.backbone.model.class_embedding
    embedding.weight.data[:] = embedding.weight[:1]  # every class is the same to it
    with pytest.raises(ValueError, match="noise makes no difference between classes on 1 images"):
        antithetic_correlation(classifier, tiny.images(1))
