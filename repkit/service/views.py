"""One state of a live index: searched and listed without a lock, since nothing in it ever changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int64

from repkit.ann import unit
from repkit.service.delta import Fresh
from repkit.service.items import TUNED, Answer, Effort, Hit, Listed, Metadata, check_counts, check_vectors
from repkit.service.segments import Segment
from repkit.where import check_where

Where = Mapping[str, Any]
Queries = Float32[np.ndarray, "q d"]
_SPARE = 16
_PYTHON = {"string": str, "integer": int, "number": float, "boolean": bool}


@dataclass(frozen=True, eq=False)
class Part:
    """Items with a mask of those that live."""

    source: Segment | Fresh
    alive: Bool[np.ndarray, " n"]
    living: int

    @classmethod
    def of(cls, source: Segment | Fresh, dead: Sequence[int] = ()) -> "Part":
        """All items alive but those with the dead keys."""
        return cls(source, np.ones(len(source), bool), len(source)).without(np.array(sorted(dead), np.int64))

    def without(self, dead: Int64[np.ndarray, " m"]) -> "Part":
        """The part after some keys died; those that are not in it are passed over."""
        keys = self.source.keys
        dead = dead[(dead >= keys[0]) & (dead <= keys[-1])] if len(keys) else dead[:0]
        rows = np.searchsorted(keys, dead)
        rows = rows[keys[rows] == dead]
        if not len(rows):
            return self
        alive = self.alive.copy()
        alive[rows] = False
        return replace(self, alive=alive, living=int(np.count_nonzero(alive)))

    def allowed(self, where: Where | None, columns: Mapping[str, str]) -> Bool[np.ndarray, " n"]:
        """Which rows live and have what is asked for."""
        if not where:
            return self.alive
        return self.alive & self.source.mask(where, {name: columns[name] for name in where if name != "id"})


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The parts in the order of their keys, after the change `version`; columns: name -> type of the metadata."""

    parts: tuple[Part, ...]
    version: int
    columns: Mapping[str, str]
    metric: str
    dimension: int

    def __len__(self) -> int:
        """How many items there are."""
        return sum(part.living for part in self.parts)

    def search(
        self,
        vectors: np.ndarray,  # [q d] of numbers, which is checked
        k: int = 10,
        where: Where | None = None,
        effort: Effort = TUNED,
    ) -> Answer:
        """The k nearest items of each query among those that `where` allows; of equally near ones, the older.

        Raises ValueError for queries that are not finite or of another dimension, k, ef or nprobe below 1, and for a
        column, operator or value in `where` that does not fit.
        """
        queries = check_vectors(vectors, self.dimension, "queries")
        check_counts(k=k, ef=effort.ef, nprobe=effort.nprobe)
        masks = self._masks(where)
        scanned = sum(_count(*one) for one in masks)
        found = _nearest(masks, unit(queries) if self.metric == "cosine" else queries, k, self.metric, effort)
        whole = effort.exact or all(part.source.is_exact for part, _ in masks)
        return Answer(_hits(masks, *found), whole, self.version, scanned)

    def count(self, where: Where | None = None) -> int:
        """How many items there are that `where` allows."""
        return sum(_count(*one) for one in self._masks(where))

    def listed(self, after: str | None, limit: int, where: Where | None = None) -> list[Listed]:
        """Up to `limit` items that `where` allows in the order of their ids, from the one after `after` on."""
        found: list[tuple[str, Metadata]] = []
        for part, allowed in self._masks(where):
            ids = part.source.table({})["id"]
            if after is not None:
                allowed = allowed & pc.greater(ids, after).to_numpy()
            rows = np.flatnonzero(allowed)
            first = pc.sort_indices(ids.take(pa.array(rows)))[:limit].to_numpy()
            found += part.source.described(rows[first])
        return [Listed(*one) for one in sorted(found, key=lambda one: one[0].encode())[:limit]]

    def drawn(self, count: int, where: Where | None = None) -> list[Listed]:
        """Up to `count` items that `where` allows, drawn at random."""
        masks, random = self._masks(where), np.random.default_rng()
        rows = [np.flatnonzero(allowed) for _, allowed in masks]
        total, start = sum(map(len, rows)), 0
        chosen = random.choice(total, min(count, total), replace=False)
        found: list[tuple[str, Metadata]] = []
        for (part, _), ours in zip(masks, rows, strict=True):
            found += part.source.described(ours[chosen[(chosen >= start) & (chosen < start + len(ours))] - start])
            start += len(ours)
        return [Listed(*found[place]) for place in random.permutation(len(found))]

    def values(self, column: str, most: int = 50) -> dict[Any, int] | None:
        """How many items have each value of a column; None where there are more than `most` values."""
        counts: dict[Any, int] = {}
        for part in self.parts:
            found = part.source.table({column: self.columns[column]})[column].filter(pa.array(part.alive)).drop_null()
            for one in found.value_counts():
                value = one["values"].as_py()
                counts[value] = counts.get(value, 0) + one["counts"].as_py()
            if len(counts) > most:
                return None
        return counts

    def changed(self, fresh: Fresh, dead: Sequence[int], version: int, columns: Mapping[str, str]) -> "Snapshot":
        """The state after more rows came, in the delta behind the segments, and some keys died."""
        *segments, last = self.parts
        grown = np.concatenate([last.alive, np.ones(len(fresh) - len(last.alive), bool)])
        parts = (*segments, Part(fresh, grown, last.living + len(fresh) - len(last.alive)))
        if dead:
            keys = np.array(sorted(dead), np.int64)
            parts = tuple(part.without(keys) for part in parts)
        return replace(self, parts=parts, version=version, columns=columns)

    def with_parts(self, parts: Sequence[Part]) -> "Snapshot":
        """The same items in other parts."""
        return replace(self, parts=tuple(parts))

    def _masks(self, where: Where | None) -> "Masks":
        if where is not None:
            check_where(where, {"id": str} | {name: _PYTHON[kind] for name, kind in self.columns.items()})
        return [(part, part.allowed(where, self.columns)) for part in self.parts if part.living]


Masks = Sequence[tuple[Part, np.ndarray]]  # a part and which of its rows are allowed


def _count(part: Part, allowed: Bool[np.ndarray, " n"]) -> int:
    return part.living if allowed is part.alive else int(np.count_nonzero(allowed))


def _nearest(
    masks: Masks, queries: Queries, k: int, metric: str, effort: Effort
) -> tuple[Float32[np.ndarray, "q c"], Int64[np.ndarray, "q c"]]:
    """Scores and places of the nearest of all parts; places count on from part to part, and -1 is none."""
    scores, places = [np.empty((len(queries), 0), np.float32)], [np.empty((len(queries), 0), np.int64)]
    start = 0
    for part, allowed in masks:
        found, rows = _search_part(part, allowed, queries, min(k, len(part.source)), metric, effort)
        scores.append(found)
        places.append(np.where(rows < 0, -1, rows + start))
        start += len(part.source)
    every, named = np.concatenate(scores, 1), np.concatenate(places, 1)
    order = np.lexsort((named, every if metric == "l2" else -every, named < 0))[:, :k]
    return np.take_along_axis(every, order, 1), np.take_along_axis(named, order, 1)


def _search_part(
    part: Part, allowed: Bool[np.ndarray, " n"], queries: Queries, k: int, metric: str, effort: Effort
) -> tuple[Float32[np.ndarray, "q c"], Int64[np.ndarray, "q c"]]:
    """Scores and rows of the nearest; row -1 is none.

    A mask costs more than some candidates too many, so that the few dead are taken out of those; where too few are
    left of a query's, it is asked again with the mask.
    """
    source = part.source
    if allowed is not part.alive:
        return source.search(queries, k, metric, effort, allowed)
    if part.living == len(source):
        return source.search(queries, k, metric, effort)
    wanted = min(2 * k + _SPARE, len(source))
    scores, rows = source.search(queries, wanted, metric, effort)
    rows = np.where(part.alive[rows], rows, -1)
    short = np.flatnonzero((rows >= 0).sum(1) < min(k, part.living))
    if len(short):
        scores[short], rows[short] = source.search(queries[short], wanted, metric, effort, allowed)
    return scores, rows


def _hits(masks: Masks, scores: Float32[np.ndarray, "q c"], places: Int64[np.ndarray, "q c"]) -> list[list[Hit]]:
    known: dict[int, tuple[str, Metadata]] = {}
    start = 0
    for part, _ in masks:
        here = np.unique(places[(places >= start) & (places < start + len(part.source))])
        known.update(zip(here.tolist(), part.source.described(here - start), strict=True))
        start += len(part.source)
    return [
        [Hit(known[place][0], score, known[place][1]) for score, place in zip(*row, strict=True) if place >= 0]
        for row in zip(scores.tolist(), places.tolist(), strict=True)
    ]
