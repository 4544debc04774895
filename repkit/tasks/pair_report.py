"""What matched pairs come to: PCK by every protocol and threshold, and how much of it is position alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from repkit.heads.pck import PROTOCOLS, Average, Number, Pck, pck
from repkit.tasks.pair_table import by_pair

Threshold = Literal["box", "image"]
AVERAGES: tuple[Average, ...] = ("image", "point", "category", "pairs")
ALL, NONE = "all", "none"


@dataclass(frozen=True, eq=False)
class PairRows:
    """The rows of a table of matches, pair by pair: places [n 2] in the target, and what alpha is a fraction of."""

    ids: list[str]
    categories: list[str]
    true: list[np.ndarray]
    found: list[np.ndarray]
    still: list[np.ndarray]
    lengths: dict[Threshold, list[float]]
    sizes: list[tuple[int, int]]

    def pck(self, protocol: str, threshold: Threshold, alphas: Sequence[Number], *, position_only: bool = False) -> Pck:
        """PCK of the matches, or of the same positions instead."""
        return pck(
            self.still if position_only else self.found,
            self.true,
            self.lengths[threshold],
            protocol=protocol,
            alphas=alphas,
            sizes=self.sizes,
            categories=self.categories,
        )


def pair_rows(table: pa.Table) -> PairRows:
    """The table of `match_pairs`; lengths of boxes are there where all targets have boxes."""
    pairs = [(name, rows) for name, rows in by_pair(table)]
    first = [rows.slice(0, 1).to_pylist()[0] for _, rows in pairs]
    given = [row["category"] for row in first]
    names = [ALL if not any(given) else name or NONE for name in given]
    places = {
        what: [np.stack([rows[f"{what}_{axis}"].to_numpy() for axis in "xy"], 1) for _, rows in pairs]
        for what in ("true", "found", "still")
    }
    lengths: dict[Threshold, list[float]] = {
        what: [row[f"{what}_length"] for row in first]
        for what in ("box", "image")
        if all(row[f"{what}_length"] is not None for row in first)
    }
    sizes = [(row["target_width"], row["target_height"]) for row in first]
    ids = [name for name, _ in pairs]
    return PairRows(ids, names, places["true"], places["found"], places["still"], lengths, sizes)


def pair_report(
    table: pa.Table, *, protocol: str, threshold: Threshold | None, alphas: Sequence[Number]
) -> dict[str, Any]:
    """As JSON-ready data: PCK by threshold, protocol and average, those that are asked for first, and by category.

    threshold: None is the object's box where all targets have one, else the image. Under `position_only` the same of
    each point's own position in the target; stayed: the share of matches that lie there, true_stayed: of true places.
    Raises ValueError for an unknown protocol or alpha, and for a threshold that not all pairs have.
    """
    rows = pair_rows(table)
    chosen = threshold or next(iter(rows.lengths))
    if chosen not in rows.lengths:
        raise ValueError(f"threshold {chosen!r}, but not all targets have a {chosen}; have {', '.join(rows.lengths)}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"no PCK protocol {protocol!r}; have {', '.join(PROTOCOLS)}")
    thresholds, protocols = _first(chosen, rows.lengths), _first(protocol, PROTOCOLS)
    scores = {of: {name: rows.pck(name, of, alphas) for name in protocols} for of in thresholds}
    still = {of: {name: rows.pck(name, of, alphas, position_only=True) for name in protocols} for of in thresholds}
    return {
        "protocol": protocol,
        "threshold": chosen,
        "average": PROTOCOLS[protocol].averages[0],
        "alphas": [float(alpha) for alpha in alphas],
        "pairs": len(rows.ids),
        "points": table.num_rows,
        "pck": _averages(scores),
        "categories": {name: _category(rows, name, scores) for name in sorted(set(rows.categories))},
        "position_only": _averages(still),
        **{name: float(np.mean(table[name].to_numpy())) for name in ("stayed", "true_stayed")},
        "clamped": pc.sum(table["clamped"]).as_py(),
        "mirrored": sum(bool(of["mirrored"][0].as_py()) for _, of in by_pair(table)),
    }


def _first(chosen: Any, names: Any) -> list[Any]:
    return [chosen, *(name for name in names if name != chosen)]


def _averages(scores: dict[Threshold, dict[str, Pck]]) -> dict[str, Any]:
    """Those that a protocol reports come first."""
    return {
        of: {
            name: {
                average: found.averages[average].tolist()
                for average in dict.fromkeys((*PROTOCOLS[name].averages, *AVERAGES))
            }
            for name, found in by_protocol.items()
        }
        for of, by_protocol in scores.items()
    }


def _category(rows: PairRows, name: str, scores: dict[Threshold, dict[str, Pck]]) -> dict[str, Any]:
    own = [len(true) for true, category in zip(rows.true, rows.categories, strict=True) if category == name]
    shares = {
        of: {
            protocol: {average: values.tolist() for average, values in found.categories[name].items()}
            for protocol, found in by_protocol.items()
        }
        for of, by_protocol in scores.items()
    }
    return {"pairs": len(own), "points": sum(own), "pck": shares}
