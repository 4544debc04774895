"""A plain convolutional network of about the bundled models' size, trained with labels: what supervision reaches."""

import numpy as np
import torch
from einops.layers.torch import Rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from repkit.progress import Progress

EPOCHS, BATCH, LEARNING_RATE = 6, 128, 1e-3


def build(classes: int) -> nn.Module:
    """Three convolutions and two linear layers for grey 28x28 images, 1.6 million parameters."""
    layers: list[nn.Module] = []
    for before, after in ((1, 48), (48, 96), (96, 160)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, Rearrange("b c h w -> b (c h w)"), nn.Linear(160 * 9, 960), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(960, classes),
    )  # fmt: skip


def train(images: UInt8[np.ndarray, "n 28 28"], labels: Int[np.ndarray, " n"], seed: int = 0) -> nn.Module:
    """The network after EPOCHS epochs of Adam with a one-cycle learning rate; nothing is chosen on test data."""
    torch.manual_seed(seed)
    network, pixels, target = build(int(labels.max()) + 1), _tensors(images), torch.from_numpy(labels).long()
    steps = EPOCHS * (len(pixels) // BATCH)
    optimizer = torch.optim.Adam(network.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with Progress("plain CNN", unit="steps") as progress:
        for epoch in range(EPOCHS):
            for step, rows in enumerate(torch.randperm(len(pixels)).split(BATCH)[: steps // EPOCHS]):
                loss = nn.functional.cross_entropy(network(pixels[rows]), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                progress(epoch * (steps // EPOCHS) + step + 1, steps)
    return network.eval()


@torch.no_grad()
def predict(network: nn.Module, images: UInt8[np.ndarray, "n 28 28"]) -> Int[np.ndarray, " n"]:
    """Class numbers."""
    found = torch.cat([network(part).argmax(1) for part in _tensors(images).split(500)])
    return found.numpy()


def _tensors(images: UInt8[np.ndarray, "n 28 28"]) -> Float[Tensor, "n 1 28 28"]:
    return torch.from_numpy(images)[:, None].float() / 127.5 - 1
