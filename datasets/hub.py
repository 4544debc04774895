"""Any data set of Hugging Face's `datasets`, by the names of its columns."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from repkit.datasets.captions import picture
from repkit.datasets.layout import numbered
from repkit.datasets.masks import IGNORE, read_mask
from repkit.datasets.samples import Samples


@runtime_checkable
class Rows(Protocol):
    """What of `datasets.Dataset` is used: a table, of which an image is decoded only when its row is asked for."""

    @property
    def column_names(self) -> list[str]: ...
    @property
    def features(self) -> Mapping[str, Any]: ...
    def select_columns(self, column_names: list[str]) -> Any: ...
    def __len__(self) -> int: ...


def read_hub(
    rows: Rows,
    split: str | None = None,
    *,
    image: str = "image",
    label: str | None = None,
    mask: str | None = None,
    classes: Sequence[str] | None = None,
    values: Mapping[int, int] | None = None,
) -> Samples:
    """The rows of a `datasets.Dataset` (one split of a DatasetDict); `image`, `label` and `mask` name its columns.

    Images are pictures, bytes or absolute paths. classes: None takes the names that the label's feature has, else its
    texts, sorted, or "0", "1", ... to its largest number; masks need them. values: the class of each value in a mask,
    None where the values are classes; 255 is IGNORE. Raises ValueError for columns that are not there.
    """
    wanted = [name for name in (image, label, mask) if name is not None]
    if lacking := [name for name in wanted if name not in rows.column_names]:
        raise ValueError(f"no column {', '.join(lacking)}; have {', '.join(rows.column_names)}")
    if label is None and mask is None:
        raise ValueError(f"no label and no mask; name one of the columns {', '.join(rows.column_names)}")
    given = None if classes is None else tuple(classes)
    labels = None
    if label is not None:
        given, labels = _labels(rows, label, given)
    if given is None:
        raise ValueError(f"the masks of {mask!r} do not tell their classes; give classes=[...]")
    known = values or {number: number for number in range(len(given))} | {IGNORE: IGNORE}
    return Samples(
        given,
        _cells(rows, image),
        labels,
        None if mask is None else _cells(rows, mask),
        partial(read_mask, classes=dict(known)),
        split=split,
    )


def _cells(rows: Rows, column: str) -> tuple[partial[Any], ...]:
    only = rows.select_columns([column])  # or asking for an image would decode the row's mask too
    return tuple(partial(_cell, only, index, column) for index in range(len(rows)))


def _cell(rows: Any, index: int, column: str) -> Any:
    cell = rows[index][column]
    return picture(cell, Path()) if isinstance(cell, (str, bytes, Mapping)) else cell


def _labels(
    rows: Rows, column: str, classes: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Int64[np.ndarray, " n"]]:
    """Names of classes, and the class of each row."""
    found = rows.select_columns([column])[:][column]
    names = classes or tuple(getattr(rows.features[column], "names", None) or ())
    if all(isinstance(value, str) for value in found):
        names = names or tuple(sorted(set(found)))
        return names, numbered(found, names, Path(column))
    if not all(isinstance(value, int) for value in found):
        strange = next(value for value in found if not isinstance(value, int))
        raise ValueError(f"column {column!r} has the label {strange!r}; give one whole number or text in each row")
    return names or tuple(map(str, range(1 + max(found)))), np.array(found, np.int64)
