"""The thread that compacts a live index beside its readers and writers."""

import logging
import threading

from repkit.service.compaction import due, whole
from repkit.service.store import Store

_RETRY = 10.0  # seconds until a compaction that failed is tried again
_PATIENCE = 30.0  # seconds that closing waits for a compaction; one that goes on then finds the index closed
_log = logging.getLogger("repkit")


class Compactor:
    """Rewrites what `due` names whenever it is told to look; who holds `busy` keeps it from starting."""

    def __init__(self, store: Store, flush_rows: int) -> None:
        self.busy = threading.Lock()
        self._store, self._flush_rows = store, flush_rows
        self._look, self._closing, self._all = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="repkit-compaction", daemon=True)
        self._thread.start()

    def tell(self) -> None:
        """There has been a change."""
        if due(self._store.snapshot.parts, self._flush_rows) is not None:
            self._look.set()

    def compact_all(self, wait: bool) -> None:
        """Make one segment of all items, here or in the background; OSError where writing fails."""
        if not wait:
            self._all.set()
            self._look.set()
            return
        with self.busy:
            self._rewrite(whole(self._store.snapshot.parts))

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._look.set()
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        self.tell()
        while True:
            self._look.wait()
            self._look.clear()
            if self._closing.is_set():
                return
            try:
                self._compact()
            except Exception as error:  # whatever it was, searches and changes go on
                if self._closing.is_set():
                    return
                _log.warning("compaction failed (%s); it is tried again in %.0f s", error, _RETRY)
                self._store.degraded = f"compaction failed: {error}"
                self._closing.wait(_RETRY)
                self._look.set()

    def _compact(self) -> None:
        if self._all.is_set():
            self._all.clear()
            self.compact_all(wait=True)
        while not self._closing.is_set():
            with self.busy:
                chosen = due(self._store.snapshot.parts, self._flush_rows)
                if chosen is None:
                    return
                self._rewrite(chosen)

    def _rewrite(self, chosen: slice | None) -> None:
        if chosen is not None:
            self._store.rewrite(chosen)
            self._store.purge()
