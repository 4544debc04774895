"""Typicality on Gaussian images, whose errors are known, and on the bundled model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from repkit.datasets import fashion_mnist
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.strategies import Uniform
from repkit.zeroshot.typicality import Typicality
from repkit.zoo import load
from tests.error_tables import table_of
from tests.oracles import class_means, gaussian_backbone, gaussian_images

MEANS, VARIANCE = class_means(3, spread=0.03), 0.01


@pytest.fixture(scope="module")
def judge():
    backbone = gaussian_backbone("flow", MEANS, VARIANCE)
    return DiffusionClassifier(backbone, range(3), strategy=Uniform(16), batch_size=4096)


@pytest.fixture(scope="module")
def reference(judge):
    labels = torch.arange(3).repeat(70)
    return Typicality.fit(judge.measure(gaussian_images(MEANS, VARIANCE, labels)))


def test_images_of_the_distribution_are_typical(judge, reference):
    fresh = judge.measure(gaussian_images(MEANS, VARIANCE, torch.arange(3).repeat(50), seed=1))
    z = reference.z_scores(fresh)
    assert z.shape == (150, 8)
    assert np.abs(z.mean(0)).max() < 0.35 and 0.7 < z.std() < 1.3
    assert 0.8 < np.sqrt((reference.score(fresh) ** 2).mean()) < 1.25
    assert 0.4 < reference.share(fresh).mean() < 0.6


@pytest.mark.parametrize("scale", [3.0, 0.0])
def test_too_rough_and_too_smooth_images_are_both_untypical(judge, reference, scale):
    """The smooth ones have a higher likelihood than any image of the distribution."""
    labels = torch.arange(3).repeat(5)
    strange = gaussian_images(MEANS, VARIANCE * scale, labels, seed=2)
    table = judge.measure(strange)
    z = reference.z_scores(table)
    assert (z.mean(1) > 1).all() if scale else (z.mean(1) < -1).all()
    assert (reference.score(table) > 2).all()
    assert (reference.share(table) <= 0.05).all()


def test_errors_without_a_condition_are_taken_where_there_are_some(rng):
    errors = rng.gamma(20, size=(40, 3, 8)) + 1
    table = replace(table_of(errors), conditions=(0, None, 1))
    flat = table_of(np.repeat(errors[:, 1:2], 3, 1))
    np.testing.assert_allclose(Typicality.fit(table).score(table), Typicality.fit(flat).score(flat))


def test_z_scores_are_of_log_means_of_bands(rng):
    errors = np.repeat(rng.gamma(20, size=(30, 1, 16)) + 1, 2, 1)
    bands = np.log(errors[:, 0].reshape(30, 8, 2).mean(2))
    expected = (bands - bands.mean(0)) / bands.std(0, ddof=1)
    table = table_of(errors)
    np.testing.assert_allclose(Typicality.fit(table).z_scores(table), expected)


def test_other_levels_gaps_and_a_lone_image_are_told(rng):
    errors = rng.gamma(20, size=(5, 2, 8))
    fitted = Typicality.fit(table_of(errors))
    with pytest.raises(ValueError, match="7 levels, not the 8 of the reference"):
        fitted.score(table_of(errors[:, :, :7]))
    with pytest.raises(ValueError, match="no loss 'l3'; have l2, l1, huber"):
        Typicality.fit(table_of(errors), loss="l3")
    with pytest.raises(ValueError, match="1 images in the reference"):
        Typicality.fit(table_of(errors[:1]))
    errors[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="has gaps"):
        Typicality.fit(table_of(errors))


def test_noise_and_inverted_photos_are_untypical_to_the_bundled_model():
    backbone = load("mini-unet")
    judge = DiffusionClassifier(backbone, [0, 1, 9], strategy=Uniform(8), weighting="train")
    pictures, _ = fashion_mnist.load("train")
    known = torch.from_numpy(np.pad(pictures[:24], ((0, 0), (2, 2), (2, 2)))).float().div(255)
    known = known[:, None].expand(-1, 3, -1, -1)
    fitted = Typicality.fit(judge.measure(known[:18]))
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    usual, inverted, noisy = (fitted.score(judge.measure(one)) for one in (known[18:], 1 - known[18:21], noise))
    assert np.median(usual) < 1.5 and inverted.min() > 2 and noisy.min() > inverted.max()
