"""What the service costs over a bare search: `python benchmarks/service.py` starts it and loads it over HTTP.

A flat index of real features (`benchmarks/search_vectors.py`), served by `repkit serve` in a process of its own on the
same machine as the client. Searches a second at saturation over the best that FAISS does with whole batches; what one
client waits longer than for a search in its own process; times at 70 % of the load, with and without writes; three
times the load; memory. The section `Service` of docs/BENCHMARKS.md. `--count` and `--seconds` make it smaller.
"""

import os

os.environ["GOMP_SPINCOUNT"] = "1000"  # as `repkit serve` has it, since FAISS alone is the faster for it too

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as counting
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import faiss
import httpx
import numpy as np
from jaxtyping import Float32
from load import Address, Load, as_bytes, closed_loop, open_loop
from measuring import PAGE, machine, ratio, spread, table, write_section
from search_vectors import DIMENSION, real_vectors
from threadpoolctl import threadpool_limits

from repkit.retrieval import Index
from repkit.service.calibration import cores
from repkit.service.live import LiveIndex

K, SMALL = 10, 20_000
CLIENTS, BATCHES = (64, 128, 256), (16, 64, 256)
CACHE = Path.home() / ".cache" / "repkit-benchmarks"

Vectors = Float32[np.ndarray, "n d"]


@dataclass(frozen=True)
class Served:
    """A running service."""

    address: Address
    process: int

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    @property
    def resident(self) -> int:
        """Bytes of memory that it holds."""
        pages = Path(f"/proc/{self.process}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="vectors of the large index")
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--rounds", type=int, default=3, help="of searches at saturation and in batches, in turns")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the vectors are kept")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    base, queries = real_vectors(options.count, options.cache)
    queries = np.array(queries[np.random.default_rng(0).permutation(len(queries))])
    body = measured(base, queries, options)
    print(body)
    write_section(options.page, "Service", body)


def measured(base: Vectors, queries: Vectors, options: argparse.Namespace) -> str:
    """The section."""
    with TemporaryDirectory() as folder:
        alone = one_client(base[:SMALL], queries, Path(folder) / "small", options.rounds)
        large = Path(folder) / "large"
        begun = perf_counter()
        Index.build(base, kind="flat").save(large)
        built = perf_counter() - begun
        bare = faiss.IndexFlatIP(DIMENSION)
        bare.add(np.ascontiguousarray(base))
        with serving(large) as (served, opened):
            most, rows = saturated(served, bare, queries, options)
            rows += steady(served, queries, most, options)
        sizes = (opened[1] / len(base), 4 * DIMENSION)
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""`python benchmarks/service.py{_given(options)}`: {len(base):,} vectors of {DIMENSION} numbers, flat,
cosine, features of mini-dit at all blocks and ten times; k = {K}. Client and service share the machine.

{machine()}

| | |
|---|---:|
{lines}

One client, {SMALL:,} vectors, milliseconds until the answer, median with quartiles over {options.rounds} rounds of 300
searches:

{alone}

Building and saving the index took {built:.0f} s, the service's first start, which takes all items over into its
database, {opened[0]:.0f} s. The service holds {sizes[0]:,.0f} bytes of memory a vector, of which {sizes[1]:,} are the
vector's own numbers."""


def _given(options: argparse.Namespace) -> str:
    """What of the options was not the default."""
    given = {"count": (options.count, 1_000_000), "seconds": (options.seconds, 20), "rounds": (options.rounds, 3)}
    return "".join(f" --{name} {value:g}" for name, (value, usual) in given.items() if value != usual)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Served, tuple[float, int]]]:
    """`repkit serve` of an index; the seconds of its start, and its memory after some searches."""
    command = [sys.executable, "-m", "repkit.cli", "serve", str(folder), "--port", "0"]
    begun = perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = httpx.URL(process.stdout.readline().strip())
        started = perf_counter() - begun
        served = Served((url.host, url.port or 80), process.pid)
        yield served, (started, served.resident)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def saturated(
    served: Served, bare: Any, queries: Vectors, options: argparse.Namespace
) -> tuple[float, list[tuple[str, str]]]:
    """Searches a second of many clients; and these beside bare FAISS and batches over HTTP, in turns."""
    found: dict[str, list[float]] = {"bare": [], **{f"{number} clients": [] for number in CLIENTS}, "batches": []}
    threads, batch = best_setting(bare, queries)
    for _ in range(options.rounds):
        found["bare"].append(raw_rate(bare, queries, threads, batch, options.seconds))
        for number in CLIENTS:
            load = closed_loop(served.address, searches(queries), number, options.seconds)
            found[f"{number} clients"].append(load.rate)
        load = closed_loop(served.address, batches(queries, 64), 4, options.seconds)
        found["batches"].append(64 * load.rate)
        print({name: round(values[-1], 1) for name, values in found.items()}, flush=True)
    rates = {name: spread(values).median for name, values in found.items()}
    told = {f"{number} clients": f"{number} clients, searches/s" for number in CLIENTS}
    told["batches"] = "4 clients with batches of 64, queries/s"
    rows = [(f"FAISS alone, batches of {batch}, {threads} thread(s), queries/s", f"{rates['bare']:.0f}")]
    for name, what in told.items():
        over = ratio(found[name], found["bare"])
        rows += [(f"service, {what}", f"{rates[name]:.0f}"), ("of FAISS alone", f"{over:.2f}")]
    return max(rates[f"{number} clients"] for number in CLIENTS), rows


def best_setting(bare: Any, queries: Vectors) -> tuple[int, int]:
    """The threads and the batch with which FAISS alone is fastest."""
    tried = [(threads, batch) for threads in sorted({1, cores()}) for batch in BATCHES]
    return max(tried, key=lambda one: raw_rate(bare, queries, *one, seconds=2))


def raw_rate(bare: Any, queries: Vectors, threads: int, batch: int, seconds: float) -> float:
    """Queries a second of FAISS's own search, matrices multiplied at any batch."""
    before = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.omp_set_num_threads(threads)
    done, begun = 0, perf_counter()
    with threadpool_limits(threads, user_api="blas"):
        while perf_counter() - begun < seconds:
            start = done % (len(queries) - batch)
            bare.search(queries[start : start + batch], K)
            done += batch
    taken = perf_counter() - begun
    faiss.cvar.distance_compute_blas_threshold, _ = before
    faiss.omp_set_num_threads(before[1])
    return done / taken


def steady(served: Served, queries: Vectors, most: float, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Searches that come at random at a share of the most that there can be."""
    calm = open_loop(served.address, searches(queries), 0.7 * most, options.seconds)
    writing = open_loop(served.address, searches(queries, writes=10), 0.7 * most, options.seconds)
    before = served.resident
    crowd = open_loop(served.address, searches(queries), 3 * most, options.seconds)
    grown = served.resident - before
    after = open_loop(served.address, searches(queries), 0.3 * most, options.seconds / 2)
    refused = len(crowd.seconds.get(429, [])) / sum(map(len, crowd.seconds.values()))
    others = {status for load in (calm, writing, crowd, after) for status in load.seconds} - {200, 429}
    return [
        (f"at 70 % of that ({0.7 * most:.0f}/s at random): p50, p99 in ms", _times(calm)),
        ("p99 over p50", f"{calm.percentile(99) / calm.percentile(50):.1f}"),
        ("the same, one in ten a durable write: p50, p99 in ms", _times(writing)),
        ("p99 over that without writes", f"{writing.percentile(99) / calm.percentile(99):.2f}"),
        (f"at three times the most ({3 * most:.0f}/s): answered a second", f"{crowd.rate:.0f}"),
        ("refused with 429", f"{100 * refused:.0f} %"),
        ("p99 of those answered, in ms", f"{1000 * crowd.percentile(99):.0f}"),
        ("memory grown by, in MB", f"{grown / 1e6:.0f}"),
        ("after it, at 30 %: p50, p99 in ms", _times(after)),
        ("answers of other kinds, in all loads", ", ".join(map(str, sorted(others))) or "none"),
    ]


def _times(load: Load) -> str:
    return f"{1000 * load.percentile(50):.0f}, {1000 * load.percentile(99):.0f}"


def searches(queries: Vectors, writes: int | None = None) -> Iterator[bytes]:
    """Requests to search, made beforehand; every one of `writes` adds an item instead."""
    made = cycle([as_bytes("POST", "/v1/search", _json(vector=_numbers(one), k=K)) for one in queries[:2000]])
    if writes is None:
        yield from made
    for number in counting():
        if writes is not None and number % writes == 0:
            item = {"id": f"new-{number}", "vector": _numbers(queries[number % len(queries)])}
            yield as_bytes("PUT", "/v1/items", _json(items=[item]))
        else:
            yield next(made)


def batches(queries: Vectors, size: int) -> Iterator[bytes]:
    """Requests with many searches each."""
    parts = [queries[start : start + size] for start in range(0, 32 * size, size)]
    asked = [_json(queries=[{"vector": _numbers(one), "k": K} for one in part]) for part in parts]
    return cycle([as_bytes("POST", "/v1/search/batch", one) for one in asked])


def _json(**values: Any) -> bytes:
    return json.dumps(values).encode()


def _numbers(vector: Float32[np.ndarray, " d"]) -> list[float]:
    return [round(float(one), 7) for one in vector]


def one_client(base: Vectors, queries: Vectors, folder: Path, rounds: int) -> str:
    """Milliseconds of single searches, in this process and over HTTP, in turns."""
    for name in ("ours", "served"):
        Index.build(base, kind="flat").save(folder / name)
    times: dict[str, list[float]] = {"in this process": [], "over HTTP": []}
    made = searches(queries)
    with LiveIndex.open(folder / "ours") as live, serving(folder / "served") as (served, _):
        for number in range(rounds + 1):
            alone = [_seconds(live, one) for one in queries[300 * number : 300 * (number + 1)]]
            asked = closed_loop(served.address, made, 1, sum(alone) * 2 + 1).seconds[200][:300]
            if number:  # the first round warms up
                times["in this process"].append(1000 * float(np.median(alone)))
                times["over HTTP"].append(1000 * float(np.median(asked)))
    added = [http - alone for alone, http in zip(*times.values(), strict=True)]
    rows = [[name, f"{spread(values):.2f}"] for name, values in {**times, "added": added}.items()]
    return table(["", "p50, ms"], rows)


def _seconds(live: LiveIndex, query: Float32[np.ndarray, " d"]) -> float:
    begun = perf_counter()
    live.search(query[None], K)
    return perf_counter() - begun


if __name__ == "__main__":
    main()
