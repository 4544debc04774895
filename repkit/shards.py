"""The files of a feature store: their names, how they reach the disk whole or not at all, and what a shard holds."""

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from repkit.publishing import parquet_bytes, remove, sha256

FORMAT = "repkit-features"
VERSION = 1
LIST, MANIFEST, FAILURES = "images.parquet", "manifest.json", "failures.parquet"
ROWS = pa.schema(
    [(name, pa.string()) for name in ("id", "path", "label", "split")]
    + [("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()), ("row", pa.int32())]
)
FAILED = pa.schema([("path", pa.string()), ("error", pa.string())])

_OWN_PART = re.compile(
    r"(images\.parquet|manifest\.json|failures\.parquet|shard-\d{5,}(\.failures\.parquet|\.parquet|\.safetensors))\.part"
)
_log = logging.getLogger("repkit")


@dataclass(frozen=True)
class Shard:
    """The images `start` ... `stop` - 1 of the list, and the names of the three files they fill."""

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"shard-{self.index:05d}"

    @property
    def files(self) -> tuple[str, str, str]:
        """Failures, rows and arrays, in the order in which they are put in place."""
        return f"{self.name}.failures.parquet", f"{self.name}.parquet", f"{self.name}.safetensors"

    def batches(self, size: int) -> list[range]:
        """The images in batches; only the last one may be smaller."""
        return [range(start, min(start + size, self.stop)) for start in range(self.start, self.stop, size)]


def shards_of(images: int, size: int) -> list[Shard]:
    """The shards of a list of so many images."""
    starts = range(0, images, size)
    return [Shard(index, start, min(start + size, images)) for index, start in enumerate(starts)]


def encode_shard(
    shard: Shard, arrays: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, str]]
) -> dict[str, bytes]:
    """The contents of a shard's files, by name; the rows' file holds the sha256 of the other two."""
    failed_file, rows_file, arrays_file = shard.files
    failed = parquet_bytes(pa.Table.from_pylist(list(failures), schema=FAILED))
    stored = save({key: array.contiguous() for key, array in arrays.items()})
    hashes = json.dumps({failed_file: sha256(failed), arrays_file: sha256(stored)})
    table = pa.Table.from_pylist(list(rows), schema=ROWS.with_metadata({"sha256": hashes}))
    return {failed_file: failed, rows_file: parquet_bytes(table), arrays_file: stored}


def shard_record(folder: Path, shard: Shard, keys: Sequence[str]) -> dict[str, Any] | None:
    """What the manifest says of a shard, or None where it is not all there.

    The headers are read, not every byte: the hashes are those that were written with the shard.
    """
    failed_file, rows_file, arrays_file = shard.files
    if not all((folder / name).exists() for name in shard.files):
        return None
    try:
        failed = pq.read_metadata(folder / failed_file).num_rows
        content = (folder / rows_file).read_bytes()
        table = pq.ParquetFile(pa.BufferReader(content))
        rows = table.metadata.num_rows
        hashes = json.loads(table.schema_arrow.metadata[b"sha256"])
        with safe_open(folder / arrays_file, framework="pt") as arrays:
            lengths = {key: arrays.get_slice(key).get_shape()[0] for key in arrays.keys()}
    except (pa.ArrowException, SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        _log.warning("%s in %s is damaged (%s); it is done again", shard.name, folder, str(error).splitlines()[0])
        return None
    if rows + failed != shard.stop - shard.start or lengths != dict.fromkeys(keys, rows):
        _log.warning("%s in %s does not hold what the list says; it is done again", shard.name, folder)
        return None
    hashes[rows_file] = sha256(content)
    return {
        "name": shard.name,
        "rows": rows,
        "failures": failed,
        "sha256": {name: hashes[name] for name in shard.files},
    }


def is_part(name: str) -> bool:
    """Whether an interrupted write of a store leaves files of such a name; others that end so are the user's."""
    return _OWN_PART.fullmatch(name) is not None


def remove_parts(folder: Path) -> None:
    """Remove what an interrupted write of a store has left."""
    remove(path for path in folder.iterdir() if is_part(path.name))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second export out of the folder; the lock goes with the process, however it ends.

    Raises BlockingIOError where another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = "another export is writing into this folder; wait for it, or choose another folder"
            raise BlockingIOError(errno.EWOULDBLOCK, reason, str(folder)) from None
        yield
    finally:
        os.close(handle)


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as it is stored: JSON in UTF-8."""
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, complete or not.

    Raises FileNotFoundError where there is no such folder, ValueError where it is no store, or of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise FileNotFoundError(errno.ENOENT, "no such feature store", str(folder)) from None
        raise ValueError(
            f"{folder} is no feature store: it has no {MANIFEST}; give a folder that export wrote"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); export into a new folder") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} is no feature store: its {MANIFEST} is not one of ours; give a folder export wrote")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder} has format version {manifest.get('version')}; this repkit reads {VERSION}")
    return manifest


def read_parquet(path: Path) -> pa.Table:
    """The table in a Parquet file; no threads, which would not survive a fork."""
    return pq.ParquetFile(pa.BufferReader(path.read_bytes())).read(use_threads=False)
