"""Evidence maps: their sums are the scores' differences, and they lie where the classes differ."""

import numpy as np
import pytest
import torch

from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.evidence import evidence_maps
from repkit.zeroshot.strategies import Uniform
from tests import tiny
from tests.oracles import class_means, gaussian_backbone, gaussian_images

MEANS, VARIANCE = class_means(3, spread=0.03), 0.01


def judge_of(**options):
    backbone = gaussian_backbone("flow", MEANS, VARIANCE)
    return DiffusionClassifier(backbone, range(3), **({"strategy": Uniform(6), "batch_size": 64} | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "l1"},
        {"loss": "huber", "batch_size": 3},
        {"weighting": "elbo", "antithetic": True, "spacing": "logsnr"},
    ],
)
def test_a_map_sums_to_the_difference_of_the_scores(options):
    judge, images = judge_of(**options), gaussian_images(MEANS, VARIANCE, torch.arange(3))
    maps = evidence_maps(judge, images, 2, 0)
    scores = judge.classify(images).scores
    assert maps.shape == (3, 4, 4)
    np.testing.assert_allclose(maps.sum((1, 2)), scores[:, 0] - scores[:, 2], rtol=1e-4, atol=1e-4)


def test_exchanged_classes_turn_the_sign():
    judge, images = judge_of(), gaussian_images(MEANS, VARIANCE, torch.arange(3))
    torch.testing.assert_close(evidence_maps(judge, images, 0, 1), -evidence_maps(judge, images, 1, 0))


def test_the_evidence_lies_where_the_classes_differ():
    means = torch.zeros(2, 3, 4, 4)
    means[1, :, 1, 2] = 0.3
    backbone = gaussian_backbone("flow", means, VARIANCE)
    judge = DiffusionClassifier(backbone, [0, 1], strategy=Uniform(8))
    images = gaussian_images(means, VARIANCE, torch.tensor([1]))
    found = evidence_maps(judge, images, 1, 0)[0]
    assert found.argmax() == 6 and found[1, 2] > 0
    others = found.clone()
    others[1, 2] = 0
    assert others.abs().max() < 1e-3 * found[1, 2]


def test_images_and_batches_do_not_mix():
    images = gaussian_images(MEANS, VARIANCE, torch.arange(3))
    together = evidence_maps(judge_of(), images, 0, 1)
    alone = torch.cat([evidence_maps(judge_of(batch_size=2), image[None], 0, 1) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_a_network_with_attention_agrees_with_its_scores():
    judge = DiffusionClassifier(tiny.grey_unet(), ["cat", "owl"], strategy=Uniform(3))
    images = torch.rand(2, 3, judge.backbone.size, judge.backbone.size, generator=torch.Generator().manual_seed(0))
    maps = evidence_maps(judge, images, "owl", "cat")
    scores = judge.classify(images).scores
    np.testing.assert_allclose(maps.sum((1, 2)), scores[:, 0] - scores[:, 1], rtol=1e-3, atol=1e-2)


def test_unknown_prompts_are_told():
    with pytest.raises(ValueError, match="no prompt 7; have 0, 1, 2"):
        evidence_maps(judge_of(), torch.zeros(1, 3, 4, 4), 0, 7)
