"""A light HTTP client for loads: requests that are bytes already, answers that are read and not looked into.

It shares the machine with the service that it measures, so it has to leave the processors to that.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np

Address = tuple[str, int]


@dataclass(frozen=True)
class Load:
    """What came of a load: the seconds of each answered request, by status, and how long all of it took."""

    seconds: dict[int, list[float]]
    lasted: float

    @property
    def rate(self) -> float:
        """Requests a second that were answered with 200."""
        return len(self.seconds.get(200, [])) / self.lasted

    def percentile(self, share: float) -> float:
        """Seconds within which that percentage of the requests answered with 200 were done."""
        return float(np.percentile(self.seconds[200], share))


def as_bytes(method: str, path: str, body: bytes) -> bytes:
    """A request as it is sent."""
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def closed_loop(address: Address, requests: Iterator[bytes], clients: int, seconds: float) -> Load:
    """So many clients, each of which asks again when it was answered."""

    async def client(ask: "Asking", done: Callable[[int, float], None], until: float) -> None:
        while (begun := perf_counter()) < until:
            done(await ask(next(requests)), perf_counter() - begun)

    async def load() -> Load:
        found = _Found()
        begun = perf_counter()
        await asyncio.gather(*(client(Asking(address), found.add, begun + seconds) for _ in range(clients)))
        return Load(found.seconds, perf_counter() - begun)

    return asyncio.run(load())


def open_loop(address: Address, requests: Iterator[bytes], rate: float, seconds: float, seed: int = 0) -> Load:
    """Requests that come at random moments, `rate` a second, whether or not others were answered.

    A request's time counts from the moment at which it was due, so that a busy client hides nothing.
    """
    due = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds)))

    async def one(free: "list[Asking]", done: Callable[[int, float], None], moment: float) -> None:
        ask = free.pop() if free else Asking(address)
        done(await ask(next(requests)), perf_counter() - moment)
        free.append(ask)

    async def load() -> Load:
        found, free, under_way = _Found(), [], []
        begun = perf_counter()
        for moment in begun + due:
            await asyncio.sleep(max(0.0, moment - perf_counter()))
            under_way.append(asyncio.ensure_future(one(free, found.add, moment)))
        await asyncio.gather(*under_way)
        return Load(found.seconds, perf_counter() - begun)

    return asyncio.run(load())


class _Found:
    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}

    def add(self, status: int, seconds: float) -> None:
        self.seconds.setdefault(status, []).append(seconds)


class Asking:
    """One kept connection; calling it sends a request and gives the status of the answer."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __call__(self, request: bytes) -> int:
        kept = self._streams is not None
        try:
            return await self._ask(request)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._streams = None
            if not kept:
                raise
            return await self._ask(request)  # a service hangs up on connections that are idle for long

    async def _ask(self, request: bytes) -> int:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        if b"connection: close" in head:
            writer.close()
            self._streams = None
        return int(head.split(b" ", 2)[1])
