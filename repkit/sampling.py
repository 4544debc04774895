"""Sampling: from noise, or from a noised image, down to data by the deterministic sampler of any schedule."""

from collections.abc import Callable
from itertools import zip_longest

import torch
from jaxtyping import Float, Num
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Condition
from repkit.schedule import Schedule

Latents = Float[Tensor, "b c h w"]
Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> what the network predicts; t is a scalar, native
Keep = Callable[[Tensor, Tensor], Tensor]


def sampling_times(schedule: Schedule, steps: int, *, strength: float = 1.0) -> Num[Tensor, " n"]:
    """The native times of `steps` steps, most noise first, evenly spread as in `Schedule.time_at`.

    strength: at which share of the schedule they begin: 1 at pure noise; at 0 there are none. A discrete schedule
    gives fewer times where it has not as many steps below. Raises ValueError for other steps or strengths.
    """
    if steps < 1 or not 0 <= strength <= 1:
        raise ValueError(f"steps={steps}, strength={strength}; give 1 step or more, and a strength from 0 to 1")
    if strength == 0:
        return torch.empty(0)
    u = strength * torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    times = schedule.time_at(u.clamp(max=1 - 1e-6))
    assert isinstance(times, Tensor)
    return times.unique_consecutive()


@torch.no_grad()
def sample(
    schedule: Schedule, predict: Predict, x_t: Latents, times: Num[Tensor, " n"], *, keep: Keep | None = None
) -> Latents:
    """Data x0 from x_t at the first of `times`: one forward for each, and the last one's estimate of x0.

    DDIM without noise (Song et al. 2021); for flows and EDM schedules that is an Euler step of their ODE. keep: what
    becomes of x after each step, with the time that it is at then. Without times, x_t is returned as it is.
    Raises ValueError where a prediction does not determine x0, as eps at pure noise.
    """
    for t, following in zip_longest(times, times[1:]):
        prediction = predict(x_t, t)
        x0 = schedule.convert(prediction, x_t, t, to="x0")
        if following is None:
            return x0
        x_t = schedule.add_noise(x0, schedule.convert(prediction, x_t, t, to="eps"), following)
        if keep is not None:
            x_t = keep(x_t, following)
    return x_t


def predictor(
    backbone: Backbone, condition: Condition, *, null: Condition | None = None, guidance: float = 1.0
) -> Predict:
    """The backbone told `condition`, for `sample`.

    guidance: other than 1, the prediction is that of `null` plus so many times the way from it to that of `condition`
    (classifier-free guidance), at two forwards a step. What is predicted makes no difference: x0, eps, v and the others
    are affine functions of each other at any x_t. Raises ValueError for guidance without `null`.
    """
    if guidance == 1:
        return lambda x_t, t: backbone.denoise(x_t, t, condition)
    if null is None:
        raise ValueError(f"guidance={guidance} needs what to be guided away from; give null=, or guidance=1")

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        without = backbone.denoise(x_t, t, null)
        return without + guidance * (backbone.denoise(x_t, t, condition) - without)

    return guided
