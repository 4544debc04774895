"""Antithetic noise: whether each noise is worth being used with both signs, measured on a few images."""

from copy import copy
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from repkit.extractors import Images
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.levels import Levels
from repkit.zeroshot.strategies import Uniform, visit_order


def antithetic_correlation(classifier: DiffusionClassifier, images: Images, *, levels: int = 16) -> float:
    """The correlation of the evidence between classes at +eps and at -eps, in [-1, 1]; antithetic noise pays below 0.

    The mean over both signs has (1 + correlation) / 2 of the variance of one evaluation, where two independent noises
    have 1/2. What the noises of an image and a level have in common is the signal, and is not part of it.
    images: a few dozen, unlabelled. levels: how many of the classifier's are looked at, four times for each class.
    Raises ValueError where the noise makes no difference between classes.
    """
    plus, minus = (_evidence_noise(classifier, images, levels, sign) for sign in (1, -1))
    size = float(np.sqrt((plus**2).sum() * (minus**2).sum()))
    if size == 0:
        raise ValueError(f"noise makes no difference between classes on {len(images)} images; give other images")
    return float((plus * minus).sum()) / size


def _evidence_noise(
    classifier: DiffusionClassifier, images: Images, levels: int, sign: int
) -> Float64[np.ndarray, "b j n"]:
    """Evidence at one noise less that at another, in which the signal cancels; relative to the mean over conditions.

    Products of it, summed over conditions, are those of the differences of all pairs of conditions.
    """
    kept = np.sort(visit_order(len(classifier.levels))[:levels])
    pilot = copy(classifier.complete)
    pilot.signs, pilot.levels, pilot.strategy = (sign,), _twice(classifier.levels, kept), Uniform(2 * len(kept))
    pilot.rule = replace(classifier.rule, weights=np.repeat(classifier.rule.weights[kept], 2))
    evidence = pilot.rule.evidence(pilot.measure(images).errors)
    noise = evidence[..., 0::2] - evidence[..., 1::2]
    return noise - noise.mean(1, keepdims=True)


def _twice(levels: Levels, kept: np.ndarray) -> Levels:
    """Some of the levels, each with two noises."""
    arrays = {name: np.repeat(one[kept], 2) for name, one in vars(levels).items() if isinstance(one, np.ndarray)}
    arrays["draw"] = 2 * arrays["draw"] + np.tile([0, 1], len(kept))
    return replace(levels, **arrays)  # type: ignore[arg-type]  # of arrays alone
