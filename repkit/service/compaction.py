"""Compaction: what is worth rewriting as one segment, and the building of it beside the readers and writers."""

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from repkit.ann import Built, build_vectors
from repkit.ann.sizes import parameters_for, size
from repkit.indexfiles import read_raw
from repkit.service.items import table_of
from repkit.service.journal import read_columns, read_meta, sqlite_errors
from repkit.service.rows import count_living, living
from repkit.service.segments import FOLDER, Record, Segment, new_name, write_segment
from repkit.service.views import Part

_MOST_SEGMENTS = 8
_MOST_DEAD = 0.2
_FLAT_BELOW = 20_000  # rows that are compared with soon enough without an approximate index
_RECALL, _MOST_RECALL = 0.95, 0.99  # where the built index has none that was measured; and what is always in reach


def due(parts: Sequence[Part], flush_rows: int) -> slice | None:
    """The neighbouring parts that should become one segment: a full delta, many dead, or too many segments.

    Of too many segments the newest are merged, as far back as the next is not twice as large as all of them, so
    that each row is rewritten a few times only.
    """
    *segments, delta = parts
    if len(delta.source) >= flush_rows:
        return slice(len(segments), len(parts))
    for place, part in enumerate(segments):
        if part.living < (1 - _MOST_DEAD) * len(part.source):
            return slice(place, place + 1)
    return _newest(segments) if len(segments) > _MOST_SEGMENTS else None


def _newest(segments: Sequence[Part]) -> slice:
    start = len(segments) - 2
    while start > 0 and segments[start - 1].living < 2 * sum(part.living for part in segments[start:]):
        start -= 1
    return slice(start, len(segments))


def whole(parts: Sequence[Part]) -> slice | None:
    """All parts, unless they are one segment without dead rows already."""
    *segments, delta = parts
    if not len(delta.source) and len(segments) <= 1 and all(part.living == len(part.source) for part in segments):
        return None
    return slice(0, len(parts))


def key_range(parts: Sequence[Part]) -> tuple[int, int]:
    """The lowest and the highest key of neighbouring parts, of which there are some that hold any."""
    full = [part.source for part in parts if len(part.source)]
    first, last = full[0], full[-1]
    low = first.record.low if isinstance(first, Segment) else int(first.keys[0])
    return low, last.record.high if isinstance(last, Segment) else int(last.keys[-1])


def build_segment(database: sqlite3.Connection, path: Path, low: int, high: int) -> tuple[int, Segment | None]:
    """A segment, on the disk, of the items with these keys that live, and the version at which they were read.

    None where none lives. Raises OSError for damaged items, and where writing fails.
    """
    with sqlite_errors(path):
        database.execute("BEGIN")  # one state of the items, however long it takes to read them
        try:
            meta = read_meta(database)
            keys, vectors, items = _read(database, path, low, high, meta["dimension"])
        finally:
            database.execute("ROLLBACK")
    built = meta["sequence"]
    if not len(keys):
        return built, None
    kind = meta["described"]["kind"] if len(keys) >= _FLAT_BELOW else "flat"
    made, name = _index(vectors, kind, meta), new_name()
    hashes = write_segment(path.parent, name, made.vectors, keys, items, vectors if kind == "ivf-pq" else None)
    record = Record(name, low, high, built, len(keys), kind, hashes)
    return built, Segment(record, made.vectors, keys, items, read_raw(path.parent / FOLDER / name, kind))


def _index(vectors: Float32[np.ndarray, "n d"], kind: str, meta: Mapping[str, Any]) -> Built:
    """Of the recall that the built index has, and where that compresses vectors, into as many bytes."""
    described, memory = meta["described"], None
    if kind == "ivf-pq":
        count, dimension = vectors.shape
        parts = {"m": described["parameters"]["m"]}
        memory = size(kind, count, dimension, parameters_for("ivf", count, dimension) | parts)
    recall = min(described["recall"] or _RECALL, _MOST_RECALL)
    return build_vectors(vectors, kind, meta["metric"], recall=recall, memory=memory)


def _read(
    database: sqlite3.Connection, path: Path, low: int, high: int, dimension: int
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"], pa.Table]:
    count, columns = count_living(database, low, high), read_columns(database)
    keys, vectors = np.empty(count, np.int64), np.empty((count, dimension), np.float32)
    tables, start = [table_of([], [], columns)], 0
    for rows in living(database, path, low, high, dimension):
        part = slice(start, start + len(rows))
        keys[part], vectors[part], start = rows.keys, rows.vectors, part.stop
        tables.append(table_of(rows.ids, rows.metadata, columns))
    return keys, vectors, pa.concat_tables(tables).combine_chunks()
