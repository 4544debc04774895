"""Search by the kinds of index: `python benchmarks/search_kinds.py` measures it and writes docs/BENCHMARKS.md.

On features of mini-unet for the bundled images, each in several views (mirrored and shifted) and at several taps of one
width, all in one index; the queries are those of images that are not in it. Recall against queries a second of each
kind, at efforts below and above the tuned one; the recall that "auto" was asked for, and found on other queries; what
a filter costs, over FAISS's own selectors of rows; and memory. With `--count` and `--only filters`, the filters alone
on so many vectors of `search_vectors.py`.
"""

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from jaxtyping import Bool, Float32
from measuring import PAGE, Spread, machine, ratio, spread, table, take_turns, write_section
from search_vectors import real_vectors
from threadpoolctl import threadpool_limits

from repkit.ann import Built, build_vectors, search_vectors, unit
from repkit.ann.tuning import Trial, trials
from repkit.datasets.fashion_mnist import load as load_images
from repkit.extractors import DiffusionExtractor
from repkit.indexfiles import read_vectors, write_vectors
from repkit.pooling import pool
from repkit.retrieval import Index
from repkit.where import Where, mask
from repkit.zoo import load

TAPS = "down.2,mid,up.0@50"
VIEWS = [(False, 0, 0), (True, 0, 0), (False, 2, 1), (True, -1, 2), (False, -2, -2), (True, 1, -1)]  # mirrored, shift
QUERIES, BATCH, SINGLES = 2000, 256, 200
SHARES = (0.9, 0.5, 0.1, 0.01, 0.001)
CACHE = Path.home() / ".cache" / "repkit-benchmarks"
EFFORT = {"hnsw": "ef", "ivf": "nprobe", "ivf-pq": "nprobe"}

Vectors = Float32[np.ndarray, "n d"]


@dataclass(frozen=True, eq=False)
class Data:
    """Vectors to index, and queries of other images: some to tune by, and others to measure with."""

    vectors: Vectors
    tuning: Vectors
    measuring: Vectors

    def trial(self) -> Trial:
        """The queries to measure with, and how near their 10th nearest is."""
        return trials(self.vectors, np.repeat(self.measuring, 2, 0), "cosine", None)[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=14_000)
    parser.add_argument("--views", type=int, default=3, help=f"of each image, at most {len(VIEWS)}")
    parser.add_argument("--taps", default=TAPS, help="of one width")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, FAISS and numpy")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--only", choices=["filters"], help="print these alone, of --count vectors; writes no page")
    parser.add_argument("--count", type=int, default=1_000_000, help="vectors of --only")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where those vectors are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        if options.only:
            vectors, queries = real_vectors(options.count, options.cache)
            chosen = np.sort(np.random.default_rng(0).permutation(len(queries))[:QUERIES])
            print(filters(Data(np.asarray(vectors), queries[chosen], queries[chosen]), options.rounds))
            return
        body = measured(options)
    print(body)
    write_section(options.page, "Search", body)


def measured(options: argparse.Namespace) -> str:
    """The section."""
    data = features(options.images, options.views, options.taps)
    count, dimension = data.vectors.shape
    command = f"python benchmarks/search_kinds.py --images {options.images} --rounds {options.rounds}"
    return f"""`{command}`: {count:,} vectors of {dimension} numbers (mini-unet, {options.taps},
{options.views} views of each image), cosine; recall@10 of {len(data.measuring):,} queries, of images that are
not in the index; {options.rounds} rounds; faiss {faiss.__version__}.

{machine()}

Each kind tuned to a recall of 0.95 by other queries (in bold), and at other efforts. Queries a second one at a time,
and in batches of {BATCH}.

{kinds(data, options.rounds)}

Recall asked of "auto", and found:

{asked(data)}

A flat index with a filter, the time of FAISS's own search with a selector of rows over ours, given the same mask:
as a bitmap, and as the set of row numbers that `IDSelectorBatch` makes. "From the metadata": through
`repkit.Index` with `where`, a number that has to be in a range, over the same mask given to FAISS: of a filter that
was not asked before, and of one that was.

{filters(data, options.rounds)}

Memory of an index that is read from its file, and the file, in bytes a vector of {dimension} numbers:

{memory(data)}"""


def features(images: int, views: int, taps: str) -> Data:
    """Pooled features of all views; a tenth of the images is for queries, of which half tune."""
    pictures = np.concatenate([load_images("train")[0], load_images("test")[0]])
    pictures = pictures[np.random.default_rng(0).permutation(len(pictures))[:images]]
    grey = np.pad(pictures, ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 255
    batch = torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1)  # [n 3 32 32]
    extract = DiffusionExtractor(load("mini-unet"), [taps], noise="shared", trim=True)
    found = [_view(extract, batch, view) for view in VIEWS[:views]]
    vectors = rearrange(np.stack(found), "view image tap d -> image (view tap) d")
    held = max(len(vectors) // 10, 2)
    queries, rest = (rearrange(part, "image many d -> (image many) d") for part in (vectors[:held], vectors[held:]))
    chosen = queries[np.random.default_rng(0).permutation(len(queries))[: 2 * QUERIES]]
    return Data(unit(rest), unit(chosen[::2]), unit(chosen[1::2]))


def _view(
    extract: DiffusionExtractor, images: torch.Tensor, view: tuple[bool, int, int]
) -> Float32[np.ndarray, "n t d"]:
    mirrored, right, down = view
    seen = torch.roll(images.flip(3) if mirrored else images, (down, right), (2, 3))
    parts = []
    for part in seen.split(250):
        maps = extract(part)
        parts.append(torch.stack([pool(maps[key].float(), "mean") for key in maps], 1).numpy())
    return np.concatenate(parts)


def kinds(data: Data, rounds: int) -> str:
    """A row a kind and effort: recall, and queries a second."""
    trial, rows = data.trial(), []
    for kind in ("flat", "hnsw", "ivf", "ivf-pq"):
        if kind == "ivf-pq" and len(data.vectors) < 11_000:
            continue
        built = build_vectors(data.vectors, kind, queries=data.tuning)
        tuned = built.parameters.get(EFFORT.get(kind, ""), 0)
        for effort in sorted({max(1, tuned // 2), tuned, 2 * tuned, 4 * tuned}) if tuned else [0]:
            name = f"{kind}, {EFFORT[kind]} {effort}" if tuned else kind
            rows.append([f"**{name}**" if effort == tuned else name, *_rates(data, built, effort, trial, rounds)])
    return table(("", "recall@10", "queries/s", f"queries/s in batches of {BATCH}"), rows)


def _rates(data: Data, built: Built, effort: int, trial: Trial, rounds: int) -> list[str]:
    options = _options(data, built, effort)
    search = partial(search_vectors, built.vectors, metric="cosine", **options)
    singles, batch = data.measuring[:SINGLES], data.measuring[:BATCH]
    seconds = take_turns(
        {
            "single": lambda: [search(query[None], 10) for query in singles],
            "batch": lambda: search(batch, 10),
        },
        rounds,
    )
    recall = trial.recalls(lambda queries, k: search(queries, k)).mean()
    rates = (_rate(len(singles), seconds["single"]), _rate(len(batch), seconds["batch"]))
    return [f"{recall:.4f}", *(f"{rate:.0f}" for rate in rates)]


def _options(data: Data, built: Built, effort: int = 0) -> dict[str, Any]:
    options: dict[str, Any] = {"raw": data.vectors} if built.kind == "ivf-pq" else {}
    return options | ({EFFORT[built.kind]: effort} if effort else {})


def _rate(count: int, seconds: Sequence[float]) -> Spread:
    return spread([count / taken for taken in seconds])


def asked(data: Data) -> str:
    """What "auto" chose for some recalls, and how much it finds of other queries' nearest."""
    trial, rows = data.trial(), []
    for recall in (0.9, 0.95, 0.99):
        built = build_vectors(data.vectors, recall=recall, queries=data.tuning)
        search = partial(search_vectors, built.vectors, metric="cosine", **_options(data, built))
        found = trial.recalls(lambda queries, k, search=search: search(queries, k)).mean()  # type: ignore[misc]
        chosen = ", ".join([built.kind, *(f"{name} {value}" for name, value in built.parameters.items())])
        rows.append([chosen, f"{recall:g}", f"{found:.4f}"])
    return table(("", "asked", "found"), rows)


def filters(data: Data, rounds: int) -> str:
    """A row for each share of rows that is allowed: FAISS's time over ours, and our queries a second."""
    drawn = pa.table({"drawn": np.random.default_rng(1).permutation(len(data.vectors))})
    index, rows = Index.build(data.vectors, kind="flat", metadata=drawn), []
    for share in SHARES:
        where = {"drawn": {"lt": max(10, round(share * len(data.vectors)))}}
        cells = [_filtered(index, data.measuring[:count], where, rounds) for count in (1, 16, BATCH)]
        told = _from_metadata(index, data.measuring[:1], where, rounds)
        rows.append([f"{100 * share:g} % of the rows", *(cell for pair in cells for cell in pair), *told])
    head = [cell for count in ("1 query", "16 queries", f"{BATCH} queries") for cell in (count, "queries/s")]
    return table(("", *head, "1 query from the metadata, first", "and again"), rows)


def _filtered(index: Index, queries: Vectors, where: Where, rounds: int) -> tuple[str, str]:
    """Both sides have the mask."""
    allowed = mask(index.items, where)
    repeats = max(1, 16 // len(queries))
    search = partial(search_vectors, index.vectors, queries, 10, metric="cosine", allowed=allowed)
    actions: dict[str, Any] = {name: partial(theirs, queries) for name, theirs in _selectors(index, allowed).items()}
    seconds = take_turns(
        {name: partial(_repeated, action, repeats) for name, action in {**actions, "ours": search}.items()}, rounds
    )
    ratios = (ratio(seconds[name], seconds["ours"]).median for name in actions)
    return ", ".join(f"{one:.1f}" for one in ratios), f"{_rate(repeats * len(queries), seconds['ours']):.0f}"


def _selectors(index: Index, allowed: Bool[np.ndarray, " n"]) -> dict[str, Any]:
    """FAISS's own search with each selector, which is made once."""
    bitmap: Any = faiss.IDSelectorBitmap  # whose stubs lack its Python
    batch: Any = faiss.IDSelectorBatch
    made = {"bitmap": bitmap(np.packbits(allowed, bitorder="little")), "batch": batch(np.flatnonzero(allowed))}
    given = {name: faiss.SearchParameters(sel=selector) for name, selector in made.items()}
    return {name: partial(index.vectors.search, k=10, params=one) for name, one in given.items()}


def _from_metadata(index: Index, query: Vectors, where: Where, rounds: int) -> tuple[str, str]:
    """FAISS's time, with a mask made for it anew, over that of the index, which at first makes one too."""

    def theirs() -> None:
        bitmap: Any = faiss.IDSelectorBitmap
        selector = bitmap(np.packbits(mask(index.items, where), bitorder="little"))
        index.vectors.search(query, 10, params=faiss.SearchParameters(sel=selector))

    def first() -> None:
        Index(index.vectors, index.items, "cosine").search(query, 10, where=where)

    again = partial(index.search, query, 10, where=where)
    seconds = take_turns({"theirs": theirs, "first": first, "again": again}, 4 * rounds)
    shares = {name: f"{ratio(seconds['theirs'], seconds[name]):.1f}" for name in ("first", "again")}
    return shares["first"], shares["again"]


def _repeated(action: Any, repeats: int) -> None:
    for _ in range(repeats):
        action()


def memory(data: Data) -> str:
    """A row a kind: how much a process grows when it reads the index, mapped or not, and the size of the file."""
    rows = []
    for kind in ("flat", "hnsw", "ivf", "ivf-pq"):
        if kind == "ivf-pq" and len(data.vectors) < 11_000:
            continue
        built = build_vectors(data.vectors, kind, queries=data.tuning)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "index.faiss"
            with open(path, "wb") as file:
                write_vectors(built.vectors, file)
            with multiprocessing.get_context("spawn").Pool(1) as pool_of_one:
                grown = pool_of_one.apply(growth, (path,))
            sizes = (grown, path.stat().st_size)
        rows.append([kind, *(f"{size / len(data.vectors):.0f}" for size in sizes)])
    return table(("", "memory", "file"), rows)


def growth(path: Path) -> int:
    """Bytes that this process grows by when it reads an index."""
    before = _resident()
    index = read_vectors(path)
    grown = _resident() - before
    assert index.ntotal
    return grown


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
