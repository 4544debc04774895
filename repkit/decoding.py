"""Decoding ahead of the model: in line, in a thread, or in processes of their own that may die."""

import errno
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from queue import SimpleQueue
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageFile

from repkit.images import Resize, decode

MAX_PIXELS = 50_000_000  # of an image, as for `decode`
MAX_FILE_BYTES = 1 << 30  # a file is read whole, so that what is hashed is what is decoded
AHEAD = 2  # batches decoded while the model works on one: this bounds the memory
ATTEMPTS = 2
START_SECONDS, DECODE_SECONDS = 300.0, 120.0

_SOURCE = re.compile(r"image of \d+ bytes: ")  # what `decode` calls it; errors stand beside the path

# -c and not -m or multiprocessing: the caller's script is not imported a second time, so it needs no __main__ guard.
# Ctrl-C reaches every process of a terminal; the one that exports decides what it means.
_START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from repkit.decoding import serve; serve(**json.loads(sys.argv[2]))"
)


@dataclass(frozen=True)
class Decoded:
    """A file as the network takes it, or `error`, which says why there is none.

    size: (width, height) of the picture before it was resized. sha256: of the file, hexadecimal.
    """

    pixels: UInt8[np.ndarray, "H W 3"] | None = None
    mask: Bool[np.ndarray, "H W"] | None = None
    size: tuple[int, int] = (0, 0)
    sha256: str = ""
    error: str | None = None


def read_image(path: str, resize: Resize, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Read a file once; hash, decode and resize what was read. No file makes this raise."""
    try:
        content = _read_file(path)
        image = decode(content, max_pixels=max_pixels)
        pixels, mask = resize(image)
    except OSError as error:
        return Decoded(error=error.strerror or str(error))
    except (ValueError, MemoryError) as error:
        return Decoded(error=_SOURCE.sub("", str(error)) or type(error).__name__)
    return Decoded(pixels, mask, image.size, hashlib.sha256(content).hexdigest())


def _read_file(path: str) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"file of {status.st_size} bytes, over the limit of {MAX_FILE_BYTES}")
    with open(path, "rb") as file:
        return file.read()


def decode_ahead(
    batches: Iterable[Sequence[str]], resize: Resize, workers: int, max_pixels: int = MAX_PIXELS
) -> Generator[list[Decoded], None, None]:
    """Each batch of paths decoded, in order, at most AHEAD batches before it is asked for.

    workers: 0 decodes in line, 1 in a thread of this process, n >= 2 in as many processes; the values are the same. A
    process that dies or hangs is replaced; an image that two have died of gets an error. Raises RuntimeError where
    the processes do not start. Close the iterator to end threads and processes early.
    """
    if workers == 0:
        with _allowing(max_pixels):
            yield from ([read_image(path, resize, max_pixels) for path in batch] for batch in batches)
        return
    processes = [Process(resize, max_pixels) for _ in range(workers)] if workers > 1 else []
    read = _shared(processes) if processes else lambda path: read_image(path, resize, max_pixels)
    threads = ThreadPoolExecutor(workers, thread_name_prefix="repkit-decode")
    waiting: deque[list[Future[Decoded]]] = deque()
    try:
        with _allowing(max_pixels):
            for batch in batches:
                waiting.append([threads.submit(read, path) for path in batch])
                if len(waiting) > AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        threads.shutdown()  # every thread has seen the end of its process: nobody reads its pipes any more
        for process in processes:
            process.end()


@contextmanager
def _allowing(max_pixels: int) -> Iterator[None]:
    """Keep PIL from refusing, by a limit of its own for the whole process, what `max_pixels` lets pass."""
    before = Image.MAX_IMAGE_PIXELS
    if before is not None:
        Image.MAX_IMAGE_PIXELS = max(before, max_pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _shared(processes: Sequence["Process"]) -> Callable[[str], Decoded]:
    """A function for as many threads as there are processes: each call takes an idle one."""
    idle: SimpleQueue[Process] = SimpleQueue()
    for process in processes:
        idle.put(process)

    def read(path: str) -> Decoded:
        process = idle.get()
        try:
            return process.read(path)
        finally:
            idle.put(process)

    return read


class Process:
    """A process that decodes one file at a time, and is started anew when it dies or hangs.

    It is asked by a line of JSON, the path; it answers by JSON after its length, then the bytes of pixels and mask.
    """

    def __init__(self, resize: Resize, max_pixels: int = MAX_PIXELS) -> None:
        self._resize, self._max_pixels = resize, max_pixels
        self._popen: subprocess.Popen[bytes] | None = None
        self._killed = False

    def read(self, path: str) -> Decoded:
        """The decoded file; an error where every attempt ended with the process."""
        for _ in range(ATTEMPTS):
            if self._killed:
                break
            try:
                return self._ask(self._popen or self._start(), path)
            except (EOFError, OSError):
                self.end()
        return Decoded(error=f"{ATTEMPTS} processes died or hung while decoding it (out of memory?)")

    def kill(self) -> None:
        """Kill the process for good; a call of `read` in another thread that waits for it returns."""
        self._killed = True
        if self._popen is not None:
            self._popen.kill()

    def end(self) -> None:
        """Kill the process, if there is one, and close its pipes."""
        popen, self._popen = self._popen, None
        if popen is None:
            return
        popen.kill()
        with suppress(subprocess.TimeoutExpired):  # it may hang in the kernel, on a file system that has gone
            popen.wait(timeout=10)
        for pipe in (popen.stdin, popen.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        settings = {
            "size": self._resize.shape,
            "policy": self._resize.policy,
            "max_pixels": self._max_pixels,
            "pil_pixels": Image.MAX_IMAGE_PIXELS,
            "truncated": ImageFile.LOAD_TRUNCATED_IMAGES,
        }
        arguments = [json.dumps([path or os.getcwd() for path in sys.path]), json.dumps(settings)]
        command = [sys.executable, "-W", "ignore", "-c", _START, *arguments]
        self._popen = popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        try:
            _header(popen, START_SECONDS)
        except (EOFError, OSError) as error:
            if self._killed:
                raise
            self.end()
            reason = "a process for decoding did not start; its error is above"
            raise RuntimeError(f"{reason}. Export with workers=1 to do without") from error
        return popen

    def _ask(self, popen: subprocess.Popen[bytes], path: str) -> Decoded:
        assert popen.stdin is not None
        popen.stdin.write(json.dumps(path).encode() + b"\n")
        reply = _header(popen, DECODE_SECONDS)
        if reply["error"] is not None:
            return Decoded(error=reply["error"])
        height, width = self._resize.shape
        pixels = np.frombuffer(_exactly(popen, height * width * 3), np.uint8).reshape(height, width, 3)
        mask = None
        if reply["mask"]:
            mask = np.frombuffer(_exactly(popen, height * width), bool).reshape(height, width)
        return Decoded(pixels, mask, tuple(reply["size"]), reply["sha256"])


def _header(popen: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """The next header from the process; EOFError where it has died, or says nothing for so long."""
    assert popen.stdout is not None
    if not wait([popen.stdout.fileno()], seconds):
        raise EOFError
    size = int.from_bytes(_exactly(popen, 4), "little")
    return json.loads(_exactly(popen, size))


def _exactly(popen: subprocess.Popen[bytes], count: int) -> bytearray:
    assert popen.stdout is not None
    content = bytearray(count)
    view, done = memoryview(content), 0
    while done < count:
        got = popen.stdout.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        done += got
    return content


def serve(size: Sequence[int], policy: Any, max_pixels: int, pil_pixels: int | None, truncated: bool) -> None:
    """What a decoding process does: answer a path on each line of standard input until there are no more."""
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = pil_pixels, truncated
    resize = Resize((size[0], size[1]), policy)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the exporting process has gone: go too, without a word
    _send(out, {"ready": True})
    for line in sys.stdin.buffer:
        one = read_image(json.loads(line), resize, max_pixels)
        header = {"error": one.error, "size": one.size, "sha256": one.sha256, "mask": one.mask is not None}
        _send(out, header, *(part.tobytes() for part in (one.pixels, one.mask) if part is not None))


def _send(out: Any, header: dict[str, Any], *parts: bytes) -> None:
    line = json.dumps(header).encode()
    out.write(b"".join([len(line).to_bytes(4, "little"), line, *parts]))
    out.flush()
