"""Precision: float32 as it is written, without the shorter mantissa (TF32) that CUDA may give its products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 inside; afterwards what was set before. The switches are those of the whole process, not of a thread."""
    switches, exact = _switches()
    before = [getattr(owner, name) for owner, name in switches]
    try:
        for owner, name in switches:
            setattr(owner, name, exact)
        yield
    finally:
        for (owner, name), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _switches() -> tuple[list[tuple[Any, str]], Any]:
    """Where matrix products and convolutions have their switch, and what turns it off.

    The older switches raise an error where somebody has set the newer ones, so they serve older versions only.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [(matmul, "fp32_precision"), (cudnn.conv, "fp32_precision")], "ieee"
    return [(matmul, "allow_tf32"), (cudnn, "allow_tf32")], False
