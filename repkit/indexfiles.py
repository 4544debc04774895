"""The files of an index: vectors, items and a manifest with their sha256, written whole and read with suspicion."""

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import pyarrow as pa
import pyarrow.parquet as pq

from repkit.shards import made, parquet_bytes, publish, sha256

FORMAT, VERSION = "repkit-index", 1
VECTORS, ITEMS, MANIFEST = "index.faiss", "items.parquet", "manifest.json"
DESCRIBED = ("metric", "kind", "key", "pool", "identity", "provenance")  # what the manifest says beside the sizes


def write_index(folder: Path, vectors: Any, items: pa.Table, described: Mapping[str, Any]) -> None:
    """Put the three files in place, the manifest last; ValueError for a folder that holds anything but an index."""
    with made(folder):
        _check_replaceable(folder)
        _publish(folder, vectors, items, described)


def _publish(folder: Path, vectors: Any, items: pa.Table, described: Mapping[str, Any]) -> None:
    files = {VECTORS: faiss.serialize_index(vectors).tobytes(), ITEMS: parquet_bytes(items)}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "count": vectors.ntotal,
        "dimension": vectors.d,
        **described,
        "sha256": {name: sha256(content) for name, content in files.items()},
    }
    publish(folder, files | {MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()})


def read_index(folder: Path) -> tuple[Any, pa.Table, dict[str, Any]]:
    """The FAISS index, the items and the described fields, once every file agrees with its sha256.

    Raises FileNotFoundError for a missing folder, ValueError for one that is damaged or no index.
    """
    manifest = _read_manifest(folder)
    for name in (VECTORS, ITEMS):
        _check_sha256(folder / name, manifest["sha256"].get(name))
    vectors, items = _read_vectors(folder / VECTORS), pq.read_table(folder / ITEMS, partitioning=None)
    if (manifest["count"], manifest["dimension"]) != (vectors.ntotal, vectors.d) or vectors.ntotal != len(items):
        raise ValueError(f"{folder} does not hold what its manifest says; build the index again")
    return vectors, items, {name: manifest[name] for name in DESCRIBED}


def _check_replaceable(folder: Path) -> None:
    """Only an index, or what an interrupted save has left of one, may be overwritten."""
    others = {path.name.removesuffix(".part") for path in folder.iterdir()} - {VECTORS, ITEMS, MANIFEST}
    if others:
        raise ValueError(f"{folder} holds other files ({', '.join(sorted(others)[:3])}); save into a folder of its own")
    if (folder / MANIFEST).exists():
        _read_manifest(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such index", str(folder))
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no index: it has no {MANIFEST}; give a folder that an index was saved in"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); build the index again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} is no index: its {MANIFEST} is not one of ours")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder} has format version {manifest.get('version')}; this repkit reads {VERSION}")
    if missing := {*DESCRIBED, "count", "dimension", "sha256"} - manifest.keys():
        raise ValueError(f"{folder / MANIFEST} is damaged (no {', '.join(sorted(missing))}); build the index again")
    return manifest


def _check_sha256(path: Path, expected: str | None) -> None:
    found = "missing"
    if path.is_file():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path} is damaged: its sha256 is {found}, not {expected}; build the index again")


def _read_vectors(path: Path) -> Any:
    try:
        with _bounded_reading(path.stat().st_size):
            return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is no index that FAISS reads ({error}); build the index again") from error


@contextmanager
def _bounded_reading(size: int) -> Iterator[None]:
    """Keep FAISS from allocating, or looping over, more than a file of `size` bytes can hold.

    It knows such limits for the whole process only, so they are put back.
    """
    limits = {"loop_limit": size, "vector_byte_limit": 8 * size}  # FAISS compares with a quarter, or less, of the bytes
    known = [name for name in limits if hasattr(faiss, f"set_deserialization_{name}")]
    before = {name: getattr(faiss, f"get_deserialization_{name}")() for name in known}
    try:
        for name in known:
            getattr(faiss, f"set_deserialization_{name}")(limits[name])
        yield
    finally:
        for name in known:
            getattr(faiss, f"set_deserialization_{name}")(before[name])
