"""Masks that are given: for training or as the truth, one PNG an image, under the image's name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from repkit.heads.miou import IGNORE
from repkit.tasks.mask_files import Index, Labels, read_mask, read_mask_as
from repkit.tasks.mask_folder import mask_path
from repkit.tasks.mask_pictures import label_colours
from repkit.tasks.segment_source import Size, Source, pixel_grid


@dataclass(frozen=True)
class Truth:
    """A folder of masks, the labels that all given masks have together, and the rows of the images that have one."""

    folder: Path
    labels: Labels
    rows: list[int]

    def read(self, name: str, size: Size) -> Index:
        """An image's mask as numbers of labels, 255 where it is to be ignored; ValueError for one of another size."""
        path = mask_path(self.folder, name)
        found = read_mask_as(path, self.labels)
        if found.shape != size[::-1]:
            (height, width), (own_width, own_height) = found.shape, size
            raise ValueError(
                f"{path} has {width}x{height} pixels, but {name} {own_width}x{own_height}; give one of its size"
            )
        return np.where(found < 0, IGNORE, found)


def find_masks(folder: Path, ids: Sequence[str]) -> list[int]:
    """The rows of the images that have a mask in the folder; ValueError where none has, or there is no folder."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; give one that holds masks as PNG, under the images' names")
    rows = [row for row, name in enumerate(ids) if mask_path(folder, name).exists()]
    if not rows:
        raise ValueError(f"{folder} has no mask of an image; looked for {mask_path(folder, ids[0])} and so on")
    return rows


def read_labels(paths: Sequence[Path], ignore: int | None = None) -> Labels:
    """The labels that masks have together, without the ignored value.

    ignore: None is 255 of palette and greyscale masks, unless 0 and 255 are all they have; -1 ignores nothing.
    Raises ValueError for masks of different kinds, for one label only, and for more than 255.
    """
    found = [read_mask(path)[1] for path in paths]
    if len(kinds := {one.mode == "RGB" for one in found}) > 1:
        raise ValueError(f"{paths[0]} and others are masks of colours and of numbers; give all in one form")
    values = {value for one in found for value in one.values}
    if ignore is None:
        ignore = -1 if True in kinds or values <= {0, 255} else IGNORE
    kept = tuple(sorted(values - {ignore}))
    if not 2 <= len(kept) <= IGNORE:
        raise ValueError(f"the {len(paths)} given masks have {len(kept)} labels in all; give masks with 2 to {IGNORE}")
    return _shown(kept, found[0])


def _shown(values: tuple[int, ...], like: Labels) -> Labels:
    """Labels of such values, written as the given masks are; numbers up to 255 with a palette, to be seen."""
    if like.mode == "RGB" or values[-1] > 255:
        return Labels(values, "RGB" if like.mode == "RGB" else "I;16")
    known = like.palette is not None and len(like.palette) > 3 * values[-1]
    return Labels(values, "P", like.palette if known else _palette(values))


def cluster_labels(count: int = IGNORE) -> Labels:
    """The labels 1 ... count of clusters, none of which is a background."""
    values = tuple(range(1, count + 1))
    return Labels(values, "P", _palette(values))


def _palette(values: tuple[int, ...]) -> bytes:
    """Hues far apart, and black for 0."""
    palette = np.zeros((256, 3), np.uint8)
    palette[list(values)] = label_colours(Labels(values, "L"))
    palette[0] = 0
    return palette.tobytes()


def in_frame(source: Source, mask: Index) -> UInt8[Tensor, "H W"]:
    """A mask over the pixels that the network saw, of the nearest pixel each; 255 in what a resize padded."""
    size = mask.shape[1], mask.shape[0]
    height, width = source.resize.shape
    points = source.resize.original_points(pixel_grid((width, height)), size).round().long().numpy()
    x, y = points[..., 0], points[..., 1]
    inside = (x >= 0) & (y >= 0) & (x < size[0]) & (y < size[1])
    found = np.where(inside, mask[y.clip(0, size[1] - 1), x.clip(0, size[0] - 1)], IGNORE)
    return torch.from_numpy(found.astype(np.uint8))
