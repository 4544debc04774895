"""Mask files: pictures whose pixels are labels, read as they are written, and others written in the same way."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from repkit.images import FORMATS, decode

Index = Int[np.ndarray, "_H _W"]
MOST, MOST_GREYS = 256, 64  # labels: smoothed edges and JPEG make more values than anyone means
_MODES = {"1": "1", "L": "L", "P": "P", "RGB": "RGB", "RGBA": "RGB", "I": "I;16", "I;16": "I;16", "I;16B": "I;16"}


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a mask in ascending order of their values, and how a file tells them.

    values: of a palette or greyscale mask the numbers in the file, of a colour mask 65536 R + 256 G + B; 0 is the
    background. mode: PIL's, of files to write. palette: of mode P, as `Image.putpalette` takes it.
    """

    values: tuple[int, ...]
    mode: str
    palette: bytes | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def objects(self) -> list[int]:
        """The numbers 0, 1, ... of the labels that are no background."""
        return [number for number, value in enumerate(self.values) if value]

    def name(self, number: int) -> str:
        """The label as people write it: its value, of a colour #rrggbb."""
        return f"#{self.values[number]:06x}" if self.mode == "RGB" else str(self.values[number])

    def encode(self, index: Index) -> bytes:
        """The PNG of a map of label numbers."""
        values = np.array(self.values)[index]
        if self.mode == "RGB":
            picture = Image.fromarray(np.stack([values >> 16, values >> 8 & 255, values & 255], -1).astype(np.uint8))
        elif self.mode == "I;16":
            picture = Image.fromarray(values.astype(np.uint16))
        elif self.mode == "1":
            picture = Image.fromarray(values > 0)
        else:
            picture = Image.fromarray(values.astype(np.uint8))
            if self.palette is not None:
                picture.putpalette(self.palette)
        content = BytesIO()
        picture.save(content, "PNG")
        return content.getvalue()


def read_mask_of(image: Path, mask: Path, *, most_greys: int = MOST_GREYS) -> tuple[Index, Labels]:
    """The numbers 0, 1, ... of the labels of an image's pixels by its mask, and the labels.

    A palette or greyscale mask has a label a value, a colour mask one a colour; what is fully transparent is
    background. most_greys: how many values of 8-bit grey may be labels; a photograph has more.
    Raises OSError for a file that cannot be read, ValueError for one that is no mask, or of another size.
    """
    values, labels = read_mask(mask)
    _check_greys(mask, labels, most_greys)
    if len(labels) < 2:
        raise ValueError(f"{mask} has only one label, {labels.name(0)}; give a mask with objects and background")
    width, height = decode(image).size
    if values.shape != (height, width):
        raise ValueError(
            f"{mask} has {values.shape[1]}x{values.shape[0]} pixels, but {image} {width}x{height}; give one of its size"
        )
    return np.searchsorted(labels.values, values), labels


def _check_greys(path: Path, labels: Labels, most: int) -> None:
    """Raise ValueError for more shades of grey than there are labels: a photograph, or edges that are smoothed."""
    grey = labels.mode == "L" or labels.mode == "RGB" and all(value % 0x10101 == 0 for value in labels.values)
    if grey and len(labels) > most:
        raise ValueError(
            f"{path} has {len(labels)} values of grey; a mask has one value a label, without smoothed edges, and at "
            f"most {most}"
        )


def read_mask_as(path: Path, labels: Labels) -> Index:
    """The same of a mask that need not have all of the labels; -1 where a pixel has another one."""
    values, own = read_mask(path)
    if (own.mode == "RGB") != (labels.mode == "RGB"):
        raise ValueError(f"{path} is a mask of mode {own.mode}, the first one of {labels.mode}; give both in one form")
    number = np.searchsorted(labels.values, values).clip(max=len(labels) - 1)
    return np.where(np.array(labels.values)[number] == values, number, -1)


def read_mask(path: Path) -> tuple[Index, Labels]:
    """The values in a mask file and the labels that it has; OSError or ValueError for what cannot be read as one."""
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as picture:
            picture.load()
            mode, palette = picture.mode, picture.getpalette() if picture.mode == "P" else None
            values = _values(picture)
    except Exception as error:  # a broken file makes PIL raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"cannot read {path} as a mask ({error}); give a PNG whose pixels are labels") from error
    if len(found := np.unique(values)) > MOST:
        raise ValueError(
            f"{path} has {len(found)} different values, more than the {MOST} labels a mask may have; save it as PNG "
            "without smoothed edges"
        )
    return values, Labels(tuple(found.tolist()), _MODES[mode], None if palette is None else bytes(palette))


def _values(picture: Image.Image) -> Index:
    if picture.mode not in _MODES:
        raise ValueError(f"it is of mode {picture.mode}, not of {', '.join(_MODES)}")
    pixels = np.asarray(picture).astype(np.int64)
    if picture.mode == "1":
        return pixels * 255
    if pixels.ndim == 2:
        return pixels
    colours = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    return colours * (pixels[..., 3] > 0) if picture.mode == "RGBA" else colours
