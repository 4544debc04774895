"""Levels: the noise levels at which a classifier looks, and what every weighting needs to know of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64, Int

from repkit.schedule import Schedule

Spacing = Literal["native", "shifted", "logsnr"]
FARTHEST = 13.8  # of log-SNR, at which flows and discrete steps are cut: a thousandth of the noise or of the image

Vector = Float64[np.ndarray, "n"]


@dataclass(frozen=True, eq=False)
class Levels:
    """The noise levels of the evaluations that every class gets, least noise first; one entry an evaluation.

    u: place in [0, 1). t: native time. draw: which noise at that time, counted from 0. alpha, sigma, logsnr: of x_t.
    density: dt/du over its mean, with which a mean over the levels becomes one over uniform native time. slope:
    -dlogsnr/du. eps_scale: error in eps over error in what the network predicts. kind, prediction: of the schedule.
    """

    u: Vector
    t: Vector
    draw: Int[np.ndarray, "n"]
    alpha: Vector
    sigma: Vector
    logsnr: Vector
    density: Vector
    slope: Vector
    eps_scale: Vector
    kind: str
    prediction: str

    def __len__(self) -> int:
        return len(self.u)

    def to_json(self) -> dict[str, Any]:
        """As plain lists."""
        return {name: one.tolist() if isinstance(one, np.ndarray) else one for name, one in asdict(self).items()}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Levels":
        """From what `to_json` gave."""
        given = {field.name: told[field.name] for field in fields(cls)}
        arrays: dict[str, Any] = {name: np.asarray(one) for name, one in given.items() if isinstance(one, list)}
        return cls(**(given | arrays))


def strata(count: int) -> Vector:
    """The middles of `count` equal strata of [0, 1)."""
    return (np.arange(count) + 0.5) / count


def levels_at(schedule: Schedule, u: Sequence[float] | Vector, spacing: Spacing = "native") -> Levels:
    """Levels at places u in [0, 1), ascending.

    native: uniform in native time (steps, t of a flow, log sigma for edm). shifted: as training spreads a flow, with
    its shift. logsnr: uniform in log-SNR, over the schedule's own range, but for flows only as far as +-13.8.
    """
    places = np.asarray(u, dtype=np.float64)
    if spacing not in ("native", "shifted", "logsnr"):
        raise ValueError(f"no spacing {spacing!r}; have native, shifted, logsnr")
    if spacing == "logsnr":
        high, low = _range_of_logsnr(schedule)
        times = schedule.time(logsnr=torch.from_numpy(high - places * (high - low)))
        assert isinstance(times, torch.Tensor)
        slope = np.full_like(places, high - low)
        density = slope / -_logsnr_slope(schedule, times) / _native_span(schedule, times)
        return _levels(schedule, places, times, density, slope)
    plain = schedule if spacing == "shifted" or schedule.kind != "flow" else Schedule.flow(1.0, schedule.prediction)
    times = plain.time_at(torch.from_numpy(places))
    assert isinstance(times, torch.Tensor)
    density = _density(schedule, places) if plain.shift != 1 else np.ones_like(places)
    slope = -_logsnr_slope(schedule, times) * density * _native_span(schedule, times)
    return _levels(schedule, places, times, density, slope)


def levels_of_times(schedule: Schedule, times: Sequence[int]) -> Levels:
    """Levels at training timesteps 0 .. T-1 of a discrete schedule, taken as equally spaced."""
    if schedule.kind != "discrete":
        raise ValueError(f"training timesteps are for discrete schedules, and this one is {schedule.kind}")
    count = len(schedule.alphas_cumprod)
    places = (np.asarray(times, dtype=np.float64) + 0.5) / count
    t = torch.tensor(list(times))
    return _levels(schedule, places, t, np.ones_like(places), -_logsnr_slope(schedule, t) * count)


def _levels(schedule: Schedule, u: Vector, times: torch.Tensor, density: Vector, slope: Vector) -> Levels:
    t = times.double().numpy()
    alpha, sigma = (one.numpy() for one in schedule.coefficients(times))
    # a step can be visited more often than once, each time with another noise
    draw = np.array([int((t[:n] == one).sum()) for n, one in enumerate(t)])
    scale = schedule.error_scale(times, to="eps").numpy()
    logsnr = schedule.logsnr(times).numpy()
    return Levels(
        u, t, draw, alpha, sigma, logsnr, density, slope, scale, kind=schedule.kind, prediction=schedule.prediction
    )


def _density(schedule: Schedule, u: Vector) -> Vector:
    """dt/du of a shifted flow, t from 0 to 1."""
    return schedule.shift / (1 + (schedule.shift - 1) * u) ** 2


def _logsnr_slope(schedule: Schedule, times: torch.Tensor) -> Vector:
    return schedule.logsnr_derivative(times).numpy()


def _native_span(schedule: Schedule, times: torch.Tensor) -> Vector:
    """dt/du where u is uniform in native time."""
    if schedule.kind == "edm":  # uniform in log sigma
        return times.double().numpy() * np.log(schedule.sigma_max / schedule.sigma_min)
    length = len(schedule.alphas_cumprod) if schedule.kind == "discrete" else 1000
    return np.full(len(times), float(length))


def _range_of_logsnr(schedule: Schedule) -> tuple[float, float]:
    if schedule.kind == "flow":
        return FARTHEST, -FARTHEST
    if schedule.kind == "edm":
        return -2 * np.log(schedule.sigma_min), -2 * np.log(schedule.sigma_max)
    table = schedule.logsnr(torch.arange(len(schedule.alphas_cumprod)))
    finite = table[table.isfinite()]
    return finite.max().item(), finite.min().item()
