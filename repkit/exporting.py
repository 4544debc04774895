"""Export: run an extractor over images and store what it finds, so that it can be interrupted at any point."""

import errno
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import pyarrow as pa
import torch

from repkit.backbones.prompts import Told
from repkit.decoding import MAX_PIXELS
from repkit.extractors import Extractor
from repkit.pipeline import Counts, Job, Progress, fill
from repkit.planning import (
    Listing,
    Manifest,
    begin,
    check_conditions,
    make_conditions,
    make_listing,
    provenance,
    store_identity,
)
from repkit.pooling import pooled_shape
from repkit.publishing import parquet_bytes, publish, sha256
from repkit.shards import (
    FAILED,
    FAILURES,
    FORMAT,
    LIST,
    MANIFEST,
    VERSION,
    locked,
    manifest_bytes,
    read_parquet,
    shard_record,
    shards_of,
)
from repkit.store import FeatureStore, Timing

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 1 << 28  # a shard is held in memory until it is written
ROW_BYTES = 256  # of the tables, for an image: about what id, path, label and hash take
_log = logging.getLogger("repkit")

Images: TypeAlias = str | Path | Sequence[str | Path] | pa.Table


def export(
    images: Images,
    extractor: Extractor,
    out: str | Path,
    *,
    pool: str = "mean",
    dtype: str = "float32",
    batch_size: int = 16,
    shard_size: int = 1024,
    workers: int = 1,
    cond: str | None = None,
    max_pixels: int = MAX_PIXELS,
    retry_failed: bool = False,
    progress: Progress | None = None,
    encoded: Told | None = None,
) -> FeatureStore:
    """Store the features of images in the folder `out`, going on where an interrupted export of the same has stopped.

    images: a folder, a csv or parquet list, an image, a sequence of paths, or the table of `listing.list_images`.
    pool: mean, max, gem, NxN or none. dtype: float32, float16 or bfloat16. shard_size: images a file, at most: fewer
    where they would pass 256 MiB. workers decode: 0 in line, 1 in a thread, n >= 2 in as many processes (they do not
    import the caller's script, so it needs no `__main__` guard). cond: a text told with each image, with fields
    {label}, {split}, {id} and {prompt}; None is the list's prompt column where it is filled, else the extractor's own.
    max_pixels: a larger image is a failure. retry_failed: do the shards again that have failures; else these stay.
    progress: called with the images done, their number and the failed ones, after each batch. encoded: called with
    the prompts that are encoded and their number, before the images, after each where there are several.

    An image that cannot be read, or whose features are not finite, becomes a row of `failures`. Going on keeps the list
    of images, and the features that are there: an image edited in place since is not noticed (`table` has the sha256 of
    the file that was read). Raises ValueError for settings that make no sense, and for a folder that holds something
    else, such as the features of images at another place; OSError where it cannot be written; then, as after Ctrl-C or
    a kill, the same call goes on.
    """
    _check_sizes(batch_size=batch_size, shard_size=shard_size, workers=workers + 1, max_pixels=max_pixels)
    _check_repeatable(extractor)
    listing, folder = make_listing(images), Path(out)
    need = estimate_bytes(len(listing), extractor, pool, dtype)
    check_conditions(extractor, make_conditions(listing.table, cond))
    wanted = _manifest(extractor, listing, pool, dtype, cond, batch_size, shard_size)
    with _explained(need), _locked(folder):
        _check_space(folder, need)
        listing, manifest = begin(folder, listing, wanted)
        conds = make_conditions(listing.table, cond)
        if retry_failed:
            manifest = _drop_failed(folder, manifest, len(listing))
        job = Job(folder, listing, conds, extractor, pool, DTYPES[dtype], batch_size, workers, max_pixels)
        timing = _complete(job, manifest, progress or (lambda done, total, failed: None), encoded)
    store = FeatureStore(folder)
    store.timing = timing
    return store


def estimate_bytes(images: int, extractor: Extractor, pool: str = "mean", dtype: str = "float32") -> int:
    """About how many bytes a store of so many images takes; ValueError for an unknown pooling or dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}; have {', '.join(DTYPES)}")
    return images * (_image_bytes(extractor, pool, dtype) + ROW_BYTES)


def _image_bytes(extractor: Extractor, pool: str, dtype: str) -> int:
    values = sum(math.prod(pooled_shape(shape, pool)) for shape in extractor.shapes.values())
    return values * DTYPES[dtype].itemsize


def _check_repeatable(extractor: Extractor) -> None:
    """Refuse what gives other values at each call: a store of it could be neither resumed nor searched."""
    identity = extractor.identity
    for name, value, remedy in (("noise", "fresh", "image"), ("latent", "sample", "mode")):
        if identity.get(name) == value:
            raise ValueError(f"{name}={value!r} is different each time and cannot be stored; use {name}={remedy!r}")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            given, least = (size - 1, 0) if name == "workers" else (size, 1)
            raise ValueError(f"{name}={given}; give at least {least}")


def _manifest(
    extractor: Extractor, listing: Listing, pool: str, dtype: str, cond: str | None, batch_size: int, shard_size: int
) -> Manifest:
    """The manifest of a store that has just begun."""
    taps = {
        key: {
            "shape": list(pooled_shape(shape, pool)),
            "dtype": dtype,
            "channels": extractor.blocks[key].channels,
            "stride": extractor.blocks[key].stride,
        }
        for key, shape in extractor.shapes.items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "complete": False,
        "identity": store_identity(extractor, listing.table, pool, dtype, cond),
        "provenance": provenance(extractor, batch_size),
        "shard_size": max(1, min(shard_size, SHARD_BYTES // _image_bytes(extractor, pool, dtype))),
        "taps": taps,
    }


def _complete(job: Job, manifest: Manifest, progress: Progress, encoded: Told | None) -> Timing:
    """Fill the shards that lack, then seal the store."""
    keys = list(manifest["taps"])
    shards = shards_of(len(job.listing), manifest["shard_size"])
    records = {shard: shard_record(job.folder, shard, keys) for shard in shards}
    pending = [shard for shard in shards if records[shard] is None]
    if pending:
        conds = job.conds
        told = None if conds is None else dict.fromkeys(cond for one in pending for cond in conds[one.start : one.stop])
        job.extractor.learn(told, encoded)
    counts = Counts(len(job.listing), progress)
    for shard, record in records.items():
        if record is not None:
            counts.add(shard.stop - shard.start, record["failures"])
    started, first = perf_counter(), counts.done
    spent = dict.fromkeys(("decode", "forward", "pooling", "write"), 0.0)
    fill(job, pending, spent, counts)
    if pending or not manifest["complete"]:
        _seal(job.folder, manifest, [records[one] or shard_record(job.folder, one, keys) for one in shards])
    timing = Timing(counts.done - first, job.workers, **spent, total=perf_counter() - started)
    _log.info("%s", timing.sentence)
    return timing


def _drop_failed(folder: Path, manifest: Manifest, images: int) -> Manifest:
    """Remove the shards with failures, so that they are done again; the manifest, which is complete no longer."""
    records = {
        one: shard_record(folder, one, list(manifest["taps"])) for one in shards_of(images, manifest["shard_size"])
    }
    failed = [shard for shard, record in records.items() if record is not None and record["failures"]]
    if not failed:
        return manifest
    manifest = {key: value for key, value in manifest.items() if key not in ("sha256", "shards")} | {"complete": False}
    publish(folder, {MANIFEST: manifest_bytes(manifest)})
    for shard in failed:
        for name in shard.files:
            (folder / name).unlink(missing_ok=True)
    return manifest


def _seal(folder: Path, manifest: Manifest, records: Sequence[dict[str, Any] | None]) -> None:
    """Join the failures, and write the manifest that says the store is complete."""
    lost = [index for index, record in enumerate(records) if record is None]
    if lost:
        raise OSError(
            errno.EIO, f"shard {lost[0]} went away after it was written; run the same export again", str(folder)
        )
    found = [read_parquet(folder / f"{record['name']}.failures.parquet") for record in records if record]
    failures = parquet_bytes(pa.concat_tables([FAILED.empty_table(), *found]))
    publish(folder, {FAILURES: failures})
    hashes = {LIST: sha256((folder / LIST).read_bytes()), FAILURES: sha256(failures)}
    publish(folder, {MANIFEST: manifest_bytes({**manifest, "complete": True, "sha256": hashes, "shards": records})})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield


def _check_space(folder: Path, need: int) -> None:
    there = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(folder).free
    if need - there > free:
        raise OSError(errno.ENOSPC, f"about {need - there} bytes are needed and {free} are free", str(folder))


@contextmanager
def _explained(need: int) -> Iterator[None]:
    """Say with an error of writing what is needed, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        advice = f"the whole store takes about {need} bytes; make room or get permission, and run the same export again"
        raise OSError(error.errno, f"{error.strerror}; {advice}", error.filename) from error
