"""Batching: one thread that searches, for all requests that wait while it does, at once."""

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any

import numpy as np
from jaxtyping import Float32

from repkit.service.answers import refusal
from repkit.service.metrics import Metrics

_log = logging.getLogger("repkit")
MOST_ROWS = 1024  # queries of one search
PROBES = 16  # that wait for the thread to be idle


@dataclass(frozen=True)
class Options:
    """How to search, apart from the vectors; searches with equal ones are made together. where: as JSON."""

    k: int
    where: str | None = None
    exact: bool = False
    ef: int | None = None
    nprobe: int | None = None


Search = Callable[[Float32[np.ndarray, "q d"], Options], Any]  # -> the answer: what `cut` takes apart
Cut = Callable[[Any, int, int], Any]  # (answer, first row, last row + 1) -> the answer of these
Probe = Callable[[Any, Any], float | None]  # (answer, exact answer) -> recall; None where they cannot be compared


@dataclass(eq=False)
class _Waiting:
    vectors: Float32[np.ndarray, "q d"]
    options: Options
    deadline: float
    future: "asyncio.Future[Any]"
    result: Any = field(default=None)


class Batcher:
    """Searches in one thread of its own, with as many queries at once as have come in during the search before.

    search: of many vectors with the same options. prepare: called in the thread before the first search. Raises HTTP
    errors: 429 where `most_waiting` requests wait, 504 past a deadline, 503 once it is closed.
    """

    def __init__(
        self,
        search: Search,
        cut: Cut,
        probe: Probe,
        metrics: Metrics,
        *,
        most_waiting: int,
        probe_share: float = 0.0,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._search, self._cut, self._probe, self._metrics, self._prepare = search, cut, probe, metrics, prepare
        self._most_waiting, self._share = most_waiting, probe_share
        self._queue: deque[_Waiting] = deque()
        self._probes: deque[tuple[Float32[np.ndarray, "q d"], Options, Any]] = deque(maxlen=PROBES)
        self._condition, self._closed = threading.Condition(), False
        self._ready, self._random = threading.Event(), random.Random(0)
        self._thread = threading.Thread(target=self._run, name="repkit-search", daemon=True)
        metrics.gauge("repkit_waiting_searches", "Searches that wait.", lambda: len(self._queue))

    def start(self) -> None:
        """Begin to search, once the thread is prepared."""
        self._thread.start()
        self._ready.wait()

    async def search(self, vectors: Float32[np.ndarray, "q d"], options: Options, deadline: float) -> Any:
        """The answer for these vectors; `deadline` is one of `time.monotonic`."""
        waiting = _Waiting(vectors, options, deadline, asyncio.get_running_loop().create_future())
        with self._condition:
            if self._closed:
                raise refusal(503, "the service is ending")
            if len(self._queue) >= self._most_waiting:
                raise refusal(429, f"{len(self._queue)} searches wait already; try again")
            self._queue.append(waiting)
            self._condition.notify()
        return await waiting.future

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._prepare()
        except Exception as error:  # searches do without
            _log.warning("the search is not calibrated: %s", error)
        finally:
            self._ready.set()
        while (batch := self._take()) is not None:
            if batch:
                self._answer(batch)
            else:
                self._repeat()

    def _take(self) -> list[_Waiting] | None:
        """The oldest request and those that can be searched with it; nothing to probe, None to end."""
        with self._condition:
            while not self._queue:
                if self._closed:
                    return None
                if self._probes:
                    return []
                self._condition.wait()
            options, rows = self._queue[0].options, 0
            taken: list[_Waiting] = []
            left: deque[_Waiting] = deque()
            for one in self._queue:
                fits = one.options == options and (not taken or rows + len(one.vectors) <= MOST_ROWS)
                rows += len(one.vectors) if fits else 0
                (taken if fits else left).append(one)
            self._queue = left
            return taken

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        now = monotonic()
        live = [one for one in batch if one.deadline > now and not one.future.done()]
        for one in batch:
            if one.deadline <= now:
                one.result = TimeoutError("the search was not begun in time")
        if live:
            self._search_all(live)
        by_loop: dict[asyncio.AbstractEventLoop, list[_Waiting]] = {}
        for one in batch:
            by_loop.setdefault(one.future.get_loop(), []).append(one)
        for loop, ours in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, ours)

    def _search_all(self, live: Sequence[_Waiting]) -> None:
        vectors = live[0].vectors if len(live) == 1 else np.concatenate([one.vectors for one in live])
        self._metrics.batch.observe(len(vectors))
        begun = perf_counter()
        try:
            answer = self._search(vectors, live[0].options)
        except Exception as error:
            for one in live:
                one.result = error
            return
        self._metrics.search.observe(perf_counter() - begun)
        row = 0
        for one in live:
            one.result = self._cut(answer, row, row + len(one.vectors))
            row += len(one.vectors)
            if self._random.random() < self._share:
                self._probes.append((one.vectors, one.options, one.result))

    def _repeat(self) -> None:
        vectors, options, answer = self._probes.popleft()
        try:
            exact = self._search(vectors, Options(options.k, options.where, exact=True))
            recall = self._probe(answer, exact)
        except Exception:  # a probe must not end the thread that all searches need
            return
        if recall is not None:
            self._metrics.probed(recall)


def _deliver(batch: Sequence[_Waiting]) -> None:
    for one in batch:
        if one.future.done():
            continue
        if isinstance(one.result, Exception):
            one.future.set_exception(one.result)
        else:
            one.future.set_result(one.result)
