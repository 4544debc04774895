"""Batching: one thread that searches, for all requests that wait while it does, at once."""

import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any

import numpy as np
from jaxtyping import Float32

from repkit.service.metrics import Metrics
from repkit.service.waiting import Line, Waiting

_log = logging.getLogger("repkit")
MOST_ROWS = 1024  # queries of one search
PROBES = 16  # that wait for the thread to be idle
PATIENCE = 0.4  # of the time of the search before: as long are clients waited for that may ask again


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


@dataclass(frozen=True)
class _Asked:
    vectors: Float32[np.ndarray, "q d"]
    options: Options
    deadline: float


_Waiting = Waiting[_Asked]


class Batcher:
    """Searches in one thread of its own, with as many queries at once as have come in during the search before.

    A search of many takes less for each, so that a next one begins only when the clients just answered had a moment to
    ask again. search: of many vectors with the same options. prepare: called in the thread before the first search.
    Raises HTTP errors: 429 where `most_waiting` requests wait, 504 past a deadline, 503 once it is closed.
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
        self._share, self._random = probe_share, random.Random(0)
        self._probes: deque[tuple[Float32[np.ndarray, "q d"], Options, Any]] = deque(maxlen=PROBES)
        self._took = 0.0  # seconds of the last search
        self._line: Line[_Asked] = Line(
            "repkit-search",
            most_waiting,
            "searches",
            _alike,
            self._answer,
            prepare=self._prepared,
            idle=self._repeat,
            patience=lambda: PATIENCE * self._took,
        )
        self.start, self.close = self._line.start, self._line.close
        metrics.gauge("repkit_waiting_searches", "Searches that wait.", lambda: len(self._line))

    @property
    def full(self) -> bool:
        """Whether the next search will be refused."""
        return self._line.full

    async def search(self, vectors: Float32[np.ndarray, "q d"], options: Options, deadline: float) -> Any:
        """The answer for these vectors; `deadline` is one of `time.monotonic`."""
        return await self._line.ask(_Asked(vectors, options, deadline))

    def _prepared(self) -> None:
        try:
            self._prepare()
        except Exception as error:  # searches do without
            _log.warning("the search is not calibrated: %s", error)

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        now = monotonic()
        live = [one for one in batch if one.asked.deadline > now and not one.future.done()]
        for one in batch:
            if one.asked.deadline <= now:
                one.result = TimeoutError("the search was not begun in time")
        if live:
            self._search_all(live)

    def _search_all(self, live: Sequence[_Waiting]) -> None:
        options, parts = live[0].asked.options, [one.asked.vectors for one in live]
        vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._metrics.batch.observe(len(vectors))
        begun = perf_counter()
        try:
            answer = self._search(vectors, options)
        except Exception as error:
            for one in live:
                one.result = error
            return
        self._took = perf_counter() - begun
        self._metrics.search.observe(self._took)
        row = 0
        for one, part in zip(live, parts, strict=True):
            one.result = self._cut(answer, row, row + len(part))
            row += len(part)
            if self._random.random() < self._share:
                self._probes.append((part, options, one.result))

    def _repeat(self) -> bool:
        """Search once more, exactly, for one of those chosen for that; whether there was one."""
        if not self._probes:
            return False
        vectors, options, answer = self._probes.popleft()
        try:
            exact = self._search(vectors, Options(options.k, options.where, exact=True))
            recall = self._probe(answer, exact)
        except Exception:  # a probe must not end the thread that all searches need
            return True
        if recall is not None:
            self._metrics.probed(recall)
        return True


def _alike(waiting: deque[_Waiting]) -> list[_Waiting]:
    """Take the oldest request and those that can be searched with it."""
    options, rows = waiting[0].asked.options, 0
    taken: list[_Waiting] = []
    left: list[_Waiting] = []
    for one in waiting:
        number = len(one.asked.vectors)
        fits = one.asked.options == options and (not taken or rows + number <= MOST_ROWS)
        rows += number if fits else 0
        (taken if fits else left).append(one)
    waiting.clear()
    waiting.extend(left)
    return taken
