"""Snapshots on the disk: copies of a live index that are whole, checked, and made while it is searched and changed."""

import errno
import json
import logging
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repkit.indexfiles import ITEMS
from repkit.publishing import PART, file_sha256, publish, sync
from repkit.service.journal import DATABASE, connect, read_meta, sqlite_errors
from repkit.service.segments import FOLDER, read_records

SNAPSHOTS, MANIFEST = "snapshots", "manifest.json"
FORMAT, VERSION = "repkit-live-snapshot", 1
_log = logging.getLogger("repkit")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Saved:
    """A snapshot on the disk: the state after the change `version`."""

    name: str
    version: int
    count: int
    bytes: int


def folder_of(live: Path, name: str) -> Path:
    """The folder of a snapshot; ValueError for a name that could be anything else."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"snapshot {repr(name)[:80]}: give 1 to 64 letters, digits, - and _, no - or _ first")
    return live / SNAPSHOTS / name


def save_snapshot(live: Path, name: str) -> Saved:
    """Copy one state of the database and the segments that it knows; no segment may be removed meanwhile.

    Raises FileExistsError where there is one of that name, OSError where writing fails.
    """
    folder = folder_of(live, name)
    if folder.exists():
        raise FileExistsError(errno.EEXIST, "there is a snapshot of this name; choose another", str(folder))
    part = folder.with_name(name + PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    sync(live)
    try:
        _copy_database(live / DATABASE, part / DATABASE)
        _describe(part, live)
        part.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return _saved(folder)


def _copy_database(source: Path, target: Path) -> None:
    """One state of the database, however much is written meanwhile."""
    database = connect(source, write=True)
    try:
        with sqlite_errors(target):
            database.execute("VACUUM INTO ?", (str(target),))
    finally:
        database.close()
    sync(target)


def _describe(part: Path, live: Path) -> None:
    copy = connect(part / DATABASE)
    try:
        with sqlite_errors(part / DATABASE):
            version, names = read_meta(copy)["sequence"], [record.name for record in read_records(copy)]
            count = copy.execute("SELECT count(*) FROM items WHERE died IS NULL").fetchone()[0]
    finally:
        copy.close()
    for name in names:
        link_folder(live / FOLDER / name, part / FOLDER / name)
    known = {"format": FORMAT, "version": VERSION, "sequence": version, "count": count}
    hashes = {DATABASE: file_sha256(part / DATABASE)}
    if (live.parent / ITEMS).is_file():  # it says of which files the items were made, for thumbnails
        _link(live.parent / ITEMS, part / ITEMS)
        hashes[ITEMS] = file_sha256(part / ITEMS)
    manifest = known | {"sha256": hashes}
    publish(part, {MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()})


def link_folder(source: Path, target: Path) -> None:
    """The files of a folder under a second name, or copies where the file system has no such links.

    They never change, so that one copy does for all. A folder that is missing is left out: it is built again from the
    database when that is opened.
    """
    if not source.is_dir():
        return
    target.mkdir(parents=True)
    for path in source.iterdir():
        _link(path, target / path.name)
    sync(target)
    sync(target.parent)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a snapshot says of itself; FileNotFoundError for a missing one, ValueError for one that is damaged."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such snapshot", str(folder))
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        fits = manifest["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); take another snapshot") from error
    if not fits:
        raise ValueError(f"{folder} is no snapshot of a live index")
    if manifest["version"] != VERSION:
        raise ValueError(f"{folder} has format version {manifest['version']}; this repkit reads {VERSION}")
    return manifest


def saved_snapshots(live: Path) -> list[Saved]:
    """The snapshots there are, by name, without those that cannot be restored as their manifest is damaged."""
    found = []
    for folder in sorted((live / SNAPSHOTS).iterdir()) if (live / SNAPSHOTS).is_dir() else ():
        if _NAME.fullmatch(folder.name):
            try:
                found.append(_saved(folder))
            except ValueError as error:
                _log.warning("snapshot %s is left out (%s)", folder.name, error)
    return found


def _saved(folder: Path) -> Saved:
    manifest = read_manifest(folder)
    return Saved(folder.name, manifest["sequence"], manifest["count"], bytes_in(folder))


def bytes_in(folder: Path) -> int:
    """The bytes of all files in a folder, some of which may go away meanwhile; links count as if they were copies."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def remove_parts(live: Path) -> None:
    """Remove what is left of snapshots that were being taken or removed when the process ended."""
    for folder in (live / SNAPSHOTS).glob("*" + PART):
        shutil.rmtree(folder, ignore_errors=True)


def remove_snapshot(live: Path, name: str) -> None:
    """Remove a snapshot, at once for all who look; FileNotFoundError where there is none of that name."""
    folder = folder_of(live, name)
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such snapshot", str(folder))
    gone = folder.with_name(name + PART)
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    sync(gone.parent)
    shutil.rmtree(gone)
