"""Pixels as features: an extractor for which equal patches are equal cells, and textures of which no two are equal."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from repkit.backbones.base import Block
from repkit.extractors import Extractor, prepare
from repkit.features import Features
from repkit.fusion import Part
from repkit.images import Resize
from repkit.tasks.correspondence import Correspondence

CELL = 4


class Patches(Extractor):
    """Each cell holds the pixels of its patch of 4x4, less the middle grey."""

    provenance: dict[str, Any] = {}
    identity = {"extractor": "patches"}

    def __init__(self, size: int | tuple[int, int] = 64, policy: Any = "squash") -> None:
        self.resize = Resize(size, policy)
        self.blocks = {"patches": Block(3 * CELL**2, CELL)}

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        height, width = self.resize.shape
        return {"patches": (3 * CELL**2, height // CELL, width // CELL)}

    def __call__(self, images: Any, cond: Any = None, *, grad: bool = False, check: bool = True) -> Features:
        batch = prepare(images, self.resize, torch.device("cpu"))
        maps = F.pixel_unshuffle(batch.images - 0.5, CELL)
        return Features({"patches": maps}, batch.images.shape[-2:], batch.mask, self.identity)


def texture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Random pixels in colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_patches(size: int | tuple[int, int] = 64, policy: Any = "squash", **options: Any) -> Correspondence:
    """A correspondence by pixels."""
    return Correspondence([Part(Patches(size, policy))], **options)
