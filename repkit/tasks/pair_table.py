"""The table of matches of pairs on the disk: its columns, the parts it grows by, and the pairs that are in it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from repkit.publishing import parquet_bytes, publish
from repkit.shards import read_parquet

MATCHES = "matches.parquet"

# A row a point, all places (x, y) in pixels of their image. x, y: in the source; true, found: in the target. still: the
# same place in the target, by which alone a match could be found; stayed: whether the match, or the true place, lies
# within a cell of it. clamped: the point was not on the source image, and was moved to its edge. made_of: a hash of the
# files whose features decided the match.
COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("pair", "category", "source", "target", "name")]
    + [(f"{what}{axis}", pa.float64()) for what in ("", "true_", "found_", "still_") for axis in "xy"]
    + [("score", pa.float32())]
    + [(name, pa.bool_()) for name in ("mirrored", "stayed", "true_stayed", "clamped")]
    + [(name, pa.float64()) for name in ("box_length", "image_length")]
    + [(f"{image}_{side}", pa.int32()) for image in ("source", "target") for side in ("width", "height")]
    + [("made_of", pa.string())]
)


def kept_pairs(folder: Path, made_of: Mapping[str, str | None]) -> dict[str, pa.Table]:
    """The rows of the pairs that earlier runs have written, by id; those made of something else are left out."""
    tables = [read_parquet(path) for path in (folder / MATCHES, *_parts(folder)) if path.is_file()]
    pairs = [pair for table in tables if table.schema.equals(COLUMNS) for pair in by_pair(table)]
    return {name: rows for name, rows in pairs if rows["made_of"][0].as_py() == made_of.get(name, "")}


def write_part(folder: Path, tables: Sequence[pa.Table]) -> None:
    """Write what was matched since the last part, if anything, under the next free number."""
    if tables:
        numbers = [int(path.stem.removeprefix("part-")) for path in _parts(folder)]
        name = f"part-{max(numbers, default=-1) + 1:06d}.parquet"
        publish(folder, {name: parquet_bytes(pa.concat_tables(tables))})


def write_table(folder: Path, table: pa.Table) -> None:
    """Write the table of all pairs in place of its parts."""
    publish(folder, {MATCHES: parquet_bytes(table)})
    for path in _parts(folder):
        path.unlink()


def by_pair(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each pair, which follow each other, with its id."""
    ids = table["pair"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield table["pair"][start].as_py(), table.slice(start, stop - start)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))
