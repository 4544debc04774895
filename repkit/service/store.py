"""The database of a live index and what of it is in memory, changed together under one lock."""

import errno
import logging
import os
import queue
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from repkit.service.acknowledged import NAME, write_acknowledged
from repkit.service.committing import Committer, Waiting, commit, fail
from repkit.service.compaction import build_segment, key_range
from repkit.service.delta import Delta, Fresh
from repkit.service.journal import DATABASE, connect, transaction
from repkit.service.opening import Opened
from repkit.service.purging import dead_ranges, remove_dead
from repkit.service.rows import Rows
from repkit.service.segments import FOLDER, Segment, read_records, replace_records
from repkit.service.views import Part, Snapshot

_log = logging.getLogger("repkit")


class Store:
    """Call `change` with a change; `snapshot` is the state that the last one left.

    degraded: why the last write failed, until one succeeds.
    """

    def __init__(self, opened: Opened) -> None:
        self.live, self.path = opened.live, opened.live / DATABASE
        self.snapshot: Snapshot = opened.snapshot
        self.degraded: str | None = None
        self.closed = False
        self._stale = False  # once what is in memory is older than what is on the disk, for good
        self.change = Committer(self._commit)
        self._lock, self._database, self._delta = opened.lock, opened.database, opened.delta
        self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._acknowledged = os.open(self.live / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        write_acknowledged(self._acknowledged, self.snapshot.version)

    def _commit(self, group: Sequence[Waiting]) -> None:
        try:
            self._check_open()
            self._delta.reserve(sum(one.rows for one in group))  # so that nothing can fail once it is on the disk
            before = self.snapshot
            version, columns = commit(self._database, self.path, group, before.version, dict(before.columns))
        except BaseException as error:
            if isinstance(error, OSError):
                if self.degraded is None:
                    _log.warning("a change could not be stored (%s)", error)
                self.degraded = str(error)
            fail(group, error)
            if isinstance(error, Exception):
                return  # who waits is told
            raise
        self.degraded = None
        try:
            self._publish([one for one in group if one.applied is not None], version, columns)
        except BaseException:
            self._stale = True
            raise

    def _publish(self, group: Sequence[Waiting], version: int, columns: dict[str, str]) -> None:
        dead: list[int] = []
        for one in group:
            assert one.applied is not None
            dead += one.applied.died
            if one.applied.rows is not None:
                self._delta.append(one.applied.rows)
        write_acknowledged(self._acknowledged, version)
        self.snapshot = self.snapshot.changed(Fresh.of(self._delta), dead, version, columns)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with."""
        self._check_open()
        try:
            database = self._readers.get_nowait()
        except queue.Empty:
            database = connect(self.path)
        try:
            yield database
        finally:
            self._readers.put(database)
            if self.closed:
                self._close_readers()

    def rewrite(self, chosen: slice) -> None:
        """Make one segment of neighbouring parts; only one thread may do so at a time.

        Raises OSError where writing fails or items are damaged; the state is what it was then.
        """
        parts = self.snapshot.parts[chosen]
        low, high = key_range(parts)
        with self.reading() as database:
            built, segment = build_segment(database, self.path, low, high)
        old = [part.source.record for part in parts if isinstance(part.source, Segment)]
        with self.change.writing:
            with self._writing_transaction() as database:
                replace_records(database, old, None if segment is None else segment.record)
                query = "SELECT key FROM items WHERE died > ? AND key BETWEEN ? AND ?"
                dead = [key for (key,) in database.execute(query, (built, low, high))]
                new = [] if segment is None else [Part.of(segment, dead)]
                snapshot, delta = self._exchanged(chosen, new, high)
            self.snapshot, self._delta = snapshot, delta
        self.degraded = None
        for record in old:  # in memory they stay for those who still search them
            shutil.rmtree(self.live / FOLDER / record.name, ignore_errors=True)

    def purge(self) -> None:
        """Remove the rows that died and are in no segment, and pictures that nothing has any more."""
        with self.reading() as database:
            records, version = read_records(database), self.snapshot.version
        for low, high, built in dead_ranges(records, version):
            removed = True
            while removed:  # a few at a time, so that no writer waits for long
                with self.change.writing, self._writing_transaction() as database:
                    removed = remove_dead(database, low, high, built)

    @contextmanager
    def _writing_transaction(self) -> Iterator[sqlite3.Connection]:
        """For who has the lock."""
        self._check_open()
        with transaction(self._database, self.path):
            yield self._database

    def _exchanged(self, chosen: slice, new: Sequence[Part], high: int) -> tuple[Snapshot, Delta]:
        """The state with a new part, if any, in the place of the chosen ones, and the delta of that state."""
        before = self.snapshot.parts
        parts, delta = [*before[: chosen.start], *new, *before[chosen.stop :]], self._delta
        if chosen.stop == len(before):
            last = _after(before[-1], high)
            parts.append(last)
            assert isinstance(last.source, Fresh)
            delta = last.source.delta
        return self.snapshot.with_parts(parts), delta

    def close(self) -> None:
        """Give the index free; what was acknowledged is on the disk already."""
        with self.change.writing:
            if self.closed:
                return
            self.closed = True
            self._close_readers()
            with suppress(sqlite3.Error):
                self._database.close()
            os.close(self._acknowledged)
            os.close(self._lock)

    def _check_open(self) -> None:
        if self.closed or self._stale:
            raise OSError(errno.EBADF, "the index is closed; open it again", str(self.live.parent))

    def _close_readers(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._readers.get_nowait().close()


def _after(part: Part, high: int) -> Part:
    """The part of the delta with keys above `high`, in a delta of its own; views of the old one stay good."""
    source = part.source
    assert isinstance(source, Fresh)
    start, rest = int((source.keys <= high).sum()), Delta(source.vectors.shape[1])
    ids, metadata = source.delta.ids[start : len(source)], source.delta.metadata[start : len(source)]
    rest.append(Rows(source.keys[start:], ids, metadata, source.vectors[start:]))
    return Part(Fresh.of(rest), part.alive[start:], int(part.alive[start:].sum()))
