"""Thumbnails: the pictures of items, found by id alone, uploaded ones or files below one folder."""

import hashlib
import os
import stat
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CACHED = 64 << 20  # bytes of finished thumbnails
MAX_FILE_BYTES = 1 << 28


class Files:
    """The files that an index was made from: what a client writes never decides which one is read.

    The ids and paths are those of the built index; by now some may be gone, or the ids of other items. root: the folder
    that the files lie in; None is the one they were in when the index was made. A path that leaves the folder, and a
    symbolic link on the way, is refused.
    """

    def __init__(self, items: Path, root: Path | None) -> None:
        table = _paths_of(items)
        self._ids, self._paths = table["id"], table["path"]
        self._made = _common_root(self._ids, self._paths)
        root = root or self._made
        self.root = root.resolve() if root is not None and root.is_dir() else None

    def read(self, id: str) -> bytes | None:
        """The bytes of the file that the item `id` was made from; None where there is none to be had."""
        if self.root is None:
            return None
        row = pc.index(self._ids, id).as_py()
        path = None if row < 0 else self._paths[row].as_py()
        if path is None:
            return None
        relative = self._relative(id, Path(path))
        return None if relative is None else _read_below(self.root, relative)

    def _relative(self, id: str, path: Path) -> Path | None:
        """Where the file lies below the root, which may have moved since the index was made."""
        for base in (self._made, self.root):
            if base is not None and path.is_relative_to(base):
                return path.relative_to(base)
        return Path(id) if not Path(id).is_absolute() else None


def _paths_of(items: Path) -> pa.Table:
    """The ids and paths of a built index; none where it was made from an array, or restored without it."""
    if items.is_file() and {"id", "path"} <= set(pq.read_schema(items).names):
        table = pq.read_table(items, columns=["id", "path"], partitioning=None)
        return table.cast(pa.schema({"id": pa.string(), "path": pa.string()}))
    return pa.schema({"id": pa.string(), "path": pa.string()}).empty_table()


def _common_root(ids: pa.ChunkedArray, paths: pa.ChunkedArray) -> Path | None:
    """The folder to which all ids are relative; None where there is no such folder."""
    if not len(ids) or ids[0].as_py() is None or paths[0].as_py() is None:
        return None
    root = paths[0].as_py().removesuffix(ids[0].as_py())
    if not root.endswith("/"):
        return None
    fits = pc.equal(pc.binary_join_element_wise(pa.scalar(root), ids, pa.scalar("")), paths)
    return Path(root) if pc.all(fits, skip_nulls=False).as_py() else None


def _read_below(root: Path, relative: Path) -> bytes | None:
    """The file, opened part by part from the root so that no symbolic link is followed."""
    parts = relative.parts
    if not parts or any(part in ("", ".", "..", "/") for part in parts):
        return None
    opened = [os.open(root, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for part in parts[:-1]:
            opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
        opened.append(os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1]))
        found = os.fstat(opened[-1])
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
            return None
        with os.fdopen(opened.pop(), "rb") as file:
            return file.read()
    except (OSError, ValueError):
        return None
    finally:
        for one in opened:
            os.close(one)


class Kept:
    """The thumbnails asked for last, by what they were made of."""

    def __init__(self, most: int = CACHED) -> None:
        self._most, self._size = most, 0
        self._found: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def get(self, name: str, side: int) -> bytes | None:
        """The thumbnail of a picture, if it is kept."""
        found = self._found.get((name, side))
        if found is not None:
            self._found.move_to_end((name, side))
        return found

    def put(self, name: str, side: int, content: bytes) -> None:
        """Keep a thumbnail, in place of the oldest ones where there is no room."""
        if (name, side) in self._found:
            return
        self._found[name, side] = content
        self._size += len(content)
        while self._size > self._most:
            self._size -= len(self._found.popitem(last=False)[1])


def picture_name(content: bytes) -> str:
    """What a picture is called in caches: the sha256 of its bytes."""
    return hashlib.sha256(content).hexdigest()


def media_type(content: bytes) -> str:
    """Of a thumbnail: PNG or JPEG, which are all there are."""
    return "image/png" if content.startswith(b"\x89PNG") else "image/jpeg"
