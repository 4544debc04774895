"""The changes of a live index, as they are applied inside a transaction of its database."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Float32

from repkit.ann import unit
from repkit.service.items import (
    Item,
    Metadata,
    Value,
    check_distinct,
    check_id,
    check_metadata,
    check_vectors,
    encode_metadata,
    widened,
)
from repkit.service.journal import blob_crc, text_crc
from repkit.service.rows import Rows

_REMEMBERED = 10_000  # changes for which an idempotency key is known
_IMAGE_BYTES = 64 << 20
_VARIABLES = 500  # in one statement


@dataclass(frozen=True, eq=False)
class Upsert:
    """Items that come new, or wholly replace those of the same ids."""

    ids: list[str]
    metadata: list[Metadata]
    texts: list[str]  # the metadata as they are stored
    vectors: Float32[np.ndarray, "n d"]
    images: list[bytes | None]
    request: str | None = None  # the idempotency key

    def digest(self) -> str:
        """What tells the content of two requests apart."""
        content = hashlib.sha256(json.dumps([self.ids, self.texts]).encode())
        content.update(self.vectors.tobytes())
        for picture in self.images:
            content.update(b"-" if picture is None else hashlib.sha256(picture).digest())
        return content.hexdigest()


def upsert_of(items: Sequence[Item], dimension: int, metric: str, request: str | None) -> Upsert:
    """The change that items ask for; ValueError for an id, a vector or metadata that cannot be kept."""
    ids = [check_id(item.id) for item in items]
    check_distinct(ids)
    given = [check_metadata(item.metadata) for item in items]
    metadata: list[Metadata] = [{name: value for name, value in one.items() if value is not None} for one in given]
    lengths = {np.shape(item.vector) for item in items} - {(dimension,)}
    if lengths:
        raise ValueError(f"a vector has shape {min(lengths)}; give {dimension} numbers, as the index has")
    stacked = np.stack([item.vector for item in items]) if items else np.empty((0, dimension), np.float32)
    vectors = check_vectors(stacked, dimension, "vectors")
    vectors = unit(vectors) if metric == "cosine" else vectors
    images = [_check_image(item) for item in items]
    return Upsert(ids, metadata, [encode_metadata(one) for one in metadata], vectors, images, request)


def _check_image(item: Item) -> bytes | None:
    if item.image is not None and len(item.image) > _IMAGE_BYTES:
        raise ValueError(f"the picture of {item.id!r} has {len(item.image)} bytes; at most {_IMAGE_BYTES} are kept")
    return item.image


@dataclass(frozen=True, eq=False)
class Update:
    """Columns to set in the metadata of an item; None takes a column away."""

    id: str
    metadata: Mapping[str, Value | None]


@dataclass(frozen=True, eq=False)
class Delete:
    """Ids to delete; those that there are not are passed over."""

    ids: list[str]


Change = Upsert | Update | Delete


@dataclass(frozen=True, eq=False)
class Applied:
    """What a change did: the keys that died, the rows that came, and the columns that there are now."""

    version: int
    died: list[int]
    rows: Rows | None
    columns: dict[str, str]


def apply(database: sqlite3.Connection, change: Change, version: int, columns: dict[str, str]) -> Applied:
    """Apply a change as the one after `version`; one that changes nothing leaves the version as it is.

    Raises KeyError for an unknown id of an Update, ValueError for a value that does not fit its column or an
    idempotency key that came with other content.
    """
    if isinstance(change, Upsert):
        return _upsert(database, change, version, columns)
    if isinstance(change, Update):
        return _update(database, change, version + 1, columns)
    return _delete(database, change, version, columns)


def _upsert(database: sqlite3.Connection, change: Upsert, version: int, columns: dict[str, str]) -> Applied:
    if not change.ids:
        return Applied(version, [], None, columns)
    if change.request is not None:
        digest = change.digest()
        if (known := _answered(database, change.request, digest)) is not None:
            return Applied(known, [], None, columns)
        values = change.request, digest, version + 1
        database.execute("INSERT INTO requests VALUES (?, ?, ?)", values)
        database.execute("DELETE FROM requests WHERE version <= ?", (version - _REMEMBERED,))
    for metadata in change.metadata:
        columns = widened(columns, metadata)
    died = list(_keys_of(database, change.ids).values())
    images = [None if picture is None else _insert_image(database, picture) for picture in change.images]
    return _written(database, version + 1, died, change, images, columns)


def _answered(database: sqlite3.Connection, request: str, digest: str) -> int | None:
    """The version that an earlier request of this key made."""
    found = database.execute("SELECT digest, version FROM requests WHERE key = ?", (request,)).fetchone()
    if found is None:
        return None
    if found[0] != digest:
        raise ValueError(f"idempotency key {request!r} came before with other items; use a key once")
    return found[1]


def _update(database: sqlite3.Connection, change: Update, version: int, columns: dict[str, str]) -> Applied:
    query = "SELECT key, metadata, image, vector FROM items WHERE id = ? AND died IS NULL"
    found = database.execute(query, (change.id,)).fetchone()
    if found is None:
        raise KeyError(change.id)
    key, text, picture, vector = found
    metadata = {name: value for name, value in {**json.loads(text), **change.metadata}.items() if value is not None}
    vectors = np.frombuffer(vector, "<f4")[None]
    item = Upsert([change.id], [metadata], [encode_metadata(metadata)], vectors, [None])
    return _written(database, version, [key], item, [picture], widened(columns, metadata))


def _delete(database: sqlite3.Connection, change: Delete, version: int, columns: dict[str, str]) -> Applied:
    died = list(_keys_of(database, change.ids).values())
    if not died:
        return Applied(version, [], None, columns)
    _mark_dead(database, died, version + 1)
    return Applied(version + 1, died, None, columns)


def _written(
    database: sqlite3.Connection,
    version: int,
    died: list[int],
    items: Upsert,
    images: Sequence[int | None],
    columns: dict[str, str],
) -> Applied:
    """Put the items in the place of the rows that die."""
    _mark_dead(database, died, version)
    first = next_key(database)
    keys = range(first, first + len(items.ids))
    insert_items(database, zip(keys, items.ids, items.texts, items.vectors, images, strict=True), version)
    database.executemany("INSERT OR REPLACE INTO columns VALUES (?, ?)", columns.items())
    rows = Rows(np.arange(keys.start, keys.stop, dtype=np.int64), items.ids, items.metadata, items.vectors)
    return Applied(version, died, rows, columns)


def next_key(database: sqlite3.Connection) -> int:
    """A key above all that were ever used."""
    found = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchone()
    return 1 if found is None else found[0] + 1


Inserted = tuple[int, str, str, Float32[np.ndarray, " d"], int | None]  # key, id, metadata, vector, image


def insert_items(database: sqlite3.Connection, items: Iterable[Inserted], born: int) -> None:
    """Add living rows."""

    def row(item: Inserted) -> tuple[int, str, str, int, int, int | None, int, memoryview]:
        key, name, text, vector, picture = item
        content = np.ascontiguousarray(vector, "<f4").data.cast("B")
        return key, name, text, text_crc(key, name, text, born), born, picture, blob_crc(key, content), content

    database.executemany(
        "INSERT INTO items (key, id, metadata, text_crc, born, image, vector_crc, vector)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        map(row, items),
    )


def _insert_image(database: sqlite3.Connection, content: bytes) -> int:
    found = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'images'").fetchone()
    key = 1 if found is None else found[0] + 1
    database.execute("INSERT INTO images VALUES (?, ?, ?)", (key, blob_crc(key, content), content))
    return key


def _mark_dead(database: sqlite3.Connection, keys: Sequence[int], version: int) -> None:
    database.executemany("UPDATE items SET died = ? WHERE key = ?", [(version, key) for key in keys])


def _keys_of(database: sqlite3.Connection, ids: Sequence[str]) -> dict[str, int]:
    """The keys of the living items among these."""
    found: dict[str, int] = {}
    rest = iter(ids)
    while some := list(islice(rest, _VARIABLES)):
        marks = ", ".join("?" * len(some))
        found.update(database.execute(f"SELECT id, key FROM items WHERE died IS NULL AND id IN ({marks})", some))
    return found
