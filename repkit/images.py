"""Files to pixels: the one way an image is decoded, resized, named by its digest, and addressed by a point."""

import errno
import hashlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow opens a camera's MPO as the JPEG that it begins with
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".gif")

Color = tuple[int, int, int]
Number = int | float
Box = tuple[float, float, float, float]  # left, top, right, bottom
Points = TypeVar("Points", np.ndarray, Tensor)


@runtime_checkable
class BinaryFile(Protocol):
    """What is open for reading bytes, as by `open(path, "rb")`."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seekable(self) -> bool: ...


Source = Path | str | bytes | BinaryFile | Image.Image

# EXIF orientation -> what puts the stored picture upright (1 is upright already).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 0x0112, 258, 262


def decode(source: Source, *, max_pixels: int = 50_000_000, background: Color = (255, 255, 255)) -> Image.Image:
    """The picture in a path, bytes, a binary file (from its start) or a PIL image, upright, in mode RGB.

    First frame or page only; transparency is composited over `background`; 16-bit and float greyscale are scaled to
    8 bits; ICC profiles are ignored. The size is checked in the header, before any pixel is decoded; PIL's own
    `Image.MAX_IMAGE_PIXELS` holds as well. A PIL image is not changed, and stays open.

    Raises OSError where the file cannot be read (missing, no permission, a folder) and ValueError where its content is
    no image that we read (broken, truncated, other format, too large); both name the source, in one line. A truncated
    file passes only where the caller has set PIL's global `LOAD_TRUNCATED_IMAGES`.
    """
    name = _name(source)
    try:
        with _opened(source) as image:
            _check_size(image.size, max_pixels)
            return _rgb(image, background)
    except Exception as error:  # a broken file makes PIL raise nearly anything: SyntaxError, struct.error, EOFError ...
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, name) from error
        raise ValueError(f"{name}: {_reason(error)}") from error


def decoder_identity(background: Color = (255, 255, 255)) -> dict[str, Any]:
    """What of `decode` decides about pixels; `version` counts the changes of its rules."""
    return {"version": 1, "background": list(background), "orientation": "exif", "frame": "first", "icc": "ignored"}


def _name(source: Source) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "image")
    if isinstance(source, BinaryFile):
        name = getattr(source, "name", None)  # of a pipe it is a number
        return name if isinstance(name, str) else "image stream"
    raise TypeError(f"cannot decode a {type(source).__name__}; give a path, bytes, a binary file or a PIL image")


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    if isinstance(source, Image.Image):
        yield source
    elif isinstance(source, (str, Path)):
        if not stat.S_ISREG(Path(source).stat().st_mode):  # opening a pipe would wait for ever
            raise OSError(errno.EINVAL, "not a regular file")
        with open(source, "rb") as file:
            yield Image.open(file, formats=FORMATS)
    elif isinstance(source, bytes):
        yield Image.open(BytesIO(source), formats=FORMATS)
    else:
        yield Image.open(cast(IO[bytes], source if source.seekable() else BytesIO(source.read())), formats=FORMATS)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ValueError(f"{width}x{height} pixels, over the limit of {max_pixels}; shrink it or raise max_pixels")
    if width * height == 0:
        raise ValueError(f"{width}x{height} pixels; give an image that has some")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, WebP, BMP, TIFF or GIF image (or its header is broken)"
    lines = str(error).splitlines()
    return lines[0] if lines else f"broken image ({type(error).__name__})"


def _rgb(image: Image.Image, background: Color) -> Image.Image:
    key = _key_color(image)
    image.load()
    orientation = _orientation(image)  # after load: PNG may hold it last, and the pixels of a TIFF are upright by then
    if image.mode == "F" or image.mode.startswith("I"):
        alpha = None if key is None else Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
        rgb = _deep_grey(image).convert("RGB")
    elif image.has_transparency_data:
        rgba = _rgba(image, key)
        rgb, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    else:
        rgb, alpha = image.convert("RGB"), None
    if alpha is not None:
        rgb = _composite(rgb, alpha, background)
    rgb.info.clear()  # or a second decode would turn the picture again
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata is no reason to refuse good pixels
        return None


def _key_color(image: Image.Image) -> Any:
    """The colour declared transparent, in the numbers that PIL decodes: it reports the file's own 2, 4 or 16 bits."""
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # how the file holds the pixels, known until they are loaded
    rawmode = tiles[0].args if tiles else None
    if rawmode == "RGB;16B" and key is not None:
        return tuple(value >> 8 for value in key)
    if rawmode in ("L;2", "L;4") and key is not None:
        return key * {"L;2": 85, "L;4": 17}[rawmode]
    return key


def _rgba(image: Image.Image, key: Any) -> Image.Image:
    if image.mode == "La":  # PIL has no direct way from premultiplied grey
        image = image.convert("LA")
    if key != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = key
    return image.convert("RGBA")


def _composite(rgb: Image.Image, alpha: Image.Image, background: Color) -> Image.Image:
    canvas = Image.new("RGB", rgb.size, background)
    canvas.paste(rgb, mask=alpha)
    return canvas


def _deep_grey(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits, scaled to 8: integers have white at 65535 (12-bit TIFF: 4095), floats at 1."""
    values = np.asarray(image).astype(np.float32)
    tags = getattr(image, "tag_v2", {})  # TIFF only
    twelve = image.mode != "F" and tags.get(_BITS_PER_SAMPLE) == (12,)
    white = 1 if image.mode == "F" else 4095 if twelve else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # true for NaN as well
        raise ValueError(f"{image.mode} greyscale from {low:g} to {high:g}; scale it to 0 ... {white} first")
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; PIL turns 8-bit files round, deeper ones not
        values = white - values
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


@dataclass(frozen=True)
class Resize:
    """A PIL image in RGB -> uint8 array `[H W 3]` of `size` = (height, width), or the side of a square.

    Bicubic and antialiased. "squash" changes the aspect ratio, "crop" keeps the largest centred part of the right
    shape, "pad" fits the whole image in and centres it on black. An image of the right size passes bit for bit.

    Raises ValueError for a size below 1 or an unknown policy.
    """

    size: int | tuple[int, int]
    policy: Literal["squash", "crop", "pad"] = "crop"

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or not all(type(side) is int and side > 0 for side in self.shape):
            raise ValueError(f"cannot resize to {self.size!r}; give a positive integer or (height, width)")
        if self.policy not in ("squash", "crop", "pad"):
            raise ValueError(f"no resize policy {self.policy!r}; have squash, crop, pad")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every result."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides about pixels, as JSON values."""
        return {"size": list(self.shape), "policy": self.policy, "filter": "bicubic-antialias"}

    def __call__(self, image: Image.Image) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"] | None]:
        """The resized image, and with "pad" (only then) a mask that is True on the image and False on the padding."""
        if image.mode != "RGB":
            raise ValueError(f"cannot resize an image in mode {image.mode}; pass it through decode first")
        box, (width, height), (left, top) = self._placement(*image.size)
        pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC, box))
        if self.policy != "pad":
            return pixels, None
        inside = (slice(top, top + height), slice(left, left + width))
        padded, mask = np.zeros((*self.shape, 3), np.uint8), np.zeros(self.shape, bool)
        padded[inside], mask[inside] = pixels, True
        return padded, mask

    def points(self, points: Points, original_size: tuple[int, int]) -> Points:
        """Points `[... 2]` (x, y) of an image of `original_size` = (width, height) -> their place in the resized one.

        Integer coordinates are pixel centres. With "crop", points of the parts cut off lie outside the result.
        """
        (x0, y0, x1, y1), (width, height), corner = self._placement(*original_size)
        scale = (width / (x1 - x0), height / (y1 - y0))
        return (points + 0.5 - _pair((x0, y0), points)) * _pair(scale, points) - 0.5 + _pair(corner, points)

    def original_points(self, points: Points, original_size: tuple[int, int]) -> Points:
        """The inverse of `points`: their place in the image of `original_size` = (width, height)."""
        (x0, y0, x1, y1), (width, height), corner = self._placement(*original_size)
        scale = ((x1 - x0) / width, (y1 - y0) / height)
        return (points + 0.5 - _pair(corner, points)) * _pair(scale, points) - 0.5 + _pair((x0, y0), points)

    def _placement(self, width: int, height: int) -> tuple[Box, tuple[int, int], tuple[int, int]]:
        """The part of the image that is used, the (width, height) it gets, and its upper left corner in the result."""
        out_h, out_w = self.shape
        wider = width * out_h > height * out_w
        used_w, used_h = float(width), float(height)
        if self.policy == "pad":
            fit_w = out_w if wider else max(1, round(width * out_h / height))
            fit_h = max(1, round(height * out_w / width)) if wider else out_h
            return (0.0, 0.0, used_w, used_h), (fit_w, fit_h), ((out_w - fit_w) // 2, (out_h - fit_h) // 2)
        if self.policy == "crop":
            used_w, used_h = (height * out_w / out_h, used_h) if wider else (used_w, width * out_h / out_w)
        left, top = (width - used_w) / 2, (height - used_h) / 2
        return (left, top, left + used_w, top + used_h), (out_w, out_h), (0, 0)


def to_tensor(images: UInt8[np.ndarray, "*b H W 3"]) -> Float[Tensor, "*b 3 H W"]:
    """8-bit RGB images -> float32 in [0, 1]."""
    _check_rgb8(images)
    channels_first = np.ascontiguousarray(rearrange(images, "... H W c -> ... c H W"))
    return torch.from_numpy(np.divide(channels_first, np.float32(255)))


def to_uint8(images: Float[Tensor, "b 3 H W"]) -> UInt8[np.ndarray, "b H W 3"]:
    """RGB images in [0, 1] -> 8 bits, rounded to the nearest (half to even).

    Raises ValueError for NaN and for values outside [0, 1] by more than 1e-6.
    """
    images = images.detach().float().cpu()
    low, high = (images.min().item(), images.max().item()) if images.numel() else (0.0, 0.0)
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # true for NaN as well
        raise ValueError(f"images range from {low:g} to {high:g}; scale them to [0, 1] (8-bit values: divide by 255)")
    rounded = images.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return np.ascontiguousarray(rearrange(rounded, "b c H W -> b H W c"))


def digest(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The 32 bytes that name an image, whatever file it came from: sha256 of its shape as "HxWx3:" and its pixels."""
    _check_rgb8(image)
    shape = "x".join(map(str, image.shape))
    return hashlib.sha256(f"{shape}:".encode() + np.ascontiguousarray(image).tobytes()).digest()


def _check_rgb8(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"have {images.dtype} of shape {images.shape}; give uint8 of shape [H W 3]")


def pixel_to_grid(points: Points, stride: Number | tuple[Number, Number]) -> Points:
    """Points `[... 2]` (x, y) in pixels -> on the grid of a feature map with `stride` pixels a cell (or (sx, sy)).

    Integer coordinates are centres, of pixels as of cells: the pixel (0, 0) covers -0.5 ... 0.5, and the first cell of
    stride 8 has its centre at pixel 3.5.
    """
    return (points + 0.5) / _pair(stride, points) - 0.5


def grid_to_pixel(points: Points, stride: Number | tuple[Number, Number]) -> Points:
    """The inverse of `pixel_to_grid`: cell (0, 0) of stride 8 is pixel (3.5, 3.5)."""
    return (points + 0.5) * _pair(stride, points) - 0.5


def _pair(pair: Number | tuple[Number, Number], like: Points) -> Points:
    """(x, y), or one number for both, in the kind of array and the floating type of `like`."""
    if like.shape[-1:] != (2,):
        raise ValueError(f"points have shape {tuple(like.shape)}; give [... 2] with (x, y) last")
    values = pair if isinstance(pair, tuple) else (pair, pair)
    if isinstance(like, Tensor):
        return torch.tensor(values, dtype=torch.result_type(like, 1.0), device=like.device)
    return np.asarray(values, dtype=np.result_type(like, np.float32))
