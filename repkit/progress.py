"""Progress of long work, on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_A_LINE = 10


class Progress:
    """Reports work in a `with` block; call it with (done, total), and where there are any, failures and words.

    The clock starts at the first call, which is to come before the work: with 0, or with what an earlier run has done,
    which does not count for the rate.
    """

    def __init__(self, what: str, unit: str = "images") -> None:
        self.what, self.unit = what, unit
        self.told = monotonic()
        self.first: tuple[int, float] | None = None
        console = Console(stderr=True)
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self.bar = Bar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(what, total=None, rate="")

    def __enter__(self) -> "Progress":
        return self

    def __call__(self, done: int, total: int, failed: int = 0, words: str = "") -> None:
        now = monotonic()
        if self.first is None:
            self.first = done, now
            self.bar.start()  # not before: work of another kind may come first, with a bar of its own
        before, start = self.first
        speed = f"{_digits((done - before) / (now - start))} {self.unit}/s" if done > before else ""
        rate = ", ".join(filter(None, (speed, f"{failed} failed" if failed else "", words)))
        self.bar.update(self.task, completed=done, total=total, rate=rate)
        if self.bar.disable and (now - self.told > _SECONDS_A_LINE or done == total):
            self.told = now
            print(f"{self.what}: {done}/{total}" + (f", {rate}" if rate else ""), file=sys.stderr, flush=True)
        if done == total:
            self._stop()

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar.live.is_started:  # else rich would print an empty line
            self.bar.stop()


def _digits(rate: float) -> str:
    """A rate as people read it: slow work is not 0.0."""
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
