"""Export: run an extractor over images and store what it finds, so that it can be interrupted at any point."""

import errno
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from repkit.decoding import Decoded, decode_ahead
from repkit.extractors import Extractor
from repkit.features import Features, check_finite
from repkit.images import to_tensor
from repkit.planning import (
    Listing,
    Manifest,
    begin,
    check_conditions,
    make_conditions,
    make_listing,
    provenance,
    store_identity,
)
from repkit.pooling import pool as pool_map
from repkit.pooling import pooled_shape
from repkit.shards import (
    FAILED,
    FAILURES,
    FORMAT,
    LIST,
    MANIFEST,
    VERSION,
    Shard,
    encode_shard,
    locked,
    manifest_bytes,
    parquet_bytes,
    publish,
    read_parquet,
    sha256,
    shard_record,
    shards_of,
)
from repkit.store import FeatureStore

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 1 << 28  # a shard is held in memory until it is written
ROW_BYTES = 256  # of the tables, for an image: about what id, path, label and hash take
_log = logging.getLogger("repkit")

Images = str | Path | Sequence[str | Path] | pa.Table
Progress = Callable[[int, int, int], None]
