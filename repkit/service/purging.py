"""Removal of rows that died and that no segment holds any more."""

import sqlite3
from collections.abc import Iterator, Sequence

from repkit.service.segments import Record

_ROWS = 1000


def dead_ranges(records: Sequence[Record], version: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of keys, and the version up to which the dead among them are in no segment; none of the delta's.

    Those of a segment's keys that died after it was built are in it, and their rows are what tells that they are dead.
    """
    before = 0
    for record in records:
        yield before + 1, record.low - 1, version
        yield record.low, record.high, record.built
        before = record.high


def remove_dead(database: sqlite3.Connection, low: int, high: int, built: int) -> bool:
    """Remove some rows with keys from `low` to `high` that died up to `built`, and their pictures; False for none."""
    query = "SELECT key, image FROM items WHERE died IS NOT NULL AND died <= ? AND key BETWEEN ? AND ? LIMIT ?"
    found = database.execute(query, (built, low, high, _ROWS)).fetchall()
    database.executemany("DELETE FROM items WHERE key = ?", [(key,) for key, _ in found])
    pictures = {(picture,) for _, picture in found if picture}
    shown = "SELECT 1 FROM items WHERE image = images.key AND image > 0"  # the last part lets SQLite use its index
    database.executemany(f"DELETE FROM images WHERE key = ? AND NOT EXISTS ({shown})", pictures)
    return len(found) == _ROWS
