"""What the tests of masks share: a scene whose masks are known, and features that tell its parts apart exactly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from repkit.backbones.base import Block
from repkit.extractors import Extractor, prepare, resize_identity
from repkit.features import Features
from repkit.fusion import Part
from repkit.images import Resize
from repkit.tasks.correspondence import Correspondence

GREYS = 16  # how many a `Greys` tells apart
PALETTE = bytes([0, 0, 0, 200, 30, 30, 20, 180, 90])


class Greys(Extractor):
    """One-hot vectors of each pixel's grey, so that like is like exactly; counts its calls."""

    provenance: Mapping[str, Any] = {}

    def __init__(self, size: int | tuple[int, int], policy: Any = "squash") -> None:
        self.resize, self.blocks, self.calls = Resize(size, policy), {"grey": Block(GREYS, 1)}, 0

    @property
    def shapes(self):
        return {"grey": (GREYS, *self.resize.shape)}

    @property
    def identity(self):
        return {"extractor": "greys", "resize": self.resize.identity}

    def __call__(self, images, cond=None, *, grad=False, check=True):
        self.calls += 1
        batch = prepare(images, self.resize, torch.device("cpu"))
        codes = (batch.images.mean(1) * 256 / (256 / GREYS)).long().clamp(max=GREYS - 1)
        maps = rearrange(F.one_hot(codes, GREYS), "b h w c -> b c h w").float()
        height, width = batch.images.shape[-2:]
        identity = {**self.identity, "resize": resize_identity(self.resize, height, width)}
        return Features({"grey": maps}, (height, width), batch.mask, identity)


def greys(size: int | tuple[int, int], policy: Any = "squash") -> Correspondence:
    return Correspondence([Part(Greys(size, policy))])


def calls(of: Correspondence) -> int:
    """How often the images were looked at."""
    extractor = of.parts[0].extractor
    assert isinstance(extractor, Greys)
    return extractor.calls


def scene(step: int, size: tuple[int, int] = (24, 20)) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its mask, (width, height) pixels: two textured squares that move over a still ground.

    The grounds and each square have greys of their own.
    """
    rng = np.random.default_rng(0)
    width, height = size
    picture = rng.integers(0, 5, (height, width)) * 16 + 8
    mask = np.zeros((height, width), np.uint8)
    for label, (x, y) in ((1, (2 + 2 * step, 2)), (2, (17 - step, 11 + step % 3))):
        texture = (rng.integers(0, 5, (6, 6)) + 5 * label) * 16 + 8
        picture[y : y + 6, x : x + 6], mask[y : y + 6, x : x + 6] = texture, label
    return np.stack([picture.astype(np.uint8)] * 3, -1), mask


def write_palette_mask(path: Path, mask: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    picture.putpalette(PALETTE)
    picture.save(path)
    return path


def write_video(root: Path, frames: int, scale: int = 1) -> Path:
    """Frames in `frames` and masks in `truth`, by the names 0.png, 1.png, ..., pixels enlarged by `scale`."""
    (root / "frames").mkdir(parents=True)
    for step in range(frames):
        picture, mask = (np.repeat(np.repeat(one, scale, 0), scale, 1) for one in scene(step))
        Image.fromarray(picture).save(root / "frames" / f"{step}.png")
        write_palette_mask(root / "truth" / f"{step}.png", mask)
    return root
