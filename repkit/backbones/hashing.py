"""The hash of a network's weights, which says whether two of them would give the same values."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def current_hash(owner: object, networks: Mapping[str, nn.Module]) -> str:
    """`hash_weights`, kept with `owner` until a weight is replaced, moved or changed in place.

    A change through `.data` leaves no trace and is not seen; nor is one of tensors made in inference mode.
    """
    if vars(owner).get("_hashed", (None,))[0] != _state(networks):
        keep_hash(owner, networks, hash_weights(networks))
    return str(vars(owner)["_hashed"][1])


def keep_hash(owner: object, networks: Mapping[str, nn.Module], value: str) -> None:
    """Have `value` be the hash of the networks as they are now."""
    vars(owner)["_hashed"] = _state(networks), value


def _state(networks: Mapping[str, nn.Module]) -> tuple[tuple[int, int], ...]:
    tensors = (tensor for network in networks.values() for tensor in (*network.parameters(), *network.buffers()))
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def hash_weights(networks: Mapping[str, nn.Module]) -> str:
    """sha256 (hex) over the networks' configs and their parameters and buffers: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for network, module in sorted(networks.items()):
        config = _config(module)  # heads and groups leave no trace in the weights
        # As JSON, in which a tuple in memory and the list read from a file are one.
        digest.update(f"{network}:{json.dumps(config, sort_keys=True, default=str)}:".encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)  # bytes, whatever the dtype
    return digest.hexdigest()


def _config(module: nn.Module) -> dict[str, Any]:
    """What a network was built from, without what only says where it was loaded from, by which version, and as what."""
    config = getattr(module, "config", {})
    config = config.to_diff_dict() if hasattr(config, "to_diff_dict") else config  # that of transformers
    passing = ("architectures", "transformers_version", "dtype", "torch_dtype")
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in passing}
