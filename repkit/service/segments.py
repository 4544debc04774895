"""Segments: items whose vectors FAISS has indexed, in files that never change and count only with their checksums."""

import json
import secrets
import shutil
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64

from repkit.ann import search_vectors
from repkit.indexfiles import ITEMS, RAW, VECTORS, read_raw, read_vectors, write_vectors
from repkit.publishing import PART, file_sha256, parquet_bytes, publish, sync
from repkit.service.items import Effort, Metadata, conformed
from repkit.where import Masks, mask

FOLDER = "segments"


@dataclass(frozen=True)
class Record:
    """What the database says of a segment: it holds the items with keys `low` to `high` that lived at `built`."""

    name: str
    low: int
    high: int
    built: int
    rows: int
    kind: str
    sha256: Mapping[str, str]  # of each file


@dataclass(frozen=True, eq=False)
class Segment:
    """Items in the order of their keys; `items` has their `id` and a column for each name in their metadata."""

    record: Record
    vectors: Any  # a faiss.Index
    keys: Int64[np.ndarray, " n"]
    items: pa.Table
    raw: Float32[np.ndarray, "n d"] | None = None  # where FAISS has compressed ones only

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def kind(self) -> str:
        """That of its FAISS index."""
        return self.record.kind

    @property
    def is_exact(self) -> bool:
        """Whether every search compares with all vectors."""
        return self.record.kind == "flat"

    def table(self, columns: Mapping[str, str]) -> pa.Table:
        """The items with exactly these columns."""
        return conformed(self.items, columns)

    def mask(self, where: Mapping[str, Any], columns: Mapping[str, str]) -> Bool[np.ndarray, " n"]:
        """Which items have what is asked of these columns; kept for the next time where they have been so all along."""
        table = self.table(columns)
        kept = {field.name: field.type for field in self.items.schema}
        same = all(kept.get(field.name) == field.type for field in table.schema)
        return self._masks(where) if same else mask(table, where)

    @cached_property
    def _masks(self) -> Masks:
        return Masks(self.items)

    def described(self, rows: Int64[np.ndarray, " m"]) -> list[tuple[str, Metadata]]:
        """The id and the metadata of some rows."""
        found = self.items.take(pa.array(rows)).to_pylist()
        return [(one.pop("id"), {name: value for name, value in one.items() if value is not None}) for one in found]

    def search(
        self,
        queries: Float32[np.ndarray, "q d"],
        k: int,
        metric: str,
        effort: Effort,
        allowed: Bool[np.ndarray, " n"] | None = None,
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """Scores and rows of the nearest allowed items."""
        options: Any = {"allowed": allowed, "raw": self.raw, **asdict(effort)}
        return search_vectors(self.vectors, queries, k, metric=metric, **options)


def new_name() -> str:
    """A name for a segment's folder that no other has, not even one in a snapshot."""
    return f"SEG-{secrets.token_hex(8)}"


def write_segment(
    live: Path, name: str, vectors: Any, keys: Int64[np.ndarray, " n"], items: pa.Table, raw: Any = None
) -> dict[str, str]:
    """Put a segment's folder in place, whole or not at all; the sha256 of its files.

    The names of columns get a dot, so that the metadata may have a `key` too.
    """
    renamed = ["id" if name == "id" else f".{name}" for name in items.column_names]
    table = items.rename_columns(renamed).add_column(0, "key", pa.array(keys))
    folder = live / FOLDER / (name + PART)
    folder.mkdir(parents=True)
    try:
        files: dict[str, Any] = {
            VECTORS: lambda file: write_vectors(vectors, file),
            ITEMS: parquet_bytes(table),
        }
        if raw is not None:
            files[RAW] = lambda file: np.save(file, raw, allow_pickle=False)
        publish(folder, files)
        return put_in_place(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def put_in_place(folder: Path) -> dict[str, str]:
    """Take PART from the name of a folder whose files are on the disk; the sha256 of each file."""
    hashes = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    sync(folder)
    folder.rename(folder.with_name(folder.name.removesuffix(PART)))
    sync(folder.parent)
    return hashes


def load_segment(live: Path, record: Record) -> Segment:
    """Read a segment; ValueError or OSError where its files are not those of the record."""
    folder = live / FOLDER / record.name
    for name, expected in record.sha256.items():
        if file_sha256(folder / name) != expected:
            raise ValueError(f"{folder / name} does not fit its checksum")
    vectors = read_vectors(folder / VECTORS)
    table = pq.ParquetFile(folder / ITEMS).read(use_threads=False).combine_chunks()
    raw = read_raw(folder, record.kind)
    keys = table["key"].to_numpy()
    if not len(keys) == vectors.ntotal == record.rows or (len(keys) and keys[-1] > record.high):
        raise ValueError(f"{folder} does not hold what is said of it")
    items = table.drop_columns(["key"])
    items = items.rename_columns([name.removeprefix(".") for name in items.column_names])
    return Segment(record, vectors, keys, items, raw)


def read_records(database: sqlite3.Connection) -> list[Record]:
    """The segments that count, in the order of their keys."""
    query = "SELECT name, low, high, built, rows, kind, sha256 FROM segments ORDER BY low"
    return [Record(*row, sha256=json.loads(hashes)) for *row, hashes in database.execute(query)]  # type: ignore[misc]


def replace_records(database: sqlite3.Connection, old: list[Record], new: Record | None) -> None:
    """Let a segment count in the place of others; within a transaction."""
    database.executemany("DELETE FROM segments WHERE name = ?", [(record.name,) for record in old])
    if new is not None:
        values = new.name, new.low, new.high, new.built, new.rows, new.kind, json.dumps(dict(new.sha256))
        database.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def remove_strays(live: Path, records: list[Record]) -> None:
    """Remove the folders of segments that do not count: what a killed process was writing, or has replaced."""
    known = {record.name for record in records}
    for folder in (live / FOLDER).glob("SEG-*"):
        if folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)
