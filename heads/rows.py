"""Rows of features that are read a few at a time: arrays, tensors, and what a feature store has on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from safetensors import safe_open
from torch import Tensor

from repkit.features import all_finite
from repkit.shards import read_manifest
from repkit.store import FeatureStore


class StoredRows:
    """One tap of a store as an array that stays on disk: `rows[numbers]` is a part of it, `np.asarray` reads it.

    fold: the shape that each row is given, where it is to differ from the stored one.
    """

    def __init__(
        self, parts: Sequence[Float[Tensor, "_n *s"]], numbers: Int[np.ndarray, " n"], fold: Sequence[int] | None = None
    ) -> None:
        self._parts, self._numbers, self._fold = parts, numbers, fold
        self.shape: tuple[int, ...] = (len(numbers), *(parts[0].shape[1:] if fold is None else fold))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, rows: Any) -> "StoredRows":
        return StoredRows(self._parts, self._numbers[rows], self._fold)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        half = self._parts[0].dtype == torch.float16
        out = np.empty((len(self), *self._parts[0].shape[1:]), np.float16 if half else np.float32)
        first = 0
        for part in self._parts:
            here = np.flatnonzero((self._numbers >= first) & (self._numbers < first + len(part)))
            if len(here):
                found = part[torch.from_numpy(self._numbers[here] - first)]
                out[here] = (found if half else found.float()).numpy()  # numpy has no bfloat16
            first += len(part)
        return out.reshape(self.shape).astype(dtype or out.dtype, copy=False)


class ScaledRows:
    """Rows less a mean, and over a scale, of each channel; both are applied when the rows are read."""

    def __init__(self, rows: "Array", mean: Float32[np.ndarray, " c"], scale: Float32[np.ndarray, " c"]) -> None:
        self.rows, self.mean, self.scale = rows, mean, scale
        self.shape: tuple[int, ...] = tuple(rows.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> "ScaledRows":
        return ScaledRows(self.rows[rows], self.mean, self.scale)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        channel = (-1, *[1] * (len(self.shape) - 2))
        scaled = (np.asarray(self.rows, np.float32) - self.mean.reshape(channel)) / self.scale.reshape(channel)
        return scaled.astype(dtype or np.float32, copy=False)


Array = np.ndarray | Tensor | StoredRows | ScaledRows  # [n c] or [n c h w]
Inputs = Array | Mapping[str, Array]  # of one tap, or of several by key


@dataclass(frozen=True, eq=False)
class Examples:
    """Features that a head reads, and the class of each row."""

    features: Inputs
    labels: Int[np.ndarray, " n"]

    def __getitem__(self, rows: Int[np.ndarray, " m"]) -> "Examples":
        x = self.features
        chosen = {key: array[rows] for key, array in x.items()} if isinstance(x, Mapping) else x[rows]
        return Examples(chosen, self.labels[rows])

    @property
    def by_key(self) -> Mapping[str, Array]:
        """The features as a mapping; of a single tap under the empty name."""
        return self.features if isinstance(self.features, Mapping) else {"": self.features}

    @property
    def key(self) -> str | None:
        """The name in `by_key` that a head reads; None where it reads several."""
        return None if isinstance(self.features, Mapping) else ""


def stored_rows(store: FeatureStore, key: str, fold: Sequence[int] | None = None) -> StoredRows:
    """The features of all images at one tap, in the order of the store's table, memory-mapped."""
    if key not in store.keys:
        raise ValueError(f"no features {key!r} in {store.path}; have {', '.join(store.keys)}")
    parts = []
    for shard in read_manifest(store.path)["shards"]:
        with safe_open(store.path / f"{shard['name']}.safetensors", framework="pt") as arrays:
            parts.append(arrays.get_tensor(key))
    return StoredRows(parts, np.arange(len(store)), fold)


def read(x: Array, rows: Int[np.ndarray, " b"] | slice) -> Float32[Tensor, "b ..."]:
    """Some rows as a tensor; ValueError for NaN or infinity."""
    values = torch.from_numpy(np.asarray(x[rows], dtype=np.float32))
    if not all_finite(values):
        bad = int((~torch.isfinite(values)).flatten(1).any(1).sum())
        raise ValueError(
            f"{bad} of {len(values)} rows of features hold NaN or infinity; drop them or use a wider dtype"
        )
    return values


def channel_moments(x: Array, chunk: int = 256) -> tuple[Float32[np.ndarray, " c"], Float32[np.ndarray, " c"]]:
    """Mean and standard deviation of each channel over rows and positions; a constant channel has deviation 1."""
    shift = read(x, slice(0, 1)).double().reshape(1, x.shape[1], -1).mean((0, 2))  # sums about 0 would lose digits
    total = torch.zeros(2, len(shift), dtype=torch.float64)
    count = 0
    for start in range(0, len(x), chunk):
        values = read(x, slice(start, start + chunk)).double()
        values = values.reshape(*values.shape[:2], -1) - shift[:, None]  # [b c h*w]
        total += torch.stack([values.sum((0, 2)), (values**2).sum((0, 2))])
        count += len(values) * values.shape[2]
    offset, square = total / count
    mean, deviation = offset + shift, (square - offset**2).clamp(min=0).sqrt()
    # The rounding error of a constant must not be blown up to unit variance.
    deviation[deviation <= 1e-6 * mean.abs()] = 1
    return mean.float().numpy(), deviation.float().numpy()
