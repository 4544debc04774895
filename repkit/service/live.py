"""LiveIndex: an index that is changed while it is searched, and that loses no change that was acknowledged."""

import builtins
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repkit.service import restoring, rows, snapshots
from repkit.service.background import Compactor
from repkit.service.changes import Delete, Update, upsert_of
from repkit.service.items import Answer, Effort, Item, Listed, Stored, check_counts, check_id, check_metadata
from repkit.service.opening import open_live
from repkit.service.snapshots import Saved
from repkit.service.store import Store
from repkit.service.views import Snapshot, Where


class LiveIndex:
    """An index to search and to change from many threads; `LiveIndex.open` makes one, `close` gives it free.

    A change that returned is on the disk and in every later search. described: what made the vectors, as the manifest
    of a built index has it.
    """

    def __init__(self, store: Store, described: Mapping[str, Any], flush_rows: int) -> None:
        self.described = described
        self._store, self._compactor = store, Compactor(store, flush_rows)

    @classmethod
    def open(
        cls, folder: str | Path, *, flush_rows: int = 8192, progress: Callable[[int, int], object] | None = None
    ) -> "LiveIndex":
        """Open the index in a folder, for this process alone; the first time, what was built there is taken over.

        flush_rows: so many new items become a segment. progress: called with (done, total) items taken over.
        Raises BlockingIOError naming the process that has it open, FileNotFoundError, ValueError for what is no index
        or of another format version, OSError for one that is damaged.
        """
        check_counts(flush_rows=flush_rows)
        opened = open_live(Path(folder), progress)
        return cls(Store(opened), opened.described, flush_rows)

    @staticmethod
    def restore(folder: str | Path, name: str, into: str | Path | None = None) -> None:
        """Put a snapshot in the place of the index in the folder, which must not be open, or into a new folder.

        Raises FileNotFoundError for an unknown snapshot, ValueError for a damaged one, BlockingIOError where the index
        is open, FileExistsError where `into` holds something.
        """
        restoring.restore(Path(folder), name, None if into is None else Path(into))

    def __len__(self) -> int:
        """How many items there are."""
        return len(self._store.snapshot)

    def __enter__(self) -> "LiveIndex":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def version(self) -> int:
        """That of the last change."""
        return self._store.snapshot.version

    @property
    def dimension(self) -> int:
        """The length of each vector."""
        return self._store.snapshot.dimension

    @property
    def metric(self) -> str:
        """What is compared: "cosine", "ip" or "l2"."""
        return self._store.snapshot.metric

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the metadata and what they hold: "string", "integer", "number" or "boolean"."""
        return dict(self._store.snapshot.columns)

    @property
    def degraded(self) -> str | None:
        """Why the last write failed, until one succeeds."""
        return self._store.degraded

    def snapshot(self) -> Snapshot:
        """The present state, which can be searched for as long as it is kept, whatever changes."""
        return self._store.snapshot

    def search(
        self,
        vectors: np.ndarray,  # [q d] of numbers, which is checked
        k: int = 10,
        *,
        where: Where | None = None,
        exact: bool = False,
        ef: int | None = None,
        nprobe: int | None = None,
    ) -> Answer:
        """As `Snapshot.search`, in the present state."""
        return self.snapshot().search(vectors, k, where=where, effort=Effort(exact, ef, nprobe))

    def upsert(self, items: Sequence[Item], *, idempotency_key: str | None = None) -> int:
        """Add items, or put them in the place of those of the same ids; all or none. Returns the version.

        The key of an earlier request, one of the last 10,000 changes, gives its version and changes nothing.
        Raises ValueError for an id, vector or metadata that cannot be kept, OSError where writing fails.
        """
        version = self._store.change(upsert_of(items, self.dimension, self.metric, idempotency_key)).version
        self._compactor.tell()
        return version

    def update(self, id: str, metadata: Mapping[str, Any]) -> int:
        """Set columns in the metadata of an item, and take away those that are None. Returns the version.

        Raises KeyError for an unknown id, ValueError for what cannot be kept, OSError where writing fails.
        """
        version = self._store.change(Update(check_id(id), check_metadata(metadata))).version
        self._compactor.tell()
        return version

    def delete(self, ids: Sequence[str]) -> tuple[int, int]:
        """Delete the items of these ids; the version, and how many there were. Raises OSError where writing fails."""
        applied = self._store.change(Delete([check_id(name) for name in ids]))
        self._compactor.tell()
        return applied.version, len(applied.died)

    def get(self, id: str) -> Stored | None:
        """The item of that id; None where there is none."""
        with self._store.reading() as database:
            return rows.stored(database, self._store.path, check_id(id), self.dimension)

    def image(self, id: str) -> bytes | None:
        """The picture that came with the item of that id; None where there is none."""
        with self._store.reading() as database:
            return rows.image(database, self._store.path, check_id(id))

    def is_original(self, id: str) -> bool:
        """Whether the item of that id is one of the built index, and not one that was put in its place."""
        with self._store.reading() as database:
            return rows.is_original(database, self._store.path, check_id(id))

    def count(self, where: Where | None = None) -> int:
        """How many items there are that `where` allows."""
        return self.snapshot().count(where)

    def stats(self) -> dict[str, Any]:
        """Sizes, for people and for metrics."""
        *segments, delta = self.snapshot().parts
        return {
            "count": len(self),
            "version": self.version,
            "dead": sum(len(part.source) - part.living for part in self.snapshot().parts),
            "delta": len(delta.source),
            "segments": [{"rows": len(part.source), "kind": part.source.kind} for part in segments],
            "bytes": snapshots.bytes_in(self._store.live),
            "degraded": self.degraded,
        }

    def compact(self, wait: bool = True) -> None:
        """Make one segment of all items, or have it made in the background; OSError where writing fails."""
        self._compactor.compact_all(wait)

    def snapshot_to(self, name: str) -> Saved:
        """Copy the present state onto the disk, below live/snapshots, while it is searched and changed.

        Raises ValueError for a name other than letters, digits, - and _, FileExistsError, OSError where writing fails.
        """
        with self._compactor.busy:  # so that no segment goes away meanwhile
            return snapshots.save_snapshot(self._store.live, name)

    def snapshots(self) -> builtins.list[Saved]:
        """What `snapshot_to` has made."""
        return snapshots.saved_snapshots(self._store.live)

    def delete_snapshot(self, name: str) -> None:
        """Remove what `snapshot_to` has made; FileNotFoundError where there is none of that name."""
        with self._compactor.busy:
            snapshots.remove_snapshot(self._store.live, name)

    def list(self, after: str | None = None, limit: int = 100, where: Where | None = None) -> builtins.list[Listed]:
        """Up to `limit` items in the order of their ids, from the one after `after` on."""
        check_counts(limit=limit)
        if where is not None:
            return self.snapshot().listed(after, limit, where)
        with self._store.reading() as database:
            return rows.listed(database, self._store.path, after, limit)

    def close(self) -> None:
        """Give the index free; what was acknowledged is on the disk already."""
        self._compactor.close()
        self._store.close()
