"""Where the feature maps of images to segment come from: an extractor that looks at them, or a store."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from repkit.extractors import Extractor
from repkit.features import Identity
from repkit.images import Resize, decode, decoder_identity
from repkit.store import FeatureStore

Maps = Mapping[str, Float[Tensor, "_c _h _w"]]  # of one image, by tap
Size = tuple[int, int]  # (width, height)


class Source(ABC):
    """Images with ids and paths, and for each the maps of `shapes` = {key: (c, h, w)} and `strides`.

    Keys without a map, such as `cls`, are left out.
    """

    listing: pa.Table
    resize: Resize
    strides: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int, int]]
    identity: Identity

    @property
    def ids(self) -> list[str]:
        return self.listing["id"].to_pylist()

    @abstractmethod
    def maps(self, row: int) -> tuple[Maps, Size]:
        """An image's maps and its size; OSError, ValueError or FloatingPointError where there are none."""

    def size(self, row: int) -> Size:
        """(width, height) of an image."""
        return decode(Path(self.listing["path"][row].as_py())).size

    def places(self, size: Size) -> Float[Tensor, "H W 2"]:
        """Where the pixels of an image of a size are in its maps, as `F.grid_sample` counts.

        Raises ValueError where a resize by "crop" has cut pixels off.
        """
        height, width = self.resize.shape
        points = self.resize.points(pixel_grid(size), size)
        places = ((points + 0.5) * torch.tensor([2 / width, 2 / height], dtype=points.dtype) - 1).float()
        if places.abs().max() > 1:
            raise ValueError(
                f"{size[0]}x{size[1]} pixels were cropped to {width}x{height}, so some have no features; extract with "
                "--size and --resize squash or pad"
            )
        return places


def pixel_grid(size: Size) -> Float[Tensor, "H W 2"]:
    """(x, y) of every pixel of an image of `size` = (width, height)."""
    return rearrange(
        list(torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="xy")), "n H W -> H W n"
    ).double()


class Pictures(Source):
    """The images of a table, looked at one by one, so that what is done with one depends on no other."""

    def __init__(self, listing: pa.Table, extractor: Extractor) -> None:
        self.listing, self.extractor, self.resize = listing, extractor, extractor.resize
        self.shapes = _with_maps(extractor.shapes)
        self.strides = {key: extractor.blocks[key].stride for key in self.shapes}
        self.identity = {"extractor": extractor.identity, "decoder": decoder_identity()}

    def maps(self, row: int) -> tuple[Maps, Size]:
        picture = decode(Path(self.listing["path"][row].as_py()))
        features = self.extractor([picture])
        return {key: features[key][0] for key in self.shapes}, picture.size


class Stored(Source):
    """The images of a store that was exported with --pool none."""

    def __init__(self, store: FeatureStore) -> None:
        if store.identity["pool"] != "none":
            raise ValueError(f"{store.path} has features pooled by {store.identity['pool']}; export with --pool none")
        self.store, self.listing, self.identity = store, store.table, dict(store.identity)
        resize: Any = store.identity["extractor"]["resize"]
        self.resize = Resize(tuple(resize["size"]), resize["policy"])
        self.shapes = _with_maps({key: tuple(told["shape"]) for key, told in store.taps.items()})
        self.strides = {key: store.taps[key]["stride"] for key in self.shapes}

    def maps(self, row: int) -> tuple[Maps, Size]:
        held = self.store[row]
        return {key: torch.from_numpy(held[key]).float() for key in self.shapes}, self.size(row)

    def size(self, row: int) -> Size:
        return self.listing["width"][row].as_py(), self.listing["height"][row].as_py()


def _with_maps(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int, int]]:
    found = {key: (c, h, w) for key, (c, h, w) in shapes.items() if (h, w) != (1, 1)}
    if not found:
        raise ValueError(f"{', '.join(shapes)} have no map to segment; take blocks or norm instead")
    return found
