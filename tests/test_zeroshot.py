import math

import numpy as np
import pytest
import torch
from PIL import Image

from repkit.images import to_uint8
from repkit.zeroshot import DiffusionClassifier, Posterior, fit_temperature, log_posterior
from tests.oracles import (
    PREDICTIONS,
    alphas_cumprod,
    bayes_log_posterior,
    class_means,
    gaussian_backbone,
    gaussian_images,
)

VARIANCE = 0.01
MEANS = class_means(5, spread=0.06)


def draw_images(per_class, means=MEANS, variance=VARIANCE, seed=0):
    labels = torch.arange(len(means)).repeat(per_class)
    return gaussian_images(means, variance, labels, seed=seed), labels


def classifier(prediction="v", means=MEANS, classes=None, **options):
    options = {"evaluations": 16, "batch_size": 512} | options
    return DiffusionClassifier(
        gaussian_backbone(prediction, means, VARIANCE), classes or range(len(means)), **options
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_decides_like_bayes(prediction):
    images, labels = draw_images(40)
    truth = bayes_log_posterior(images, MEANS, VARIANCE).argmax(1)
    found = torch.tensor(classifier(prediction, evaluations=64).predict(images))
    bayes, ours = ((guess == labels).double().mean().item() for guess in (truth, found))
    print(prediction, bayes, ours, (found == truth).double().mean().item())
