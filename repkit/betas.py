"""Curves of betas by diffusers' names, and the rescaling to zero terminal SNR."""

import math

import torch
from jaxtyping import Float64
from torch import Tensor


def beta_curve(name: str, start: float, end: float, steps: int) -> Float64[Tensor, "T"]:
    """Betas by diffusers' name of their curve."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if name == "linear":
        return start + (end - start) * ramp
    if name == "scaled_linear":
        return (start**0.5 + (end**0.5 - start**0.5) * ramp) ** 2
    if name == "sigmoid":
        return start + (end - start) * torch.sigmoid(12 * ramp - 6)
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if name == "squaredcos_cap_v2":
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    elif name == "exp":
        alpha_bar = torch.exp(-12 * u)
    elif name == "laplace":
        alpha_bar = torch.sigmoid(-0.5 * torch.sign(0.5 - u) * torch.log(1 - 2 * (u - 0.5).abs() + 1e-6)).sqrt()
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid, exp, laplace"
        raise ValueError(f"no beta schedule {name!r}; have {known}; or give the betas themselves")
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)  # the cap keeps the last steps from losing x0


def rescale_to_zero_terminal_snr(alphas_cumprod: Float64[Tensor, "T"]) -> Float64[Tensor, "T"]:
    """Shift and scale alpha so that the first stays and the last is 0 (Lin et al. 2024)."""
    alpha = alphas_cumprod.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
