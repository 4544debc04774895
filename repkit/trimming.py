"""Trimming: free the weights that the forwards to some taps never read."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from repkit.backbones.base import Backbone
from repkit.backbones.hashing import keep_hash

logger = logging.getLogger("repkit")


def trim(backbone: Backbone, blocks: Sequence[str]) -> int:
    """Free all weights but those that encoding and a forward to `blocks` read; returns the bytes, also of texts.

    What needs more afterwards, such as a later tap or `denoise`, raises ValueError when it comes to a freed weight. The
    weights' hash stays that of the whole model. Raises ValueError for a backbone that `load` has not read from files.
    """
    if not backbone.provenance.get("model"):
        raise ValueError(
            f"{backbone.name} was handed in, so its weights are not repkit's to free; load it by name or folder"
        )
    whole = backbone.weights_hash
    with _reads() as read:
        backbone.shapes(blocks, backbone.size, backbone.size)
    # An encoder that makes latents by features has no forward on shapes, and none of its weights to spare.
    networks = {name: network for name, network in backbone.networks.items() if name in ("denoiser", "vae")}
    reason = f"{backbone.name} was trimmed to {', '.join(blocks)} and has no weights for more; load it again"
    freed = free(networks, read, reason)
    keep_hash(backbone, backbone.networks, whole)
    freed += 0 if backbone.prompts is None else backbone.prompts.free()
    backbone.trimmed += freed
    logger.info("%s trimmed to %s: %.1f MiB freed", backbone.name, ", ".join(blocks), freed / 2**20)
    return freed


def free(networks: Mapping[str, nn.Module], kept: set[int], reason: str) -> int:
    """Put a `Freed` in the place of each parameter and buffer whose id is not in `kept`; returns their bytes."""
    freed: dict[int, Tensor] = {}
    total = 0
    for module in (module for network in networks.values() for module in network.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) in kept or isinstance(tensor, Freed):
                    continue
                if id(tensor) not in freed:
                    freed[id(tensor)] = Freed.of(tensor, reason)
                    total += tensor.nbytes
                tensors[name] = freed[id(tensor)]  # type: ignore[assignment]
    return total


class Freed(Tensor):
    """In the place of a weight that was freed: knows its shape, and refuses whatever would read its values."""

    reason: str

    @staticmethod
    def of(weight: Tensor, reason: str) -> "Freed":
        new = torch.empty_like(weight, device="meta", requires_grad=False).as_subclass(Freed)
        new.reason = reason
        return new

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise ValueError(next(one.reason for one in tree_iter((args, kwargs)) if isinstance(one, Freed)))


# What tells of a tensor without its values. The getters' type is not known to torch's own types.
_HARMLESS: set[Any] = {
    Tensor.data_ptr,
    Tensor.is_inference,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.size,
    Tensor.numel,
    Tensor.element_size,
    Tensor.requires_grad_,
    *(
        getattr(Tensor, name).__get__
        for name in "_version device dtype grad is_leaf is_meta layout nbytes ndim requires_grad shape".split()
    ),
}


@contextmanager
def _reads() -> Iterator[set[int]]:
    """The ids of the tensors that torch's functions are given inside, whichever module holds them."""
    read: set[int] = set()

    class Reading(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            read.update(id(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor))
            return function(*args, **(kwargs or {}))

    with Reading():
        yield read
