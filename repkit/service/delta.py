"""The newest items, in memory: appended to by one writer, and read up to a count by everybody."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64

from repkit.ann import nearest
from repkit.service.items import Effort, Metadata, conformed, table_of, widened
from repkit.service.rows import Rows
from repkit.where import mask

_MOST_CHUNKS = 32


class Delta:
    """Rows in arrays with room for more; one that grows gets new arrays, so that views of the old ones stay good."""

    def __init__(self, dimension: int, capacity: int = 1024) -> None:
        self.vectors = np.empty((capacity, dimension), np.float32)
        self.keys = np.empty(capacity, np.int64)
        self.ids: list[str] = []
        self.metadata: list[Metadata] = []
        self._tables: list[pa.Table] = []
        self._reading = threading.Lock()

    def reserve(self, more: int) -> None:
        """Make room, so that appending so many rows cannot fail."""
        count, needed = len(self.ids), len(self.ids) + more
        if needed > len(self.keys):
            capacity = max(needed, 2 * len(self.keys))
            vectors, keys = np.empty((capacity, self.vectors.shape[1]), np.float32), np.empty(capacity, np.int64)
            vectors[:count], keys[:count] = self.vectors[:count], self.keys[:count]
            self.vectors, self.keys = vectors, keys

    def append(self, rows: Rows) -> None:
        """Add rows behind those that anybody reads yet."""
        self.reserve(len(rows))
        start, stop = len(self.ids), len(self.ids) + len(rows)
        self.vectors[start:stop], self.keys[start:stop] = rows.vectors, rows.keys
        self.ids += rows.ids
        self.metadata += rows.metadata

    def table(self, count: int, columns: Mapping[str, str]) -> pa.Table:
        """The first `count` items with these columns; what earlier calls have made is kept."""
        with self._reading:
            made = sum(map(len, self._tables))
            if made < count:
                if len(self._tables) > _MOST_CHUNKS:
                    self._tables, made = [], 0
                self._tables.append(_table(self.ids[made:count], self.metadata[made:count]))
            tables = [conformed(table, columns) for table in self._tables]
        return pa.concat_tables(tables).slice(0, count) if tables else table_of([], [], columns)


def _table(ids: list[str], metadata: list[Metadata]) -> pa.Table:
    """With the columns that these items have, whichever are asked for."""
    columns: dict[str, str] = {}
    for one in metadata:
        columns = widened(columns, one)
    return table_of(ids, metadata, columns)


@dataclass(frozen=True, eq=False)
class Fresh:
    """The rows of a delta up to a count."""

    delta: Delta
    vectors: Float32[np.ndarray, "n d"]
    keys: Int64[np.ndarray, " n"]
    kind: str = "flat"
    is_exact: bool = True

    @classmethod
    def of(cls, delta: Delta) -> "Fresh":
        """All that the delta has now."""
        count = len(delta.ids)
        return cls(delta, delta.vectors[:count], delta.keys[:count])

    def __len__(self) -> int:
        return len(self.keys)

    def table(self, columns: Mapping[str, str]) -> pa.Table:
        """The items with exactly these columns."""
        return self.delta.table(len(self), columns)

    def mask(self, where: Mapping[str, Any], columns: Mapping[str, str]) -> Bool[np.ndarray, " n"]:
        """Which items have what is asked of these columns."""
        return mask(self.table(columns), where)

    def described(self, rows: Int64[np.ndarray, " m"]) -> list[tuple[str, Metadata]]:
        """The id and the metadata of some rows."""
        return [(self.delta.ids[row], self.delta.metadata[row]) for row in rows.tolist()]

    def search(
        self,
        queries: Float32[np.ndarray, "q d"],
        k: int,
        metric: str,
        effort: Effort,
        allowed: Bool[np.ndarray, " n"] | None = None,
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """Scores and rows of the nearest allowed items."""
        return nearest(self.vectors, queries, k, metric=metric, allowed=allowed)
