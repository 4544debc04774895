"""The files of an index: vectors, items and a manifest with their sha256, written whole and read with suspicion."""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import faiss as _faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from repkit.publishing import PART, file_sha256, made, parquet_bytes, publish

faiss: Any = _faiss  # whose stubs lack what its Python adds
FORMAT, VERSION = "repkit-index", 2
VECTORS, RAW, ITEMS, MANIFEST = "index.faiss", "vectors.npy", "items.parquet", "manifest.json"
LIVE = "live"  # the folder beside them that `repkit serve` keeps its changes in
# What the manifest says beside the sizes; version 1 knew flat indexes only.
DESCRIBED = ("metric", "kind", "parameters", "recall", "key", "pool", "identity", "provenance")
_FLAT: Mapping[str, Any] = {"parameters": {}, "recall": 1.0}

Raw = Float32[np.ndarray, "n d"] | None


def write_index(folder: Path, vectors: Any, raw: Raw, items: pa.Table, described: Mapping[str, Any]) -> None:
    """Put the files in place, the manifest last; ValueError for a folder that holds anything but an index.

    raw: the vectors that were indexed, where the index has them only compressed.
    """
    with made(folder):
        check_replaceable(folder)
        _publish(folder, vectors, raw, items, described)
        if raw is None:
            (folder / RAW).unlink(missing_ok=True)  # of an index that was here before


def _publish(folder: Path, vectors: Any, raw: Raw, items: pa.Table, described: Mapping[str, Any]) -> None:
    contents: dict[str, Any] = {VECTORS: lambda file: write_vectors(vectors, file), ITEMS: parquet_bytes(items)}
    if raw is not None:
        contents[RAW] = lambda file: np.save(file, raw, allow_pickle=False)
    manifest = {"format": FORMAT, "version": VERSION, "count": vectors.ntotal, "dimension": vectors.d, **described}

    def write_manifest(file: BinaryIO) -> None:
        hashes = {name: file_sha256(folder / (name + PART)) for name in contents}
        file.write((json.dumps({**manifest, "sha256": hashes}, indent=1) + "\n").encode())

    publish(folder, {**contents, MANIFEST: write_manifest})


def write_vectors(vectors: Any, file: BinaryIO) -> None:
    """Write a FAISS index without a copy of it in memory; OSError where the file cannot be written."""
    faiss.write_index(vectors, faiss.PyCallbackIOWriter(file.write))


def read_index(folder: Path, mmap: bool = False) -> tuple[Any, pa.Table, dict[str, Any]]:
    """The FAISS index, the items and the described fields, once every file agrees with its sha256.

    mmap: leave the vectors in their file, of which pages are read as they are needed; the index is then not to be
    changed. Raises FileNotFoundError for a missing folder, ValueError for one that is damaged or no index.
    """
    manifest = _read_manifest(folder)
    hashes = manifest["sha256"]
    for name in (VECTORS, ITEMS, *([RAW] if manifest["kind"] == "ivf-pq" else [])):
        _check_sha256(folder / name, hashes.get(name))
    vectors, items = read_vectors(folder / VECTORS, mmap), pq.read_table(folder / ITEMS, partitioning=None)
    raw = read_raw(folder, manifest["kind"])
    shape = (manifest["count"], manifest["dimension"])
    if shape != (vectors.ntotal, vectors.d) or len(items) != shape[0] or (raw is not None and raw.shape != shape):
        raise ValueError(f"{folder} does not hold what its manifest says; build the index again")
    return vectors, items, {name: manifest[name] for name in DESCRIBED}


def read_raw(folder: Path, kind: str) -> Raw:
    """The vectors that were indexed, left in their file, where the kind has them only compressed; else None.

    They are to be checked by `read_index` before.
    """
    return np.load(folder / RAW, mmap_mode="r", allow_pickle=False) if kind == "ivf-pq" else None


def check_replaceable(folder: Path) -> None:
    """ValueError for a folder that holds anything but an index, or what an interrupted save has left of one."""
    if not folder.is_dir():
        return
    if (folder / LIVE).exists():
        raise ValueError(f"{folder} has changes that repkit serve has made ({LIVE}/); save into another folder")
    others = {path.name.removesuffix(PART) for path in folder.iterdir()} - {VECTORS, RAW, ITEMS, MANIFEST}
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
    if manifest.get("version") not in (1, VERSION):
        raise ValueError(f"{folder} has format version {manifest.get('version')}; this repkit reads 1 and {VERSION}")
    if manifest["version"] == 1:
        manifest = {**_FLAT, **manifest}
    if missing := {*DESCRIBED, "count", "dimension", "sha256"} - manifest.keys():
        raise ValueError(f"{folder / MANIFEST} is damaged (no {', '.join(sorted(missing))}); build the index again")
    return manifest


def _check_sha256(path: Path, expected: str | None) -> None:
    found = file_sha256(path) if path.is_file() else "missing"
    if found != expected:
        raise ValueError(f"{path} is damaged: its sha256 is {found}, not {expected}; build the index again")


def read_vectors(path: Path, mmap: bool = False) -> Any:
    """The FAISS index in a file; ValueError for what is none. Its sha256 is to be checked before."""
    try:
        with _bounded_reading(path.stat().st_size):
            return faiss.read_index(str(path), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE | (_mapped(path) if mmap else 0))
    except RuntimeError as error:
        raise ValueError(f"{path} is no index that FAISS reads ({error}); build the index again") from error


def _mapped(path: Path) -> int:
    """FAISS maps lists in one way, and in another, which its first versions lack, what the other kinds hold."""
    with open(path, "rb") as file:
        lists = file.read(2) == b"Iw"
    return faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if lists else getattr(faiss, "IO_FLAG_MMAP_IFC", 0)


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
