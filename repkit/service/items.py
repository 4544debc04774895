"""What goes into a live index and what comes out, and what is refused at the door."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

Value = str | int | float | bool
Metadata = Mapping[str, Value]  # a column that is missing has no entry; None stands for that in what is given

ID_LENGTH, NAME_LENGTH, COLUMNS, METADATA_LENGTH = 512, 128, 256, 65_536
_UNPLAIN, _SURROGATE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]"), re.compile(r"[\ud800-\udfff]")
TYPES = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}


@dataclass(frozen=True, eq=False)
class Item:
    """A vector to keep under an id, with values to filter by and the bytes of its picture; checked when it is kept."""

    id: str
    vector: np.ndarray  # [d] of numbers
    metadata: Mapping[str, Any] = field(default_factory=dict)
    image: bytes | None = None


@dataclass(frozen=True, eq=False)
class Stored:
    """An item as it is kept; `version` is that of the change that wrote it, `vector` of length 1 under "cosine"."""

    id: str
    metadata: Metadata
    vector: Float32[np.ndarray, " d"]
    version: int


@dataclass(frozen=True)
class Listed:
    """An item of a list, without its vector."""

    id: str
    metadata: Metadata


@dataclass(frozen=True)
class Effort:
    """How thoroughly to search: every vector, or as many as `ef` of a graph and `nprobe` of lists; None: as tuned."""

    exact: bool = False
    ef: int | None = None
    nprobe: int | None = None


TUNED = Effort()


@dataclass(frozen=True)
class Hit:
    """A found item; score: the cosine or inner product, of which more is nearer, or for "l2" the distance."""

    id: str
    score: float
    metadata: Metadata


@dataclass(frozen=True)
class Answer:
    """The hits of each query, nearest first, all from one state of the index.

    exact: no vector was left out. version: of the last change seen. scanned: among how many items was chosen.
    """

    hits: list[list[Hit]]
    exact: bool
    version: int
    scanned: int


def check_id(given: object) -> str:
    """The id, which is any text of 1 to 512 characters without control characters; else ValueError."""
    if not isinstance(given, str) or not 0 < len(given) <= ID_LENGTH or not _plain(given):
        shown = repr(given)[:80]
        raise ValueError(f"id {shown} is no text of 1 to {ID_LENGTH} characters without control characters")
    return given


def _plain(text: str) -> bool:
    """Whether there are no control characters and no halves of surrogate pairs, which UTF-8 cannot hold."""
    return _UNPLAIN.search(text) is None


def check_distinct(ids: Sequence[str]) -> None:
    """ValueError where an id comes twice: which of the two is meant cannot be known."""
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"id {twice!r} is given twice; give each once")


def check_metadata(given: object) -> dict[str, Value | None]:
    """Names with text, numbers, truth values or None; ValueError for anything else, naming the column."""
    if not isinstance(given, Mapping):
        raise ValueError(f"metadata is {type(given).__name__}; give names with text, numbers, true or false")
    if len(given) > COLUMNS:
        raise ValueError(f"metadata has {len(given)} columns; at most {COLUMNS} are kept")
    for name, value in given.items():
        _check_name(name)
        _check_value(name, value)
    return dict(given)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= NAME_LENGTH or not _plain(name) or name == "id":
        raise ValueError(
            f"column {repr(name)[:80]} of the metadata: give a name other than 'id', of 1 to {NAME_LENGTH} characters"
        )


def _check_value(name: str, value: object) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise ValueError(f"column {name!r} of the metadata is text that UTF-8 cannot hold")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"column {name!r} of the metadata is {str(value)[:30]}; integers have 64 bits")
    elif not isinstance(value, float):
        raise ValueError(f"column {name!r} of the metadata is {type(value).__name__}; give text, a number or a bool")
    elif not math.isfinite(value):
        raise ValueError(f"column {name!r} of the metadata is {value}; leave out NaN and infinities")


def check_vectors(given: Any, dimension: int, what: str) -> Float32[np.ndarray, "n d"]:
    """The array in float32; ValueError for what is not a finite matrix of that many columns."""
    values = np.asarray(given)
    if values.ndim != 2 or values.dtype.kind not in "fiu" or values.shape[1] != dimension:
        raise ValueError(f"{what} are {values.dtype} of shape {values.shape}; give numbers of shape [n {dimension}]")
    with np.errstate(over="ignore"):  # told just below
        values = np.ascontiguousarray(values, np.float32)
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise ValueError(f"row {int(finite.argmin())} of the {what} is not finite; leave out NaN and infinities")
    return values


def check_counts(**counts: int | None) -> None:
    """ValueError for a count below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; give at least 1")


def type_of(value: Value) -> str:
    """The name of the column type that holds such a value."""
    if isinstance(value, bool):
        return "boolean"
    return "integer" if isinstance(value, int) else "number" if isinstance(value, float) else "string"


def widened(columns: Mapping[str, str], metadata: Metadata) -> dict[str, str]:
    """The columns with those that the metadata adds; a column of integers takes numbers and is one of numbers then.

    Raises ValueError for a value of another type than its column, and for too many columns.
    """
    known = dict(columns)
    for name, value in metadata.items():
        given, have = type_of(value), known.get(name)
        if have in (None, given) or (have, given) == ("integer", "number"):
            known[name] = given
        elif (have, given) != ("number", "integer"):
            raise ValueError(f"column {name!r} holds values of type {have} and {value!r:.80} is of type {given}")
    if len(known) > COLUMNS:
        raise ValueError(f"there would be {len(known)} columns of metadata; at most {COLUMNS} are kept")
    return known


def encode_metadata(metadata: Mapping[str, Value | None]) -> str:
    """The metadata as it is stored: JSON in which the same metadata are always the same text."""
    kept = {name: value for name, value in metadata.items() if value is not None}
    text = json.dumps(kept, ensure_ascii=False, sort_keys=True, allow_nan=False, separators=(",", ":"))
    if len(text) > METADATA_LENGTH:
        raise ValueError(f"the metadata of an item are {len(text)} characters of JSON; at most {METADATA_LENGTH} fit")
    return text


def table_of(ids: Sequence[str], metadata: Sequence[Metadata], columns: Mapping[str, str]) -> pa.Table:
    """The items as a table: `id` and a column for each name, null where an item has no such value."""
    arrays = [pa.array(ids, pa.string())]
    arrays += [
        pa.array([_plain_value(one.get(name), kind) for one in metadata], TYPES[kind]) for name, kind in columns.items()
    ]
    return pa.table(arrays, names=["id", *columns])


def _plain_value(value: Value | None, kind: str) -> Value | None:
    """An integer in a column of numbers as the nearest of them, as Arrow takes none beyond 53 bits."""
    return float(value) if kind == "number" and value is not None else value


def conformed(items: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """The table with exactly these columns: nulls where it has none, integers as numbers where they are so by now."""
    arrays = [items["id"]]
    for name, kind in columns.items():
        known = name in items.column_names
        arrays.append(items[name].cast(TYPES[kind], safe=False) if known else pa.nulls(len(items), TYPES[kind]))
    return pa.table(arrays, names=["id", *columns])
