"""What a user asks a network to be told, and what it is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Cond = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class Condition:
    """What the network is told beside x_t and t, one row an image; keys are the network's own argument names."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, rows: Any) -> "Condition":
        return Condition({name: tensor[rows] for name, tensor in self.tensors.items()})
