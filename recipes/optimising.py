"""How heads are optimised: the optimizer by name, and its learning rate over the steps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import cos, floor, pi
from typing import Any, Literal

import torch
from timm.optim import Lars
from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Optimising:
    """An optimizer and the course of its rate.

    Args:
        name: sgd, adam, adamw or lars
        lrs: learning rates; several compete, each with heads of its own
        per: the rates are for a batch of this many images, and are scaled to the batch; null takes them as they are
        momentum: of sgd and lars
        weight_decay: on matrices and kernels; biases and norms have none
        schedule: constant; cosine falls to 0; poly falls linearly to 0; drops multiplies by `factor` at each drop
        drops: shares of the steps at which the rate drops
        factor: what a drop multiplies by
        warmup: share of the steps in which the rate rises linearly
        stairs: the rate changes only this many times, at even distances, such as once an epoch; null is every step
    """

    name: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    lrs: list[float] = field(default_factory=lambda: [0.1])
    per: int | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "poly", "drops"] = "cosine"
    drops: list[float] = field(default_factory=list)
    factor: float = 0.1
    warmup: float = 0.0
    stairs: int | None = None

    def __post_init__(self) -> None:
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"lrs={self.lrs}; give at least one learning rate, all above 0")

    def rates(self, batch: int) -> list[float]:
        """The learning rates at a batch of this many images."""
        return [lr if self.per is None else lr * batch / self.per for lr in self.lrs]

    def share(self, step: int, steps: int) -> float:
        """The rate of a step as a share of the highest."""
        done = step / steps
        if done < self.warmup:
            return (step + 1) / (self.warmup * steps + 1)
        if self.stairs is not None:
            done = floor(done * self.stairs + 1e-9) / self.stairs  # an epoch's first step must not round down
        gone = (done - self.warmup) / (1 - self.warmup)
        courses = {"constant": 1.0, "cosine": (1 + cos(pi * gone)) / 2, "poly": 1 - gone}
        if self.schedule == "drops":
            return self.factor ** sum(done >= drop - 1e-9 for drop in self.drops)
        return courses[self.schedule]

    def optimizer(self, groups: Iterable[tuple[float, nn.Module]]) -> Optimizer:
        """One optimizer of modules that each have a learning rate."""
        parameters = [group for lr, module in groups for group in self._parts(lr, module)]
        if self.name == "sgd":
            return torch.optim.SGD(parameters, momentum=self.momentum)
        if self.name == "lars":
            return Lars(parameters, momentum=self.momentum)
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.name](parameters)

    def _parts(self, lr: float, module: nn.Module) -> Sequence[dict[str, Any]]:
        """Matrices and kernels, then biases and norms, which neither decay nor adapt."""
        weights = [one for one in module.parameters() if one.requires_grad and one.ndim > 1]
        others = [one for one in module.parameters() if one.requires_grad and one.ndim <= 1]
        adapts = {"always_adapt": True} if self.name == "lars" else {}
        parts = [
            {"params": weights, "lr": lr, "weight_decay": self.weight_decay, **adapts},
            {"params": others, "lr": lr, "weight_decay": 0.0},
        ]
        return [part for part in parts if part["params"]]
