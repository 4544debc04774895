"""Correspondence: images seen once, their features fused pair by pair, and the points of one found in another."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from repkit.extractors import Extractor
from repkit.features import Identity
from repkit.fusion import Part, common_resize, finest
from repkit.images import decode
from repkit.matching.featuremap import FeatureMap
from repkit.matching.flow import flip_aligned
from repkit.matching.method import Method
from repkit.matching.nearest import Matches
from repkit.matching.pca import co_pca
from repkit.matching.positions import without_position
from repkit.mirrored import Mirrored
from repkit.tasks.templates import check_template, filled

Points = Float[Tensor, "n 2"]
Map = Float[Tensor, "_c _h _w"]


@dataclass(frozen=True, eq=False)
class Seen:
    """What the parts' extractors found in an image of `size` = (width, height).

    maps: for each part, its keys' maps. mirrored: the same of the mirror image, where flips are tried.
    """

    maps: tuple[tuple[Map, ...], ...]
    size: tuple[int, int]
    mirrored: "tuple[tuple[Map, ...], ...] | None" = None


@dataclass(frozen=True, eq=False)
class View:
    """An image of `size` = (width, height) ready to be matched: its fused map, and that of its mirror image."""

    size: tuple[int, int]
    plain: FeatureMap
    mirrored: FeatureMap | None = None


class Correspondence:
    """What it takes to find points of one image in another: extractors, how their features are fused, and a method.

    parts: as of `Fused`, each with its own resize: "squash", or "pad" for all; "crop" would lose points. conds: for
    each part the template of what its network is told of an image, which may use {label}; None is nothing. pca: for
    each part, to how many dimensions at most each key is reduced by the principal components of both images together.
    flip: match from the source's mirror image where that is nearer. positions: by part number and key, a
    `position_component` that is taken off. grid: (h, w) of the fused maps, else the finest among the parts'.

    Vectors of several parts are fused as in `Fused`; those of one part keep their own norms, as cosines ignore them at
    cells, but weigh them where features are interpolated. All points that go in and come out are (x, y) in pixels of
    the images themselves.
    Raises ValueError for parts that do not go together, of which none has a weight above 0, or which share an
    extractor and tell it different things; for templates that use anything but {label}; and for resizes that crop.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        method: Method | None = None,
        conds: Sequence[str | None] | None = None,
        pca: Sequence[int | None] | None = None,
        flip: bool = False,
        positions: Mapping[tuple[int, str], Map] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.parts, self.method, self.flip = tuple(parts), method or Method(), flip
        self.conds = (None,) * len(self.parts) if conds is None else tuple(conds)
        self.pca = (None,) * len(self.parts) if pca is None else tuple(pca)
        if not self.parts or len(self.conds) != len(self.parts) or len(self.pca) != len(self.parts):
            raise ValueError(
                f"{len(self.parts)} parts, {len(self.conds)} conds, {len(self.pca)} pca; give at least one part, and "
                "as many of each"
            )
        _check_parts(self.parts, self.conds)
        self.positions = dict(positions or {})
        self.resize = common_resize([part.extractor.resize for part in self.parts])
        if self.resize.policy == "crop":
            raise ValueError('resize "crop" cuts off parts of the images; build the extractors with "squash" or "pad"')
        self.grid = grid

    @property
    def extractors(self) -> dict[Extractor, str | None]:
        """The distinct extractors, each with the template of what it is told."""
        return {part.extractor: cond for part, cond in zip(self.parts, self.conds, strict=True)}

    @property
    def apart(self) -> bool:
        """Whether an image has one fused map whatever it is matched with, as it has without `pca`."""
        return all(dim is None for dim in self.pca)

    @property
    def identity(self) -> Identity:
        """What decides the matches of given images, as JSON-ready data; of `positions`, only which are taken off."""
        return {
            "parts": {str(number): part.identity for number, part in enumerate(self.parts)},
            "conds": list(self.conds),
            "pca": list(self.pca),
            "flip": self.flip,
            "method": asdict(self.method),
            "grid": None if self.grid is None else list(self.grid),
            "positions": sorted(f"{number} {key}" for number, key in self.positions),
        }

    def replaced(self, **changes: Any) -> "Correspondence":
        """The same with other arguments, such as `parts` of other weights or `positions`."""
        own: dict[str, Any] = {
            name: getattr(self, name) for name in ("method", "conds", "pca", "flip", "positions", "grid")
        }
        return Correspondence(**{"parts": self.parts, **own} | changes)

    def see(self, images: Sequence[Path | Image.Image], label: str | None = None) -> list[Seen]:
        """Run every extractor once over the images, in one batch; `label` fills the templates."""
        pictures = [decode(image) for image in images]
        plain = self._run(pictures, label, mirrored=False)
        turned = self._run(pictures, label, mirrored=True) if self.flip else [None] * len(pictures)
        return [Seen(maps, one.size, flip) for maps, one, flip in zip(plain, pictures, turned, strict=True)]

    def _run(
        self, pictures: Sequence[Image.Image], label: str | None, *, mirrored: bool
    ) -> list[tuple[tuple[Map, ...], ...]]:
        found = {}
        for extractor, cond in self.extractors.items():
            run = Mirrored(extractor) if mirrored else extractor
            found[extractor] = run(pictures, filled(cond, label))
        return [
            tuple(tuple(found[part.extractor][key][row] for key in part.chosen) for part in self.parts)
            for row in range(len(pictures))
        ]

    def fuse(self, *seen: Seen) -> list[FeatureMap]:
        """The images' fused maps; with `pca`, in the directions that they have in common."""
        return self._fuse([one.maps for one in seen], [one.size for one in seen])

    def _fuse(
        self, images: Sequence[tuple[tuple[Map, ...], ...]], sizes: Sequence[tuple[int, int]]
    ) -> list[FeatureMap]:
        grid = self.grid or finest([one.shape[-2:] for part in images[0] for one in part])
        fused: list[list[Tensor]] = [[] for _ in images]
        for number, (part, dim) in enumerate(zip(self.parts, self.pca, strict=True)):
            keys = [
                self._prepared([image[number][at].float() for image in images], self.positions.get((number, key)), dim)
                for at, key in enumerate(part.chosen)
            ]
            for row, own in enumerate(fused):
                maps = [key[row][None] for key in keys]
                own.append((part.join(maps, grid) if len(self.parts) == 1 else part.fuse(maps, grid))[0])
        return [
            FeatureMap(torch.cat(own), self.frame(size), self._mask(size, own[0].device))
            for own, size in zip(fused, sizes, strict=True)
        ]

    @staticmethod
    def _prepared(maps: list[Map], position: Map | None, dim: int | None) -> list[Map]:
        if position is not None:
            maps = [without_position(one, position.to(one.device)) for one in maps]
        if dim is None:
            return maps
        cells = sum(one[0].numel() for one in maps)  # two small maps have few directions
        return co_pca(maps, min(dim, len(maps[0]), cells))

    def match(self, source: Seen, target: Seen, points: Points, partner: Sequence[int | None] | None = None) -> Matches:
        """Where the source's points are in the target; `partner` as in `flip_aligned`, where flips are tried."""
        return self.matched(source, target, points, partner)[0]

    def matched(
        self, source: Seen, target: Seen, points: Points, partner: Sequence[int | None] | None = None
    ) -> tuple[Matches, bool]:
        """As `match`, and whether the source was mirrored."""
        return self.found(*self.views(source, target), points, partner)

    def view(self, seen: Seen) -> View:
        """An image on its own; ValueError with `pca`, whose directions are those of two images."""
        if not self.apart:
            raise ValueError(f"pca={self.pca} depends on both images of a pair; call views(source, target)")
        plain = self._fuse([seen.maps], [seen.size])[0]
        return View(seen.size, plain, None if seen.mirrored is None else self._fuse([seen.mirrored], [seen.size])[0])

    def views(self, source: Seen, target: Seen) -> tuple[View, View]:
        """Two images that are to be matched; the target's mirror image is not looked at."""
        sizes = [source.size, target.size]
        if source.mirrored is None:
            one, other = self._fuse([source.maps, target.maps], sizes)
            return View(source.size, one), View(target.size, other)
        one, other, mirrored = self._fuse([source.maps, target.maps, source.mirrored], [*sizes, source.size])
        return View(source.size, one, mirrored), View(target.size, other)

    def found(
        self, source: View, target: View, points: Points, partner: Sequence[int | None] | None = None
    ) -> tuple[Matches, bool]:
        """As `matched`, of images that are fused already."""
        match, places = self.method.matcher(), self.to_frame(points, source.size)
        if source.mirrored is None:
            found, turned = match(source.plain, target.plain, places), False
        else:
            maps = source.plain, source.mirrored, target.plain
            found, turned = flip_aligned(*maps, places, partner, match=match, over="mutual")
        return Matches(self.from_frame(found.points, target.size), found.scores), turned

    def frame(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the pixels that an image's fused map covers: squashed images keep their own."""
        return (size[1], size[0]) if self.resize.policy == "squash" else self.resize.shape

    def to_frame(self, points: Float[Tensor, "*n 2"], size: tuple[int, int]) -> Float[Tensor, "*n 2"]:
        """Points of an image of `size` = (width, height) -> pixels of its frame."""
        return points if self.resize.policy == "squash" else self.resize.points(points, size)

    def from_frame(self, points: Float[Tensor, "*n 2"], size: tuple[int, int]) -> Float[Tensor, "*n 2"]:
        """The inverse of `to_frame`."""
        return points if self.resize.policy == "squash" else self.resize.original_points(points, size)

    def _mask(self, size: tuple[int, int], device: torch.device) -> Bool[Tensor, "H W"] | None:
        """Where the frame shows the image and no padding."""
        if self.resize.policy != "pad":
            return None
        left, top = self.resize.points(np.array([-0.5, -0.5]), size)
        right, bottom = self.resize.points(np.array([size[0] - 0.5, size[1] - 0.5]), size)
        mask = torch.zeros(self.resize.shape, dtype=torch.bool)
        mask[round(top + 0.5) : round(bottom + 0.5), round(left + 0.5) : round(right + 0.5)] = True
        return mask.to(device)


def _check_parts(parts: Sequence[Part], conds: Sequence[str | None]) -> None:
    if not any(part.weight for part in parts):
        raise ValueError(f"{len(parts)} parts, none of a weight above 0; give at least one")
    told: dict[Extractor, str | None] = {}
    for part, cond in zip(parts, conds, strict=True):
        check_template(cond)
        if told.setdefault(part.extractor, cond) != cond:
            raise ValueError(
                f"one extractor is told {told[part.extractor]!r} in one part and {cond!r} in another; build an "
                "extractor for each"
            )
