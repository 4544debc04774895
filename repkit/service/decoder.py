"""Decoder: pictures of strangers are decoded in processes of their own, which may die without harm."""

import asyncio
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any, Literal

import numpy as np
from jaxtyping import Bool, UInt8

from repkit.service.answers import refusal
from repkit.service.metrics import Metrics

MEMORY = 1 << 30  # bytes that a picture may take beyond what the process has after its imports
START_SECONDS = 120.0
Policy = Literal["squash", "crop", "pad"]

_START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from repkit.service.decoder import serve; serve(**json.loads(sys.argv[2]))"
)


@dataclass(frozen=True)
class Picture:
    """A picture as the network takes it. size: its (width, height) before."""

    pixels: UInt8[np.ndarray, "H W 3"]
    mask: Bool[np.ndarray, "H W"] | None
    size: tuple[int, int]


class Decoder:
    """A number of processes that decode one picture at a time, each replaced when it dies or takes too long.

    most_waiting: pictures that may wait for one. memory: bytes that a picture may take. Raises HTTP errors: 422 for
    what is no picture, 429 where too many wait.
    """

    def __init__(
        self,
        workers: int,
        metrics: Metrics,
        *,
        max_pixels: int,
        seconds: int | float,
        most_waiting: int,
        memory: int = MEMORY,
    ) -> None:
        self._seconds, self._most, self._metrics = seconds, most_waiting, metrics
        settings = {"max_pixels": max_pixels, "memory": memory}
        self._processes = [_Process(settings, seconds) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="repkit-pictures")
        self._waiting = 0
        metrics.gauge("repkit_waiting_images", "Pictures that are decoded or wait for it.", lambda: self._waiting)

    async def picture(self, content: bytes, shape: Sequence[int], policy: Policy) -> Picture:
        """The picture resized, by the rules of `repkit extract`."""
        reply, parts = await self._ask({"shape": list(shape), "policy": policy}, content)
        height, width = shape
        pixels = np.frombuffer(parts[0], np.uint8).reshape(height, width, 3)
        mask = np.frombuffer(parts[1], bool).reshape(height, width) if len(parts) > 1 else None
        return Picture(pixels, mask, tuple(reply["size"]))

    async def thumbnail(self, content: bytes, side: int) -> bytes:
        """The picture as a PNG or JPEG whose longer side is `side` pixels, or less where the picture has less."""
        return bytes((await self._ask({"side": side}, content))[1][0])

    def warm(self) -> None:
        """Start the processes before the first picture comes."""
        for process in self._processes:
            self._threads.submit(process.start)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.end(for_good=True)
        self._threads.shutdown(cancel_futures=True)

    async def _ask(self, how: dict[str, Any], content: bytes) -> tuple[dict[str, Any], list[bytes]]:
        if self._waiting >= self._most:
            raise refusal(429, f"{self._waiting} pictures wait already; try again")
        self._waiting += 1
        future = self._threads.submit(self._exchange, how, content)
        future.add_done_callback(lambda _: self._done())
        reply, parts = await asyncio.wrap_future(future)
        self._metrics.images.labels("ok" if reply["error"] is None else reply["outcome"]).inc()
        if reply["error"] is not None:
            raise refusal(422, reply["error"], "no_picture")
        return reply, parts

    def _done(self) -> None:
        self._waiting -= 1

    def _exchange(self, how: dict[str, Any], content: bytes) -> tuple[dict[str, Any], list[bytes]]:
        process = self._idle.get()
        try:
            return process.exchange(how, content)
        except (EOFError, OSError):
            process.end()
            told = f"the picture could not be decoded within {self._seconds:g} seconds and the memory there is for one"
            return {"error": told, "outcome": "killed"}, []
        finally:
            self._idle.put(process)


class _Process:
    """One process; it is sent a header and the picture, and answers with a header and what was made of it."""

    def __init__(self, settings: dict[str, Any], seconds: int | float) -> None:
        self._settings, self._seconds = settings, seconds
        self._popen: subprocess.Popen[bytes] | None = None
        self._lock, self._ended = threading.Lock(), False

    def start(self) -> subprocess.Popen[bytes]:
        """The process, started if need be."""
        with self._lock:
            if self._ended:
                raise EOFError
            if self._popen is not None and self._popen.poll() is None:
                return self._popen
            arguments = [json.dumps([path or os.getcwd() for path in sys.path]), json.dumps(self._settings)]
            command = [sys.executable, "-W", "ignore", "-c", _START, *arguments]
            # A group of its own: Ctrl-C in a terminal is for the service, which ends what it has started.
            popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
            self._popen = popen
        with _watched(popen, START_SECONDS):
            _read(popen.stdout)
        return popen

    def exchange(self, how: dict[str, Any], content: bytes) -> tuple[dict[str, Any], list[bytes]]:
        """Send a picture and read what comes back; EOFError or OSError where the process has died or was killed."""
        popen = self.start()
        with _watched(popen, self._seconds):
            _write(popen.stdin, how, [content])
            return _read(popen.stdout)

    def end(self, *, for_good: bool = False) -> None:
        """Kill the process; the next picture starts another, unless it is for good."""
        with self._lock:
            self._ended = self._ended or for_good
            popen, self._popen = self._popen, None
        if popen is None:
            return
        popen.kill()
        with suppress(subprocess.TimeoutExpired):
            popen.wait(timeout=10)
        for pipe in (popen.stdin, popen.stdout):
            with suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]


class _watched:  # noqa: N801
    """Kill a process that has not answered in time."""

    def __init__(self, popen: "subprocess.Popen[bytes]", seconds: int | float) -> None:
        self._timer = threading.Timer(seconds, popen.kill)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _write(pipe: IO[bytes] | None, header: dict[str, Any], parts: Sequence[bytes]) -> None:
    assert pipe is not None
    line = json.dumps({**header, "parts": [len(part) for part in parts]}).encode()
    pipe.write(b"".join([len(line).to_bytes(4, "little"), line, *parts]))
    pipe.flush()


def _read(pipe: IO[bytes] | None) -> tuple[dict[str, Any], list[bytes]]:
    assert pipe is not None
    header = json.loads(_exactly(pipe, int.from_bytes(_exactly(pipe, 4), "little")))
    return header, [_exactly(pipe, size) for size in header["parts"]]


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    content = pipe.read(size)
    if len(content) != size:
        raise EOFError
    return content


def serve(max_pixels: int, memory: int) -> None:
    """What a process does: answer pictures on standard input until there are no more."""
    from repkit.images import Resize, decode

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the service has gone: go too, without a word
    out, into = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # what a library prints must not get between the answers
    decode(_warming())  # Pillow loads its codecs now, not under the limit
    _limit(memory)
    _write(out, {"ready": True}, [])
    while True:
        try:
            how, (content,) = _read(into)
        except EOFError:
            return
        try:
            image = decode(content, max_pixels=max_pixels)
            if "side" in how:
                parts = [_encoded(image, how["side"])]
            else:
                pixels, mask = Resize(tuple(how["shape"]), how["policy"])(image)
                parts = [one.tobytes() for one in (pixels, mask) if one is not None]
            _write(out, {"error": None, "size": image.size}, parts)
        except (ValueError, MemoryError) as error:
            _write(out, _told(error), [])


def _limit(memory: int) -> None:
    """No more memory than this beyond what there is, no file written, no dump of a crash."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _warming() -> bytes:
    from PIL import Image

    content = BytesIO()
    Image.new("RGB", (1, 1)).save(content, "PNG")
    return content.getvalue()


def _encoded(image: Any, side: int) -> bytes:
    """PNG of what is small, where it is the better one, and JPEG of the rest."""
    image.thumbnail((side, side))
    content = BytesIO()
    small = image.width * image.height <= 64 * 64
    image.save(content, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 85}))
    return content.getvalue()


def _told(error: ValueError | MemoryError) -> dict[str, str]:
    """What was wrong, without the name that `decode` has for bytes."""
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return {"error": "the picture takes more memory than there is for one", "outcome": "memory"}
    return {"error": str(error).partition(" bytes: ")[2] or str(error), "outcome": "refused"}
