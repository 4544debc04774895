"""The SQLite file that holds the truth about a live index: how it is made, opened, written and told of errors."""

import errno
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repkit.publishing import sync

FORMAT, VERSION = "repkit-live", 1
DATABASE, WAL_FILES = "live.db", ("live.db-wal", "live.db-shm")

# A row of items is one version of an item: a change of metadata is a new row, and the row before it gets `died`. Keys
# are never used again. The crc are seeded with the key, so that a row that took another's place does not fit either.
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, metadata TEXT NOT NULL, text_crc INTEGER NOT NULL,
    born INTEGER NOT NULL, died INTEGER, image INTEGER, vector_crc INTEGER NOT NULL, vector BLOB NOT NULL
);
CREATE TABLE images (key INTEGER PRIMARY KEY AUTOINCREMENT, crc INTEGER NOT NULL, content BLOB NOT NULL);
CREATE TABLE columns (name TEXT PRIMARY KEY, type TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE segments (
    name TEXT PRIMARY KEY, low INTEGER NOT NULL, high INTEGER NOT NULL, built INTEGER NOT NULL, rows INTEGER NOT NULL,
    kind TEXT NOT NULL, sha256 TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE requests (key TEXT PRIMARY KEY, digest TEXT NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
"""
# Made once the rows are there, which is far quicker than row by row.
_INDEXES = """
CREATE UNIQUE INDEX living ON items (id) WHERE died IS NULL;
CREATE INDEX dead ON items (died, key) WHERE died IS NOT NULL;
CREATE INDEX pictured ON items (image) WHERE image > 0;
CREATE INDEX asked ON requests (version);
"""
_FULL, _IO, _CORRUPT, _NOT_A_DATABASE, _READ_ONLY, _CANNOT_OPEN = 13, 10, 11, 26, 8, 14
_ERRNO = {_FULL: errno.ENOSPC, _IO: errno.EIO, _READ_ONLY: errno.EROFS, _CANNOT_OPEN: errno.EACCES}


def text_crc(key: int, name: str, metadata: str, born: int) -> int:
    """The checksum of what an item's row says."""
    return zlib.crc32(f"{key}\0{name}\0{metadata}\0{born}".encode())


def blob_crc(key: int, content: bytes | memoryview) -> int:
    """The checksum of a vector or a picture that belongs to this key."""
    return zlib.crc32(content, key & 0xFFFFFFFF)


def damaged(path: Path, reason: str) -> OSError:
    """The error for a live index that does not hold what was written."""
    return OSError(errno.EBADMSG, f"the live index is damaged ({reason}); restore a snapshot of it", str(path))


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Let SQLite's errors be OSErrors that name the file."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (_CORRUPT, _NOT_A_DATABASE) or "decode" in str(error):  # the latter is Python's, of text
            raise damaged(path, str(error)) from error
        number = _ERRNO.get(code, errno.EIO)
        reason = os.strerror(number) if code in _ERRNO else str(error)
        raise OSError(number, reason, str(path)) from error


def connect(path: Path, *, write: bool = False, new: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode; what a writing one commits is on the disk when `COMMIT` returns."""
    with sqlite_errors(path):
        mode = "rwc" if new else "rw"  # a reader, too, may have to recover the write-ahead log
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=30,
        )
        for setting in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = FULL", "temp_store = MEMORY"):
            database.execute(f"PRAGMA {setting}")
        if not write:
            database.execute("PRAGMA query_only = ON")
    return database


def create(path: Path) -> sqlite3.Connection:
    """A new, empty database, which is on the disk only once `finish` has put it there."""
    path.unlink(missing_ok=True)
    database = connect(path, write=True, new=True)
    with sqlite_errors(path):
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.executescript(_SCHEMA)
    return database


def finish(database: sqlite3.Connection, path: Path, meta: Mapping[str, Any]) -> None:
    """Index the rows of a created database, say what it is, and see it onto the disk; the connection is closed."""
    described = {"format": FORMAT, "version": VERSION, **meta}
    with sqlite_errors(path):
        database.executescript(_INDEXES)
        database.executemany(
            "INSERT INTO meta VALUES (?, ?)", [(name, json.dumps(value)) for name, value in described.items()]
        )
        database.close()
    sync(path)


def open_database(path: Path) -> sqlite3.Connection:
    """The writing connection of a live index, once its structure is checked.

    Raises ValueError for another format version, OSError for what is damaged or cannot be written.
    """
    if path.stat().st_size == 0:  # SQLite would take it for a new database
        raise damaged(path, "the file is empty")
    database = connect(path, write=True)
    try:
        with sqlite_errors(path):
            _check_format(database, path)
            if (found := database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise damaged(path, found)
            for setting in ("journal_mode = WAL", "synchronous = FULL", f"journal_size_limit = {64 << 20}"):
                database.execute(f"PRAGMA {setting}")
    except BaseException:
        database.close()
        raise
    return database


def _check_format(database: sqlite3.Connection, path: Path) -> None:
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if "meta" not in tables:
        raise damaged(path, "it is no live index")
    meta = read_meta(database)
    if meta.get("format") != FORMAT:
        raise damaged(path, "it is no live index")
    if meta.get("version") != VERSION:
        raise ValueError(f"{path} has format version {meta.get('version')}; this repkit reads {VERSION}")


def read_meta(database: sqlite3.Connection) -> dict[str, Any]:
    """What the database says of itself."""
    return {name: json.loads(value) for name, value in database.execute("SELECT name, value FROM meta")}


@contextmanager
def transaction(database: sqlite3.Connection, path: Path) -> Iterator[None]:
    """All of the changes in the block, on the disk, or none of them; OSError where writing fails."""
    with sqlite_errors(path):
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            _roll_back(database)
            raise


def _roll_back(database: sqlite3.Connection) -> None:
    if database.in_transaction:  # SQLite has done so itself after some errors
        database.execute("ROLLBACK")


def set_meta(database: sqlite3.Connection, name: str, value: Any) -> None:
    """Change what the database says of itself; within a transaction."""
    database.execute("UPDATE meta SET value = ? WHERE name = ?", (json.dumps(value), name))


def read_columns(database: sqlite3.Connection) -> dict[str, str]:
    """The columns of the metadata and the types of their values."""
    return dict(database.execute("SELECT name, type FROM columns ORDER BY name"))
