"""Precision: float32 as it is written, without the shorter mantissa (TF32) that CUDA may give its products."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_lock = Lock()
_inside: list[Any] = []  # what was set before the first of those that are inside now came, once for each of them


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 inside; when the last has left, what was set before. The switches are those of the whole process."""
    switches, exact = _switches()
    with _lock:
        before = _inside[0] if _inside else [getattr(owner, name) for owner, name in switches]
        _inside.append(before)
        _set(switches, [exact] * len(switches))
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            if not _inside:
                _set(switches, before)


def _set(switches: list[tuple[Any, str]], values: list[Any]) -> None:
    for (owner, name), value in zip(switches, values, strict=True):
        setattr(owner, name, value)


def _switches() -> tuple[list[tuple[Any, str]], Any]:
    """Where matrix products and convolutions have their switch, and what turns it off.

    The older switches raise an error where somebody has set the newer ones, so they serve older versions only.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [(matmul, "fp32_precision"), (cudnn.conv, "fp32_precision")], "ieee"  # type: ignore[attr-defined]
    return [(matmul, "allow_tf32"), (cudnn, "allow_tf32")], False
