"""Learning weights: those of each noise level under which labelled images' classes are likeliest."""

from dataclasses import replace

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from repkit.zeroshot.calibration import minimise, mixed
from repkit.zeroshot.errortable import ErrorTable
from repkit.zeroshot.evaluating import LOSSES
from repkit.zeroshot.weighttable import WeightTable, place, weight_table, whiten

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
FOLDS = 5

Knots = Float64[Tensor, "m"]


def learn(
    table: ErrorTable,
    labels: Int[np.ndarray, "b"],
    *,
    loss: str = "l2",
    knots: int = 16,
    strength: float | None = None,
) -> WeightTable:
    """Weights and temperature fitted to labelled images: softmax cross-entropy of -sum_t w_t error_t.

    table: complete errors. labels: class numbers. log w is linear between `knots` evenly spaced times, and a penalty on
    the squared steps of its difference to the whitened weights' holds it to them, up to a factor. strength: of that;
    None is the one, of 0.1 to 100, whose fits to 4/5 of the images make the labels of the others likeliest.
    Raises ValueError where labels do not determine a temperature, and where the table has gaps.
    """
    if len(labels) != len(table) or len(table) < FOLDS:
        raise ValueError(f"{len(labels)} labels for {len(table)} images; give one for each of at least {FOLDS}")
    kind = table.levels.kind
    white = whiten(table, labels, loss=loss)
    assert white.temperature is not None
    along = place(table.levels.t, kind)
    at = np.linspace(along.min(), along.max(), min(knots, len(np.unique(along))))
    guess = np.interp(at, place(np.asarray(white.t), kind), np.log(white.weights)) - np.log(white.temperature)
    basis = np.stack([np.interp(along, at, one) for one in np.eye(len(at))], 1)
    fit = _Fit(table, labels, loss, torch.from_numpy(basis), torch.from_numpy(guess))
    chosen = min(STRENGTHS, key=fit.held_out) if strength is None else strength
    weights = fit(chosen, np.ones(len(table), dtype=bool)).exp().numpy()
    times = np.exp(at) if kind == "edm" else at
    made = weight_table("learned", table, times, weights, loss, f"{len(table)} labelled images, strength {chosen:g}")
    return replace(made, temperature=float(made.weights[0] / weights[0]))


class _Fit:
    """Log-weights at the knots of least cross-entropy, for any strength and any of the images."""

    def __init__(
        self,
        table: ErrorTable,
        labels: Int[np.ndarray, "b"],
        loss: str,
        basis: Float64[Tensor, "n m"],
        start: Knots,
    ) -> None:
        errors = table.errors[..., LOSSES.index(loss)] * table.levels.density / len(table.levels)
        # What all conditions share cancels in the softmax, and would only cost digits.
        self.errors = torch.from_numpy(errors - errors.mean(1, keepdims=True))
        self.owner, self.classes = torch.from_numpy(table.owner), len(table.classes)
        self.labels, self.basis, self.start = torch.as_tensor(labels), basis, start

    def __call__(self, strength: float, rows: Bool[np.ndarray, "b"]) -> Knots:
        count = int(rows.sum())

        def objective(knots: Knots) -> Tensor:
            steps = (knots - self.start).diff()
            return self.cross_entropy(knots, rows) + strength * (steps**2).sum() / count

        return minimise(objective, self.start)

    def cross_entropy(self, knots: Knots, rows: Bool[np.ndarray, "b"]) -> Tensor:
        kept = torch.from_numpy(rows)
        weights = (self.basis @ knots).exp()
        logits = -einsum(self.errors[kept], weights, "b j n, n -> b j")
        return torch.nn.functional.cross_entropy(mixed(logits, self.owner, self.classes), self.labels[kept])

    def held_out(self, strength: float) -> float:
        """Mean cross-entropy of each fold's images under the weights that were fitted to the others."""
        fold = np.arange(len(self.labels)) % FOLDS
        return sum(float(self.cross_entropy(self(strength, fold != one), fold == one)) for one in range(FOLDS)) / FOLDS
