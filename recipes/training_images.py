"""What each training step sees: images, labels, noise, times and dropped labels are functions of (seed, step).

All of it is drawn on the CPU, so that it is the same wherever the training runs.
"""

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor

from repkit.datasets.fashion_mnist import CLASSES, load, load_full
from repkit.images import Resize


class Batch(NamedTuple):
    """One training step's draw: images in [-1, 1], labels after dropout, noise, and uniform times in [0, 1)."""

    x0: Float[Tensor, "b 1 h w"]
    labels: Int64[Tensor, " b"]
    eps: Float[Tensor, "b 1 h w"]
    u: Float[Tensor, " b"]


def draw_batch(
    images: UInt8[Tensor, "n h w"],
    labels: Int64[Tensor, " n"],
    step: int,
    *,
    batch: int,
    label_dropout: float,
    seed: int,
) -> Batch:
    """What training step `step` sees: each image once an epoch, and times stratified over the batch."""
    epoch, position = divmod(step, len(images) // batch)
    order = torch.randperm(len(images), generator=step_generator(seed, "order", epoch))
    rows = order[position * batch : (position + 1) * batch]
    x0 = images[rows][:, None].float() / 127.5 - 1
    generator = step_generator(seed, "step", step)
    dropped = torch.rand(batch, generator=generator) < label_dropout
    eps = torch.randn(x0.shape, generator=generator)
    u = (torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1
    return Batch(x0, torch.where(dropped, len(CLASSES), labels[rows]), eps, u)


def step_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """The random numbers of one step or epoch, for one purpose."""
    words = np.random.SeedSequence([seed, *purpose.encode(), index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


def prepare_images(images: UInt8[np.ndarray, "n 28 28"], size: int) -> UInt8[Tensor, "n h w"]:
    """Grey images as the backbones will see them: through the same resize, which works on RGB."""
    resize = Resize(size)
    return torch.from_numpy(np.stack([resize(Image.fromarray(image).convert("RGB"))[0][..., 0] for image in images]))


class TrainingImages(LightningDataModule):
    """Fashion-MNIST's training images at `size`; its batches begin at the step at which the trainer stands.

    `data` is "bundled" or a folder with the original files. Raises FileNotFoundError without them, ValueError for a
    batch that is larger than the set.
    """

    def __init__(self, data: str, size: int, *, batch: int, label_dropout: float, seed: int) -> None:
        super().__init__()
        self.data, self.size = data, size
        self.batch, self.label_dropout, self.seed = batch, label_dropout, seed

    def setup(self, stage: str) -> None:
        images, labels = load("train") if self.data == "bundled" else load_full(self.data, "train")
        if len(images) < self.batch:
            raise ValueError(f"batch={self.batch} of {len(images)} images; give a smaller one")
        self.images, self.labels = prepare_images(images, self.size), torch.from_numpy(labels)

    def train_dataloader(self) -> Iterator[Batch]:
        assert self.trainer is not None
        return map(self._draw, count(self.trainer.global_step))

    def _draw(self, step: int) -> Batch:
        return draw_batch(
            self.images, self.labels, step, batch=self.batch, label_dropout=self.label_dropout, seed=self.seed
        )
