"""The trained heads by name, with their sizes and the learning rates that compete by default."""

from collections.abc import Mapping, Sequence

from torch import nn

from repkit.heads.attention import AttentionHead, Shape
from repkit.heads.difformer import DifFormer
from repkit.heads.linear import BatchNormLinear, LinearHead
from repkit.heads.mlp import MlpHead

WIDTH = 256
_MANY = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)  # of linear heads, which are one product
_FEW = (3e-3, 1e-2, 3e-2, 0.1)
KINDS: Mapping[str, Sequence[float]] = {
    "linear": _MANY,
    "bn-linear": _MANY,
    "mlp": _FEW,
    "attention": _FEW,
    "difformer": _FEW,
}
MAP_KINDS = ("attention", "difformer")


def build_head(kind: str, sizes: Mapping[str, Sequence[int]], n_classes: int, width: int = WIDTH) -> nn.Module:
    """A head with fresh weights.

    kind: linear, bn-linear, mlp, attention or difformer. sizes: [c] or [c h w] of each key; all but difformer read one
    key. width: of the hidden layer of mlp, and of the tokens of attention and difformer.
    Raises ValueError for an unknown kind, several keys where one is read, and vectors where maps are needed.
    """
    if kind not in KINDS:
        raise ValueError(f"no head {kind!r}; have {', '.join(KINDS)}")
    if kind in MAP_KINDS and any(len(size) != 3 for size in sizes.values()):
        raise ValueError(f"{kind} needs maps [c h w], and features of {list(sizes.values())} are vectors")
    if kind == "difformer":
        return DifFormer({key: _shape(size) for key, size in sizes.items()}, n_classes, width=width)
    if len(sizes) != 1:
        raise ValueError(f"{kind} reads one tap; got {', '.join(sizes)}")
    (size,) = sizes.values()
    if kind == "attention":
        return AttentionHead(_shape(size), n_classes, width=width)
    if kind == "mlp":
        return MlpHead(size[0], n_classes, hidden=(width,))
    return (LinearHead if kind == "linear" else BatchNormLinear)(size[0], n_classes)


def _shape(size: Sequence[int]) -> Shape:
    channels, h, w = size
    return channels, h, w
