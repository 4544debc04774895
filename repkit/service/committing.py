"""Changes of several threads in one transaction: what a change costs is the wait for the disk, which they share."""

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from repkit.service.changes import Applied, Change, Upsert, apply
from repkit.service.journal import set_meta, transaction

_GROUP = 256  # changes in one transaction


@dataclass(eq=False)
class Waiting:
    """A change, until it is known what came of it."""

    change: Change
    applied: Applied | None = None
    error: Exception | None = None

    @property
    def rows(self) -> int:
        """How many rows it can add at most."""
        return len(self.change.ids) if isinstance(self.change, Upsert) else 1


class Committer:
    """Call it with a change from any thread; `commit` is called with groups of them, by one thread at a time.

    `writing` is the lock under which it does so; nothing is to be committed without it.
    """

    def __init__(self, commit: Callable[[Sequence[Waiting]], None]) -> None:
        self.writing = threading.Lock()
        self._commit = commit
        self._waiting: deque[Waiting] = deque()

    def __call__(self, change: Change) -> Applied:
        """What the change did, once it is on the disk and published."""
        mine = Waiting(change)
        self._waiting.append(mine)
        with self.writing:  # who gets it commits for all who wait
            while mine.applied is None and mine.error is None:
                self._commit([self._waiting.popleft() for _ in range(min(len(self._waiting), _GROUP))])
        if mine.error is not None:
            raise mine.error
        assert mine.applied is not None
        return mine.applied


def commit(
    database: sqlite3.Connection, path: Path, group: Sequence[Waiting], version: int, columns: dict[str, str]
) -> tuple[int, dict[str, str]]:
    """Apply each change of the group wholly or not at all; the version and the columns afterwards.

    Raises OSError where writing fails, and then nothing is changed.
    """
    with transaction(database, path):
        for one in group:
            database.execute("SAVEPOINT change")
            try:
                one.applied = apply(database, one.change, version, columns)
            except (KeyError, ValueError) as error:
                one.error = error
                database.execute("ROLLBACK TO change")
            else:
                version, columns = max(version, one.applied.version), one.applied.columns
            database.execute("RELEASE change")
        set_meta(database, "sequence", version)
    return version, columns


def fail(group: Sequence[Waiting], error: BaseException) -> None:
    """Let every change of a group end with the error, each with an exception of its own."""
    for one in group:
        one.applied = None
        if isinstance(error, OSError):
            one.error = type(error)(error.errno, error.strerror, error.filename)
        else:
            one.error = type(error)(*error.args) if isinstance(error, Exception) else InterruptedError(str(error))
