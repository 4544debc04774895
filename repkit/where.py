"""Filters on the metadata of items: which rows a condition like {"label": "Bag", "width": {"gte": 64}} allows."""

from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from math import isfinite
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

Where = Mapping[str, Any]
Column = type[str] | type[int] | type[float] | type[bool]
ORDERS = {"gt": pc.greater, "gte": pc.greater_equal, "lt": pc.less, "lte": pc.less_equal}
OPERATORS = (*ORDERS, "ne", "not")
MOST_COLUMNS, MOST_VALUES, MOST_CHARACTERS = 32, 1000, 1000
_MOST_MASKS, _MOST_BYTES = 64, 1 << 25


def mask(items: pa.Table, where: Where) -> Bool[np.ndarray, " n"]:
    """True for the rows of which every condition holds.

    A condition is a value that the column equals, a list of which it is one, or a mapping of operators to values: "gt",
    "gte", "lt", "lte", and "ne" or "not", after which a list is none of which. None stands for a missing value, of
    which no order holds, but which differs from every other value. Raises ValueError as `check_where` does.
    """
    check_where(where, column_types(items))
    allowed = np.ones(len(items), bool)
    for name, condition in where.items():
        allowed &= _holds(_plain(items[name]), condition)
    return allowed


class Masks:
    """The masks of one table that were asked for last, in at most 32 MiB; any number of threads may ask.

    At a million rows, to compare a column with a text takes longer than to search the few vectors that it allows.
    """

    def __init__(self, items: pa.Table) -> None:
        self.items = items
        self._kept: OrderedDict[bytes, Bool[np.ndarray, " n"]] = OrderedDict()
        self._lock = Lock()

    def __call__(self, where: Where) -> Bool[np.ndarray, " n"]:
        """As `mask`; what it gives is not to be written to."""
        check_where(where, column_types(self.items))
        key = _key(where)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = mask(self.items, where)
        found.flags.writeable = False
        with self._lock:
            self._kept[key] = found
            most = min(_MOST_MASKS, _MOST_BYTES // max(1, len(found)))
            while len(self._kept) > most:
                self._kept.popitem(last=False)
        return found


def _key(where: Where) -> bytes:
    """The same for filters that are written alike, and short however long they are."""
    plain = [(name, [*one.items()] if isinstance(one, Mapping) else (one,)) for name, one in where.items()]
    return sha256(repr(plain).encode()).digest()


def column_types(items: pa.Table) -> dict[str, Column]:
    """The columns that can be filtered, and whether they hold str, int, float or bool."""
    found = {field.name: _column_type(field.type) for field in items.schema}
    return {name: kind for name, kind in found.items() if kind is not None}


def check_where(where: Any, columns: Mapping[str, Column]) -> None:
    """Raise ValueError naming the column, the operator or the type of value that is wrong, and what there is."""
    if not isinstance(where, Mapping):
        raise ValueError(f"where is a {type(where).__name__}; give a mapping of columns to conditions")
    if len(where) > MOST_COLUMNS:
        raise ValueError(f"where has {len(where)} columns; give at most {MOST_COLUMNS}")
    for name, condition in where.items():
        if name not in columns:
            raise ValueError(f"no column {name!r} to filter by; have {', '.join(sorted(columns)) or 'none'}")
        pairs = condition.items() if isinstance(condition, Mapping) else [("", condition)]
        for operator, value in pairs:
            _check_condition(name, operator, value, columns[name])


def _check_condition(name: str, operator: Any, value: Any, column: Column) -> None:
    if operator not in ("", *OPERATORS):
        raise ValueError(f"no operator {operator!r} (on {name}); have {', '.join(OPERATORS)}")
    if operator in ORDERS and (column is bool or value is None or isinstance(value, list | tuple)):
        raise ValueError(f"{name} holds {column.__name__}; {operator} needs one number or text, not {_short(value)}")
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > MOST_VALUES:
        raise ValueError(f"{len(values)} values for {name}; give at most {MOST_VALUES}")
    for one in values:
        _check_value(name, one, column)


def _check_value(name: str, value: Any, column: Column) -> None:
    accepted: Any = (int, float) if column in (int, float) else column
    if value is None:
        return
    if not isinstance(value, accepted) or (isinstance(value, bool) and column is not bool):
        raise ValueError(f"{name} holds {column.__name__} and is compared with {_short(value)}, a {_type(value)}")
    if isinstance(value, str):
        if len(value) > MOST_CHARACTERS:
            raise ValueError(f"a text of {len(value)} characters for {name}; give at most {MOST_CHARACTERS}")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"the text for {name} is not Unicode; leave out lone surrogates")
    elif not (_is_finite(value) if column is float else -(2**63) <= value < 2**63):
        raise ValueError(f"{name} is compared with {_short(value)}; give a finite number within 64 bits")


def _is_finite(value: int | float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # of an integer that no float holds
        return False


def _holds(values: pa.ChunkedArray, condition: Any) -> Bool[np.ndarray, " n"]:
    if not isinstance(condition, Mapping):
        return _among(values, condition)
    holds = np.ones(len(values), bool)
    for operator, value in condition.items():
        if operator in ORDERS:
            holds &= _numpy(ORDERS[operator](*_comparable(values, value)))
        else:
            holds &= ~_among(values, value)
    return holds


def _among(values: pa.ChunkedArray, wanted: Any) -> Bool[np.ndarray, " n"]:
    """Which values equal the wanted one, or one of them."""
    listed = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    given = [value for value in listed if value is not None]
    found = _numpy(pc.is_null(values)) if len(given) < len(listed) else np.zeros(len(values), bool)
    if pa.types.is_integer(values.type):
        given = [int(value) for value in given if value == int(value)]
    if pa.types.is_floating(values.type):
        given = [float(value) for value in given]
        given += [0.0, -0.0] if 0.0 in given else []  # of which Arrow tells the bits apart
    if len(given) == 1:  # several times as fast
        found = found | _numpy(pc.equal(values, pa.scalar(given[0], values.type)))
    elif given:
        found = found | _numpy(pc.is_in(values, value_set=pa.array(given, values.type)))
    return found


def _comparable(values: pa.ChunkedArray, value: Any) -> tuple[pa.ChunkedArray, pa.Scalar]:
    """Whole numbers compare with whole numbers; with others, both as float64."""
    if pa.types.is_floating(values.type):
        value = float(value)
    if pa.types.is_integer(values.type) and isinstance(value, float):
        values = pc.cast(values, pa.float64(), safe=False)
    return values, pa.scalar(value, values.type)


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """In one of the four types that comparisons are written for."""
    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    kind = _column_type(values.type)
    assert kind is not None
    return pc.cast(values, types[kind])


def _column_type(kind: pa.DataType) -> Column | None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return str
    if pa.types.is_boolean(kind):
        return bool
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return int
    return float if pa.types.is_floating(kind) else None


def _numpy(values: pa.ChunkedArray) -> Bool[np.ndarray, " n"]:
    """Null is False; Arrow's own ways to fill nulls and to unpack bits take many times as long."""
    return pc.cast(pc.and_kleene(pc.is_valid(values), values), pa.uint8()).to_numpy().view(bool)


def _type(value: Any) -> str:
    return type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
