"""An index of bundled images as mini-unet sees them, and what a service over it should answer, by numpy."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

import repkit
from repkit.datasets.fashion_mnist import write_folder
from repkit.service.settings import Settings

EACH = 6  # images of each of ten classes
WIDE = "bag/wide.png"
WIDE_SIZE = (1400, 700)  # more than the page asks for


@dataclass(frozen=True)
class Clothes:
    """The folder of the index, and the store that it was built from."""

    index: Path
    store: repkit.FeatureStore

    def settings(self, **options: Any) -> Settings:
        """For a service of it, of which there can be one at a time."""
        return Settings(index=self.index, decoders=1, **options)


@dataclass(frozen=True)
class Site:
    """The service's address, and the store that its index was built from."""

    origin: str
    store: repkit.FeatureStore

    @cached_property
    def all_ids(self) -> list[str]:
        """Of all images, the wide one among them."""
        return self.store.table["id"].to_pylist()

    @cached_property
    def ids(self) -> list[str]:
        """Of the small images."""
        return [name for name in self.all_ids if name != WIDE]

    @cached_property
    def vectors(self) -> np.ndarray:
        """[n d] of length 1, in the order of `all_ids`."""
        vectors = self.store.array(self.store.keys[0]).astype(np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def nearest(self, name: str, k: int = 20, allowed: Callable[[str], bool] = lambda name: True) -> list[str]:
        """The ids by descending cosine to an item, itself first."""
        order = np.argsort(-self.vectors @ self.vectors[self.all_ids.index(name)], kind="stable")
        return [self.all_ids[row] for row in order if allowed(self.all_ids[row])][:k]

    def path(self, name: str) -> Path:
        """The file of an item."""
        return Path(self.store.table["path"][self.all_ids.index(name)].as_py())


def build(folder: Path) -> Clothes:
    """Index the images under the name "clothes"."""
    images = write_folder(folder / "images", "train", EACH)
    colours = np.random.default_rng(0).integers(0, 256, (7, 14, 3), np.uint8)
    Image.fromarray(colours).resize(WIDE_SIZE).save(images / WIDE)
    extract = repkit.DiffusionExtractor(repkit.load("mini-unet"), ["up.0@50"])
    store = repkit.export(images, extract, folder / "features", pool="2x2")
    repkit.Index.build(store).save(folder / "clothes")
    return Clothes(folder / "clothes", store)


def view(**parts: object) -> str:
    """The "#..." of a view."""
    given = {name: json.dumps(part) if isinstance(part, dict) else str(part) for name, part in parts.items()}
    return "#" + "&".join(f"{name}={quote(part, safe='')}" for name, part in given.items())
