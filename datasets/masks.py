"""Masks of classes: pictures and arrays whose values are numbers, turned into 0 ... k - 1 and IGNORE."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from repkit.images import FORMATS

IGNORE = 255  # pixels that do not count
Mask = Int64[np.ndarray, "H W"]
Source = Path | Callable[[], Any]  # a file, or a function that returns what could be in one
_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
_NO_CLASS = -1


def name_of(source: Any) -> str:
    """What errors call a source."""
    return str(source) if isinstance(source, Path) else "in memory"


def read_class_mask(source: Source, classes: int) -> Mask:
    """A mask whose values are classes already: 0 ... classes - 1, or IGNORE; ValueError, naming it, for others."""
    return read_mask(source, {value: value for value in range(classes)} | {IGNORE: IGNORE})


def read_mask(source: Source, classes: Mapping[int, int]) -> Mask:
    """The classes of a mask's pixels by `classes`, which maps the values in the file.

    Raises ValueError, naming the file, for values that it lacks and for what is no mask; OSError where it cannot be
    read.
    """
    values = read_values(source)
    table = np.full(max(classes) + 2, _NO_CLASS, np.int64)  # the last is of all values that are out of range
    table[list(classes)] = list(classes.values())
    found = table[values.clip(-1, len(table) - 1)]
    if (found == _NO_CLASS).any():
        strange = np.unique(values[found == _NO_CLASS])[:3].tolist()
        raise ValueError(
            f"mask {name_of(source)} has the value {', '.join(map(str, strange))}, which is no class; "
            f"have {_ranges(sorted(classes))}"
        )
    return found


def read_values(source: Source) -> Mask:
    """The numbers in a mask: of a palette or greyscale picture (PNG), of an .npy file or an array, as they are."""
    given = source() if callable(source) else source
    try:
        values = _load(given) if isinstance(given, Path) else _numbers(given)
    except Exception as error:  # a broken file makes PIL and numpy raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot read the mask {name_of(source)}: {reason}") from error
    return values


def _load(path: Path) -> Mask:
    if path.suffix == ".npy":
        return _numbers(np.load(path, allow_pickle=False))
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as picture:
        return _numbers(picture)


def _numbers(given: Any) -> Mask:
    if isinstance(given, Image.Image) and given.mode not in _MODES:
        raise ValueError(f"it is of mode {given.mode}; give palette or grey, whose values are numbers of classes")
    values = np.asarray(given)
    if values.ndim != 2 or not np.array_equal(values, numbers := values.astype(np.int64)):
        raise ValueError(f"it is {values.dtype} of shape {list(values.shape)}; give whole numbers [H W]")
    return numbers


def _ranges(values: list[int]) -> str:
    """Whole numbers in short: 0 ... 20, 255."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} ... {run[-1]}" for run in runs)
