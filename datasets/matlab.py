"""MATLAB files: the one place that reads them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from scipy.io import loadmat

Taken = TypeVar("Taken")


def read_mat(path: Path, what: str, take: Callable[[Mapping[str, Any]], Taken]) -> Taken:
    """What `take` makes of a file's variables; ValueError, naming the file and `what` was looked for, for others."""
    try:
        return take(loadmat(path))
    except Exception as error:  # scipy raises nearly anything for a damaged file, and `take` for another content
        raise ValueError(f"cannot read {what} of {path}; unpack it again") from error
