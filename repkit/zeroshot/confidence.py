"""Confidence: what finitely many noises leave in doubt, apart from what the model itself leaves in doubt."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

if TYPE_CHECKING:
    from repkit.zeroshot.posterior import Posterior

DRAWS = 2048
NODES = 32


def top_probability(
    log_posterior: Float64[Tensor, "b k"], standard_errors: Float64[Tensor, "b k"]
) -> Float64[Tensor, "b"]:
    """The probability that the likeliest class would still be it after infinitely many draws.

    standard_errors: in nats, of each class's difference to the best one. The differences share the best class's noise:
    taken to be normal with correlation 1/2, as it is where all classes' noises are independent and equally large. The
    integral over what they share is a Gauss-Hermite sum.
    """
    top = log_posterior.argmax(1, keepdim=True)
    margin = log_posterior.gather(1, top) - log_posterior
    # Another than the best by score alone can be on top, by its prior or bias; then both errors count.
    ratio = _ratio(margin, torch.hypot(standard_errors, standard_errors.gather(1, top)))
    total = torch.zeros(len(margin), dtype=torch.float64)
    for shared, weight in zip(*np.polynomial.hermite_e.hermegauss(NODES), strict=True):
        stays = torch.special.log_ndtr(2**0.5 * ratio + shared)
        total += weight / (2 * np.pi) ** 0.5 * stays.scatter(1, top, 0.0).sum(1).exp()
    return total.clamp(max=1.0)


def marginal_log_posterior(posterior: "Posterior", *, seed: int = 0) -> Float64[Tensor, "b k"]:
    """The log posterior averaged over what its standard errors leave open, which makes it less sure.

    For a temperature that holds without noise, such as one fitted at many more evaluations; one fitted at as few has
    the noise in it already. The mean of the softmax over 2048 draws, the same for each image, of normal errors of the
    differences to the best class, with correlation 1/2 as in `top_probability`.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(DRAWS // 2, len(posterior.classes) + 1, generator=generator, dtype=torch.float64)
    draws = torch.cat([half, -half])
    errors = (draws[:, 1:] + draws[:, :1]) / 2**0.5
    spread = torch.nan_to_num(posterior.standard_errors / posterior.temperature, posinf=0.0)
    rows = [
        torch.log_softmax(row + width * errors, 1).logsumexp(0) - np.log(DRAWS)
        for row, width in zip(posterior.log_posterior, spread, strict=True)
    ]
    return torch.stack(rows)


def _ratio(margin: Float64[Tensor, "b k"], spread: Float64[Tensor, "b k"]) -> Float64[Tensor, "b k"]:
    """margin / spread; a class that is out of the question stays out, and equal ones with no doubt are even."""
    ratio = margin / spread
    return torch.where(torch.isinf(margin), margin, torch.nan_to_num(ratio, nan=0.0, posinf=torch.inf))
