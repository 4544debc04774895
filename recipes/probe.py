"""Probe: classification heads on frozen features; several, and several learning rates, compete on validation data."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor, nn

from repkit.recipes.feature_data import Batch, FeatureData
from repkit.recipes.head_options import HeadOptions
from repkit.recipes.head_training import HeadTraining
from repkit.recipes.optimising import Optimising


class Probe(HeadTraining):
    """Classification by cross-entropy.

    Args:
        head: the head and its sizes
        inputs: which taps a head reads: all of them; each one, with a head of its own; or by name, such as
            {last: [cls], last-and-mean: [cls, norm]}, with a head for each name
        optimising: the optimizer and its learning rates, at each of which there is a head for every input
        seed: of the heads' first weights
    """

    def __init__(
        self,
        head: HeadOptions = HeadOptions(),  # noqa: B008 - frozen
        inputs: Literal["all", "each"] | dict[str, list[str]] = "all",
        optimising: Optimising = Optimising(),  # noqa: B008 - frozen
        seed: int = 0,
    ) -> None:
        options = {"head": asdict(head), "inputs": inputs, "optimising": asdict(optimising), "seed": seed}
        super().__init__(optimising, seed, options)
        self.head, self.inputs = head, inputs

    def build(self, data: FeatureData, rates: Sequence[float]) -> dict[str, tuple[float, nn.Module]]:
        sizes = data.sizes
        chosen = self.inputs
        if chosen == "all":
            chosen = {"all": list(sizes)}
        elif chosen == "each":
            chosen = {key: [key] for key in sizes}
        assert isinstance(chosen, dict)
        if unknown := [key for keys in chosen.values() for key in keys if key not in sizes]:
            raise ValueError(f"no features {unknown[0]!r} for a head; have {', '.join(sizes)}")
        return {
            f"{name}, lr {lr:g}": (lr, self.head.build({key: sizes[key] for key in keys}, len(data.classes), self.seed))
            for name, keys in chosen.items()
            for lr in rates
        }

    def losses(self, batch: Batch) -> list[Tensor]:
        return [F.cross_entropy(head(batch["features"]), batch["label"]) for head in self.heads]

    def measures(self, batch: Batch) -> Float64[Tensor, "m four"]:
        """Of each head the right ones, the right among five, the summed loss, and how many samples."""
        return torch.stack([_measured(head(batch["features"]), batch) for head in self.heads])

    def scored(self, total: Float64[Tensor, "m four"]) -> dict[str, list[float]]:
        right, right5, loss, count = total.unbind(1)
        scores = {"accuracy": right / count, "accuracy_top5": right5 / count, "loss": loss / count}
        return {name: values.tolist() for name, values in scores.items()}


def _measured(logits: Tensor, batch: Batch) -> Float64[Tensor, " four"]:
    counts = batch["index"] >= 0
    logits, truth = logits[counts], batch["label"][counts]
    near = logits.topk(min(5, logits.shape[1])).indices == truth[:, None]
    loss = F.cross_entropy(logits, truth, reduction="none").double().sum()
    return torch.stack([near[:, 0].double().sum(), near.double().sum(), loss, counts.double().sum()])
