"""Matches of many pairs of images as one Parquet table, made some pairs at a time and taken up where they stopped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from repkit.datasets.pairs import Pair
from repkit.datasets.tss import dense_points
from repkit.features import identity_hash
from repkit.fusion import finest
from repkit.heads.pck import box_length
from repkit.matching.nearest import Matches
from repkit.matching.positions import same_position, stayed
from repkit.tasks.correspondence import Correspondence, Points, Seen, View
from repkit.tasks.pair_table import COLUMNS, kept_pairs, write_part, write_table
from repkit.tasks.seen_store import SeenStore

CACHE_BYTES = 1 << 30  # of maps that are kept, since the next pairs may need them again
PART_SECONDS = 10.0  # after which what was matched is written
Partner = Callable[[Pair], Sequence[int | None] | None]
Progress = Callable[[int, int, int], None]


@dataclass
class Matched:
    """The table, why pairs have no rows (by id), and how long this call matched how many; what waits to be written."""

    table: pa.Table
    left_out: dict[str, str]
    pairs: int = 0
    points: int = 0
    seconds: float = 0.0
    waiting: list[pa.Table] = field(default_factory=list)
    written: float = field(default_factory=perf_counter)


def match_pairs(
    pairs: Sequence[Pair],
    correspondence: Correspondence,
    seen: SeenStore,
    folder: Path,
    *,
    partner: Partner | None = None,
    step: int = 1,
    progress: Progress | None = None,
) -> Matched:
    """Find every point of the pairs and write FOLDER/matches.parquet; pairs that are done are kept.

    Done are pairs whose features came from the same files, and where positions are taken off, from the same files of
    all images. partner: which points trade places in a mirror image. step: of dense truth, every so many pixels along x
    and y. A pair without features, or whose annotation does not fit its images, is left out.
    """
    over = seen.all_files() if correspondence.positions else ""
    made_of = {pair.id: _made_of(pair, seen, over) for pair in pairs}
    tell, done = progress or (lambda *counts: None), kept_pairs(folder, made_of)
    found, views = Matched(COLUMNS.empty_table(), {}), _views(correspondence, seen)
    left = [pair for pair in visiting_order(pairs) if pair.id not in done]
    tell(len(pairs) - len(left), len(pairs), 0)
    try:
        for count, pair in enumerate(left, len(pairs) - len(left) + 1):
            try:
                rows = _timed(found, pair, step, seen, views, correspondence, partner)
                made = pa.array([made_of[pair.id]] * len(rows), pa.string())
                done[pair.id] = rows.append_column("made_of", made)
                found.waiting.append(done[pair.id])
            except _LeftOut as error:
                found.left_out[pair.id] = str(error)
            if perf_counter() - found.written >= PART_SECONDS:
                _write(folder, found)
            tell(count, len(pairs), len(found.left_out))
    finally:
        _write(folder, found)
    tables = [done[pair.id] for pair in pairs if pair.id in done]
    found.table = pa.concat_tables([found.table, *tables]).combine_chunks()
    write_table(folder, found.table)
    return found


def _write(folder: Path, found: Matched) -> None:
    write_part(folder, found.waiting)
    found.waiting, found.written = [], perf_counter()


def visiting_order(pairs: Sequence[Pair]) -> list[Pair]:
    """By source, its targets forth and back in turn, so that the images of the last pairs are needed next."""
    ordered = sorted(pairs, key=lambda pair: (pair.category or "", str(pair.source), str(pair.target), pair.id))
    groups = [list(of) for _, of in groupby(ordered, key=lambda pair: (pair.category, pair.source))]
    return [pair for n, group in enumerate(groups) for pair in (group[::-1] if n % 2 else group)]


class _LeftOut(Exception):
    """Why a pair cannot be matched, which is no reason to stop."""


def _timed(
    found: Matched,
    pair: Pair,
    step: int,
    seen: SeenStore,
    views: Callable[[Pair], tuple[View, View]],
    correspondence: Correspondence,
    partner: Partner | None,
) -> pa.Table:
    """The rows of one pair; what reading truth from a file takes is not counted."""
    pair = _checked(pair, step, seen)
    started = perf_counter()
    partners = partner(pair) if partner is not None and correspondence.flip else None
    rows = _rows(pair, correspondence, *views(pair), partners)
    found.seconds += perf_counter() - started
    found.pairs, found.points = found.pairs + 1, found.points + len(rows)
    return rows


def _checked(pair: Pair, step: int, seen: SeenStore) -> Pair:
    """The pair with its points; _LeftOut where they or its features are not to be had."""
    for image in (pair.source, pair.target):
        if (error := seen.why_not(image)) is not None:
            raise _LeftOut(f"{image}: {error}")
    try:
        if pair.target_box is not None:
            box_length(pair.target_box)
        if pair.flow is not None and not len(pair.source_points):
            pair = dense_points(pair, step)
    except (OSError, ValueError) as error:
        raise _LeftOut(str(error)) from error
    if not len(pair.source_points):
        raise _LeftOut(f"{pair.flow} knows no pixel's place at step {step}")
    return pair


def _views(correspondence: Correspondence, seen: SeenStore) -> Callable[[Pair], tuple[View, View]]:
    """The function that makes a pair's images ready, with the last ones kept, up to `CACHE_BYTES`."""
    many = max(2, CACHE_BYTES // _image_bytes(correspondence))

    @lru_cache(many)
    def read(image: Path, category: str | None) -> Seen | View:
        one = seen.seen(image, category)
        return correspondence.view(one) if correspondence.apart else one

    def views(pair: Pair) -> tuple[View, View]:
        source, target = read(pair.source, pair.category), read(pair.target, pair.category)
        for image, one, size in ((pair.source, source, pair.source_size), (pair.target, target, pair.target_size)):
            if size not in (None, one.size):
                raise _LeftOut(f"{image} has {one.size[0]}x{one.size[1]} pixels, its annotation says {size}")
        if isinstance(source, View) and isinstance(target, View):
            return source, target
        assert isinstance(source, Seen) and isinstance(target, Seen)
        return correspondence.views(source, target)

    return views


def _image_bytes(correspondence: Correspondence) -> int:
    """Of what is kept of an image: its fused map, or with `pca` the maps that it is made of."""
    shapes = [part.extractor.shapes[key] for part in correspondence.parts for key in part.chosen]
    height, width = correspondence.grid or finest([shape[1:] for shape in shapes])
    fused = sum(part.channels for part in correspondence.parts) * height * width
    return 4 * (fused if correspondence.apart else sum(map(prod, shapes))) * (2 if correspondence.flip else 1)


def _rows(
    pair: Pair, correspondence: Correspondence, source: View, target: View, partner: Sequence[int | None] | None
) -> pa.Table:
    """A row a point; one that is not on the source image is taken for the nearest that is."""
    limit = np.array(source.size) - 1
    inside = pair.source_points.clip(0, limit)
    points = torch.from_numpy(inside)
    found, turned = correspondence.found(source, target, points, partner)
    still, stays, truly = _position_only(correspondence, source, target, points, found, pair.target_points)
    (source_width, source_height), (target_width, target_height) = source.size, target.size
    same = {
        "pair": pair.id,
        "category": pair.category,
        "source": str(pair.source),
        "target": str(pair.target),
        "mirrored": turned,
        "box_length": None if pair.target_box is None else box_length(pair.target_box),
        "image_length": float(max(target.size)),
        "source_width": source_width,
        "source_height": source_height,
        "target_width": target_width,
        "target_height": target_height,
    }
    columns: dict[str, Any] = {name: [value] * len(points) for name, value in same.items()}
    places = {"": pair.source_points, "true_": pair.target_points, "found_": found.points, "still_": still}
    columns |= {f"{what}{axis}": _numpy(xy)[:, n] for what, xy in places.items() for n, axis in enumerate("xy")}
    columns |= {"name": pair.names or [None] * len(points), "score": _numpy(found.scores).astype(np.float32)}
    columns |= {"stayed": stays, "true_stayed": truly, "clamped": (inside != pair.source_points).any(1)}
    return pa.table(
        {name: pa.array(columns[name], COLUMNS.field(name).type) for name in COLUMNS.names if name in columns}
    )


def _position_only(
    correspondence: Correspondence, source: View, target: View, points: Points, found: Matches, true: np.ndarray
) -> tuple[Points, np.ndarray, np.ndarray]:
    """The same places in the target's frame, and which matches and which true places lie there."""
    places = correspondence.to_frame(points, source.size)
    maps = source.plain, target.plain

    def still(of: Points) -> np.ndarray:
        one = Matches(correspondence.to_frame(of.cpu().double(), target.size), found.scores.cpu())
        return stayed(one, places, *maps).numpy()

    at = correspondence.from_frame(same_position(places, *maps), target.size)
    return at, still(found.points), still(torch.from_numpy(true))


def _numpy(values: torch.Tensor | np.ndarray) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.cpu().double().numpy()


def _made_of(pair: Pair, seen: SeenStore, over: str) -> str | None:
    files = seen.files([(pair.source, pair.category), (pair.target, pair.category)])
    return None if files is None else identity_hash({"pair": files, "positions": over})
