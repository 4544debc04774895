"""Evaluating: the network's denoising errors at (image, level, condition), in full batches over all three."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import reduce
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Condition
from repkit.noise import noise_like
from repkit.precision import full_float32
from repkit.zeroshot.levels import Levels
from repkit.zeroshot.strategies import Evidence, Run

LOSSES = ("l2", "l1", "huber")  # each summed over dimensions; huber with delta = 1

Errors = Float64[np.ndarray, "j n 3"]  # of one image; NaN where nothing was evaluated
ENCODED = 8  # images that are encoded at once


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image as the network knows it."""

    x0: Float[Tensor, "c h w"]
    digest: bytes


@dataclass(frozen=True, eq=False)
class Evaluator:
    """A backbone with its conditions, one row each, and the grid of levels.

    signs: of the noise; every error is the mean over them, and (1, -1) is antithetic noise at twice the cost.
    """

    backbone: Backbone
    conditions: Condition
    names: Sequence[object]
    levels: Levels
    seed: int = 0
    batch_size: int = 64
    signs: Sequence[int] = (1,)

    def encode(self, images: Float[Tensor, "b 3 H W"], digests: Sequence[bytes]) -> Iterator[Prepared]:
        """Images to clean latents, a few at a time and only when they are asked for."""
        for first in range(0, len(images), ENCODED):
            part = slice(first, first + ENCODED)
            for x0, digest in zip(self.backbone.encode(images[part]), digests[part], strict=True):
                yield Prepared(x0, digest)

    def errors(self, images: Sequence[Prepared], rows: Int[np.ndarray, "r 3"]) -> Float64[np.ndarray, "r 3"]:
        """The losses of rows (image, level, condition); an (image, level) is noised once for all its conditions.

        Raises FloatingPointError where the network returns something that is not finite.
        """
        pairs, place = np.unique(rows[:, :2], axis=0, return_inverse=True)
        pair_of = torch.from_numpy(place.reshape(-1))
        x0 = torch.stack([images[image].x0 for image in pairs[:, 0]])
        eps = torch.stack([self._eps(x0.shape[1:], images[image].digest, level) for image, level in pairs.tolist()])
        eps = eps.to(x0)
        told = self.conditions[torch.from_numpy(rows[:, 2]).to(x0.device)]
        each = [self._losses(x0, sign * eps, pairs[:, 1], pair_of, told) for sign in self.signs]
        losses = torch.stack(each).mean(0)
        self._check_finite(losses, rows)
        return losses.float().double().numpy()  # as a table on disk keeps them, so that a replay sees the same

    def _losses(
        self,
        x0: Float[Tensor, "p c h w"],
        eps: Float[Tensor, "p c h w"],
        levels: Int[np.ndarray, "p"],
        pair_of: Int[Tensor, "r"],
        told: Condition,
    ) -> Float64[Tensor, "r 3"]:
        residual = self.residual(x0, eps, levels, pair_of, told).flatten(1)
        size = residual.abs()
        huber = torch.where(size < 1, residual**2 / 2, size - 0.5)
        return torch.stack([reduce(one, "r d -> r", "sum") for one in (residual**2, size, huber)], dim=1).cpu()

    def residual(
        self,
        x0: Float[Tensor, "p c h w"],
        eps: Float[Tensor, "p c h w"],
        levels: Int[np.ndarray, "p"],
        pair_of: Int[Tensor, "r"],
        told: Condition,
    ) -> Float64[Tensor, "r c h w"]:
        """target - prediction, in float64; row r takes pair pair_of[r] of (x0, eps, level)."""
        schedule = self.backbone.schedule
        t = torch.from_numpy(self.levels.t[levels]).to(x0.device)
        clean = x0.double()  # in float64, or the target would lose digits where sigma is small
        x_t = schedule.add_noise(clean, eps.double(), t)
        # the target is had from x0, because eps leaves v and flow undetermined at a step without signal
        target = replace(schedule, prediction="x0").convert(clean, x_t, t, to=schedule.prediction)
        prediction = self.backbone.denoise(x_t[pair_of].to(x0), t[pair_of], told)
        return target[pair_of] - prediction

    def _eps(self, shape: Sequence[int], digest: bytes, level: int) -> Float[Tensor, "c h w"]:
        t, draw = float(self.levels.t[level]), int(self.levels.draw[level])
        return noise_like(shape, seed=self.seed, digest=digest, t=t, draw=draw)

    def _check_finite(self, losses: Float64[Tensor, "r 3"], rows: Int[np.ndarray, "r 3"]) -> None:
        bad = ~torch.isfinite(losses).all(1).numpy()
        if bad.any():
            _, level, condition = rows[bad][0]
            raise FloatingPointError(
                f"{self.backbone.name} returns no finite prediction for class {self.names[condition]!r} "
                f"at t={self.levels.t[level]:g}; load the model with dtype=torch.bfloat16 or torch.float32"
            )


@dataclass(eq=False)
class _Trial:
    """One image on its way to a decision."""

    run: Run
    errors: Errors
    waiting: int = 0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was found out of one image: its errors, and whether its strategy stopped because it was decided."""

    errors: Errors
    decided: bool


def try_all(
    evaluator: Evaluator,
    images: Iterator[Prepared],
    start: Callable[[int], Run],
    weigh: Callable[[Errors], Evidence],
) -> Iterator[tuple[int, Outcome]]:
    """Run a strategy for each image, many images at once, so that batches stay full after eliminations.

    start: the run of the nth image. weigh: errors to evidence. Yields (n, outcome) as images are decided, in any order.
    """
    shape = (len(evaluator.names), len(evaluator.levels), len(LOSSES))
    trials: dict[int, _Trial] = {}
    prepared: dict[int, Prepared] = {}
    queue: deque[Int[np.ndarray, "r 3"]] = deque()
    queued, count, more = 0, 0, True
    while more or trials:
        while more and queued < evaluator.batch_size:
            image = next(images, None)
            if image is None:
                more = False
                break
            prepared[count] = image
            trials[count] = _Trial(start(count), np.full(shape, np.nan))
            rows = _ask(count, trials[count], next(trials[count].run))
            queue.append(rows)
            queued, count = queued + len(rows), count + 1
        if not trials:
            return
        rows = _take(queue, evaluator.batch_size)
        queued -= len(rows)
        with full_float32(), torch.no_grad():
            found = _errors_of(evaluator, prepared, rows)
        for image_number in np.unique(rows[:, 0]).tolist():
            trial, own = trials[image_number], rows[:, 0] == image_number
            trial.errors[rows[own, 2], rows[own, 1]] = found[own]
            trial.waiting -= int(own.sum())
            if trial.waiting:
                continue
            try:
                asked = _ask(image_number, trial, trial.run.send(weigh(trial.errors)))
            except StopIteration as stop:
                del trials[image_number], prepared[image_number]
                yield image_number, Outcome(trial.errors, bool(stop.value))
                continue
            queue.append(asked)
            queued += len(asked)


def _errors_of(
    evaluator: Evaluator, prepared: dict[int, Prepared], rows: Int[np.ndarray, "r 3"]
) -> Float64[np.ndarray, "r 3"]:
    numbers, place = np.unique(rows[:, 0], return_inverse=True)
    local = np.column_stack([place.reshape(-1), rows[:, 1:]])
    plain = torch.autocast(evaluator.backbone.device.type, enabled=False)  # a training loop's would change the values
    with plain:
        return evaluator.errors([prepared[number] for number in numbers.tolist()], local)


def _ask(image: int, trial: _Trial, asked: tuple[np.ndarray, np.ndarray]) -> Int[np.ndarray, "r 3"]:
    """Rows (image, level, condition) of what a strategy wants, level by level."""
    conditions, levels = asked
    rows = np.column_stack(
        [
            np.full(len(levels) * len(conditions), image),
            np.repeat(levels, len(conditions)),
            np.tile(conditions, len(levels)),
        ]
    )
    trial.waiting = len(rows)
    return rows


def _take(queue: deque[Int[np.ndarray, "_ 3"]], count: int) -> Int[np.ndarray, "r 3"]:
    """The first `count` rows of the queue, or all there are."""
    taken, size = [], 0
    while queue and size < count:
        rows = queue.popleft()
        if len(rows) > count - size:
            queue.appendleft(rows[count - size :])
            rows = rows[: count - size]
        taken.append(rows)
        size += len(rows)
    return np.concatenate(taken)


def seen(errors: Float64[np.ndarray, "... 3"]) -> Bool[np.ndarray, "..."]:
    """Where something was evaluated."""
    return ~np.isnan(errors[..., 0])
