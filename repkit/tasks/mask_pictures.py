"""Pictures of masks: each image with its objects in colour over it."""

import colorsys
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image, ImageOps

from repkit.images import decode
from repkit.publishing import publish
from repkit.tasks.mask_files import Index, Labels
from repkit.tasks.mask_folder import OVERLAY, Masks
from repkit.tasks.pictures import mosaic

Picture = UInt8[np.ndarray, "_H _W 3"]


def overlay(image: Picture, index: Index, labels: Labels) -> Picture:
    """The image with each object's colour mixed in, half and half."""
    colours = label_colours(labels)
    mixed = (image.astype(np.uint16) + colours[index] + 1) // 2
    return np.where(np.isin(index, labels.objects)[..., None], mixed, image).astype(np.uint8)


def label_colours(labels: Labels) -> UInt8[np.ndarray, "l 3"]:
    """The colours of the labels: those of a palette or colour mask, else hues far apart."""
    values = np.array(labels.values)
    if labels.mode == "RGB":
        return np.stack([values >> 16, values >> 8 & 255, values & 255], -1).astype(np.uint8)
    if labels.palette is not None:
        palette = np.frombuffer(labels.palette, np.uint8).reshape(-1, 3)
        return palette[values]
    # Steps of the golden section keep any number of hues apart.
    hues = [colorsys.hsv_to_rgb(0.618034 * number % 1, 1, 1) for number in range(len(labels))]
    return (np.array(hues) * 255).round().astype(np.uint8)


def draw_overlays(masks: Masks, images: pa.Table, *, side: int = 192, most: int = 24, columns: int = 6) -> Path:
    """Write overlay.png: at most so many of the masks, evenly chosen, over their images, row by row."""
    paths = dict(zip(images["id"].to_pylist(), images["path"].to_pylist(), strict=True))
    chosen = np.linspace(0, len(masks.ids) - 1, min(most, len(masks.ids))).round().astype(int)
    pictures = []
    for name in (masks.ids[number] for number in chosen):
        image = np.asarray(decode(Path(paths[name])))
        pictures.append(_square(overlay(image, masks[name], masks.labels), side))
    content = BytesIO()
    mosaic([pictures[start : start + columns] for start in range(0, len(pictures), columns)], side).save(content, "PNG")
    publish(masks.folder, {OVERLAY: content.getvalue()})
    return masks.folder / OVERLAY


def _square(picture: Picture, side: int) -> Picture:
    """The whole picture in a white square, so that a mosaic keeps its proportions."""
    return np.array(ImageOps.pad(Image.fromarray(picture), (side, side), Image.Resampling.BILINEAR, color="white"))
