"""Pictures of a segmentation: images, what was found over them, where it is uncertain, and the truth."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from repkit.heads.miou import IGNORE
from repkit.images import decode
from repkit.publishing import publish
from repkit.tasks.mask_files import Index
from repkit.tasks.mask_folder import OVERLAY
from repkit.tasks.mask_pictures import Picture, overlay
from repkit.tasks.pictures import mosaic
from repkit.tasks.segment import Segmented
from repkit.tasks.segment_source import Source
from repkit.tasks.segment_truth import Truth


def draw(
    source: Source, found: Segmented, out: Path, *, truth: Truth | None = None, side: int = 128, most: int = 12
) -> Path:
    """Write overlay.png: a column for each of at most so many images, evenly chosen, first those with a true mask.

    Rows: the image, what was found over it, where known how uncertain it is (white: as uncertain as can be), the truth.
    """
    rows = _chosen(source, found, truth, most)
    columns = [_column(source, found, truth, row) for row in rows]
    deep = max(len(column) for column in columns)
    blank = np.full((1, 1, 3), 255, np.uint8)
    grid = [[_square(column[at] if at < len(column) else blank, side) for column in columns] for at in range(deep)]
    content = BytesIO()
    mosaic(grid, side).save(content, "PNG")
    publish(out, {OVERLAY: content.getvalue()})
    return out / OVERLAY


def _chosen(source: Source, found: Segmented, truth: Truth | None, most: int) -> list[int]:
    done = [row for row, name in enumerate(source.ids) if name not in found.masks.failures]
    known = set(truth.rows) - set(found.trained) if truth else set()
    rows = [row for row in done if row in known] or done
    return [rows[number] for number in np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]


def _column(source: Source, found: Segmented, truth: Truth | None, row: int) -> Sequence[Picture]:
    name, masks = source.ids[row], found.masks
    image = np.asarray(decode(Path(source.listing["path"][row].as_py())))
    column = [image, overlay(image, masks[name], masks.labels)]
    if (uncertain := found.uncertainty(name)) is not None:
        column.append(_grey(uncertain))
    if truth is not None and row in truth.rows:
        true = truth.read(name, (image.shape[1], image.shape[0]))
        column.append(_with_truth(image, true, truth))
    return column


def _with_truth(image: Picture, true: Index, truth: Truth) -> Picture:
    shown = overlay(image, np.where(true == IGNORE, 0, true), truth.labels)
    return np.where((true == IGNORE)[..., None], 128, shown).astype(np.uint8)


def _grey(values: Float[np.ndarray, "H W"]) -> Picture:
    return np.repeat((values * 255).round().astype(np.uint8)[..., None], 3, -1)


def _square(picture: Picture, side: int) -> Picture:
    """The whole picture in a white square, so that a mosaic keeps its proportions."""
    return np.array(ImageOps.pad(Image.fromarray(picture), (side, side), Image.Resampling.NEAREST, color="white"))
