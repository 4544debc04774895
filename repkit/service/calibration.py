"""Calibration: how many threads a search takes, and when FAISS multiplies matrices, measured on the index itself.

More threads can make a search slower where others want the cores too, and FAISS compares few queries one by one, with
the vectors of "flat" and the centroids of "ivf", unless told otherwise; which is better depends on machine and index.
"""

import os
from collections.abc import Callable, Iterable
from itertools import product
from math import prod
from pathlib import Path
from time import perf_counter

import faiss
import numpy as np
from jaxtyping import Float32
from threadpoolctl import threadpool_limits

BATCHES = (1, 32)  # queries: a client alone, and several at once
BLOCK = 8192  # vectors that FAISS multiplies with the queries at once: with its 1,024, threads wait more for each other
REPEATS = 3
SECONDS = 4.0  # no further setting is tried after so long
_FIXED = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")

Search = Callable[[Float32[np.ndarray, "q d"]], object]


def calibrate(search: Search, queries: Float32[np.ndarray, "q d"], *, multiplies: bool) -> tuple[int, int]:
    """Choose threads and FAISS's threshold for products, and leave them set; the two.

    search: of some queries, with the settings most use. queries: at least one; they are repeated. multiplies: whether
    FAISS may, as for "flat" and for the centroids of "ivf". To be called in the thread that will search: FAISS keeps
    the number of threads for each. The settings hold for the whole process; numbers of threads in the environment are
    left as they are.
    """
    faiss.cvar.distance_compute_blas_database_bs = BLOCK
    before = faiss.cvar.distance_compute_blas_threshold
    candidates = list(product(_threads(), (before, 1) if multiplies else (before,)))
    begun, best, chosen = perf_counter(), np.inf, candidates[0]
    for candidate in candidates if len(candidates) > 1 else ():
        _set(*candidate)
        # The product, so that a share gained counts the same at every batch.
        seconds = prod(_fastest(search, np.resize(queries, (batch, queries.shape[1]))) for batch in BATCHES)
        if seconds < 0.95 * best:  # less is within the noise
            best, chosen = seconds, candidate
        if perf_counter() - begun > SECONDS:
            break
    _set(*chosen)
    return chosen


def _fastest(search: Search, queries: Float32[np.ndarray, "q d"]) -> float:
    found = []
    for _ in range(REPEATS):
        begun = perf_counter()
        search(queries)
        found.append(perf_counter() - begun)
    return min(found) / len(queries)


def _set(threads: int, threshold: int) -> None:
    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_threshold = threshold
    if not any(name in os.environ for name in _FIXED):
        threadpool_limits(threads, user_api="blas")


def _threads() -> Iterable[int]:
    """The numbers to try: powers of two up to the cores that this process may use."""
    for name in _FIXED:
        if os.environ.get(name, "").isdecimal():
            return [max(1, int(os.environ[name]))]
    most = cores()
    return sorted({1, most, *(2**power for power in range(1, most.bit_length()) if 2**power < most)})


def cores() -> int:
    """The processors that this process may use, by its affinity and its group's quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_MAX.read_text().split()
        return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed
