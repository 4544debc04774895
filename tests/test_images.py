"""Decoding against pixels written by hand, resizing against PIL and numpy, points against their own geometry."""

import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from repkit.images import (
    Resize,
    decode,
    decoder_identity,
    digest,
    grid_to_pixel,
    pixel_to_grid,
    to_tensor,
    to_uint8,
)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(source, **options) -> list:
    return np.asarray(decode(source, **options)).tolist()


def png(width: int, height: int, depth: int, color: int, rows: bytes, trns: bytes = b"") -> bytes:
    """A PNG written by hand, for what PIL cannot save."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    transparent = chunk(b"tRNS", trns) if trns else b""
    return header + transparent + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int, photometric: int, data: bytes, *, sample_format=1, order="<") -> bytes:
    """An uncompressed greyscale TIFF written by hand."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    body = data + b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)
    return magic + struct.pack(order + "I", 8 + len(body)) + body + directory


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


# What is read


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_and_sources_give_the_pixels_saved(tmp_path, picture, kind):
    data = encoded(Image.fromarray(picture), kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "picture.bin"  # the name does not matter
    path.write_bytes(data)
    with open(path, "rb") as file, Image.open(path) as lazy:
        file.read(3)
        for source in (path, str(path), data, BytesIO(data), file, lazy, Image.fromarray(picture)):
            image = decode(source)
            assert image.mode == "RGB" and np.array_equal(np.asarray(image), picture)
        assert not file.closed


def test_a_stream_that_cannot_seek_is_read(picture):
    read, write = os.pipe()
    with os.fdopen(write, "wb") as end:
        end.write(encoded(Image.fromarray(picture), "PNG"))
    with os.fdopen(read, "rb", buffering=0) as stream:
        assert np.array_equal(np.asarray(decode(stream)), picture)


@pytest.mark.parametrize("color", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 128, 255, 0), (10, 20, 30, 200)])
def test_cmyk_jpeg(color):
    c, m, y, k = color
    expected = [255 * (1 - ink / 255) * (1 - k / 255) for ink in (c, m, y)]
    data = encoded(Image.new("CMYK", (16, 16), color), "JPEG", quality=100)
    assert np.abs(np.asarray(decode(data), float) - expected).max() <= 3


def test_jpeg_with_several_pictures_is_read_as_its_first(picture):
    first, second = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 200))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert np.abs(np.asarray(decode(data), int) - (200, 0, 0)).max() <= 3


def test_first_frame_of_animations():
    frames = [Image.new("RGB", (4, 3), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(data) == [[[255, 0, 0]] * 4] * 3


@pytest.mark.parametrize("data", [
    png(2, 2, 16, 0, b"\0\0\0\x01\x01\0\x80\x80\xff\xff"),
    tiff(2, 2, 16, 1, struct.pack("<4H", 0, 257, 0x8080, 65535)),
    tiff(2, 2, 16, 1, struct.pack(">4H", 0, 257, 0x8080, 65535), order=">"),
    tiff(2, 2, 16, 0, struct.pack("<4H", 65535, 65278, 0x7F7F, 0)),
    tiff(2, 2, 32, 1, struct.pack("<4i", 0, 257, 0x8080, 65535), sample_format=2),
    tiff(2, 2, 32, 1, struct.pack("<4f", 0, 1 / 255, 128 / 255, 1), sample_format=3),
    tiff(2, 2, 32, 1, struct.pack(">4f", 0, 1 / 255, 128 / 255, 1), sample_format=3, order=">"),
], ids=["png16", "tiff16", "tiff16-big-endian", "white-is-zero", "tiff32", "float", "float-big-endian"])  # fmt: skip
def test_deep_greyscale_is_scaled(data):
    assert [row[0] for line in pixels(data) for row in [line[0], line[1]]] == [0, 1, 128, 255]


def test_twelve_bit_tiff_has_its_own_white():
    assert pixels(tiff(2, 1, 12, 1, bytes([0xFF, 0xF0, 0x00]))) == [[[255] * 3, [0] * 3]]


def test_all_sixteen_bit_values_round_to_the_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.floor(values * 255.0 / 65535 + 0.5)  # never a tie: v / 257 is no half
    assert np.array_equal(np.asarray(decode(Image.fromarray(values)))[..., 0], expected)


@pytest.mark.parametrize(
    "data, extreme",
    [
        (tiff(2, 1, 32, 1, struct.pack("<2f", 0, 255), sample_format=3), "255"),
        (tiff(2, 1, 32, 1, struct.pack("<2f", 0, float("nan")), sample_format=3), "nan"),
        (tiff(2, 1, 16, 1, struct.pack("<2h", -5, 7), sample_format=2), "-5"),
        (tiff(2, 1, 32, 1, struct.pack("<2i", 0, 70000), sample_format=2), "70000"),
    ],
)
def test_greyscale_of_unknown_scale_is_refused(data, extreme):
    with pytest.raises(ValueError, match=f"greyscale from .*{extreme}.*; scale it"):
        decode(data)


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (Image.new("L", (1, 1), 77), (77, 77, 77)),
        (Image.new("HSV", (1, 1), (0, 255, 255)), (255, 0, 0)),
        (Image.new("LAB", (1, 1), (255, 128, 128)), (254, 255, 254)),
        (Image.new("YCbCr", (1, 1), (76, 85, 255)), (254, 0, 0)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_color_spaces(image, expected):
    if image.mode not in ("HSV", "YCbCr"):
        assert decode(encoded(image, "TIFF")).getpixel((0, 0)) == pytest.approx(expected, abs=2)
    assert decode(image).getpixel((0, 0)) == pytest.approx(expected, abs=2)


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert pixels(encoded(image, kind)) == [[[10, 20, 30], [40, 50, 60]]]


# Transparency


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 100, 200)])
@pytest.mark.parametrize("mode, color", [("RGBA", (200, 100, 0, 64)), ("LA", (90, 128)), ("RGBa", (50, 25, 0, 64)),
                                         ("La", (45, 128))])  # fmt: skip
def test_alpha_is_composited(mode, color, background):
    *front, alpha = color
    gain = 255 / alpha if mode.endswith("a") else 1
    expected = [f * gain * alpha / 255 + b * (1 - alpha / 255) for f, b in zip(front * 3, background, strict=False)]
    image = Image.new(mode, (1, 1), color)
    assert decode(image, background=background).getpixel((0, 0)) == pytest.approx(expected, abs=2)
    if mode in ("RGBA", "LA"):
        data = encoded(image, "PNG")
        assert decode(data, background=background).getpixel((0, 0)) == pytest.approx(expected, abs=1)


def test_palette_with_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 200, 100, 0])
    image.putdata([0, 1, 2])
    white = [255] * 3
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(image, kind, transparency=1)) == [[[10, 20, 30], white, [200, 100, 0]]]
    half = pixels(encoded(image, "PNG", transparency=bytes([255, 0, 51])), background=(0, 0, 0))
    assert half == [[[10, 20, 30], [0, 0, 0], [40, 20, 0]]]
    image.info["transparency"] = 1
    assert pixels(image.convert("PA")) == [[[10, 20, 30], white, [200, 100, 0]]]


@pytest.mark.parametrize("data, kept", [
    (png(2, 1, 8, 2, b"\0\x01\x02\x03\x09\x08\x07", struct.pack(">3H", 9, 8, 7)), [1, 2, 3]),
    (png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 256, 512, 768, 300, 0, 65535), struct.pack(">3H", 300, 0, 65535)),
     [1, 2, 3]),
    (png(2, 1, 1, 0, b"\0\x40", struct.pack(">H", 1)), [0, 0, 0]),
    (png(2, 1, 2, 0, bytes([0, 0b01110000]), struct.pack(">H", 3)), [85, 85, 85]),
    (png(2, 1, 4, 0, bytes([0, 0x12]), struct.pack(">H", 2)), [17, 17, 17]),
    (png(2, 1, 8, 0, b"\0\x05\x06", struct.pack(">H", 6)), [5, 5, 5]),
    (png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 1285, 1286), struct.pack(">H", 1286)), [5, 5, 5]),
], ids=["rgb8", "rgb16", "grey1", "grey2", "grey4", "grey8", "grey16"])  # fmt: skip
def test_a_transparent_color_of_any_depth(data, kept):
    assert pixels(data, background=(200, 0, 100)) == [[kept, [200, 0, 100]]]


# Orientation


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Where the stored row 0 and column 0 belong, from the table of the EXIF standard."""
    rows_are_columns = orientation >= 5
    turned = stored.swapaxes(0, 1) if rows_are_columns else stored
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return turned[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation(picture, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.kron(picture // 64 * 64, np.ones((16, 16, 1), np.uint8))  # blocks, so that JPEG keeps them
    data = encoded(
        Image.fromarray(stored), kind, exif=exif, quality=100, **({"lossless": True} if kind == "WEBP" else {})
    )
    expected = upright(stored, orientation)
    image = decode(data)
    assert image.size == (expected.shape[1], expected.shape[0])
    error = np.abs(np.asarray(image, int) - expected)
    assert error.mean() < 8 if kind == "JPEG" else error.max() == 0
    assert decode(image).tobytes() == image.tobytes()  # not turned twice
    with Image.open(BytesIO(data)) as lazy:
        assert decode(lazy).tobytes() == image.tobytes()


def test_orientation_goes_with_transparency_and_deep_greyscale():
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, color in (("RGBA", (1, 2, 3, 255)), ("I;16", 257), ("P", 0)):
        image = Image.new(mode, (5, 2), color)
        assert decode(encoded(image, "PNG", exif=exif)).size == (2, 5)


def test_damaged_exif_does_not_hide_good_pixels(picture):
    data = encoded(Image.fromarray(picture), "PNG", exif=b"Exif\0\0nonsense")
    assert np.array_equal(np.asarray(decode(data)), picture)


# What is refused


def nasty(tmp_path: Path) -> dict[str, Path]:
    jpeg = encoded(Image.effect_noise((64, 64), 100), "JPEG")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    contents = {
        "empty.png": b"",
        "text.png": b"this is no picture\n",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "head.jpg": jpeg[:20],
        "truncated.png": encoded(noise, "PNG")[:500],
        "truncated.gif": encoded(noise, "GIF")[:900],
        "truncated.bmp": encoded(noise, "BMP")[:900],
        "truncated.webp": encoded(noise, "WEBP")[:300],
        "truncated.tiff": encoded(noise, "TIFF", compression="tiff_lzw")[:300],
        "signature.png": b"\x89PNG\r\n\x1a\n",
        "page.pdf": encoded(noise, "PDF"),
        "icon.png": encoded(noise, "ICO"),
        "bomb.png": png(60000, 60000, 8, 2, b""),
        "bomb.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in contents}


def test_broken_files_are_value_errors_of_one_line_with_the_name(tmp_path):
    for name, path in nasty(tmp_path).items():
        for source in (path, path.read_bytes()):
            with pytest.raises(ValueError) as caught:
                decode(source)
            message = str(caught.value)
            assert "\n" not in message and len(message) < 300
            assert (name if source is path else "image of ") in message


def test_unreadable_paths_are_os_errors_with_the_name(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("folder.png", "link.png", "loop.png", "pipe.png", "vanished.png"):
        with pytest.raises(OSError, match=name) as caught:
            decode(tmp_path / name)
        assert caught.value.errno and "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_an_os_error(tmp_path, picture):
    path = tmp_path / "secret.png"
    Image.fromarray(picture).save(path)
    path.chmod(0)
    with pytest.raises(PermissionError, match="secret.png"):
        decode(path)


def test_random_damage_raises_nothing_else(picture):
    rng = np.random.default_rng(0)
    outcomes: set[object] = set()
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        data = bytearray(encoded(Image.fromarray(picture), kind))
        for _ in range(60):
            broken = data.copy()
            for place in rng.integers(0, len(data), 4):
                broken[place] = rng.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    decode(bytes(broken), max_pixels=1_000_000)
                    outcomes.add("read")
                except (OSError, ValueError) as error:
                    outcomes.add(type(error))
    assert outcomes == {"read", ValueError}


def test_pixel_limit_is_read_from_the_header():
    data = png(3000, 2000, 8, 2, b"")  # no pixels in it: decoding would fail otherwise
    with pytest.raises(ValueError, match="3000x2000 pixels, over the limit of 5999999; shrink"):
        decode(data, max_pixels=5_999_999)
    with pytest.raises(ValueError, match="truncated"):
        decode(data, max_pixels=6_000_000)
    with pytest.raises(ValueError, match="over the limit"):
        decode(Image.new("L", (11, 10)), max_pixels=109)
    assert decode(Image.new("L", (11, 10)), max_pixels=110).size == (11, 10)
    with pytest.raises(ValueError, match="0x7 pixels; give"):
        decode(Image.new("RGB", (0, 7)))


def test_a_bomb_costs_no_memory(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(60000, 60000, 8, 2, b""))
    program = (
        "import resource, sys; from repkit.images import decode\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode(sys.argv[1])\n"
        "except ValueError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(result.stdout) < 20_000  # kB


def test_what_is_no_source_is_a_type_error(picture):
    with pytest.raises(TypeError):
        decode(picture)


def test_odd_sizes_are_read():
    assert decode(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")).getpixel((0, 0)) == (9, 8, 7)
    assert decode(encoded(Image.new("L", (4000, 3000)), "JPEG")).size == (4000, 3000)
    assert decode(encoded(Image.new("L", (1, 50000)), "PNG")).size == (1, 50000)


def test_nothing_global_or_of_the_caller_changes(picture):
    image = Image.fromarray(picture).convert("RGBA")
    image.info["mine"] = 1
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, image.tobytes(), dict(image.info))
    decode(image).paste((0, 0, 0), (0, 0, 2, 2))
    plain = Image.fromarray(picture)
    decode(plain).paste((0, 0, 0), (0, 0, 2, 2))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, image.tobytes(), dict(image.info)) == before
    assert np.array_equal(np.asarray(plain), picture)


def test_threads_agree(tmp_path, picture):
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(decode(path).tobytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [picture.tobytes()] * 8


def test_identity_tells_backgrounds_apart():
    assert decoder_identity() == decoder_identity((255, 255, 255)) != decoder_identity((0, 0, 0))


# Resize

POLICIES: tuple[Literal["squash", "crop", "pad"], ...] = ("squash", "crop", "pad")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_right_size_passes_unchanged(picture, policy):
    result, mask = Resize((5, 7), policy)(Image.fromarray(picture))
    assert result.dtype == np.uint8 and np.array_equal(result, picture)
    assert (mask is None) == (policy != "pad") and (mask is None or mask.all())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("width, height", [(1, 1), (50, 3), (3, 50), (33, 32), (100, 100)])
@pytest.mark.parametrize("size", [1, 8, (6, 15)])
def test_a_constant_image_stays_constant(policy, width, height, size):
    resize = Resize(size, policy)
    result, mask = resize(Image.new("RGB", (width, height), (10, 200, 30)))
    assert result.shape == (*resize.shape, 3)
    inside = np.ones(resize.shape, bool) if mask is None else mask
    assert (result[inside] == (10, 200, 30)).all() and (result[~inside] == 0).all() and inside.any()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_squash_is_pils_bicubic():
    expected = np.asarray(noise(40, 30).resize((12, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(Resize((20, 12), "squash")(noise(40, 30))[0], expected)


@pytest.mark.parametrize("width, height, side, scale", [(48, 24, 12, 2), (24, 48, 12, 2), (96, 24, 8, 3)])
def test_crop_is_the_middle_of_the_whole_image_resized(width, height, side, scale):
    whole = np.asarray(noise(width, height).resize((width // scale, height // scale), Image.Resampling.BICUBIC))
    top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
    difference = Resize(side)(noise(width, height))[0] - whole[top : top + side, left : left + side].astype(int)
    assert np.abs(difference).max() <= 1  # PIL rounds between its two passes


def test_crop_of_one_axis_is_a_slice():
    assert np.array_equal(Resize((10, 6))(noise(20, 10))[0], np.asarray(noise(20, 10))[:, 7:13])


@pytest.mark.parametrize("width, height, inside", [(40, 20, (4, 12, 0, 16)), (20, 40, (0, 16, 4, 12)),
                                                   (1000, 1, (7, 8, 0, 16)), (3, 3, (0, 16, 0, 16))])  # fmt: skip
def test_pad_keeps_the_whole_image_in_the_middle(width, height, inside):
    top, bottom, left, right = inside
    result, mask = Resize(16, "pad")(noise(width, height))
    expected = np.asarray(noise(width, height).resize((right - left, bottom - top), Image.Resampling.BICUBIC))
    assert mask is not None and mask.sum() == (bottom - top) * (right - left) and mask[top:bottom, left:right].all()
    assert np.array_equal(result[top:bottom, left:right], expected) and not result[~mask].any()


def test_a_thin_image_takes_every_policy():
    thin = Image.fromarray(np.repeat(np.arange(0, 50000)[:, None, None] * 255 // 49999, 3, 2).astype(np.uint8))
    result, _ = Resize(224, "squash")(thin)
    assert np.ptp(result, axis=1).max() == 0
    assert np.abs(result[:, 0, 0] - np.linspace(0.5, 254.5, 224)).max() <= 1.5
    assert all(Resize(224, policy)(thin)[0].shape == (224, 224, 3) for policy in POLICIES)


@pytest.mark.parametrize("size", [0, -1, True, (3, 0)])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match="cannot resize to .*; give"):
        Resize(size)


@pytest.mark.parametrize("size", [(1, 2, 3), 2.5, "8"])
def test_sizes_of_another_kind_are_refused(size):
    with pytest.raises((ValueError, TypeError)):
        Resize(size)


def test_bad_policy_and_mode_are_refused():
    with pytest.raises((ValueError, TypeError), match="stretch"):
        Resize(8, "stretch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode L; pass it through decode"):
        Resize(8)(Image.new("L", (3, 3)))


def test_equal_resizes_have_equal_identities():
    assert Resize(8).identity == Resize((8, 8)).identity != Resize(8, "pad").identity
    assert Resize((8, 9)).identity["size"] == [8, 9]


def test_points_follow_a_bright_spot():
    image = np.zeros((60, 100, 3), np.uint8)
    image[20:25, 40:45] = 255  # centre (42, 22)
    for policy in POLICIES:
        resize = Resize((40, 48), policy)
        result = resize(Image.fromarray(image))[0][..., 0].astype(float)
        x, y = (result.sum(axis) @ np.arange(result.shape[1 - axis]) / result.sum() for axis in (0, 1))
        assert resize.points(np.array([42.0, 22.0]), (100, 60)) == pytest.approx([x, y], abs=0.05)


@given(policy=st.sampled_from(POLICIES), width=st.integers(1, 300), height=st.integers(1, 300), side=st.integers(1, 64))
def test_points_keep_the_centre_and_the_frame(policy, width, height, side):
    resize = Resize((side, 2 * side), policy)
    corners = np.array([[-0.5, -0.5], [width - 0.5, height - 0.5], [(width - 1) / 2, (height - 1) / 2]])
    start, end, centre = resize.points(corners, (width, height))
    frame = np.array([2 * side, side]) - 0.5
    assert np.abs(centre - (frame - 0.5) / 2).max() <= (0.5 if policy == "pad" else 1e-6)
    if policy == "squash":
        assert start == pytest.approx([-0.5, -0.5]) and end == pytest.approx(frame)
    if policy == "crop":
        assert (start <= -0.5 + 1e-6).all() and (end >= frame - 1e-6).all()
    if policy == "pad":
        assert (start >= -0.5 - 1e-6).all() and (end <= frame + 1e-6).all()


# Arrays, digests, points


def test_tensor_round_trip_is_exact():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    images = to_tensor(values)
    assert images.shape == (1, 3, 16, 16) and images.dtype == torch.float32 and images.is_contiguous()
    assert np.array_equal(images[0, 0].numpy(), (values[0, ..., 0] / 255.0).astype(np.float32))
    assert np.array_equal(to_uint8(images), values)
    assert np.array_equal(to_uint8(images.double()), values)


def test_to_tensor_of_one_image_moves_channels_first(picture):
    picture.flags.writeable = False
    assert np.array_equal(to_tensor(picture), (picture / np.float32(255)).transpose(2, 0, 1))


def test_to_uint8_rounds_half_to_even_and_forgives_rounding_errors():
    images = torch.tensor([0.5 / 255, 1.5 / 255, 2.5 / 255, -5e-7, 1 + 5e-7, 0.4999]).double()
    expected = [0, 2, 2, 0, 255, 127]
    assert to_uint8(images.expand(1, 3, 1, 6))[0, 0, :, 0].tolist() == expected


@pytest.mark.parametrize("value, shown", [(-0.01, "-0.01"), (1.001, "1.001"), (255.0, "255"), (float("nan"), "nan")])
def test_to_uint8_refuses_other_ranges(value, shown):
    images = torch.full((1, 3, 2, 2), 0.5)
    images[0, 1, 0, 1] = value
    with pytest.raises(ValueError, match=f"{shown}.*; scale them"):
        to_uint8(images)


def test_digest_is_the_sha256_of_shape_and_pixels(picture):
    assert digest(picture) == sha256(b"5x7x3:" + picture.tobytes()).digest()
    assert digest(np.zeros((2, 3, 3), np.uint8)) != digest(np.zeros((3, 2, 3), np.uint8))
    assert digest(np.asfortranarray(picture)) == digest(picture)


@pytest.mark.parametrize("wrong", [np.zeros((2, 2, 3)), np.zeros((3, 2, 2), np.uint8), np.zeros((2, 2), np.uint8)])
def test_other_arrays_are_refused(wrong):
    for function in (digest, to_tensor):
        with pytest.raises((ValueError, TypeError)):
            function(wrong)


def test_the_first_cell_covers_the_first_stride_of_pixels():
    assert pixel_to_grid(np.array([3.5, 3.5]), 8).tolist() == [0, 0]
    assert pixel_to_grid(np.array([-0.5, 7.5]), 8).tolist() == [-0.5, 0.5]
    assert grid_to_pixel(torch.tensor([[0, 1]]), (8, 4)).tolist() == [[3.5, 5.5]]


@given(
    point=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)),
    stride=st.one_of(st.floats(0.5, 64), st.tuples(st.floats(0.5, 64), st.floats(0.5, 64))),
)
def test_grid_and_pixels_are_inverse(point, stride):
    array = np.array([point])
    assert np.allclose(grid_to_pixel(pixel_to_grid(array, stride), stride), array, rtol=0, atol=1e-9)
    tensor = torch.from_numpy(array)
    assert torch.allclose(grid_to_pixel(pixel_to_grid(tensor, stride), stride), tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype, kept", [("int64", "float64"), ("float32", "float32"), ("float64", "float64")])
def test_points_keep_their_kind(dtype, kept):
    points = np.ones((2, 3, 2), dtype)
    assert pixel_to_grid(points, 8).dtype == kept and Resize(8).points(points, (9, 9)).shape == points.shape
    tensor = pixel_to_grid(torch.from_numpy(points), 8)
    assert tensor.dtype == (torch.float32 if dtype == "int64" else torch.from_numpy(points).dtype)


def test_points_must_be_pairs():
    with pytest.raises(ValueError, match="give .* with"):
        pixel_to_grid(np.zeros((4, 3)), 8)
