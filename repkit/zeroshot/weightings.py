"""Weightings: what an error at each noise level counts for, as a function of the level alone.

Each gives w so that the evidence is the mean over the levels of w * error, whatever the spacing of the levels. Only
`elbo` makes that mean (an upper bound of) a negative log-likelihood; every result carries its weighting's name.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float64

from repkit.zeroshot.levels import Levels

Vector = Float64[np.ndarray, "n"]

EDM_MEAN, EDM_SPREAD = -1.2, 1.2  # of log sigma in training, Karras et al. 2022
MIN_SNR_GAMMA = 5.0
SIGMOID_BIAS = 2.0
MODE_SCALE = 1.29  # the scale that diffusers' training scripts take


def train(levels: Levels) -> Vector:
    """The network's own target at uniform native time: 1, or the density that brings other spacings back to it."""
    return levels.density


def elbo(levels: Levels) -> Vector:
    """The likelihood: half the integral of the eps-error over log-SNR (Kingma et al. 2021)."""
    return 0.5 * levels.slope * levels.eps_scale**2


def min_snr(levels: Levels) -> Vector:
    """x0-error times min(SNR, 5) (Hang et al. 2023), at uniform native time."""
    snr = np.exp(levels.logsnr)
    return levels.density * levels.eps_scale**2 * np.minimum(snr, MIN_SNR_GAMMA) / snr


def sigmoid(levels: Levels) -> Vector:
    """The elbo times sigmoid(2 - log-SNR) (Kingma and Gao 2023)."""
    return elbo(levels) / (1 + np.exp(levels.logsnr - SIGMOID_BIAS))


def lognormal(levels: Levels) -> Vector:
    """EDM's training: log sigma drawn from N(-1.2, 1.2^2) (Karras et al. 2022)."""
    _check_kind(levels, "edm", "lognormal")
    place = (np.log(levels.sigma) - EDM_MEAN) / EDM_SPREAD
    return levels.density * np.exp(-0.5 * place**2)


def logit_normal(levels: Levels) -> Vector:
    """Flow times drawn as the sigmoid of N(0, 1) (Esser et al. 2024)."""
    s = _flow_time(levels, "logit-normal")
    logit = np.log(s / (1 - s))
    return levels.density * np.exp(-0.5 * logit**2) / (s * (1 - s)) / np.sqrt(2 * np.pi)


def mode(levels: Levels) -> Vector:
    """Flow times drawn as t = 1 - u - 1.29 (cos^2(pi u / 2) - 1 + u) of a uniform u (Esser et al. 2024)."""
    s, u = _flow_time(levels, "mode"), np.linspace(0, 1, 100_001)
    drawn = 1 - u - MODE_SCALE * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    slope = 1 + MODE_SCALE - MODE_SCALE * np.pi / 2 * np.sin(np.pi * u)  # of -t in u, above 0
    return levels.density / np.interp(s, drawn[::-1], slope[::-1])


def cosmap(levels: Levels) -> Vector:
    """Flow times drawn so that log-SNR is spread as on the cosine schedule (Esser et al. 2024)."""
    s = _flow_time(levels, "cosmap")
    return levels.density * 2 / (np.pi * (1 - 2 * s + 2 * s**2))


def sigma_sqrt(levels: Levels) -> Vector:
    """Flow errors divided by sigma^2."""
    return levels.density / _flow_time(levels, "sigma-sqrt") ** 2


WEIGHTINGS: Mapping[str, Callable[[Levels], Vector]] = {
    "train": train,
    "elbo": elbo,
    "min-snr": min_snr,
    "sigmoid": sigmoid,
    "lognormal": lognormal,
    "logit-normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
    "sigma-sqrt": sigma_sqrt,
}
# The others convert squared errors.
OF_ANY_LOSS = ("train", "lognormal", "logit-normal", "mode", "cosmap", "sigma-sqrt")


def weigh(weighting: str, levels: Levels, loss: str = "l2") -> Vector:
    """The weights of a named weighting, finite and >= 0.

    Raises ValueError for a name that is not known, for a loss or a schedule it is not defined for, and at levels where
    a weight is not finite.
    """
    if weighting not in WEIGHTINGS:
        known = ", ".join(WEIGHTINGS)
        raise ValueError(f"no weighting {weighting!r}; have {known}, or a table that was fitted (FILE.json of --fit)")
    if loss != "l2" and weighting not in OF_ANY_LOSS:
        raise ValueError(f"weighting {weighting!r} is defined for l2 errors, not {loss}; take train, or l2")
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = WEIGHTINGS[weighting](levels)
    if not np.isfinite(weights).all():
        t = levels.t[~np.isfinite(weights)][0]
        raise ValueError(f"weighting {weighting!r} is not finite at t={t:g}, a level without signal or without noise")
    return weights


def _check_kind(levels: Levels, kind: str, weighting: str) -> None:
    if levels.kind != kind:
        raise ValueError(f"weighting {weighting!r} is for {kind} schedules, not {levels.kind}; take train or elbo")


def _flow_time(levels: Levels, weighting: str) -> Vector:
    _check_kind(levels, "flow", weighting)
    return levels.sigma
