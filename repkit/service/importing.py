"""The first opening of a built index as a live one: its items go into a database, its FAISS index becomes a segment."""

import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Int64

from repkit import where
from repkit.ann import reconstruct
from repkit.indexfiles import MANIFEST, read_index, read_raw
from repkit.publishing import PART, sync
from repkit.service.changes import Inserted, insert_items
from repkit.service.items import TYPES, check_distinct, check_id, check_metadata, encode_metadata
from repkit.service.journal import DATABASE, create, finish, sqlite_errors
from repkit.service.rows import BLOCK, ORIGINAL
from repkit.service.segments import FOLDER, Record, new_name, replace_records, write_segment

Progress = Callable[[int, int], object]
Take = Callable[[Int64[np.ndarray, " b"]], Float32[np.ndarray, "b d"]]
PATH = "path"  # of the file that an item was made from: no client is to know how this machine's folders are called
_NAMES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
_log = logging.getLogger("repkit")


def import_index(root: Path, live: Path, progress: Progress | None = None) -> None:
    """Make the live index of a built one; one that is interrupted starts over.

    Raises ValueError where the built index is damaged, or has ids or columns that a live one does not take.
    """
    vectors, items, described = read_index(root)
    raw = read_raw(root, described["kind"])
    columns = column_types(items)
    check_metadata(dict.fromkeys(columns))
    table = plain_table(items, columns)
    meta = {"described": described, "metric": described["metric"], "dimension": vectors.d}
    part = live / (DATABASE + PART)
    shutil.rmtree(live / FOLDER, ignore_errors=True)  # of an earlier try
    try:
        database = create(part)
        try:
            with sqlite_errors(part):
                take = raw.__getitem__ if raw is not None else partial(reconstruct, vectors)
                _insert(database, take, table, progress)
                database.executemany("INSERT INTO columns VALUES (?, ?)", columns.items())
                replace_records(database, [], _write_first(live, vectors, table, raw, described["kind"]))
            finish(database, part, meta | {"sequence": 0, "base": base_of(root)})
        finally:
            database.close()
        os.replace(part, live / DATABASE)
        sync(live)
    except BaseException:
        part.unlink(missing_ok=True)
        shutil.rmtree(live / FOLDER, ignore_errors=True)
        raise


def _write_first(live: Path, vectors: Any, table: pa.Table, raw: Any, kind: str) -> Record:
    """The segment that is the built index."""
    name, count = new_name(), len(table)
    hashes = write_segment(live, name, vectors, np.arange(1, count + 1), table, raw)
    return Record(name, 1, count, 0, count, kind, hashes)


def base_of(root: Path) -> dict[str, str] | None:
    """The checksums of the built index in the folder, by which a live one knows its own; None where there is none."""
    try:
        return json.loads((root / MANIFEST).read_bytes())["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{root / MANIFEST} is damaged ({error}); put the file that the index was built with back"
        ) from error


def _insert(database: sqlite3.Connection, take: Take, table: pa.Table, progress: Progress | None) -> None:
    check_distinct(table["id"].to_pylist())
    database.execute("BEGIN")
    for start in range(0, len(table), BLOCK):
        if progress is not None:
            progress(start, len(table))
        insert_items(database, _block(take, table, start), born=0)
    database.execute("COMMIT")
    if progress is not None:
        progress(len(table), len(table))


def _block(take: Take, table: pa.Table, start: int) -> Iterator[Inserted]:
    rows = np.arange(start, min(start + BLOCK, len(table)))
    found = take(rows)
    for row, one in enumerate(table.slice(start, len(rows)).to_pylist()):
        yield start + row + 1, check_id(one.pop("id")), encode_metadata(one), found[row], ORIGINAL


def column_types(items: pa.Table) -> dict[str, str]:
    """The columns that hold anything but paths, and the type in which each is kept; other types are left out."""
    named = [name for name in items.column_names if name not in ("id", PATH)]
    held = [name for name in named if items[name].null_count < len(items)]
    known = where.column_types(items)
    if lost := [name for name in held if name not in known]:
        _log.warning("columns of other types than text, numbers and truth values are left out: %s", ", ".join(lost))
    return {name: _NAMES[known[name]] for name in held if name in known}


def plain_table(items: pa.Table, columns: dict[str, str]) -> pa.Table:
    """The items with these columns in these types; numbers that are not finite are missing ones."""
    arrays = [items["id"].cast(pa.string())]
    for name, kind in columns.items():
        values = items[name].cast(TYPES[kind])
        arrays.append(pc.if_else(pc.is_finite(values), values, None) if kind == "number" else values)
    return pa.table(arrays, names=["id", *columns])
