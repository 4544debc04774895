"""ErrorTable: denoising errors as data, from which any strategy, weighting, prior and temperature can be replayed."""

import errno
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64, Int

from repkit.zeroshot.evaluating import LOSSES, seen
from repkit.zeroshot.levels import Levels
from repkit.zeroshot.strategies import Strategy

Label = str | int | None

FORMAT = 1


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Errors of images under conditions at levels: l2, l1 and huber, each summed over dimensions.

    errors: NaN where nothing was evaluated. owner: the class each condition belongs to. decided: whether the strategy
    stopped because it was sure. info: what made the table (model, weights_hash, seed, ...), JSON-able.
    """

    ids: tuple[str, ...]
    classes: tuple[Label, ...]
    conditions: tuple[Label, ...]
    owner: Int[np.ndarray, "j"]
    levels: Levels
    errors: Float64[np.ndarray, "b j n 3"]
    decided: Bool[np.ndarray, "b"]
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def evaluations(self) -> Int[np.ndarray, "b"]:
        """How often the network ran for each image."""
        return seen(self.errors).sum((1, 2)) * (2 if self.info.get("antithetic") else 1)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> "ErrorTable":
        """The table of some of the images."""
        chosen = np.arange(len(self))[rows]
        ids = tuple(self.ids[row] for row in chosen)
        return replace(self, ids=ids, errors=self.errors[chosen], decided=self.decided[chosen])

    def write(self, path: str | Path | BytesIO) -> None:
        """Write one Parquet row for each error: image, class, prompt, level, time, draw, l2, l1, huber.

        What else belongs to the table is in the schema's metadata, under `repkit`. Raises ValueError where two images,
        classes or prompts have one name.
        """
        for names in (self.ids, self.classes, self.conditions):
            _check_distinct(names)
        image, condition, level = np.nonzero(seen(self.errors))
        values = self.errors[image, condition, level].astype(np.float32)
        told = {
            "format": FORMAT,
            "ids": self.ids,
            "classes": self.classes,
            "conditions": self.conditions,
            "owner": self.owner.tolist(),
            "levels": self.levels.to_json(),
            "decided": self.decided.tolist(),
            "info": dict(self.info),
        }
        columns = {
            "image": _coded(image, self.ids),
            "class": _coded(self.owner[condition], self.classes),
            "prompt": _coded(condition, self.conditions),
            "level": level.astype(np.int32),
            "time": self.levels.t[level],
            "draw": self.levels.draw[level].astype(np.int32),
            **{loss: values[:, column] for column, loss in enumerate(LOSSES)},
        }
        table = pa.table(columns).replace_schema_metadata({"repkit": json.dumps(told)})
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def read(cls, path: str | Path) -> "ErrorTable":
        """What `write` wrote; ValueError for another file, FileNotFoundError for none."""
        if not Path(path).exists():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        try:
            table = pq.read_table(path)
            told = json.loads((table.schema.metadata or {})[b"repkit"])
            if "log_posterior" in table.column_names:  # classified images have metadata of the same key
                raise KeyError("levels")
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no table of errors; repkit classify --errors FILE writes one") from error
        if told.get("format") != FORMAT:
            raise ValueError(f"{path} has errors in format {told.get('format')}, and this repkit reads {FORMAT}")
        levels = Levels.from_json(told["levels"])
        errors = np.full((len(told["ids"]), len(told["conditions"]), len(levels), len(LOSSES)), np.nan)
        image, condition = (table[name].combine_chunks().indices.to_numpy() for name in ("image", "prompt"))
        level = table["level"].to_numpy()
        for column, loss in enumerate(LOSSES):
            errors[image, condition, level, column] = table[loss].to_numpy()
        return cls(
            ids=tuple(told["ids"]),
            classes=tuple(told["classes"]),
            conditions=tuple(told["conditions"]),
            owner=np.array(told["owner"]),
            levels=levels,
            errors=errors,
            decided=np.array(told["decided"], dtype=bool),
            info=told["info"],
        )


def join(tables: Sequence[ErrorTable]) -> ErrorTable:
    """Tables of different images as one; ValueError where they were not made the same way."""
    if not tables:
        raise ValueError("no tables given; give at least one")
    first = tables[0]
    for other in tables[1:]:
        if _made_by(other) != _made_by(first):
            raise ValueError("the tables differ in classes, levels or model; only tables of one run can be joined")
    return replace(
        first,
        ids=tuple(name for table in tables for name in table.ids),
        errors=np.concatenate([table.errors for table in tables]),
        decided=np.concatenate([table.decided for table in tables]),
    )


def replay(
    table: ErrorTable,
    strategy: Strategy,
    weights: Float64[np.ndarray, "n"],
    *,
    loss: str = "l2",
    candidates: Sequence[Int[np.ndarray, "_a"]] | None = None,
) -> ErrorTable:
    """The table a strategy would have left, had it run with these weights on errors; nothing is computed anew.

    candidates: the conditions each image starts with; None for all. Raises ValueError where the strategy asks for what
    the table does not hold.
    """
    if strategy.evaluations != len(table.levels):
        raise ValueError(
            f"a strategy of {strategy.evaluations} evaluations a class on a table of {len(table.levels)}; "
            "give it as many as the table has"
        )
    column = LOSSES.index(loss)
    kept, decided = np.full_like(table.errors, np.nan), np.zeros(len(table), dtype=bool)
    for row, errors in enumerate(table.errors):
        everyone = np.arange(len(table.conditions)) if candidates is None else candidates[row]
        run = strategy.run(everyone, table.owner)
        asked = next(run)
        while True:
            at = np.ix_(*asked)
            if np.isnan(errors[at]).any():
                raise ValueError(
                    f"the table has no error for {table.ids[row]} where the strategy looks; "
                    "make the table with the uniform strategy, which leaves nothing out"
                )
            kept[row][at] = errors[at]
            try:
                asked = run.send(weights * kept[row, :, :, column])
            except StopIteration as stop:
                decided[row] = bool(stop.value)
                break
    return replace(table, errors=kept, decided=decided)


def _made_by(table: ErrorTable) -> tuple[object, ...]:
    levels = (table.levels.t.tolist(), table.levels.draw.tolist())
    return table.classes, table.conditions, table.owner.tolist(), levels, dict(table.info)


def _check_distinct(names: Sequence[Label]) -> None:
    counts = Counter(map(str, names))
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"{twice[0]!r} names two rows of the table, which a file cannot tell apart; give distinct names"
        )


def _coded(codes: Int[np.ndarray, "r"], names: Sequence[Label]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array([str(name) for name in names]))
