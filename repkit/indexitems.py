"""The items of an index: a table with a row a vector, of its id and whatever else is known of it."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

Metadata: TypeAlias = pa.Table | Mapping[str, Sequence[Any]] | None


def table_of(
    count: int,
    ids: Sequence[str] | None = None,
    labels: Sequence[str | None] | None = None,
    metadata: Metadata = None,
    first: int = 0,
) -> pa.Table:
    """Items of an array's rows: id, path, label and the columns of the metadata.

    ids: by default the row numbers, from `first` on. Raises ValueError where there is not one of each for each vector,
    for ids given twice, and for metadata that cannot be a table or names a column that has an argument of its own.
    """
    names = [str(row) for row in range(first, first + count)] if ids is None else list(ids)
    classes = [None] * count if labels is None else list(labels)
    if len(names) != count or len(classes) != count:
        raise ValueError(f"{len(names)} ids and {len(classes)} labels for {count} vectors; give one for each")
    text = pa.string()
    try:
        columns = [pa.array(names, text), pa.nulls(count, text), pa.array(classes, text)]
        known = metadata if isinstance(metadata, pa.Table) else pa.table({} if metadata is None else dict(metadata))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(f"ids and labels are texts, and metadata columns of one type each: {error}") from error
    if known.num_columns and len(known) != count:
        raise ValueError(f"{len(known)} rows of metadata for {count} vectors; give one for each")
    if len(set(known.column_names)) < known.num_columns:
        raise ValueError(f"metadata has columns of one name: {', '.join(known.column_names)}; rename one")
    table = pa.table(columns, names=["id", "path", "label"])
    for name in known.column_names:
        table = _with(table, name, known[name], given=labels is not None)
    check_ids(table["id"])
    return table


def _with(table: pa.Table, name: str, values: pa.ChunkedArray, given: bool) -> pa.Table:
    if name == "id" or (name == "label" and given):
        raise ValueError(f"metadata has a column {name!r}; give {name}s= in its place, and each once")
    if name in table.column_names:
        return table.set_column(table.schema.get_field_index(name), name, values)
    return table.append_column(name, values)


def check_ids(ids: pa.ChunkedArray) -> None:
    """Raise ValueError for an id that is there twice or missing."""
    if ids.null_count:
        raise ValueError("an id is missing; give a text for each vector")
    counts = pc.value_counts(ids.combine_chunks())
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise ValueError(f"id {twice.field('values')[0].as_py()!r} is given twice; ids must be distinct")


def joined(items: pa.Table, more: pa.Table) -> pa.Table:
    """Both tables' rows; a column that one lacks is empty there.

    Raises ValueError for an id that both have, and for columns of types that do not go together.
    """
    try:
        both = pa.concat_tables([items, more], promote_options="default").combine_chunks()
    except pa.ArrowException as error:
        raise ValueError(f"the new items do not go with those of the index: {str(error).splitlines()[0]}") from error
    check_ids(both["id"])
    return both


def rows_of(items: pa.Table, ids: Sequence[str]) -> Int64[np.ndarray, " m"]:
    """The rows of some ids; ValueError naming one that is not there."""
    if isinstance(ids, str):  # whose letters would be ids
        raise ValueError(f"give a list of ids, such as [{ids!r}]")
    found = pc.index_in(pa.array(list(ids), pa.string()), value_set=items["id"].combine_chunks())
    if found.null_count:
        missing = next(name for name, row in zip(ids, found.to_pylist(), strict=True) if row is None)
        raise ValueError(f"no item {missing!r} in the index, which has {len(items)}")
    return found.to_numpy().astype(np.int64)
