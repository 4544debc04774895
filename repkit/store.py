"""FeatureStore: a folder of shards, read like a dataset."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from repkit.features import Identity
from repkit.shards import FAILURES, LIST, ROWS, read_manifest, read_parquet


@dataclass(frozen=True)
class Timing:
    """Seconds of an export, as its main thread spent them; decoding and writing count only while they are waited for.

    images: how many were done. workers: of the decoding. total: with what none of the others covers.
    """

    images: int
    workers: int
    decode: float
    forward: float
    pooling: float
    write: float
    total: float

    @property
    def bottleneck(self) -> str:
        """The stage that took longest: decode, forward, pooling or write."""
        return max(("decode", "forward", "pooling", "write"), key=lambda stage: getattr(self, stage))

    @property
    def sentence(self) -> str:
        """The rate, the slowest stage, and what would help."""
        if not self.images:
            return "There was nothing left to do."
        advice = {
            "decode": f"the model waited for images: more workers than {self.workers} may help",
            "forward": "the model is the limit: fewer or earlier taps, or a faster device would help",
            "pooling": "pooling and copying are the limit: a smaller pooling or dtype would help",
            "write": "the disk is the limit: pooling, a 16-bit dtype or a faster disk would help",
        }
        stage, total = self.bottleneck, max(self.total, 1e-9)
        share = getattr(self, stage) / total
        return f"{self.images} images at {self.images / total:.1f} a second, {share:.0%} on {stage}: {advice[stage]}."


class FeatureStore:
    """What `export` wrote: for each image that could be read its arrays and its row, in the order of the list.

    `keys`: the taps. `taps`: for each its `shape` without the image axis, stored `dtype`, `channels` and `stride` of
    the map it came from. `identity`: {"extractor": the extractor's identity, "cond", "pool", "dtype"}. `provenance`:
    versions, device and the like. `complete`: False while an export has not ended; then nothing can be read.
    `timing`: where the time went, for the call of `export` that returned this store. Arrays are memory-mapped: only
    what is asked for is read.

    Raises FileNotFoundError for a missing folder and ValueError for one that is no store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._manifest = read_manifest(self.path)
        self.identity: Identity = self._manifest["identity"]
        self.provenance: dict[str, Any] = self._manifest["provenance"]
        self.complete: bool = self._manifest["complete"]
        self.taps: dict[str, dict[str, Any]] = self._manifest["taps"]
        self.keys = tuple(self.taps)
        self.timing: Timing | None = None

    def __repr__(self) -> str:
        size = f"{len(self)} images" if self.complete else "not complete"
        return f"FeatureStore({str(self.path)!r}: {size}, {', '.join(self.keys)})"

    def __len__(self) -> int:
        """How many images have features."""
        return sum(shard["rows"] for shard in self._shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{key: its array, ..., "row": the image's row of `table`}; IndexError past the last image."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"no image {index}; there are {count}")
        index %= count
        ends = list(accumulate(shard["rows"] for shard in self._shards))
        place = int(np.searchsorted(ends, index, side="right"))
        shard = self._shards[place]
        row = index - ends[place] + shard["rows"]
        arrays = {key: _to_numpy(self._read(shard, key, slice(row, row + 1)))[0] for key in self.keys}
        return {**arrays, "row": self.table.slice(index, 1).to_pylist()[0]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def array(self, key: str | None = None, split: str | None = None) -> Float[np.ndarray, "n ..."]:
        """The features of all images, or of one split, in the order of `table`; bfloat16 comes as float32.

        `key` may be left out where there is one only. Raises ValueError for an unknown key or split.
        """
        key = self._key(key)
        chosen = self._chosen(split)
        kind = np.float16 if self.taps[key]["dtype"] == "float16" else np.float32
        out = np.empty((int(chosen.sum()), *self.taps[key]["shape"]), kind)
        first = done = 0
        for shard in self._shards:
            here = chosen[first : first + shard["rows"]]
            count = int(here.sum())
            if count:
                values = _to_numpy(self._read(shard, key, slice(None)))
                out[done : done + count] = values if count == len(here) else values[here]
            first, done = first + shard["rows"], done + count
        return out

    @cached_property
    def table(self) -> pa.Table:
        """One row an image: id, path (absolute), label, split, width, height, sha256 of the file, row in `array`."""
        found = [self._parquet(f"{shard['name']}.parquet").cast(ROWS) for shard in self._shards]
        table = pa.concat_tables([ROWS.empty_table(), *found]).replace_schema_metadata(None)
        rows = pa.array(np.arange(table.num_rows), pa.int64())
        return self._absolute(table.set_column(table.schema.get_field_index("row"), "row", rows))

    @cached_property
    def failures(self) -> pa.Table:
        """The images without features: path (absolute) and error."""
        self._check_complete()
        return self._absolute(self._parquet(FAILURES))

    @cached_property
    def images(self) -> pa.Table:
        """The list that was exported, failures included: id, path (absolute), label, split, prompt."""
        return self._absolute(self._parquet(LIST))

    def verify(self) -> None:
        """Compare every file with its sha256 in the manifest; ValueError naming those that differ or are missing."""
        expected = dict(self._manifest.get("sha256", {}))
        for shard in self._shards:
            expected |= shard["sha256"]
        bad = [name for name, digest in expected.items() if _file_sha256(self.path / name) != digest]
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(expected)} files in {self.path} are damaged or missing: {', '.join(bad[:10])}; "
                "delete them and run the same export again"
            )

    @property
    def _shards(self) -> list[dict[str, Any]]:
        self._check_complete()
        return self._manifest["shards"]

    def _check_complete(self) -> None:
        if not self.complete:
            raise ValueError(f"{self.path} is not complete; run the same export again, it goes on where it stopped")

    def _key(self, key: str | None) -> str:
        if key is None and len(self.keys) == 1:
            return self.keys[0]
        if key is None or key not in self.keys:
            raise ValueError(f"no features {key!r} in {self.path}; have {', '.join(self.keys)}")
        return key

    def _chosen(self, split: str | None) -> np.ndarray:
        if split is None:
            return np.ones(len(self), bool)
        chosen = pc.fill_null(pc.equal(self.table["split"], split), False).to_numpy()
        if not chosen.any():
            have = ", ".join(filter(None, pc.unique(self.table["split"]).to_pylist())) or "none"
            raise ValueError(f"no split {split!r} in {self.path}; have {have}")
        return chosen

    def _read(self, shard: dict[str, Any], key: str, rows: slice) -> Tensor:
        path = self.path / f"{shard['name']}.safetensors"
        try:
            with safe_open(path, framework="pt") as arrays:
                return arrays.get_slice(key)[rows]
        except (SafetensorError, OSError) as error:
            raise ValueError(_damaged(path, error)) from error

    def _parquet(self, name: str) -> pa.Table:
        path = self.path / name
        try:
            return read_parquet(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(_damaged(path, error)) from error

    @cached_property
    def _root(self) -> str:
        """The folder that stored paths are relative to."""
        return ((self._parquet(LIST).schema.metadata or {}).get(b"root") or b"").decode()

    def _absolute(self, table: pa.Table) -> pa.Table:
        paths = [str(Path(self._root, path)) for path in table["path"].to_pylist()]
        return table.set_column(table.schema.get_field_index("path"), "path", pa.array(paths, pa.string()))


def _to_numpy(tensor: Tensor) -> Float[np.ndarray, "n ..."]:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is missing or damaged ({str(error).splitlines()[0]}); delete it and run the same export again"


def _file_sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
