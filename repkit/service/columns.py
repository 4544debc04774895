"""Columns: what the metadata hold, as the page needs it for its filters."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from repkit.service.views import Snapshot

FEW = 50  # values that are listed


def columns_of(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Name and type of each column; its values with their numbers where they are few; least and most of numbers."""
    return [_column(snapshot, name, kind) for name, kind in snapshot.columns.items()]


def _column(snapshot: Snapshot, name: str, kind: str) -> dict[str, Any]:
    counts = snapshot.values(name, FEW)
    values = None
    if counts is not None:
        ordered = sorted(counts.items(), key=lambda one: (-one[1], str(one[0])))
        values = [{"value": value, "count": count} for value, count in ordered]
    low, high = _range(snapshot, name, kind) if kind in ("integer", "number") else (None, None)
    return {"name": name, "type": kind, "values": values, "min": low, "max": high}


def _range(snapshot: Snapshot, name: str, kind: str) -> tuple[float | None, float | None]:
    living = [part.source.table({name: kind})[name].filter(pa.array(part.alive)) for part in snapshot.parts]
    found = [pc.min_max(values).as_py() for values in living]
    lows, highs = ([float(one[end]) for one in found if one[end] is not None] for end in ("min", "max"))
    return min(lows, default=None), max(highs, default=None)
