"""Errors of images told captions as one Parquet table, made an image at a time and taken up where it stopped."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from repkit.datasets.captions import Example
from repkit.publishing import made, parquet_bytes, publish, sha256
from repkit.shards import locked, read_parquet
from repkit.tasks.judging import Judge
from repkit.tasks.resuming import claim

SCORES = "scores.parquet"
# error: of the image told the caption. null_error: told nothing, where images are compared.
COLUMNS = pa.schema(
    [("id", pa.string()), ("image", pa.int32()), ("path", pa.string()), ("caption", pa.int32()), ("text", pa.string())]
    + [("right", pa.bool_()), ("tags", pa.list_(pa.string())), ("error", pa.float64()), ("null_error", pa.float64())]
)
_log = logging.getLogger("repkit")


Progress = Callable[[int, int, int, str], None]  # images done, of how many, failed, and in words what is going on


@dataclass(frozen=True)
class Unit:
    """An image of an example: what is done in one go."""

    number: int
    example: Example
    image: int

    @property
    def file(self) -> str:
        return f"part-{self.number:06d}.parquet"

    @property
    def name(self) -> str:
        return f"image {self.image} of {self.example.id}"


@dataclass(frozen=True, eq=False)
class CaptionScores:
    """The errors that were found, a row for each image and caption in order, and why images have none, by name."""

    table: pa.Table
    failures: dict[str, str]


def score_captions(
    examples: Sequence[Example],
    judge: Judge,
    out: str | Path,
    *,
    progress: Progress | None = None,
) -> CaptionScores:
    """Judge every image of `examples` and write OUT/scores.parquet; images done by an earlier run are kept.

    An image that cannot be read has no rows, and is tried again by the next run. Raises ValueError where `out` holds
    scores of other examples or settings, BlockingIOError where another process is writing there.
    """
    folder, tell = Path(out), progress or (lambda *_: None)
    units = [Unit(n, *of) for n, of in enumerate((e, i) for e in examples for i in range(len(e.images)))]
    with made(folder), locked(folder):
        claim(folder, judge.identity | {"examples": _hash(examples)}, "scores")
        done, failures = _kept(folder, units), dict[str, str]()
        left, count = [unit for unit in units if unit.number not in done], len(done)
        tell(count, len(units), 0, "")
        texts = (text for unit in left for text in unit.example.captions)
        judge.learn(texts, lambda known, of: tell(count, len(units), 0, f"{known}/{of} captions encoded"))
        for start, unit in enumerate(left, count):
            try:
                done[unit.number] = _judged(unit, judge)
                publish(folder, {unit.file: parquet_bytes(done[unit.number])})
            except _Unreadable as error:
                failures[unit.name] = str(error)
                _log.warning("%s: %s", unit.name, error)
            tell(start + 1, len(units), len(failures), "")
        table = pa.concat_tables([COLUMNS.empty_table(), *(done[number] for number in sorted(done))])
        publish(folder, {SCORES: parquet_bytes(table)})
        for unit in units:
            (folder / unit.file).unlink(missing_ok=True)
    return CaptionScores(table, failures)


class _Unreadable(Exception):
    """An image, or what it is told, that is no reason to stop."""


def _judged(unit: Unit, judge: Judge) -> pa.Table:
    """The rows of one image; the null prompt is asked only where images have to be compared."""
    example, null = unit.example, len(unit.example.images) > 1
    try:
        errors = judge.errors(example.images[unit.image], example.captions, null)
    except (OSError, ValueError) as error:
        raise _Unreadable(str(error)) from error
    return _rows(unit, errors[: len(example.captions)], float(errors[-1]) if null else None)


def _rows(unit: Unit, errors: Float64[np.ndarray, " c"], null_error: float | None) -> pa.Table:
    example = unit.example
    source, right = example.images[unit.image], example.right[unit.image]
    rows = [
        {
            "id": example.id,
            "image": unit.image,
            "path": str(source) if isinstance(source, Path) else None,
            "caption": place,
            "text": text,
            "right": place == right,
            "tags": list(example.tags),
            "error": float(error),
            "null_error": null_error,
        }
        for place, (text, error) in enumerate(zip(example.captions, errors, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=COLUMNS)


def _hash(examples: Sequence[Example]) -> str:
    """sha256 over what is asked; files go by their names, so that a benchmark may be moved."""
    asked = [
        [e.id, [image.name if isinstance(image, Path) else sha256(image) for image in e.images], e.captions, e.right]
        + [e.tags]
        for e in examples
    ]
    return sha256(json.dumps(asked).encode())


def _kept(folder: Path, units: Sequence[Unit]) -> dict[int, pa.Table]:
    """The rows of the images that earlier runs have done, by their units' numbers."""
    kept = {unit.number: read_parquet(folder / unit.file) for unit in units if (folder / unit.file).is_file()}
    if (folder / SCORES).is_file():
        table = read_parquet(folder / SCORES)
        number = {(unit.example.id, unit.image): unit.number for unit in units}
        at: dict[int, list[int]] = {}
        for row, key in enumerate(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True)):
            at.setdefault(number[key], []).append(row)
        kept |= {of: table.slice(rows[0], len(rows)) for of, rows in at.items()}
    return kept
