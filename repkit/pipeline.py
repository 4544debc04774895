"""The work of an export: decoded images through the extractor into shards, with every stage beside the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from repkit.decoding import Decoded, decode_ahead
from repkit.extractors import Extractor
from repkit.features import Features, all_finite, check_finite
from repkit.images import to_tensor
from repkit.planning import Listing
from repkit.pooling import pool as pool_map
from repkit.pooling import pooled_shape
from repkit.publishing import publish
from repkit.shards import Shard, encode_shard

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Job:
    """What stays the same through an export; `conds` holds one condition an image, or is None."""

    folder: Path
    listing: Listing
    conds: list[str] | None
    extractor: Extractor
    pool: str
    dtype: torch.dtype
    batch_size: int
    workers: int
    max_pixels: int


class Counts:
    """How far the export is, told to `progress` after each batch."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self.done, self.failed, self._progress = total, 0, 0, progress

    def add(self, done: int, failed: int) -> None:
        self.done, self.failed = self.done + done, self.failed + failed
        self._progress(self.done, self.total, self.failed)


def fill(job: Job, shards: Sequence[Shard], spent: dict[str, float], counts: Counts) -> None:
    """Extract and write shards; files are decoded before, and written while, the model works on others."""
    batches = [batch for shard in shards for batch in shard.batches(job.batch_size)]
    paths = ([job.listing.paths[index] for index in batch] for batch in batches)
    ahead = decode_ahead(paths, job.extractor.resize, job.workers, job.max_pixels)
    with closing(ahead) as decoded, _writer() as write:
        for shard in shards:
            parts: list[dict[str, Tensor]] = []
            rows: list[dict[str, Any]] = []
            for batch in shard.batches(job.batch_size):
                with _timed(spent, "decode"):
                    images = next(decoded)
                arrays, errors = _extract(job, batch, images, spent)
                parts.append(arrays)
                rows += _rows(job.listing.table.slice(batch.start, len(batch)), images, errors)
                counts.add(len(batch), sum(error is not None for error in errors))
            with _timed(spent, "write"):
                write(partial(_write, job, shard, parts, rows))
        with _timed(spent, "write"):
            write(lambda: None)


def _extract(
    job: Job, batch: range, images: Sequence[Decoded], spent: dict[str, float]
) -> tuple[dict[str, Tensor], list[str | None]]:
    """The stored arrays of the images that have no error, and the error of each image or None."""
    errors = [image.error for image in images]
    if None not in errors:
        return {}, errors
    cond = None if job.conds is None else job.conds[batch.start : batch.stop]
    with _timed(spent, "forward"):
        features = job.extractor(_pixels(images, job.extractor.resize.shape), cond, check=False)
        _synchronize(features)
    with _timed(spent, "pooling"):
        mask = _masks(images)
        stored = {key: pool_map(maps, job.pool, _like(mask, maps)).to(job.dtype) for key, maps in features.items()}
        errors = _refuse_non_finite(features, stored, errors)
        good = torch.tensor([error is None for error in errors])
        return {key: values.cpu()[good] for key, values in stored.items()}, errors


def _pixels(images: Sequence[Decoded], shape: tuple[int, int]) -> Tensor:
    """The images as [b 3 H W] in [0, 1]; one that could not be read is black, so that no other moves."""
    blank = np.zeros((*shape, 3), np.uint8)
    return to_tensor(np.stack([blank if image.pixels is None else image.pixels for image in images]))


def _masks(images: Sequence[Decoded]) -> Tensor | None:
    found = [image.mask for image in images if image.mask is not None]
    if not found:
        return None
    full = np.ones_like(found[0])
    return torch.from_numpy(np.stack([full if image.mask is None else image.mask for image in images]))


def _like(mask: Tensor | None, maps: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(maps.device)


def _synchronize(features: Features) -> None:
    """Wait for the forward, so that its time is not taken for that of the copy, which would wait anyway."""
    device = next(iter(features.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _refuse_non_finite(
    features: Features, stored: Mapping[str, Tensor], errors: Sequence[str | None]
) -> list[str | None]:
    """The errors, with one more for each image that has a value which is not finite, or not any more when stored."""
    errors = list(errors)
    for key, maps in features.items():
        if all_finite(maps) and all_finite(stored[key]):
            continue
        bad = (~torch.isfinite(stored[key])).flatten(1).any(1) | (~torch.isfinite(maps)).flatten(1).any(1)
        for index in bad.nonzero().flatten().tolist():
            errors[index] = errors[index] or _why_not_finite(
                key, maps[index : index + 1], stored[key].dtype, features.identity.get("dtype")
            )
    return errors


def _why_not_finite(key: str, maps: Tensor, dtype: torch.dtype, computed: str | None) -> str:
    try:
        check_finite({key: maps}, computed)
    except FloatingPointError as error:
        return str(error)
    limit = torch.finfo(dtype).max
    return (
        f"{key} does not fit into {str(dtype).removeprefix('torch.')} (at most {limit:g}); export with dtype='bfloat16'"
    )


def _rows(table: pa.Table, images: Sequence[Decoded], errors: Sequence[str | None]) -> list[dict[str, Any]]:
    """What the tables say of each image; `error` is None for those that have features."""
    found = zip(table.to_pylist(), images, errors, strict=True)
    return [
        {**row, "width": image.size[0], "height": image.size[1], "sha256": image.sha256, "error": error}
        for row, image, error in found
    ]


def _write(job: Job, shard: Shard, parts: Sequence[Mapping[str, Tensor]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Put a shard in place, also one without any good image."""
    good = [row for row in rows if row["error"] is None]
    arrays = {}
    for key, shape in job.extractor.shapes.items():
        none = torch.empty((0, *pooled_shape(shape, job.pool)), dtype=job.dtype)
        arrays[key] = torch.cat([none, *(part[key] for part in parts if part)])
    table = [{**row, "row": index} for index, row in enumerate(good)]
    failures = [{"path": row["path"], "error": row["error"]} for row in rows if row["error"] is not None]
    publish(job.folder, encode_shard(shard, arrays, table, failures))


@contextmanager
def _writer() -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that runs a task in a thread, once the one before has ended, whose error it raises."""
    last: list[Future[None]] = []

    def submit(task: Callable[[], None]) -> None:
        if last:
            last.pop().result()
        last.append(thread.submit(task))

    with ThreadPoolExecutor(1, thread_name_prefix="repkit-write") as thread:
        yield submit


@contextmanager
def _timed(spent: dict[str, float], stage: str) -> Iterator[None]:
    started = perf_counter()
    try:
        yield
    finally:
        spent[stage] += perf_counter() - started
