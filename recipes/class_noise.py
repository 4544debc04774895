"""ClassNoise: noise on the embedding of the class while a denoiser is trained."""

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn


class ClassNoise:
    """Adds delta ~ N(0, (gamma / sqrt(d))^2) to what a network's class embeddings of length d give.

    It is the perturbation of "Slight corruption in pre-training data makes better diffusion models" (Chen et al. 2024,
    eq. 8). A network that embeds the class in several places, as a DiT of diffusers does in each block, gets the same
    delta in all. Without `draw` nothing is added.
    """

    def __init__(self, network: nn.Module, gamma: float) -> None:
        self.gamma = gamma
        self.delta: Tensor | None = None
        embeddings = [one for one in network.modules() if isinstance(one, nn.Embedding)]
        (self.length,) = {one.embedding_dim for one in embeddings}
        for embedding in embeddings:
            embedding.register_forward_hook(self._add)

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> None:
        """The noise of the next forward, of so many images; drawn on the CPU, so that it is the same everywhere."""
        eps = torch.randn(count, self.length, generator=generator)
        self.delta = (self.gamma / sqrt(self.length) * eps).to(device)

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self.delta is None else output + self.delta
