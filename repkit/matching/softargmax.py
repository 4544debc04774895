"""Soft-argmax: the peak of a map of scores, between its cells."""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

Outside = Literal["excluded", "zero"]


def soft_argmax(
    scores: Float[Tensor, "n h w"],
    *,
    temperature: float = 0.02,
    window: int | None = 7,
    outside: Outside = "excluded",
) -> Float[Tensor, "n 2"]:
    """The mean place (x, y) in cells under softmax(scores / temperature), within `window` cells of the best one.

    temperature: so low that the softmax is much narrower than a cell, the place is that of the best cell. window: the
    box around the first of the best cells has 2 window + 1 cells a side; None: the whole map. outside: what counts
    beyond it: nothing, or, as GeoAware-SC has it, scores of zero, which pull the place towards the middle of the map
    the more, the lower the scores in the window are.
    Raises ValueError for a temperature not above 0, a negative window, and an unknown `outside`.
    """
    if outside not in ("excluded", "zero"):
        raise ValueError(f"no rule {outside!r} for scores outside the window; have excluded, zero")
    if window is not None:
        if window < 0:
            raise ValueError(f"window={window}; give 0 cells or more, or None for the whole map")
        x, y = _from_peak(scores)
        near = (x.abs() <= window)[:, None] & (y.abs() <= window)[:, :, None]  # [n h w]
        beyond = torch.zeros_like(scores) if outside == "zero" else torch.full_like(scores, -torch.inf)
        scores = torch.where(near | scores.isneginf(), scores, beyond)
    return _expectation(scores, temperature)


def kernel_soft_argmax(
    scores: Float[Tensor, "n h w"], *, temperature: float = 0.02, sigma: float = 5.0
) -> Float[Tensor, "n 2"]:
    """Soft-argmax of scores that a Gaussian of `sigma` cells around the best cell has damped (Lee et al. 2019, SFNet).

    The Gaussian multiplies the scores, so 0 must mean unlike, as for cosines.
    Raises ValueError for a temperature or sigma that is not above 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}; give a number of cells above 0")
    x, y = _from_peak(scores)
    kernel = torch.exp(-(x.square()[:, None] + y.square()[:, :, None]) / (2 * sigma**2))  # [n h w]
    return _expectation(torch.where(scores.isneginf(), scores, scores * kernel), temperature)


def _from_peak(scores: Float[Tensor, "n h w"]) -> tuple[Int[Tensor, "n w"], Int[Tensor, "n h"]]:
    """How many cells right of and below the first of the best cells each column and row lies."""
    h, w = scores.shape[1:]
    peak = rearrange(scores, "n h w -> n (h w)").max(1).indices[:, None]
    columns, rows = torch.arange(w, device=peak.device), torch.arange(h, device=peak.device)
    return columns - peak % w, rows - peak // w


def _expectation(scores: Float[Tensor, "n h w"], temperature: float) -> Float[Tensor, "n 2"]:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; give a number above 0")
    h, w = scores.shape[1:]
    flat = rearrange(scores / temperature, "n h w -> n (h w)")
    share = rearrange(flat.softmax(1), "n (h w) -> n h w", h=h)
    x, y = torch.arange(w).to(share), torch.arange(h).to(share)
    return torch.stack([share.sum(1) @ x, share.sum(2) @ y], 1)
