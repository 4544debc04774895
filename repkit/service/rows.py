"""Items read back from the database, each compared with its checksums."""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from repkit.service.items import Listed, Metadata, Stored
from repkit.service.journal import blob_crc, damaged, sqlite_errors, text_crc

BLOCK = 8192
ORIGINAL = 0  # the `image` of items of the built index; if they have a picture, it is the file they were made from
HIGHEST = 2**63 - 1
_COLUMNS = "key, id, metadata, text_crc, born, vector_crc, vector"
_Row = tuple[int, str, str, int, int, int, bytes]


@dataclass(frozen=True, eq=False)
class Rows:
    """Items in the order of their keys, which is the order in which they came."""

    keys: Int64[np.ndarray, " n"]
    ids: list[str]
    metadata: list[Metadata]
    vectors: Float32[np.ndarray, "n d"]

    def __len__(self) -> int:
        return len(self.ids)


def living(database: sqlite3.Connection, path: Path, low: int, high: int, dimension: int) -> Iterator[Rows]:
    """The living items with keys from `low` to `high`, in blocks; OSError for one that is damaged."""
    with sqlite_errors(path):
        found = database.execute(
            f"SELECT {_COLUMNS} FROM items WHERE key BETWEEN ? AND ? AND died IS NULL ORDER BY key", (low, high)
        )
        while block := found.fetchmany(BLOCK):
            yield _checked(block, dimension, path)


def count_living(database: sqlite3.Connection, low: int = 0, high: int = HIGHEST) -> int:
    """How many living items have keys from `low` to `high`, or how many there are."""
    query = "SELECT count(*) FROM items WHERE key BETWEEN ? AND ? AND died IS NULL"
    return database.execute(query, (low, high)).fetchone()[0]


def stored(database: sqlite3.Connection, path: Path, name: str, dimension: int) -> Stored | None:
    """The living item of that id."""
    with sqlite_errors(path):
        row = database.execute(f"SELECT {_COLUMNS} FROM items WHERE id = ? AND died IS NULL", (name,)).fetchone()
    if row is None:
        return None
    rows = _checked([row], dimension, path)
    return Stored(name, rows.metadata[0], rows.vectors[0], row[4])


def image(database: sqlite3.Connection, path: Path, name: str) -> bytes | None:
    """The picture that was stored with the living item of that id, if there is one."""
    query = "SELECT i.key, i.crc, i.content FROM items JOIN images i ON i.key = image WHERE id = ? AND died IS NULL"
    with sqlite_errors(path):
        row = database.execute(query, (name,)).fetchone()
    if row is None:
        return None
    key, crc, content = row
    if blob_crc(key, content) != crc:
        raise damaged(path, f"the picture of {name!r} does not fit its checksum")
    return content


def is_original(database: sqlite3.Connection, path: Path, name: str) -> bool:
    """Whether the living item of that id came with the built index; other metadata make no other item of it."""
    with sqlite_errors(path):
        found = database.execute("SELECT image FROM items WHERE id = ? AND died IS NULL", (name,)).fetchone()
    return found == (ORIGINAL,)


def listed(database: sqlite3.Connection, path: Path, after: str | None, limit: int) -> list[Listed]:
    """Up to `limit` living items in the order of their ids, from the one after `after` on."""
    query = "SELECT key, id, metadata, text_crc, born FROM items WHERE died IS NULL AND id > ? ORDER BY id LIMIT ?"
    with sqlite_errors(path):
        found = database.execute(query, (after or "", limit)).fetchall()
    return [Listed(row[1], _metadata(row, path)) for row in found]


def _checked(block: list[_Row], dimension: int, path: Path) -> Rows:
    metadata = [_metadata(row[:5], path) for row in block]
    for key, name, *_, crc, vector in block:
        if not isinstance(vector, bytes) or len(vector) != 4 * dimension or blob_crc(key, vector) != crc:
            raise damaged(path, f"the vector of {name!r} does not fit its checksum")
    vectors = np.frombuffer(b"".join(row[-1] for row in block), "<f4").reshape(len(block), dimension)
    return Rows(np.array([row[0] for row in block], np.int64), [row[1] for row in block], metadata, vectors)


def _metadata(row: tuple[int, str, str, int, int], path: Path) -> Metadata:
    key, name, metadata, crc, born = row
    if text_crc(key, name, metadata, born) != crc:
        raise damaged(path, f"what is said of {name!r} does not fit its checksum")
    return json.loads(metadata)
