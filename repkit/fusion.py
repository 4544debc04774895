"""Fused: several extractors as one, whose cosine is the weighted mean of theirs."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from repkit.backbones.base import Block
from repkit.backbones.conditions import Cond
from repkit.backbones.prompts import Told
from repkit.bases import Basis
from repkit.dino import DinoExtractor
from repkit.extractors import Extractor, Images, prepare, resize_identity
from repkit.features import Features, Identity
from repkit.images import Number, Resize, to_tensor, to_uint8
from repkit.precision import full_float32

KEY = "fused"
Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Part:
    """One extractor in a fusion: its share, and which of its keys make its vector.

    weight: of the part's unit vectors; a weight counts by its square, so 2 is four times as much as 1. keys: None is
    all. key_weights: one for each key, of its values before the part gets unit norm. bases: by key, principal
    components (`bases.fit_bases`) that replace the key's channels.
    Raises ValueError for keys that the extractor or the basis does not have, and for weights below 0.
    """

    extractor: Extractor
    weight: Number = 1.0
    keys: Sequence[str] | None = None
    key_weights: Sequence[Number] | None = None
    bases: Mapping[str, Basis] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            raise TypeError(f"keys={self.keys!r} is one string; give a list of keys")
        have, chosen = list(self.extractor.blocks), self.chosen
        if unknown := [key for key in chosen if key not in have]:
            raise ValueError(f"no key {unknown[0]!r} in the extractor; have {', '.join(have)}")
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"keys={chosen}; give at least one, and each once")
        if len(self.scales) != len(chosen):
            raise ValueError(f"{len(self.scales)} key weights for {len(chosen)} keys; give one for each")
        if not all(isfinite(one) and one >= 0 for one in (self.weight, *self.scales)) or not any(self.scales):
            raise ValueError(
                f"weight={self.weight}, key_weights={self.scales}; give finite ones of at least 0, and one key above 0"
            )
        self._check_bases()

    def _check_bases(self) -> None:
        for key, basis in self.bases.items():
            if key not in self.chosen:
                raise ValueError(f"a basis for {key!r}, which is none of the part's keys: {', '.join(self.chosen)}")
            fitted, channels = basis.components.shape[1], self.extractor.blocks[key].channels
            if fitted != channels:
                raise ValueError(f"the basis of {key} is for {fitted} channels, not {channels}; fit it on this key")

    @property
    def chosen(self) -> list[str]:
        """The keys, in their order."""
        return list(self.extractor.blocks if self.keys is None else self.keys)

    @property
    def scales(self) -> list[float]:
        """The weight of each key."""
        return [1.0] * len(self.chosen) if self.key_weights is None else [float(one) for one in self.key_weights]

    @property
    def channels(self) -> int:
        """How many channels the part adds."""
        return sum(
            len(self.bases[key].components) if key in self.bases else self.extractor.blocks[key].channels
            for key in self.chosen
        )

    @property
    def identity(self) -> Identity:
        """What of the part decides the fused values."""
        return {
            "extractor": self.extractor.identity,
            "weight": float(self.weight),
            "keys": self.chosen,
            "key_weights": self.scales,
            **({"bases": {key: basis.hash for key, basis in self.bases.items()}} if self.bases else {}),
        }

    def join(self, maps: Sequence[Float[Tensor, "b _c _h _w"]], grid: Grid) -> Float[Tensor, "b c h w"]:
        """The maps of the chosen keys as one, each times its weight; the vectors keep their norms."""
        pairs = zip(self.chosen, maps, strict=True)
        reduced = [self.bases[key].project(one) if key in self.bases else one for key, one in pairs]
        return torch.cat([scale * _on_grid(one, grid) for scale, one in zip(self.scales, reduced, strict=True)], 1)

    def fuse(self, maps: Sequence[Float[Tensor, "b _c _h _w"]], grid: Grid) -> Float[Tensor, "b c h w"]:
        """As `join`, of vectors that have the part's weight as their norm (zeros stay zeros)."""
        return float(self.weight) * F.normalize(self.join(maps, grid), dim=1)


class Fused(Extractor):
    """Images -> Features with the one key `fused`: every part's unit vectors, times its weight, side by side.

    Their cosine is the mean of the parts' cosines with weights w^2, and the nearest by Euclidean distance is the
    nearest by cosine. grid: (h, w) of the result, or "finest", the largest height and width among the maps; maps are
    resampled to it bilinearly, each taken to cover the whole image (align_corners=False).

    An image is resized once, as the part with the largest images does it, and from there to each other part's size,
    so that all see the same region: all parts must have the same policy, and with "crop" and "pad" sizes of the same
    proportions. Tensors are taken to be of the size of `resize`; another size scales all parts' by the same factor.
    cond: what all parts that take one are told, in place of their own.
    Raises ValueError for parts that do not go together.
    """

    def __init__(self, parts: Sequence[Part], *, grid: str | tuple[int, ...] = "finest", cond: Cond = None) -> None:
        self.parts, self.cond = tuple(parts), cond
        if not any(part.weight for part in self.parts):
            raise ValueError(f"{len(self.parts)} parts, none of a weight above 0; give at least one Part(extractor)")
        self.resize = common_resize([part.extractor.resize for part in self.parts])
        self.grid = _checked_grid(grid)
        self.provenance = {"parts": [dict(part.extractor.provenance) for part in self.parts]}
        channels, height, _ = self.shapes[KEY]
        self.blocks = {KEY: Block(channels, self.resize.shape[0] // height)}

    def __call__(self, images: Images, cond: Cond = None, *, grad: bool = False, check: bool = True) -> Features:
        """Run every extractor once, and fuse; `cond` is told to those that take one, which a `DinoExtractor` does not.

        grad=True keeps the graph, so that features can be differentiated with respect to the images. Non-finite
        features raise FloatingPointError, unless check=False leaves them to the caller.
        """
        cond = self.cond if cond is None else cond
        if cond is not None and not _takes_cond(self):
            raise ValueError(f"no part takes a condition; leave cond out instead of giving {cond!r}")
        # Each extractor moves its own images to where it computes.
        batch = prepare(images, self.resize, images.device if isinstance(images, Tensor) else torch.device("cpu"))
        height, width = batch.images.shape[-2:]
        found: dict[Extractor, Features] = {}
        for extractor in dict.fromkeys(part.extractor for part in self.parts):
            seen = _resized(batch.images, self._size(extractor, height, width), grad)
            found[extractor] = extractor(seen, cond if _takes_cond(extractor) else None, grad=grad, check=check)
        maps = [[found[part.extractor][key] for key in part.chosen] for part in self.parts]
        fused = self._fuse(maps, grad)
        mask = None if batch.mask is None else batch.mask.to(fused.device)
        identity = {**self.identity, **_told(cond), "resize": resize_identity(self.resize, height, width)}
        return Features({KEY: fused}, (height, width), mask, identity)

    def _fuse(self, maps: Sequence[Sequence[Tensor]], grad: bool) -> Float[Tensor, "b c h w"]:
        device = maps[0][0].device
        grid = finest([one.shape[-2:] for part in maps for one in part]) if self.grid == "finest" else self.grid
        plain = torch.autocast(device.type, enabled=False)
        with nullcontext() if grad else torch.no_grad(), plain, full_float32():
            pairs = zip(self.parts, maps, strict=True)
            return torch.cat([part.fuse([one.to(device) for one in own], grid) for part, own in pairs], 1)

    def _size(self, extractor: Extractor, height: int, width: int) -> tuple[int, int]:
        """The size at which a part sees images of the given size."""
        (own_h, own_w), (full_h, full_w) = extractor.resize.shape, self.resize.shape
        return round(height * own_h / full_h), round(width * own_w / full_w)

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """(c, h, w) of each key's map for images that went through `resize`."""
        sizes = [part.extractor.shapes[key][1:] for part in self.parts for key in part.chosen]
        height, width = finest(sizes) if self.grid == "finest" else self.grid
        return {KEY: (sum(part.channels for part in self.parts), height, width)}

    @property
    def identity(self) -> Identity:
        """What decides the features' values, as JSON-ready data; equal identities mean comparable features."""
        parts = [part.identity for part in self.parts]
        return {
            "extractor": "fused",
            "parts": parts,
            "grid": self.grid if self.grid == "finest" else list(self.grid),
            "resize": self.resize.identity,
            **_told(self.cond),
            **_unrepeatable([part["extractor"] for part in parts]),
        }

    def learn(self, conds: Iterable[Cond] | None = None, told: Told | None = None) -> None:
        """Have every part encode what images will be told, then let go of its text encoders."""
        own = None if self.cond is None else [self.cond]
        known = own if conds is None else list(conds)
        for extractor in dict.fromkeys(part.extractor for part in self.parts):
            extractor.learn(known if _takes_cond(extractor) else None, told)


def _told(cond: Cond) -> dict[str, Any]:
    """A condition as an identity has it."""
    return {} if cond is None else {"cond": cond if isinstance(cond, str | int) else list(cond)}


def _takes_cond(extractor: Extractor) -> bool:
    if isinstance(extractor, Fused):
        return any(_takes_cond(part.extractor) for part in extractor.parts)
    return not isinstance(extractor, DinoExtractor)


def _unrepeatable(identities: Sequence[Identity]) -> dict[str, Any]:
    """The settings of any part that give other values at each call, where an export looks for them."""
    settings = (("noise", "fresh"), ("latent", "sample"))
    return {name: value for name, value in settings if any(one.get(name) == value for one in identities)}


def common_resize(resizes: Sequence[Resize]) -> Resize:
    """The largest; ValueError where two would show their networks different regions of an image."""
    largest = max(resizes, key=lambda resize: resize.shape[0] * resize.shape[1])
    height, width = largest.shape
    for other in resizes:
        same_shape = other.policy == "squash" or other.shape[0] * width == other.shape[1] * height
        if other.policy != largest.policy or not same_shape:
            one, two = (f"{one.policy} to {one.shape[0]}x{one.shape[1]}" for one in (largest, other))
            raise ValueError(
                f"one part resizes by {one}, another by {two}: they would see different regions; "
                "give both extractors the same policy and proportions by resize="
            )
    return largest


def _checked_grid(grid: Any) -> Any:
    if grid == "finest":
        return grid
    if isinstance(grid, str) or len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
        raise ValueError(f'no grid {grid!r}; give "finest" or (height, width) in cells')
    return tuple(grid)


def finest(sizes: Sequence[Sequence[int]]) -> Grid:
    """The largest height and the largest width."""
    return max(size[0] for size in sizes), max(size[1] for size in sizes)


def _on_grid(maps: Float[Tensor, "b c _h _w"], grid: Grid) -> Float[Tensor, "b c h w"]:
    if tuple(maps.shape[-2:]) == grid:
        return maps
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)


def _resized(images: Float[Tensor, "b 3 H W"], size: tuple[int, int], grad: bool) -> Float[Tensor, "b 3 h w"]:
    """The images in another size, as 8 bits and by the rule for files: noise that depends on the image needs the bits.

    With grad, the derivative is that of a smooth resampling.
    """
    if tuple(images.shape[-2:]) == size:
        return images
    resize = Resize(size, "squash")
    pixels = np.stack([resize(Image.fromarray(image))[0] for image in to_uint8(images)])
    exact = to_tensor(pixels).to(images.device)
    if not grad:
        return exact
    smooth = F.interpolate(images, size, mode="bicubic", antialias=True)
    return smooth + (exact - smooth).detach()
