"""Tiny ADMs with weights that depend on nothing but their names, so that any implementation can be given them."""

import hashlib
from collections.abc import Mapping
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repkit.backbones.adm import ADM
from repkit.backbones.adm_unet import ADMUNet
from repkit.schedule import Schedule

BASE = {"image_size": 16, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_strides": (2,)}

# Every choice of the family at least once: classes, scale and shift, learned variance, samplers, heads and their order.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "unconditional": {"num_head_channels": 16},
    "classes-new-order": {
        "num_classes": 5,
        "num_head_channels": 16,
        "use_new_attention_order": True,
        "num_res_blocks": 2,
        "channel_mult": (1, 1),
    },
    "shift-conv": {"num_classes": 5, "num_heads": 2, "use_scale_shift_norm": False, "resample": "conv"},
    "fixed-variance-plain": {
        "num_heads": 4,
        "resample": "plain",
        "out_channels": 3,
        "model_channels": 64,
        "channel_mult": (0.5, 1, 1),
        "attention_strides": (1, 4),
    },
    "shift-resblock-new-order": {"num_heads": 2, "use_scale_shift_norm": False, "use_new_attention_order": True},
    "scale-shift-conv": {"num_head_channels": 32, "resample": "conv", "out_channels": 3},
}


def config(variant: str) -> dict[str, Any]:
    return {**BASE, **VARIANTS[variant]}


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform in [-1, 1), float32, from a counter-based generator keyed by the name: the same bits everywhere."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(prod(shape)) >> np.uint64(40)
    return (raw.astype(np.float32) / np.float32(2**23) - 1).reshape(shape)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights of these names and shapes; none is zero, and activations keep about their size from layer to layer."""
    found = {}
    for name, shape in shapes.items():
        scale = 0.5 if len(shape) == 1 else sqrt(3 / prod(shape[1:]))
        centre = 1 if len(shape) == 1 and name.endswith("weight") else 0  # of a normalisation
        found[name] = torch.from_numpy(centre + np.float32(scale) * numbers(name, shape))
    return found


def adm_model(variant: str = "unconditional") -> ADMUNet:
    model = ADMUNet(**config(variant))
    model.load_state_dict(weights({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}))
    return model.eval().requires_grad_(False)


def adm(variant: str = "unconditional") -> ADM:
    return ADM(adm_model(variant), Schedule.from_betas("linear"), name=variant)


def inputs(variant: str) -> dict[str, Tensor]:
    """What the reference was given: two images that are not square, two times, and labels where there are classes."""
    given = {"x": torch.from_numpy(numbers("x", (2, 3, 8, 16))), "t": torch.tensor([3, 741])}
    return given | ({"y": torch.tensor([1, 4])} if "num_classes" in VARIANTS[variant] else {})


def sample(activation: Tensor) -> np.ndarray:
    """A few values spread over an activation [b c h w]."""
    flat = activation.detach().flatten().numpy()
    return flat[:: max(1, len(flat) // 15)][:16]
