"""Opening of a live index: from what is on the disk, each piece checked, to a state that can be searched."""

import errno
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repkit.indexfiles import LIVE, MANIFEST, read_index
from repkit.publishing import sync
from repkit.service import rows
from repkit.service.acknowledged import NAME, read_acknowledged
from repkit.service.compaction import build_segment
from repkit.service.delta import Delta, Fresh
from repkit.service.importing import Progress, base_of, import_index
from repkit.service.journal import (
    DATABASE,
    damaged,
    open_database,
    read_columns,
    read_meta,
    sqlite_errors,
    transaction,
)
from repkit.service.ownership import own
from repkit.service.restoring import LOCK, finish_restore
from repkit.service.segments import Record, Segment, load_segment, read_records, remove_strays, replace_records
from repkit.service.snapshots import remove_parts
from repkit.service.views import Part, Snapshot

_log = logging.getLogger("repkit")


@dataclass(frozen=True, eq=False)
class Opened:
    """A live index as it was opened; `lock` is a descriptor that holds it."""

    live: Path
    lock: int
    database: sqlite3.Connection
    described: Mapping[str, Any]
    snapshot: Snapshot
    delta: Delta


def open_live(root: Path, progress: Progress | None) -> Opened:
    """Open the live index in a folder, which is made of the built one where there is none yet."""
    live = root / LIVE
    if not root.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such index", str(root))
    if not live.exists() and not (root / MANIFEST).exists():
        read_index(root)  # says what is wrong with the folder
    live.mkdir(exist_ok=True)
    sync(root)
    lock = own(live / LOCK)
    try:
        finish_restore(live)
        if not (live / DATABASE).exists():
            _check_never_opened(live)
            import_index(root, live, progress)
        return _loaded(root, live, lock)
    except BaseException:
        os.close(lock)
        raise


def _check_never_opened(live: Path) -> None:
    """An index that acknowledged changes and has lost its database must not start over as it was built."""
    if (live / NAME).exists():
        raise damaged(live / DATABASE, "the file is missing")


def _loaded(root: Path, live: Path, lock: int) -> Opened:
    path = live / DATABASE
    database = open_database(path)
    try:
        with sqlite_errors(path):
            meta, columns, records = read_meta(database), read_columns(database), read_records(database)
            _check_is_ours(root, path, meta)
            segments = [_load_or_rebuild(database, live, record) for record in records]
            delta = _read_delta(database, path, records, meta["dimension"])
            sources = [segment for segment in segments if segment is not None]
            parts = _parts(database, [*sources, Fresh.of(delta)])
            snapshot = Snapshot(parts, meta["sequence"], columns, meta["metric"], meta["dimension"])
            if len(snapshot) != (
                found := database.execute("SELECT count(*) FROM items WHERE died IS NULL").fetchone()[0]
            ):
                raise damaged(path, f"it has {found} items and its segments {len(snapshot)}")
            remove_strays(live, read_records(database))
            remove_parts(live)
    except BaseException:
        database.close()
        raise
    return Opened(live, lock, database, meta["described"], snapshot, delta)


def _check_is_ours(root: Path, path: Path, meta: Mapping[str, Any]) -> None:
    base = base_of(root)
    if base is not None and meta["base"] is not None and base != meta["base"]:
        raise ValueError(f"{path} holds the changes of another index than that in {root}; put each back in its place")
    if meta["sequence"] < (version := read_acknowledged(path.parent / NAME)):
        reason = f"change {version} was acknowledged and the last one there is {meta['sequence']}"
        raise damaged(path, f"{reason}; or remove {NAME} beside it to go on without them")


def _load_or_rebuild(database: sqlite3.Connection, live: Path, record: Record) -> Segment | None:
    """The segment of a record; one whose files are damaged is built again from the database, which has it all."""
    try:
        return load_segment(live, record)
    except (OSError, ValueError) as error:
        _log.warning("segment %s is damaged (%s); it is built again from the database", record.name, error)
    path = live / DATABASE
    segment = build_segment(database, path, record.low, record.high)[1]
    with transaction(database, path):
        replace_records(database, [record], None if segment is None else segment.record)
    return segment


def _read_delta(database: sqlite3.Connection, path: Path, records: Sequence[Record], dimension: int) -> Delta:
    """What is not in a segment yet."""
    delta, low = Delta(dimension), max((record.high for record in records), default=0) + 1
    for some in rows.living(database, path, low, rows.HIGHEST, dimension):
        delta.append(some)
    return delta


def _parts(database: sqlite3.Connection, sources: Sequence[Segment | Fresh]) -> tuple[Part, ...]:
    dead = [key for (key,) in database.execute("SELECT key FROM items WHERE died IS NOT NULL")]
    return tuple(Part.of(source, dead) for source in sources)
