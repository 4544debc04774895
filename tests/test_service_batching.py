"""Batching: who is searched together, and who is not kept waiting."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from repkit.service import batching, waiting
from repkit.service.batching import Batcher, Options
from repkit.service.metrics import Metrics

SEARCH = 0.02  # seconds


@contextmanager
def searching(sizes: list[int]) -> Iterator[Callable[[float], Awaitable[Any]]]:
    """A batcher whose answers are its queries, doubled; `sizes` gets the number of queries of each search."""

    def search(vectors: np.ndarray, options: Options) -> np.ndarray:
        sizes.append(len(vectors))
        time.sleep(SEARCH)
        return 2 * vectors

    def cut(answer: np.ndarray, first: int, end: int) -> np.ndarray:
        return answer[first:end]

    batcher = Batcher(search, cut, lambda one, other: None, Metrics(), most_waiting=64)
    batcher.start()

    def ask(number: float) -> Awaitable[Any]:
        return batcher.search(np.full((1, 1), number, np.float32), Options(10), time.monotonic() + 60)

    try:
        yield ask
    finally:
        batcher.close()


async def asking(ask: Callable[[float], Awaitable[Any]], number: int, rounds: int) -> None:
    """A client that asks again as soon as it is answered."""
    for turn in range(rounds):
        assert await ask(number + turn) == 2 * (number + turn)


def test_clients_that_ask_again_are_searched_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching, "PATIENCE", 1e3)  # a busy machine may take longer than a search to let them ask
    sizes: list[int] = []
    with searching(sizes) as ask:

        async def clients() -> None:
            await asyncio.gather(*(asking(ask, 100 * number, 10) for number in range(8)))

        asyncio.run(clients())
    assert sum(sizes) == 80
    # The first to come is searched at once, and so is a round behind the others at first, and before them at the end.
    assert sizes.count(8) >= 8, sizes


def test_a_lone_client_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "PAUSE", 60.0)
    monkeypatch.setattr(batching, "PATIENCE", 1e6)
    sizes: list[int] = []
    with searching(sizes) as ask:
        asyncio.run(asyncio.wait_for(asking(ask, 0, 10), 20))
    assert sizes == [1] * 10


def test_those_that_stay_away_are_not_waited_for():
    sizes: list[int] = []
    with searching(sizes) as ask:

        async def clients() -> None:
            await asyncio.gather(*(asking(ask, 100 * number, 2) for number in range(8)))
            begun = time.perf_counter()
            await asking(ask, 0, 5)
            assert time.perf_counter() - begun < 2 + 5 * SEARCH

        asyncio.run(clients())
    assert sizes[-5:] == [1] * 5


def test_clients_that_go_away_leave_nothing_behind():
    sizes: list[int] = []
    with searching(sizes) as ask:

        async def clients() -> None:
            leaving = [asyncio.ensure_future(ask(number)) for number in range(8)]
            await asyncio.sleep(SEARCH / 4)
            for one in leaving:
                one.cancel()
            await asking(ask, 5, 3)

        asyncio.run(clients())
    assert sizes[-3:] == [1] * 3 and sum(sizes) <= 8 + 3


def test_a_loop_that_was_closed_does_not_end_the_thread():
    sizes: list[int] = []
    with searching(sizes) as ask:
        loop = asyncio.new_event_loop()
        left = loop.create_task(asking(ask, 1, 1))
        loop.run_until_complete(asyncio.sleep(SEARCH / 4))  # it is asked, and not answered yet
        left.cancel()
        loop.run_until_complete(asyncio.gather(left, return_exceptions=True))
        loop.close()
        asyncio.run(asyncio.wait_for(asking(ask, 5, 3), 20))
    assert sizes[-3:] == [1] * 3


def test_whatever_fails_is_an_error_for_those_who_asked_and_no_others():
    def cut(answer: np.ndarray, first: int, end: int) -> np.ndarray:
        if not answer[first].any():
            raise LookupError("no zeros")
        return answer[first:end]

    batcher = Batcher(lambda vectors, options: vectors, cut, lambda one, other: None, Metrics(), most_waiting=4)
    batcher.start()

    async def clients() -> None:
        for number, fails in ((0, True), (1, False)):
            asked = batcher.search(np.full((1, 1), number, np.float32), Options(10), time.monotonic() + 60)
            found = await asyncio.wait_for(asyncio.gather(asked, return_exceptions=True), 20)
            assert isinstance(found[0], LookupError) == fails

    asyncio.run(clients())
    batcher.close()
