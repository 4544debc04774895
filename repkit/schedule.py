"""A backbone's noise: native time -> (alpha, sigma) of x_t = alpha*x0 + sigma*eps, and what its network predicts."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor

from repkit.betas import beta_curve, rescale_to_zero_terminal_snr
from repkit.schedulers import read_scheduler

PREDICTIONS = ("eps", "v", "x0", "flow", "edm")
Times = Num[Tensor, "*t"] | float | int


@dataclass(frozen=True)
class Schedule:
    """Map from a backbone's native time t to (alpha, sigma), and between its prediction and any other.

    Native time: "discrete" counts training steps, 0 (least noise) to T-1; "edm" is sigma itself (alpha = 1);
    "flow" runs from 0 to 1000, with sigma = t/1000 and alpha = 1 - t/1000.
    Predictions: "eps"; "v" = alpha*eps - sigma*x0; "x0"; "flow" = eps - x0; "edm", the raw F of
    x0 = c_skip*x + c_out*F with x = x_t/alpha (Karras et al. 2022). Prefer the constructors below.
    Raises ValueError for parameters that describe no schedule.
    """

    kind: Literal["discrete", "edm", "flow"]
    prediction: str
    alphas_cumprod: tuple[float, ...] = field(default=(), repr=False)  # discrete: alpha(t)^2
    shift: float = 1.0  # flow: uniform u -> sigma = shift*u / (1 + (shift-1)*u), only in time_at
    sigma_min: float = 0.0  # edm: the range of sigma that the network was trained on
    sigma_max: float = math.inf
    sigma_data: float = 0.5
    edm_sign: Literal[1, -1] = 1  # -1: the network returns -F (diffusers' "v_prediction" of EDM)

    def __post_init__(self) -> None:
        _check_prediction(self.prediction)
        table = np.asarray(self.alphas_cumprod)
        if self.kind == "discrete" and not (
            len(table) > 1 and 1 > table[0] and table[-2] > 0 <= table[-1] and (np.diff(table) <= 0).all()
        ):
            raise ValueError(
                f"alphas_cumprod of {len(table)} steps is no schedule: give at least 2 numbers between 0 and 1, "
                "both excluded, never increasing; only the last may be 0"
            )
        if self.kind == "edm" and not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma range [{self.sigma_min}, {self.sigma_max}]: give 0 < sigma_min < sigma_max")
        if not (self.sigma_data > 0 and self.shift > 0):
            raise ValueError(f"sigma_data={self.sigma_data} and shift={self.shift} must be positive")

    @classmethod
    def discrete(cls, alphas_cumprod: Sequence[float] | Num[Tensor, "T"], prediction: str) -> "Schedule":
        """Build a variance-preserving schedule from its table alpha(t)^2, t = 0 .. T-1."""
        return cls("discrete", prediction, tuple(torch.as_tensor(alphas_cumprod, dtype=torch.float64).tolist()))

    @classmethod
    def from_betas(
        cls,
        betas: str | Sequence[float] | Num[Tensor, "T"],
        prediction: str = "eps",
        *,
        start: float = 1e-4,
        end: float = 0.02,
        steps: int = 1000,
        snr_shift: float = 1.0,
        zero_terminal_snr: bool = False,
    ) -> "Schedule":
        """Build a variance-preserving schedule from betas, given or by diffusers' name of their curve.

        `start`, `end` and `steps` shape a named curve; `snr_shift` divides the SNR; `zero_terminal_snr` then
        rescales the table so that the last step is pure noise (Lin et al. 2024). Raises ValueError for a name
        that is not known.
        """
        values = beta_curve(betas, start, end, steps) if isinstance(betas, str) else betas
        table = (1 - torch.as_tensor(values, dtype=torch.float64)).cumprod(0)
        table = table / (snr_shift + (1 - snr_shift) * table)
        return cls.discrete(rescale_to_zero_terminal_snr(table) if zero_terminal_snr else table, prediction)

    @classmethod
    def edm(
        cls,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        prediction: str = "edm",
        *,
        edm_sign: Literal[1, -1] = 1,
    ) -> "Schedule":
        """Build a variance-exploding schedule: alpha = 1 and t is sigma."""
        low, high, data = float(sigma_min), float(sigma_max), float(sigma_data)
        return cls("edm", prediction, sigma_min=low, sigma_max=high, sigma_data=data, edm_sign=edm_sign)

    @classmethod
    def flow(cls, shift: float = 1.0, prediction: str = "flow") -> "Schedule":
        """Build a rectified flow: sigma = t/1000; `shift` says how densely `time_at` covers it."""
        return cls("flow", prediction, shift=float(shift))

    @classmethod
    def from_diffusers(cls, config: object) -> "Schedule":
        """Build the schedule a diffusers scheduler, or its config with `_class_name`, was trained on.

        Options of sampling alone (spacing, karras sigmas, final sigma) are ignored; a dynamic shift takes its
        value at the largest resolution. Raises ValueError for a scheduler that is none of ours, TypeError for
        what is no scheduler.
        """
        constructor, options = read_scheduler(config)
        return getattr(cls, constructor)(**options)

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able values on which results depend; the table as a sha256."""
        own: dict[str, Any] = {"shift": self.shift}
        if self.kind == "discrete":
            # float32, because the last bits of a float64 table differ between machines
            own = {"alphas_cumprod": hashlib.sha256(np.asarray(self.alphas_cumprod, "<f4").tobytes()).hexdigest()}
        if self.kind == "edm":
            own = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "edm_sign": self.edm_sign}
        return {"kind": self.kind, "prediction": self.prediction, "sigma_data": self.sigma_data, **own}

    def coefficients(self, t: Times) -> tuple[Float64[Tensor, "*t"], Float64[Tensor, "*t"]]:
        """Return (alpha, sigma) in float64, on t's device.

        t: any number of whole steps 0 .. T-1 (discrete), sigma >= 0 (edm), 0 .. 1000 (flow); else ValueError.
        """
        t = self._check_time(t)
        if self.kind == "discrete":
            table = self._table.to(t.device)[t.long()]
            return table.sqrt(), (1 - table).sqrt()
        return (torch.ones_like(t), t) if self.kind == "edm" else (1 - t / 1000, t / 1000)

    def logsnr(self, t: Times) -> Float64[Tensor, "*t"]:
        """Return log(alpha^2 / sigma^2) in nats; infinite where alpha or sigma is 0."""
        alpha, sigma = self.coefficients(t)
        return 2 * (alpha.log() - sigma.log())

    def logsnr_derivative(self, t: Times) -> Float64[Tensor, "*t"]:
        """Return d logsnr / dt per unit of native time (negative).

        Discrete: central differences over the table, one-sided at its ends; -inf at a step without signal.
        """
        t = self._check_time(t)
        if self.kind == "edm":
            return -2 / t
        if self.kind == "flow":
            return -2000 / (t * (1000 - t))
        table = self.logsnr(torch.arange(len(self.alphas_cumprod)))
        finite = table[table.isfinite()]
        slope = torch.gradient(finite)[0] if len(finite) > 1 else torch.full_like(finite, -math.inf)
        slope = torch.cat([slope, torch.full((len(table) - len(finite),), -math.inf, dtype=torch.float64)])
        return slope.to(t.device)[t.long()]

    def time(self, *, sigma: Times | None = None, logsnr: Times | None = None) -> Times:
        """Return the native time with this sigma(t) or this log-SNR: exactly one is given.

        A number gives a number, a tensor a tensor. Discrete: the nearest step in log-SNR, an int. Raises
        ValueError beyond the schedule's range (discrete: by more than half a step; edm: sigma_min .. sigma_max).
        """
        if (sigma is None) == (logsnr is None):
            raise ValueError(f"sigma={sigma} and logsnr={logsnr}: give exactly one of them")
        given = sigma if sigma is not None else logsnr
        assert given is not None
        value = torch.as_tensor(given, dtype=torch.float64)
        if self.kind == "discrete":
            ratio = value if sigma is None else torch.log1p(-(value**2)) - 2 * value.log()
            t, reached = self._nearest_step(ratio)
        else:
            t, reached = self._time_of_sigma(value if sigma is not None else self._sigma_of_logsnr(value))
        if not reached.all():
            what, bad = "sigma" if logsnr is None else "logsnr", value[~reached][0].item()
            raise ValueError(f"{what}={bad:g} is out of reach: {self._describe_range()}")
        return t if isinstance(given, Tensor) else t.item()

    def time_at(self, u: Float[Tensor, "*t"] | float | int) -> Times:
        """Map u in [0, 1), uniform, to native time as training spreads it.

        Discrete: floor(u*T). Flow: by the shift. Edm: log-uniform from sigma_min to sigma_max.
        """
        value = torch.as_tensor(u, dtype=torch.float64)
        if not ((value >= 0) & (value < 1)).all():
            raise ValueError(f"u={u}: give 0 <= u < 1")
        if self.kind == "discrete":
            t = (value * len(self.alphas_cumprod)).floor().long()
        elif self.kind == "edm":
            t = self.sigma_min * (self.sigma_max / self.sigma_min) ** value
        else:
            t = 1000 * self.shift * value / (1 + (self.shift - 1) * value)
        return t if isinstance(u, Tensor) else t.item()

    def add_noise(self, x0: Float[Tensor, "*x"], eps: Float[Tensor, "*x"], t: Times) -> Float[Tensor, "*x"]:
        """Return x_t = alpha*x0 + sigma*eps in float32, or in float64 if x0 is; t is a scalar or one per row."""
        alpha, sigma = (c.to(_compute_dtype(x0)) for c in self._coefficients_for(x0, t))
        return alpha * x0 + sigma * eps.to(alpha.dtype)

    def convert(
        self, prediction: Float[Tensor, "*x"], x_t: Float[Tensor, "*x"], t: Times, *, to: str
    ) -> Float[Tensor, "*x"]:
        """Turn what the network predicts into eps, v, x0, flow or edm; t is a scalar or one per row.

        Computed in float64, returned in float32, or in float64 if the prediction is. Raises ValueError where
        the prediction and x_t do not determine the answer: from eps at alpha = 0, from x0 at sigma = 0.
        """
        _check_prediction(to)
        if to == self.prediction:
            return prediction.to(_compute_dtype(prediction))
        alpha, sigma = self._coefficients_for(x_t, t)
        a, b = self._weights(self.prediction, alpha, sigma)
        c, d = self._weights(to, alpha, sigma)
        # x_t = alpha*x0 + sigma*eps and p = a*x0 + b*eps solved for c*x0 + d*eps, by Cramer's rule
        determinant = alpha * b - sigma * a
        self._check_determined(determinant, alpha, sigma, t, to)
        solved = ((c * b - d * a) * x_t.double() + (alpha * d - sigma * c) * prediction.double()) / determinant
        return solved.to(_compute_dtype(prediction))

    def error_scale(self, t: Times, *, to: str) -> Float64[Tensor, "*t"]:
        """Return |error in `to`| / |error in the network's own prediction| at t, with x_t given.

        So ||eps - eps_hat||^2 is error_scale(t, to="eps")**2 times the squared error of what the network predicts; 1
        for v at alpha = 1, 0 where it is lost. Infinite where the prediction says nothing of `to`.
        """
        _check_prediction(to)
        alpha, sigma = self.coefficients(t)
        if to == self.prediction:
            return torch.ones_like(alpha)
        (a, b), (c, d) = self._weights(self.prediction, alpha, sigma), self._weights(to, alpha, sigma)
        return ((alpha * d - sigma * c) / (alpha * b - sigma * a)).abs()

    def edm_input(
        self, x_t: Float[Tensor, "*x"], t: Times
    ) -> tuple[Float[Tensor, "*x"], Float[Tensor, ""] | Float[Tensor, "b"]]:
        """Return what an EDM network receives: (c_in*x_t, c_noise = log(sigma)/4), in float32 or x_t's float64.

        Raises ValueError for another kind of schedule, and at sigma = 0, where c_noise is infinite.
        """
        alpha, sigma = self._coefficients_for(x_t, t)
        if self.kind != "edm" or (sigma == 0).any():
            raise ValueError(f"no EDM input for kind {self.kind!r} at t={t}: the schedule must be edm, with sigma > 0")
        dtype = _compute_dtype(x_t)
        scaled = x_t.double() / torch.sqrt(sigma**2 + self.sigma_data**2)
        c_noise = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).log() / 4
        return scaled.to(dtype), c_noise.to(dtype)

    @cached_property
    def _table(self) -> Float64[Tensor, "T"]:
        return torch.tensor(self.alphas_cumprod, dtype=torch.float64)

    @property
    def _span(self) -> tuple[float, float]:
        """Native times of least and most noise."""
        if self.kind == "discrete":
            return 0.0, float(len(self.alphas_cumprod) - 1)
        return (self.sigma_min, self.sigma_max) if self.kind == "edm" else (0.0, 1000.0)

    def _check_time(self, t: Times) -> Float64[Tensor, "*t"]:
        time = torch.as_tensor(t, dtype=torch.float64)
        last = math.inf if self.kind == "edm" else self._span[1]  # training draws some sigma beyond sigma_max
        valid = time.isfinite() & (time >= 0) & (time <= last)
        if self.kind == "discrete":
            valid &= time == time.round()
        if not valid.all():
            what = {"discrete": f"a whole step from 0 to {last:g}", "edm": "sigma >= 0", "flow": "from 0 to 1000"}
            bad = time[~valid][0].item()
            raise ValueError(f"t={bad:g} is no time of this {self.kind} schedule: t is {what[self.kind]}")
        return time

    def _coefficients_for(self, x: Float[Tensor, "*x"], t: Times) -> tuple[Tensor, Tensor]:
        """Coefficients on x's device that broadcast against it."""
        shape = tuple(t.shape) if isinstance(t, Tensor) else ()
        if shape and shape != tuple(x.shape[:1]):
            raise ValueError(f"t of shape {shape} for x of shape {tuple(x.shape)}: give a scalar or one t per row")
        rows = (-1, *[1] * (x.ndim - 1)) if shape else ()
        alpha, sigma = (c.reshape(rows).to(x.device) for c in self.coefficients(t))
        return alpha, sigma

    def _weights(self, prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The (a, b) of prediction = a*x0 + b*eps."""
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        if prediction == "edm":
            # F = (x0 - c_skip*x) / c_out with s = sigma/alpha, multiplied out so that alpha = 0 needs no division
            scale = self.edm_sign / torch.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
            return scale * sigma / self.sigma_data, -scale * alpha * self.sigma_data
        return {"eps": (zero, one), "v": (-sigma, alpha), "x0": (one, zero), "flow": (-one, one)}[prediction]

    def _check_determined(self, determinant: Tensor, alpha: Tensor, sigma: Tensor, t: Times, to: str) -> None:
        lost = (determinant == 0).flatten()
        if lost.any():
            row = int(lost.nonzero()[0])
            time = t.flatten()[row].item() if isinstance(t, Tensor) else t
            raise ValueError(
                f"{to} cannot be had from {self.prediction} at t={time:g} (alpha={alpha.flatten()[row].item():g}, "
                f"sigma={sigma.flatten()[row].item():g}): {'x0' if self.prediction == 'eps' else 'eps'} is lost "
                "there; take a time with a little of both"
            )

    def _nearest_step(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        table = self.logsnr(torch.arange(len(self.alphas_cumprod))).to(logsnr.device)
        borders = (table[1:] + table[:-1]) / 2
        t = len(borders) - torch.searchsorted(borders.flip(0), logsnr)
        high, low = table[0] + (table[0] - borders[0]), table[-1] - (borders[-1] - table[-1]).nan_to_num(0.0)
        return t, (logsnr <= high) & (logsnr >= low)

    def _sigma_of_logsnr(self, logsnr: Tensor) -> Tensor:
        return torch.exp(-logsnr / 2) if self.kind == "edm" else torch.sigmoid(-logsnr / 2)

    def _time_of_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        t = sigma if self.kind == "edm" else 1000 * sigma
        low, high = self._span
        # a log-SNR at the very border may come back one rounding beyond it
        return t.clamp(low, high), (t >= low * (1 - 1e-9)) & (t <= high * (1 + 1e-9))

    def _describe_range(self) -> str:
        ends = torch.tensor(self._span, dtype=torch.float64)
        (s0, s1), (l0, l1) = self.coefficients(ends)[1].tolist(), self.logsnr(ends).tolist()
        return f"this {self.kind} schedule has sigma from {s0:g} to {s1:g}, log-SNR from {l0:g} to {l1:g}"


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"no prediction {prediction!r}; have {', '.join(PREDICTIONS)}")
