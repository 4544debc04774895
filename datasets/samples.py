"""Samples: the form every labelled data set is read into, a dict an image, and the table that exports take."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt8
from PIL import Image

from repkit.datasets.masks import Mask, Source, name_of, read_class_mask
from repkit.images import decode
from repkit.listing import COLUMNS, SPLITS

Sample = dict[str, Any]
Labels = Int64[np.ndarray, " n"]
Images = tuple[Source, ...] | UInt8[np.ndarray, "n H W 3"] | UInt8[np.ndarray, "n H W"]


@dataclass(frozen=True, eq=False)
class Samples(Sequence):  # of Sample; said in brackets, beartype would read one of them at each call
    """Images with labels, masks or both, of which each is read when it is asked for; it can be pickled.

    `samples[i]` has image (PIL, RGB, upright), index (i, not negative) and, where the set has them, label (0 ... k - 1)
    and mask (int64 `[H W]`, 0 ... k - 1, IGNORE where a pixel does not count). A slice is Samples again.

    images and masks: files, functions without arguments that return what is in one, or all images as an array.
    read_mask: a file of `masks` -> its classes. nearest: a mask of another size is resized to its image's, else it is
    an error. root: the folder that ids in the table are relative to.
    Raises ValueError where there is no image, for counts that differ, labels without class, and classes named twice.
    """

    classes: tuple[str, ...]
    images: Images = field(repr=False)
    labels: Labels | None = field(default=None, repr=False)
    masks: tuple[Source, ...] | None = field(default=None, repr=False)
    read_mask: Callable[[Source], Mask] | None = field(default=None, repr=False)
    nearest: bool = False
    split: str | None = None
    root: Path = Path()

    def __post_init__(self) -> None:
        counts = {name: len(items) for name, items in self._columns().items() if items is not None}
        if len(set(counts.values())) > 1 or not len(self.images):
            have = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(f"{self.root} has {have}; give at least one image, and as many of each")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"{self.root} has two classes {twice!r}; give each a name of its own")
        if self.labels is not None and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            found = f"labels {self.labels.min()} ... {self.labels.max()}"
            raise ValueError(f"{self.root} has {found} and {len(self.classes)} classes; give 0 ... classes - 1")

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        place = range(len(self))[index]
        image = _picture(self.images[place])
        sample: Sample = {"image": image, "index": place}
        if self.labels is not None:
            sample["label"] = int(self.labels[place])
        if self.masks is not None:
            sample["mask"] = self._mask(place, image)
        return sample

    def take(self, rows: Iterable[int]) -> "Samples":
        """Some of the samples, in the order given; their index counts anew."""
        places = list(rows)
        return replace(self, **{name: _taken(items, places) for name, items in self._columns().items()})

    def table(self) -> pa.Table:
        """What `export` takes: id (path relative to root), path, label (class name), split (train, val, test), prompt.

        Raises ValueError where the images are no files: `write_list` makes files of them.
        """
        paths = [os.path.abspath(image) for image in self.images if isinstance(image, Path)]
        if len(paths) < len(self):
            raise ValueError(f"images of {self.root} are no files; datasets.writing.write_list makes files of them")
        root = os.path.abspath(self.root)
        split = self.split and {**SPLITS, "trainval": "train"}.get(self.split.lower(), self.split)
        columns = {
            "id": [Path(path.removeprefix(root + os.sep)).as_posix() for path in paths],
            "path": paths,
            "label": [None] * len(paths) if self.labels is None else [self.classes[label] for label in self.labels],
            "split": [split] * len(paths),
            "prompt": [None] * len(paths),
        }
        schema = pa.schema([(name, pa.string()) for name in COLUMNS], metadata={"root": root})
        return pa.table(columns, schema=schema)

    def _columns(self) -> dict[str, Any]:
        return {"images": self.images, "labels": self.labels, "masks": self.masks}

    def _mask(self, place: int, image: Image.Image) -> Mask:
        assert self.masks is not None
        source = self.masks[place]
        read = self.read_mask or partial(read_class_mask, classes=len(self.classes))
        mask = read(source)
        height, width = mask.shape
        if (width, height) == image.size:
            return mask
        if self.nearest:
            picture = Image.fromarray(mask.astype(np.int32)).resize(image.size, Image.Resampling.NEAREST)
            return np.asarray(picture).astype(np.int64)
        raise ValueError(
            f"the mask {name_of(source)} has {width}x{height} pixels, but its image {name_of(self.images[place])} "
            f"{image.width}x{image.height}; give masks of their image's size"
        )


def _picture(source: Any) -> Image.Image:
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    return decode(source() if callable(source) else source)


def _taken(items: Any, places: list[int]) -> Any:
    if items is None or isinstance(items, np.ndarray):
        return None if items is None else items[places]
    return tuple(items[place] for place in places)
