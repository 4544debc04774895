"""Measuring a list of images part by part: what a killed run has done is kept, and the same call goes on from there."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from repkit.decoding import Decoded, decode_ahead
from repkit.features import identity_differences
from repkit.images import to_tensor
from repkit.publishing import made, parquet_bytes, publish
from repkit.shards import FAILED, locked, read_parquet
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.errortable import ErrorTable

SETTINGS = "settings.json"
LOOK = 4  # evaluations a class at a strategy's first look
BATCHES, MOST = 16, 64  # that the first look at a part's images fills, and images: a kill should not cost much

Progress = Callable[[int, int], None]
_log = logging.getLogger("repkit")


@dataclass(frozen=True, eq=False)
class Measured:
    """The errors of part of the images, None where none could be read, and why others have none: path and error.

    earlier: whether another run has measured them.
    """

    table: ErrorTable | None
    failures: pa.Table
    earlier: bool = False


@dataclass(frozen=True)
class Kept:
    """The folder of what is done so far, and how many images are kept at a time; both stay as a run began."""

    folder: Path | None
    part_size: int


@dataclass(frozen=True)
class _Part:
    """The images `start` ... `stop` - 1 of the list; `errors` is not there where none of them could be read."""

    number: int
    start: int
    stop: int

    @property
    def errors(self) -> str:
        return f"part-{self.number:05d}.parquet"

    @property
    def failures(self) -> str:
        """What comes last: with it the part is done."""
        return f"part-{self.number:05d}.failures.parquet"


def part_size(classifier: DiffusionClassifier) -> int:
    """Images that together keep batches full also when classes have been given up."""
    rows = LOOK * len(classifier.prompts)
    return min(MOST, ceil(BATCHES * classifier.batch_size / rows))


def measure_images(
    classifier: DiffusionClassifier, listing: pa.Table, kept: Kept, progress: Progress | None = None
) -> Iterator[Measured]:
    """The errors of the listing's images, part by part, from the folder where they are there already.

    Batches do not straddle parts, so that what was interrupted has the very bits of what was not. progress: told
    (images done, images) from the moment that the work begins, at first what an earlier run has done. Raises
    FloatingPointError where the network returns something that is not finite.
    """
    starts = range(0, listing.num_rows, kept.part_size)
    parts = [_Part(n, start, min(start + kept.part_size, listing.num_rows)) for n, start in enumerate(starts)]
    waiting = [part for part in parts if kept.folder is None or not (kept.folder / part.failures).exists()]
    paths = listing["path"].to_pylist()
    ahead = decode_ahead((paths[part.start : part.stop] for part in waiting), classifier.resize, workers=1)
    with closing(ahead) as decoded:
        for part in parts:
            if kept.folder is not None and part not in waiting:
                yield _read(kept.folder, part)
                continue
            rows = listing.slice(part.start, part.stop - part.start)
            tell = _shifted(progress, part.start, len(paths))
            tell(0, rows.num_rows)
            measured = _measure(classifier, rows, next(decoded), tell)
            if kept.folder is not None:
                publish(kept.folder, _files(part, measured))
            yield measured


@contextmanager
def keeping(beside: Path | None, settings: Mapping[str, Any], size: int, own_size: int | None = None) -> Iterator[Kept]:
    """A folder BESIDE.parts for what is done so far, which goes when the block ends well; none beside nothing.

    settings: with identity and provenance. own_size: images a part as the user wants them, else `size`. Raises
    ValueError where the folder holds work of another identity, BlockingIOError where another process is at it.
    """
    if beside is None:
        yield Kept(None, own_size or size)
        return
    folder = _folder(beside)
    with made(beside.parent), made(folder), locked(folder):
        yield Kept(folder, _claim(folder, {**settings, "part_size": own_size or size}))
        _remove(folder)


def forget(beside: Path) -> None:
    """Remove what a run has left that was killed after its last file was in place."""
    if (_folder(beside) / SETTINGS).exists():
        _remove(_folder(beside))


def refuse_other(what: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise ValueError where the identities in two settings differ; warn where provenances do."""
    if differences := identity_differences(json.loads(json.dumps(mine["identity"])), theirs["identity"]):
        raise ValueError(f"{what} was made with other settings ({'; '.join(differences)}); choose another --out")
    for line in identity_differences(json.loads(json.dumps(mine["provenance"])), theirs["provenance"]):
        _log.warning("%s was begun with another provenance; its last bits may differ: %s", what, line)


def _folder(beside: Path) -> Path:
    return beside.with_name(f"{beside.name}.parts")


def _remove(folder: Path) -> None:
    """The settings go last, since they tell that the folder is ours."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == SETTINGS):
        path.unlink()
    folder.rmdir()


def _claim(folder: Path, settings: dict[str, Any]) -> int:
    """Write what the work depends on, or compare with what was written; the images a part, which stay."""
    path = folder / SETTINGS
    if not path.exists():
        if any(name != f"{SETTINGS}.part" for name in os.listdir(folder)):
            raise ValueError(f"{folder} has files that are no unfinished work; move it, or choose another --out")
        publish(folder, {SETTINGS: (json.dumps(settings, indent=1) + "\n").encode()})
        return settings["part_size"]
    stored = json.loads(path.read_text())
    refuse_other(folder, settings, stored)
    return stored["part_size"]


def _measure(
    classifier: DiffusionClassifier, rows: pa.Table, decoded: list[Decoded], progress: Progress | None
) -> Measured:
    good = [(name, one.pixels) for name, one in zip(rows["id"].to_pylist(), decoded, strict=True) if one.error is None]
    failed = [
        {"path": path, "error": one.error}
        for path, one in zip(rows["path"].to_pylist(), decoded, strict=True)
        if one.error is not None
    ]
    failures = pa.Table.from_pylist(failed, schema=FAILED)
    if not good:
        return Measured(None, failures)
    images = to_tensor(np.stack([pixels for _, pixels in good if pixels is not None]))
    return Measured(classifier.measure(images, ids=[name for name, _ in good], progress=progress), failures)


def _files(part: _Part, measured: Measured) -> dict[str, bytes]:
    errors = {} if measured.table is None else {part.errors: table_bytes(measured.table)}
    return {**errors, part.failures: parquet_bytes(measured.failures)}


def _read(folder: Path, part: _Part) -> Measured:
    errors = folder / part.errors
    table = ErrorTable.read(errors) if errors.exists() else None
    return Measured(table, read_parquet(folder / part.failures), earlier=True)


def table_bytes(table: ErrorTable) -> bytes:
    """A table of errors as the file that `write` makes."""
    sink = BytesIO()
    table.write(sink)
    return sink.getvalue()


def _shifted(progress: Progress | None, start: int, total: int) -> Progress:
    """A part's progress as that of the whole; who takes the part tells its end."""

    def shifted(done: int, of: int) -> None:
        if progress is not None and done < of:
            progress(start + done, total)

    return shifted
