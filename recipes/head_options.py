"""HeadOptions: a classification head and its sizes, in words that fit in a yaml file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repkit.heads.attention import AttentionHead, Shape
from repkit.heads.difformer import DifFormer
from repkit.heads.linear import BatchNormLinear, LinearHead
from repkit.heads.mlp import MlpHead
from repkit.pooling import pool as pooled


@dataclass(frozen=True)
class HeadOptions:
    """A head.

    Args:
        kind: linear, bn-linear (behind batch normalisation without parameters), mlp, attention or difformer
        pool: maps are averaged over this many by this many cells, for linear, bn-linear and mlp
        hidden: widths of the layers of mlp
        width: of the tokens of attention and difformer
        depth: transformer blocks of attention and difformer
        heads: of each transformer block
        side: rows and columns of tokens at most
        norm: before the projection, over the whole map (layer) or each channel's batch statistics (batch)
        std: of the linear layers' normal initial weights, with biases of 0; null is torch's own initialisation
    """

    kind: Literal["linear", "bn-linear", "mlp", "attention", "difformer"] = "linear"
    pool: int = 1
    hidden: list[int] = field(default_factory=lambda: [512])
    width: int = 1024
    depth: int = 2
    heads: int = 8
    side: int = 16
    norm: Literal["layer", "batch"] = "layer"
    std: float | None = None

    def build(self, sizes: Mapping[str, Sequence[int]], n_classes: int, seed: int) -> "Reading":
        """A head on the features of these taps, with weights that the seed decides.

        Raises ValueError for attention on several taps, and for maps where vectors are needed or the other way round.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = self._attending(sizes, n_classes) if self._attends else self._pooling(sizes, n_classes)
            if self.std is not None:
                for layer in head.modules():
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=self.std)
                        nn.init.zeros_(layer.bias)
        return Reading(list(sizes), head, None if self._attends else self.pool)

    @property
    def _attends(self) -> bool:
        return self.kind in ("attention", "difformer")

    def _attending(self, sizes: Mapping[str, Sequence[int]], n_classes: int) -> nn.Module:
        if any(len(size) != 3 for size in sizes.values()):
            raise ValueError(f"{self.kind} needs maps, and features of {list(sizes.values())} are vectors")
        shapes = {key: _shape(size) for key, size in sizes.items()}
        options = {"width": self.width, "depth": self.depth, "heads": self.heads, "side": self.side}
        if self.kind == "difformer":
            return DifFormer(shapes, n_classes, norm=self.norm, **options)
        if len(shapes) != 1:
            raise ValueError(f"attention reads one tap; got {', '.join(shapes)} (difformer reads several)")
        (shape,) = shapes.values()
        return AttentionHead(shape, n_classes, norm=self.norm, **options)

    def _pooling(self, sizes: Mapping[str, Sequence[int]], n_classes: int) -> nn.Module:
        if self.pool > 1 and any(len(size) != 3 for size in sizes.values()):
            raise ValueError(f"pool={self.pool} needs maps, and features of {list(sizes.values())} are vectors")
        width = sum(size[0] * self.pool**2 for size in sizes.values())
        if self.kind == "mlp":
            return MlpHead(width, n_classes, hidden=self.hidden)
        return (LinearHead if self.kind == "linear" else BatchNormLinear)(width, n_classes)


class Reading(nn.Module):
    """A head and the taps that it reads; `pool` averages their maps and joins them to one vector."""

    def __init__(self, keys: list[str], head: nn.Module, pool: int | None) -> None:
        super().__init__()
        self.keys, self.head, self.pool = keys, head, pool

    def forward(self, features: Mapping[str, Tensor]) -> Float[Tensor, "b k"]:
        own = {key: features[key] for key in self.keys}
        if self.pool is not None:
            return self.head(torch.cat([_vector(one, self.pool) for one in own.values()], dim=1))
        return self.head(own if isinstance(self.head, DifFormer) else own[self.keys[0]])


def _vector(features: Tensor, side: int) -> Float[Tensor, "b d"]:
    return features if features.ndim == 2 else pooled(features, f"{side}x{side}")


def _shape(size: Sequence[int]) -> Shape:
    channels, h, w = size
    return channels, h, w
