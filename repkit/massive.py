"""Massive channels of transformer features: found, and zeroed before a block's norm (Gan et al. 2025, DiTF)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repkit.capture import Point, capture

Call = tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]  # a module, and what it was called with
ADALN = ".in.adaln"


def massive_channels(x: Float[Tensor, "b c h w"], *, ratio: float | int = 10) -> list[int]:
    """The channels whose mean absolute value exceeds `ratio` times that of the median channel, in ascending order.

    They are few, the same for all images, and say little of the image; a LayerNorm spreads them over all others.
    """
    strength = x.float().abs().mean((0, 2, 3))
    return torch.nonzero(strength > ratio * strength.median()).flatten().tolist()


def call_points(points: Mapping[str, Point], block: str) -> tuple[Point, Point]:
    """For a tap `*.in.adaln`: where to take its block's call, and where inside the block the tap lies.

    Raises ValueError for another tap, or for one that the model has no input of the block for.
    """
    inner, outer = points.get(block), points.get(block.removesuffix(ADALN) + ".in")
    if not block.endswith(ADALN) or inner is None or outer is None:
        have = ", ".join(name for name in points if name.endswith(ADALN)) or "none in this model"
        raise ValueError(f"channels are discarded before a block's own norm, not at {block!r}; have {have}")
    return Point(outer.path, "call"), Point(inner.path.removeprefix(f"{outer.path}."), inner.side)


def discarded(call: Call, channels: Sequence[int], tap: Point) -> Any:
    """What `tap`, a point inside the called block, gives when those channels of the block's image input are zero.

    The block runs again from its input as far as the tap: the norm and its modulation, whatever the family.
    Raises ValueError for a channel that the input does not have.
    """
    block, args, kwargs = call
    hidden = args[0] if args else kwargs["hidden_states"]
    if wrong := [channel for channel in channels if not 0 <= channel < hidden.shape[-1]]:
        raise ValueError(f"no channel {wrong[0]} to discard; have 0 ... {hidden.shape[-1] - 1}")
    # Filled, not multiplied: zero times an overflow is no number.
    zeroed = hidden.index_fill(-1, torch.tensor(channels, device=hidden.device, dtype=torch.long), 0)
    args, kwargs = ((zeroed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": zeroed})
    return capture(block, [tap], lambda module: module(*args, **kwargs))[tap]
