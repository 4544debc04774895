"""Workers: threads for calls that wait for a disk, with a bound on how many calls wait for a thread."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from repkit.service.answers import refusal

P = ParamSpec("P")
Result = TypeVar("Result")


class Workers:
    """A number of threads, and how many calls may be under way or wait; one more is refused with 429."""

    def __init__(self, name: str, threads: int, most: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"repkit-{name}")
        self._name, self._most, self.running = name, most, 0

    async def run(self, call: Callable[P, Result], *args: P.args, **options: P.kwargs) -> Result:
        """The call's result; a caller that goes away does not end the call."""
        if self.running >= self._most:
            raise refusal(429, f"{self.running} {self._name} are under way already; try again")
        self.running += 1
        future = self._threads.submit(call, *args, **options)
        future.add_done_callback(lambda _: self._done())
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        self.running -= 1

    def close(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown()
