"""Putting a snapshot in the place of a live index that is not open, so that a kill at any moment leaves one of both."""

import errno
import logging
import os
import shutil
from pathlib import Path

from repkit.indexfiles import ITEMS, LIVE
from repkit.publishing import PART, file_sha256, sync
from repkit.service.acknowledged import NAME
from repkit.service.journal import DATABASE, WAL_FILES
from repkit.service.ownership import own
from repkit.service.segments import FOLDER
from repkit.service.snapshots import folder_of, link_folder, read_manifest

LOCK = "lock"
_log = logging.getLogger("repkit")
_RESTORED = "restored.db"  # once it has this name, the restore is decided


def restore(root: Path, name: str, into: Path | None = None) -> None:
    """Put a snapshot of the index in `root` in the place of its present state, or into a new folder.

    Raises FileNotFoundError for an unknown snapshot, ValueError for a damaged one, BlockingIOError where a process has
    the index open, FileExistsError where there is something in `into`.
    """
    source = folder_of(root / LIVE, name)
    manifest = read_manifest(source)
    if file_sha256(source / DATABASE) != manifest["sha256"][DATABASE]:
        raise ValueError(f"{source / DATABASE} is damaged: it does not fit its checksum; restore another snapshot")
    if into is not None and into.exists() and any(into.iterdir()):
        raise FileExistsError(errno.EEXIST, "there is something in this folder; restore into a new one", str(into))
    live = (root if into is None else into) / LIVE
    live.mkdir(parents=True, exist_ok=True)
    lock = own(live / LOCK)
    try:
        if into is not None:
            _copy_items(source / ITEMS, into, manifest["sha256"].get(ITEMS))
        _copy(source, live)
        finish_restore(live)
    finally:
        os.close(lock)


def _copy_items(source: Path, into: Path, expected: str | None) -> None:
    """Of which files the items were made, where the snapshot has that: without it there are no thumbnails of them."""
    if expected is None:
        return
    if not source.is_file() or file_sha256(source) != expected:
        _log.warning("%s is damaged; the files that items were made of are not known in the restored index", source)
        return
    shutil.copyfile(source, into / ITEMS)
    sync(into / ITEMS)


def _copy(source: Path, live: Path) -> None:
    for folder in (source / FOLDER).glob("SEG-*"):
        if not (live / FOLDER / folder.name).exists():
            part = live / FOLDER / (folder.name + PART)
            shutil.rmtree(part, ignore_errors=True)
            link_folder(folder, part)
            part.rename(part.with_name(folder.name))
    part = live / (_RESTORED + PART)
    try:
        shutil.copyfile(source / DATABASE, part)
        sync(part)
        os.replace(part, live / _RESTORED)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(live)


def finish_restore(live: Path) -> None:
    """Go on with a restore that was decided; nothing of the state before may be mixed with it."""
    if (live / _RESTORED).exists():
        for name in (*WAL_FILES, NAME):
            (live / name).unlink(missing_ok=True)
        sync(live)
        os.replace(live / _RESTORED, live / DATABASE)
        sync(live)
