"""Views: which part of an image is shown to the network, drawn at random in training, the centre in evaluation."""

from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps

from repkit.images import Box


@dataclass(frozen=True)
class View:
    """A part of an image, (left, top, right, bottom) in its pixels after `pad` black ones were put around it."""

    box: Box
    flip: bool = False
    pad: int = 0

    def image(self, image: Image.Image, shape: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
        """The part of a picture in RGB at `shape` = (height, width), bicubic and antialiased."""
        return self._seen(image, shape, Image.Resampling.BICUBIC, 0)

    def mask(self, mask: Int64[np.ndarray, "_h _w"], shape: tuple[int, int], outside: int) -> Int64[np.ndarray, "H W"]:
        """The same part of a mask, by nearest neighbour; `outside` is what the padding is."""
        seen = self._seen(Image.fromarray(mask.astype(np.int32)), shape, Image.Resampling.NEAREST, outside)
        return seen.astype(np.int64)

    def _seen(self, image: Image.Image, shape: tuple[int, int], how: Image.Resampling, outside: int) -> np.ndarray:
        padded = ImageOps.expand(image, self.pad, outside) if self.pad else image
        pixels = np.array(padded.resize((shape[1], shape[0]), how, self.box))
        return np.ascontiguousarray(pixels[:, ::-1]) if self.flip else pixels


@dataclass(frozen=True)
class Views:
    """How images are shown.

    Args:
        crop: of training images: none is the largest centred part of the right shape; resized a part of random area
            (smallest to all) and aspect ratio (3/4 to 4/3); scaled a random place of `smallest` to 1 of the shorter
            side; padded a random place of the image with `pad` pixels around it
        flip: mirror half of the training images
        smallest: smallest area (resized) or side (scaled) as a share
        pad: pixels for padded
        centre: share of the shorter side that is kept in evaluation
    """

    crop: Literal["none", "resized", "scaled", "padded"] = "none"
    flip: bool = False
    smallest: float = 0.08
    pad: int = 4
    centre: float = 1.0

    def __post_init__(self) -> None:
        for name in ("smallest", "centre"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share; give more than 0, and 1 at most")

    def training(self, size: tuple[int, int], shape: tuple[int, int], rng: np.random.Generator) -> View:
        """A view of an image of `size` = (width, height) that is to get `shape` = (height, width)."""
        flip = self.flip and bool(rng.random() < 0.5)
        if self.crop == "resized":
            return View(_resized(size, shape, self.smallest, rng), flip)
        if self.crop == "scaled":
            return View(_placed(size, _inside(size, shape, rng.uniform(self.smallest, 1)), rng), flip)
        if self.crop == "padded":
            outer = (size[0] + 2 * self.pad, size[1] + 2 * self.pad)
            return View(_placed(outer, _inside(size, shape, 1.0), rng, whole=True), flip, self.pad)
        return View(_centred(size, shape, 1.0), flip)

    def evaluation(self, size: tuple[int, int], shape: tuple[int, int]) -> View:
        """The view of evaluation: the centre."""
        return View(_centred(size, shape, self.centre))


def _inside(size: tuple[int, int], shape: tuple[int, int], share: float) -> tuple[float, float]:
    """Width and height of the largest part of the right shape, times a share."""
    unit = min(size[0] / shape[1], size[1] / shape[0]) * share
    return shape[1] * unit, shape[0] * unit


def _centred(size: tuple[int, int], shape: tuple[int, int], share: float) -> Box:
    width, height = _inside(size, shape, share)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def _placed(size: tuple[int, int], part: tuple[float, float], rng: np.random.Generator, *, whole: bool = False) -> Box:
    """A part at a random place, `whole` numbers of pixels from the corner."""
    spare = [max(0.0, outer - inner) for outer, inner in zip(size, part, strict=True)]
    left, top = (float(rng.integers(int(room) + 1)) if whole else rng.uniform(0, room) for room in spare)
    return left, top, min(left + part[0], size[0]), min(top + part[1], size[1])


def _resized(size: tuple[int, int], shape: tuple[int, int], smallest: float, rng: np.random.Generator) -> Box:
    """Ten tries at a part of random area and aspect ratio, then the centre."""
    for _ in range(10):
        area = size[0] * size[1] * rng.uniform(smallest, 1)
        ratio = exp(rng.uniform(log(3 / 4), log(4 / 3))) * shape[1] / shape[0]
        part = sqrt(area * ratio), sqrt(area / ratio)
        if part[0] <= size[0] and part[1] <= size[1]:
            return _placed(size, part, rng)
    return _centred(size, shape, 1.0)
