import hashlib
import inspect
import os
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from repkit import decoding
from repkit.decoding import AHEAD, Process, decode_ahead, read_image
from repkit.images import Resize, decode
from tests.export_cases import write_image, write_images

# Speaks the protocol of `serve` for 1x1 images, but dies of one path, hangs on another, and starts at once.
EVIL = """
import json, os, sys, time
def send(header, body=b""):
    line = json.dumps(header).encode()
    os.write(1, len(line).to_bytes(4, "little") + line + body)
send({"ready": True})
for line in sys.stdin:
    path = json.loads(line)
    if path == "die" or path.startswith("once") and not os.path.exists(path[5:]):
        if path != "die":
            open(path[5:], "w").close()
        os.kill(os.getpid(), 9)
    if path == "hang":
        time.sleep(60)
    send({"error": None, "size": [1, 1], "sha256": path, "mask": False}, bytes([len(path)] * 3))
"""


@pytest.fixture
def evil(monkeypatch):
    monkeypatch.setattr(decoding, "_START", EVIL)


def test_read_image(tmp_path):
    path = write_image(tmp_path / "image.png", 0, (20, 30))
    found = read_image(str(path), Resize(16, "pad"))
    pixels, mask = Resize(16, "pad")(decode(path))
    assert found.pixels is not None and found.mask is not None and mask is not None
    assert (found.pixels == pixels).all() and (found.mask == mask).all()
    assert found.size == (30, 20)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a PNG"),
        (lambda path: write_image(path, 0).write_bytes(path.read_bytes()[:99]), "truncated"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: None, "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_what_is_no_image_has_an_error(make, message, tmp_path):
    make(tmp_path / "x.png")
    found = read_image(str(tmp_path / "x.png"), Resize(8))
    assert found.pixels is None and found.error is not None and message in found.error
    assert "bytes:" not in found.error


def test_max_pixels_is_that_of_decode():
    assert inspect.signature(decode).parameters["max_pixels"].default == decoding.MAX_PIXELS


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_max_pixels_decides_what_is_too_large(workers, tmp_path, monkeypatch):
    path = str(write_image(tmp_path / "x.png", 0, (20, 15)))
    with closing(decode_ahead([[path]], Resize(8), workers, 299)) as decoded:
        assert "15x20 pixels, over the limit of 299" in str(next(decoded)[0].error)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # PIL warns above, and refuses the double
    with closing(decode_ahead([[path]], Resize(8), workers, 300)) as decoded:
        assert next(decoded)[0].error is None
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_file_too_large_to_hold_is_not_read(tmp_path):
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(decoding.MAX_FILE_BYTES + 1)
    assert "over the limit" in str(read_image(str(tmp_path / "x.png"), Resize(8)).error)


@pytest.mark.parametrize("workers", [0, 1])
def test_order_and_bound(workers, tmp_path):
    """Files come in order, and no more are asked for than the look-ahead allows."""
    paths = [str(path) for path in sorted(write_images(tmp_path, 12).iterdir())]
    asked = []

    def batches():
        for start in range(0, 12, 2):
            asked.append(start)
            yield paths[start : start + 2]

    expected = [read_image(path, Resize(8)).sha256 for path in paths]
    found = []
    with closing(decode_ahead(batches(), Resize(8), workers)) as decoded:
        for number, batch in enumerate(decoded, 1):
            assert len(asked) <= number + AHEAD
            found += [one.sha256 for one in batch]
    assert found == expected


def test_a_process_that_dies_costs_one_image(evil):
    batches = [["a", "die", "bb"], ["ccc", "die"], ["dddd"]]
    with closing(decode_ahead(batches, Resize(1), 3)) as decoded:
        found = list(decoded)
    assert [[one.error is None for one in batch] for batch in found] == [[True, False, True], [True, False], [True]]
    assert "2 processes died or hung" in str(found[0][1].error)
    good = [one for batch in found for one in batch if one.pixels is not None]
    assert [one.sha256 for one in good] == ["a", "bb", "ccc", "dddd"]
    assert [int(np.unique(one.pixels).item()) for one in good if one.pixels is not None] == [1, 2, 3, 4]


def test_a_process_that_dies_by_chance_costs_nothing(evil, tmp_path):
    with closing(decode_ahead([["a", f"once {tmp_path / 'mark'}", "b"]], Resize(1), 2)) as decoded:
        assert [one.error for one in next(decoded)] == [None, None, None]


def test_a_process_that_hangs_is_killed(evil, monkeypatch):
    monkeypatch.setattr(decoding, "DECODE_SECONDS", 1.0)
    with closing(decode_ahead([["hang", "a"]], Resize(1), 2)) as decoded:
        assert [one.error is None for one in next(decoded)] == [False, True]


def test_closing_early_ends_processes_and_threads(evil):
    before = threading.active_count()
    started = time.monotonic()
    decoded = decode_ahead([["a"], ["hang"], ["hang"]], Resize(1), 2)
    next(decoded)
    decoded.close()
    assert time.monotonic() - started < 20
    assert threading.active_count() == before


def test_processes_that_do_not_start(monkeypatch):
    monkeypatch.setattr(decoding, "_START", "import sys; sys.exit(3)")
    with closing(decode_ahead([["a"]], Resize(1), 2)) as decoded, pytest.raises(RuntimeError, match="workers=1"):
        next(decoded)


def test_a_real_process_reads_what_this_one_reads(tmp_path):
    write_image(tmp_path / "image.png", 0, (20, 30))
    process = Process(Resize((8, 12), "pad"))
    try:
        for path in (tmp_path / "image.png", tmp_path / "none.png"):
            here, there = read_image(str(path), Resize((8, 12), "pad")), process.read(str(path))
            assert (there.size, there.sha256, there.error) == (here.size, here.sha256, here.error)
            assert np.array_equal(there.pixels, here.pixels) and np.array_equal(there.mask, here.mask)
    finally:
        process.end()
