"""Tiny checkpoints with the published names of SiT, REPA, SVG and DiT, and backbones made of them."""

import hashlib
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from repkit.backbones.sit import SiT, from_weights
from repkit.dino import DinoExtractor
from tests import tiny

WIDTH, DEPTH, LABELS = 12, 2, 4


def numbers(name: str, *shape: int) -> Tensor:
    """Numbers between -0.5 and 0.5 that depend on the name alone, the same on every machine."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.Generator(np.random.Philox(key)).random(shape) - 0.5).float()


def shapes(channels: int, out: int, patch: int, cells: int, *, qk_norm: int = 0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of SiT; qk_norm: channels a head, where queries and keys are normed."""
    linears = {"t_embedder.mlp.0": (WIDTH, 256), "t_embedder.mlp.2": (WIDTH, WIDTH)}
    linears |= {"final_layer.linear": (patch * patch * out, WIDTH), "final_layer.adaLN_modulation.1": (24, WIDTH)}
    found: dict[str, tuple[int, ...]] = {"pos_embed": (1, cells, WIDTH), "x_embedder.proj.bias": (WIDTH,)}
    found |= {"x_embedder.proj.weight": (WIDTH, channels, patch, patch)}
    found |= {"y_embedder.embedding_table.weight": (LABELS, WIDTH)}
    for block in range(DEPTH):
        inner = {"attn.qkv": (36, WIDTH), "attn.proj": (WIDTH, WIDTH), "adaLN_modulation.1": (72, WIDTH)}
        inner |= {"mlp.fc1": (48, WIDTH), "mlp.fc2": (WIDTH, 48)}
        linears |= {f"blocks.{block}.{name}": shape for name, shape in inner.items()}
        if qk_norm:
            norms = [f"blocks.{block}.attn.{part}_norm.{kind}" for part in "qk" for kind in ("weight", "bias")]
            found |= dict.fromkeys(norms, (qk_norm,))
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def sit_weights(channels: int = 4, out: int = 4, **options: Any) -> dict[str, Tensor]:
    return _drawn(shapes(channels, out, 2, 9, **options))


def repa_weights(**options: Any) -> dict[str, Tensor]:
    """With the projectors of the alignment, which are no part of the denoiser."""
    weights = sit_weights(**options)
    return weights | {"projectors.0.0.weight": numbers("p", 10, WIDTH), "projectors.0.0.bias": numbers("p", 10)}


def svg_weights(channels: int = 4) -> dict[str, Tensor]:
    """Patches of one cell on a grid of 16x16, embedded by a linear layer; a second half of outputs is not used."""
    found = shapes(channels, 2 * channels, 1, 256, qk_norm=4)
    found["ln1.weight"] = found.pop("x_embedder.proj.weight")[:2]
    found["ln1.bias"] = found.pop("x_embedder.proj.bias")
    return _drawn(found)


def _drawn(found: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: numbers(name, *shape) for name, shape in found.items()}


CONFIG = {"heads": 3, "class_names": tiny.NAMES}


def sit() -> SiT:
    return from_weights(sit_weights(3, 6), name="SiT-S-2.pt", config=CONFIG)  # on pixels; a learned half


def repa() -> SiT:
    return from_weights(repa_weights(), name="last.pt", config=CONFIG, vae=tiny.vae_model())


def dit() -> SiT:
    return from_weights(sit_weights(4, 8), name="DiT-S-2.pt", config=CONFIG, vae=tiny.vae_model())


def dino(taps: str = "norm") -> DinoExtractor:
    """A ViT with 4 channels and a patch of 2, so that 32x32 pixels make SVG's 16x16 cells."""
    model = VisionTransformer(
        img_size=32, patch_size=2, embed_dim=4, depth=1, num_heads=1, num_classes=0, dynamic_img_size=True
    )
    model.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}  # type: ignore[assignment]
    return DinoExtractor(tiny.randomise(model), taps)


MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 1.5]


def svg() -> SiT:
    config = CONFIG | {"mean": MEAN, "std": STD}
    return from_weights(svg_weights(), name="svg.pt", config=config, extractor=dino())
