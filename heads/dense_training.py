"""Training of heads that give logits for whole maps, from a handful of masks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from repkit.heads.miou import IGNORE
from repkit.heads.places import Levels


@dataclass(frozen=True)
class DenseRule:
    """AdamW for so many `steps` of `batch` images, its rate falling from `lr` to 0 along a cosine."""

    steps: int = 400
    batch: int = 8
    lr: float = 3e-3
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.lr > 0:
            raise ValueError(f"steps={self.steps}, batch={self.batch}, lr={self.lr}; give at least 1, 1, and above 0")


def train_dense(
    head: nn.Module,
    levels: Levels,
    masks: Integer[Tensor, "n H W"],
    rule: DenseRule | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train a head {stride: map} -> logits on images' maps and masks, 255 ignored; it ends in eval mode.

    masks: of any one size, to which the logits are enlarged. The order of the images depends on `seed` only.
    """
    rule = rule or DenseRule()
    optimizer = torch.optim.AdamW(head.parameters(), lr=rule.lr, weight_decay=rule.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rule.steps)
    head.train()
    for step, rows in enumerate(_rows(len(masks), rule, seed)):
        if progress:
            progress(step, rule.steps)
        logits = head({stride: maps[rows.to(maps.device)] for stride, maps in levels.items()})
        loss = segmentation_loss(logits, masks[rows].to(logits.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if progress:
        progress(rule.steps, rule.steps)
    head.eval()


def segmentation_loss(logits: Float[Tensor, "b k _h _w"], masks: Integer[Tensor, "b H W"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the labelled pixels, of logits enlarged to the masks' size; 0 where there are none."""
    enlarged = F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(enlarged, masks.long(), ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp_min(1)


def _rows(count: int, rule: DenseRule, seed: int) -> Iterator[Int[Tensor, " b"]]:
    """Every image once before any comes again."""
    needed, rng = rule.steps * rule.batch, np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(count) for _ in range(-(-needed // count))])
    size = min(rule.batch, count)
    yield from torch.from_numpy(order[: rule.steps * size]).split(size)
