"""Training of pixel classifiers as published for label-efficient segmentation: Adam, 64 pixels a step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Integer
from torch import Tensor

from repkit.heads.miou import IGNORE
from repkit.heads.pixel_bank import PixelBank
from repkit.heads.pixels import PixelEnsemble
from repkit.heads.places import pixel_places

SMALL = 20  # pixels


@dataclass(frozen=True)
class PixelRule:
    """When to stop, and what a step is; the defaults are the published ones.

    A network stops once its loss on a step's pixels, watched from epoch `settle` on (they count from 0), has not been
    below its lowest for more than `patience` steps in a row; or after `epochs`, or so many `steps` where given.
    """

    epochs: int = 100
    batch: int = 64
    lr: float = 1e-3
    settle: int = 4
    patience: int = 50
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or not self.lr > 0 or (self.steps is not None and self.steps < 1):
            raise ValueError(
                f"epochs={self.epochs}, batch={self.batch}, lr={self.lr}, steps={self.steps}; give at least 1 epoch, "
                "2 pixels a batch (it is normalised), a positive lr, and at least 1 step"
            )


def train_pixels(
    ensemble: PixelEnsemble,
    bank: PixelBank,
    masks: Integer[Tensor, "n H W"],
    rule: PixelRule | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Train all networks on the pixels of masks, 255 ignored; how many steps each took.

    masks: of the bank's images, in any one size. Each network sees all pixels once an epoch in an order of its own,
    which `pixel_order` gives; a last step of a single pixel is left out, as it cannot be normalised.
    Raises ValueError for labels that the ensemble does not have, and for fewer than two labelled pixels.
    """
    rule, pixels = rule or PixelRule(), _Pixels(bank, masks, ensemble.classes)
    total = rule.steps or rule.epochs * pixels.steps(rule.batch)
    watch, optimizer = _Watch(ensemble, rule), torch.optim.Adam(ensemble.parameters(), lr=rule.lr)
    ensemble.train()
    for step, (epoch, rows) in enumerate(_batches(len(pixels), ensemble.networks, rule, seed)):
        if progress:
            progress(step, total)
        inputs, labels = pixels[rows]
        losses = F.cross_entropy(rearrange(ensemble(inputs), "n b k -> n k b"), labels, reduction="none").mean(1)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        if watch.done(losses.detach(), epoch, step + 1) or step + 1 == rule.steps:
            break
    if progress:
        progress(step + 1, step + 1)  # all may have stopped before the total
    ensemble.eval()
    return watch.finish(step + 1)


def drop_small(masks: Integer[Tensor, "n H W"], least: int = SMALL) -> Integer[Tensor, "n H W"]:
    """The masks with 255 in place of every class that has fewer than `least` pixels in an image."""
    kept = masks.clone()
    for mask in kept:
        labels, counts = mask.unique(return_counts=True)
        for label in labels[counts < least]:
            mask[mask == label] = IGNORE
    return kept


def pixel_order(count: int, network: int, epoch: int, seed: int) -> Int[np.ndarray, " count"]:
    """The order in which a network sees the pixels of an epoch: the same for a network alone and among others."""
    return np.random.default_rng([seed, epoch, network]).permutation(count)


def _batches(count: int, networks: int, rule: PixelRule, seed: int) -> Iterator[tuple[int, Int[Tensor, "n b"]]]:
    for epoch in range(rule.epochs):
        orders = np.stack([pixel_order(count, n, epoch, seed).astype(np.int32) for n in range(networks)])
        for start in range(0, count - 1, rule.batch):
            yield epoch, torch.from_numpy(orders[:, start : start + rule.batch]).long()


class _Pixels:
    """The labelled pixels: their vectors and labels by their number."""

    def __init__(self, bank: PixelBank, masks: Integer[Tensor, "n H W"], classes: int) -> None:
        images, rows, columns = (masks != IGNORE).nonzero(as_tuple=True)
        self.bank, self.labels = bank, masks[images, rows, columns].long()
        if len(self.labels) < 2:
            raise ValueError(f"{len(self.labels)} labelled pixels to train on; give masks with at least 2")
        if not 0 <= self.labels.min() <= self.labels.max() < classes:
            low, high = int(self.labels.min()), int(self.labels.max())
            raise ValueError(f"labels {low} to {high} for {classes} classes; give 0 ... {classes - 1}, or {IGNORE}")
        self.images, self.size = images.int(), masks.shape[1:]
        self.cells = (rows * masks.shape[2] + columns).int()
        self.places = rearrange(pixel_places(*self.size), "H W xy -> (H W) xy")

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch: int) -> int:
        return len(range(0, len(self) - 1, batch))

    def __getitem__(self, rows: Int[Tensor, "n b"]) -> tuple[Float[Tensor, "n b d"], Int[Tensor, "n b"]]:
        flat, device = rows.flatten(), self.bank.maps[0].device
        places = self.places[self.cells[flat].long()].to(device)
        vectors = self.bank.at(self.images[flat].long().to(device), places)
        return rearrange(vectors, "(n b) d -> n b d", n=len(rows)), self.labels[rows].to(device)


class _Watch:
    """Which networks have stopped, and their weights at that moment: the others go on in the same tensors."""

    def __init__(self, ensemble: PixelEnsemble, rule: PixelRule) -> None:
        self.ensemble, self.rule = ensemble, rule
        self.best = torch.full((ensemble.networks,), torch.inf)
        self.waited = torch.zeros(ensemble.networks, dtype=torch.long)
        self.stopped: dict[int, tuple[int, list[Tensor]]] = {}

    def done(self, losses: Float[Tensor, " n"], epoch: int, step: int) -> bool:
        """Look at a step's losses; whether all have stopped."""
        if epoch < self.rule.settle:
            return False
        losses = losses.cpu()
        better = losses < self.best
        self.best = torch.where(better, losses, self.best)
        self.waited = torch.where(better, 0, self.waited + 1)
        for network in (self.waited > self.rule.patience).nonzero().flatten().tolist():
            if network not in self.stopped:
                self.stopped[network] = step, [state[network].clone() for state in self._states()]
        return len(self.stopped) == self.ensemble.networks

    @torch.no_grad()
    def finish(self, steps: int) -> list[int]:
        """Give the networks that stopped their weights back; the steps that each took."""
        for network, (_, states) in self.stopped.items():
            for state, kept in zip(self._states(), states, strict=True):
                state[network] = kept
        return [self.stopped[n][0] if n in self.stopped else steps for n in range(self.ensemble.networks)]

    def _states(self) -> list[Tensor]:
        """Views of all weights and statistics, one network a row."""
        floats = [state.detach() for state in self.ensemble.state_dict().values() if state.is_floating_point()]
        return [
            state if state.ndim == 3 else rearrange(state, "(n f) -> n f", n=self.ensemble.networks) for state in floats
        ]
