"""Reading a checkpoint of SiT, REPA, SVG or DiT: what its names and shapes say of the network, and which they are."""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from repkit.backbones.sit_transformer import SiTTransformer

NetworkTime = Literal["repa", "sit", "dit"]

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published sizes S, B, L and XL, by width


def network_time(weights: Mapping[str, Tensor], name: str) -> NetworkTime:
    """Which way the network's time runs, from what REPA and SVG leave in their weights, or else from the file's name.

    Raises ValueError where neither says.
    """
    if any(key.startswith("projectors.") for key in weights):
        return "repa"
    if "ln1.weight" in weights:
        return "sit"
    words = re.findall("[a-z]+", name.lower())
    for time in get_args(NetworkTime):
        if time in words:
            return time
    raise ValueError(
        f"nothing in {name} says how its time runs; give --config time=sit (1 is data, predicts data - noise), "
        "time=repa (0 is data, predicts noise - data) or time=dit (steps 0 ... 999, predicts the noise), in Python "
        "config={'time': ...}"
    )


def latent_channels(weights: Mapping[str, Tensor]) -> int:
    """How many channels the network takes."""
    return weights["ln1.weight" if "ln1.weight" in weights else "x_embedder.proj.weight"].shape[1]


def _rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the network itself, under SiT's names."""
    aligned = _depth(weights)  # REPA's first checkpoints count the blocks after the aligned one anew

    def renamed(key: str) -> str:
        key = re.sub(r"^ln1\.", "x_embedder.proj.", key)
        return re.sub(r"^decoder_blocks\.(\d+)", lambda found: f"blocks.{aligned + int(found[1])}", key)

    own = {renamed(key): tensor for key, tensor in weights.items() if not key.startswith("projectors.")}
    if "ln1.weight" in weights:  # SVG's patches are single cells, so it embeds them by a linear layer
        own["x_embedder.proj.weight"] = weights["ln1.weight"][:, :, None, None]
    return own


def _depth(weights: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[1] for key in weights if key.startswith("blocks.")})


def read_network(weights: Mapping[str, Tensor], name: str, heads: int | None) -> SiTTransformer:
    """The frozen network of a checkpoint; its tensors are the checkpoint's own.

    heads: None is what the shapes or a published size of this width say. Raises OSError for weights that are missing,
    ValueError for what does not fit, heads that do not divide the width among it.
    """
    weights = _rename(weights)
    config = _read_config(weights, name, heads)
    with torch.device("meta"):
        network = SiTTransformer(**config)
    expected = network.state_dict()
    if unknown := [key for key in weights if key not in expected]:
        raise ValueError(f"{name} has {len(unknown)} weights that no SiT has, {unknown[0]} first; it is a variant")
    if missing := [key for key in expected if key not in weights]:
        raise OSError(f"{name} lacks {len(missing)} weights of a SiT, {missing[0]} first; get it again")
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[key].shape)}"
            raise ValueError(f"{key} of {name} has shape {shapes} as the other weights say; it is a variant of SiT")
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()


def _read_config(weights: Mapping[str, Tensor], name: str, heads: int | None) -> dict[str, Any]:
    """What the shapes say of the network. Raises OSError for a weight that is missing."""

    def shape(key: str) -> torch.Size:
        if key not in weights:
            raise OSError(f"{name} lacks {key}, which a SiT has; get it again, or give another file")
        return weights[key].shape

    width, channels, patch, _ = shape("x_embedder.proj.weight")
    qk_norm = "blocks.0.attn.q_norm.weight" in weights
    if heads is None and qk_norm:
        heads = width // shape("blocks.0.attn.q_norm.weight")[0]
    if heads is None and width not in _HEADS:
        raise ValueError(
            f"{name} is {width} wide, which no published SiT is; give --config heads=NUMBER, in Python config="
            "{'heads': ...}"
        )
    heads = heads or _HEADS[width]
    if width % heads:
        fit = ", ".join(str(one) for one in range(1, min(width, 64) + 1) if width % one == 0)
        raise ValueError(f"config heads={heads} does not divide the width of {name}, {width}; give one of {fit}")
    return {
        "sample_size": isqrt(shape("pos_embed")[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("final_layer.linear.bias")[0] // patch**2,
        "width": width,
        "depth": _depth(weights),
        "heads": heads,
        "mlp_width": shape("blocks.0.mlp.fc1.bias")[0],
        "labels": shape("y_embedder.embedding_table.weight")[0],
        "qk_norm": qk_norm,
    }
