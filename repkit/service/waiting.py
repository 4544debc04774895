"""Waiting: requests of event loops that one thread answers, several at once, and how its answers reach them."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, TypeVar

from repkit.service.answers import refusal

PAUSE = 0.005  # seconds in which nobody asked: no more will come
Asked = TypeVar("Asked")


@dataclass(eq=False)
class Waiting(Generic[Asked]):
    """A request; `result` is its answer, or the exception to raise for it."""

    asked: Asked
    future: "asyncio.Future[Any]"
    result: Any = None


class Line(Generic[Asked]):
    """A bounded number of requests, and the thread that answers them.

    name: of the thread. most: requests that may wait. what: who they are, for those beyond. take: removes from the
    waiting, of which there are some, those to answer at once. answer: gives each its result. prepare: called in the
    thread before all else. idle: called while nothing waits, until it returns False. patience: seconds for which those
    just answered are waited for, as long as they do ask again; never a lone client.
    """

    def __init__(
        self,
        name: str,
        most: int,
        what: str,
        take: Callable[["deque[Waiting[Asked]]"], list[Waiting[Asked]]],
        answer: Callable[[Sequence[Waiting[Asked]]], None],
        *,
        prepare: Callable[[], None],
        idle: Callable[[], bool] = lambda: False,
        patience: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._most, self._what = most, what
        self._choose, self._answer, self._prepare, self._idle, self._patience = take, answer, prepare, idle, patience
        self._waiting: deque[Waiting[Asked]] = deque()
        self._condition, self._closed, self._ready = threading.Condition(), False, threading.Event()
        self._crowd, self._telling = 0, 0  # requests at once when the last ones were answered; loops to be told so
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether the next to ask will be refused, if it asks now."""
        return len(self._waiting) >= self._most

    def start(self) -> None:
        """Start the thread; returns when it is prepared or has failed to be."""
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    async def ask(self, asked: Asked) -> Any:
        """The answer; an HTTP error 429 where too many wait, 503 once the line is closed."""
        waiting = Waiting(asked, asyncio.get_running_loop().create_future())
        with self._condition:
            if self._closed:
                raise refusal(503, "the service is ending")
            if self.full:
                raise refusal(429, f"{len(self._waiting)} {self._what} wait already; try again")
            self._waiting.append(waiting)
            if len(self._waiting) == 1 or len(self._waiting) >= self._crowd or self.full:
                self._condition.notify()
        return await waiting.future

    def _run(self) -> None:
        try:
            self._prepare()
        finally:
            self._ready.set()
        while self._awaited():
            with self._condition:
                self._gather()
                batch = self._choose(self._waiting)
            try:
                self._answer(batch)
            except Exception as error:  # it must not end the thread, which all others wait for
                for one in batch:
                    one.result = error
            self._deliver(batch)

    def _awaited(self) -> bool:
        """Return True when something waits, and False to end."""
        while True:
            with self._condition:
                if self._waiting or self._closed:
                    return bool(self._waiting)
            if not self._idle():
                with self._condition:
                    self._condition.wait_for(lambda: self._waiting or self._closed)

    def _gather(self) -> None:
        """Wait until those just answered have asked again or seem not to."""
        until = perf_counter() + self._patience()
        most = min(self._crowd, self._most)
        while len(self._waiting) < most and not self._closed and (left := until - perf_counter()) > 0:
            before = len(self._waiting)
            self._condition.wait(min(PAUSE, left))
            if len(self._waiting) == before and not self._telling:
                break

    def _deliver(self, batch: Sequence[Waiting[Asked]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Waiting[Asked]]] = {}
        for one in batch:
            by_loop.setdefault(one.future.get_loop(), []).append(one)
        with self._condition:
            self._crowd, self._telling = len(self._waiting) + len(batch), self._telling + len(by_loop)
        for loop, ours in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._tell, loop, ours)
            except RuntimeError:  # it is closed, and nobody waits in it
                self._told()

    def _tell(self, loop: asyncio.AbstractEventLoop, batch: Sequence[Waiting[Asked]]) -> None:
        for one in batch:
            if one.future.done():
                continue
            if isinstance(one.result, Exception):
                one.future.set_exception(one.result)
            else:
                one.future.set_result(one.result)
        loop.call_soon(self._told)  # by then they have sent their answers

    def _told(self) -> None:
        with self._condition:
            self._telling -= 1
