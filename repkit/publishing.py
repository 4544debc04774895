"""How files reach the disk: each whole, or not at all."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

Content = bytes | Callable[[BinaryIO], object]
PART = ".part"  # what a file's name ends in until all of it is on the disk


def publish(folder: Path, files: Mapping[str, Content]) -> None:
    """Put files in place, in this order, so that each is there with all of its bytes or not at all.

    A function is called with the open file and writes what is too large to be held as bytes; the files before it are
    then there under their names + PART. A crash, a kill or a power cut leaves at most files that end in PART.
    Raises OSError where writing fails.
    """
    parts = {name: folder / (name + PART) for name in files}
    try:
        for name, content in files.items():
            with _named(folder / name), open(parts[name], "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            with _named(folder / name):
                os.replace(parts[name], folder / name)
        sync(folder)
    except BaseException:
        remove(parts.values())
        raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an OSError name the file that was to be written: `write` names none, and `open` the temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder to write into; where that fails, a folder that was not there before goes again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # not empty: it is kept
                folder.rmdir()
        raise


def remove(paths: Iterable[Path]) -> None:
    """Remove files; what cannot be removed stays."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file of the table."""
    sink = BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def sha256(content: bytes) -> str:
    """The sha256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits; OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
