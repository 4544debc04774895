"""How well a correspondence finds the points of a benchmark: images encoded once, pairs matched, PCK and its cost."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isinf
from pathlib import Path
from typing import Any

import numpy as np

from repkit.datasets.pairs import Pair
from repkit.features import identity_hash
from repkit.images import Number
from repkit.publishing import made, publish
from repkit.shards import locked
from repkit.tasks.correspondence import Correspondence
from repkit.tasks.extraction_cost import image_flops
from repkit.tasks.pair_matches import Matched, Partner, match_pairs
from repkit.tasks.pair_report import Threshold, pair_report
from repkit.tasks.resuming import claim
from repkit.tasks.seen_store import SeenStore, Watch, store_seen, unwatched

RESULTS, FEATURES, SEARCH = "results.json", "features", "val"
ALPHAS = (0.1, 0.05, 0.01)


@dataclass(frozen=True)
class Rules:
    """How pairs are matched and counted.

    protocol: of `heads.pck`, the one to report first. threshold: of what alpha is a fraction, see `pair_report`.
    partner: which points trade places in a mirror image. step: of dense truth, in pixels. remove_position: take off
    what features have at a position whatever the image. dtype: of the stored features.
    """

    protocol: str = "dift"
    threshold: Threshold | None = None
    alphas: tuple[Number, ...] = ALPHAS
    partner: Partner | None = None
    step: int = 1
    remove_position: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 < alpha < np.inf for alpha in self.alphas):
            raise ValueError(f"alphas {', '.join(map(str, self.alphas)) or '(none)'}; give fractions above 0")


@dataclass(frozen=True)
class Running:
    """What does not change the results: forwards at once, where maps are matched, whether to try failures again."""

    batch_size: int = 16
    device: str = "cpu"
    retry_failed: bool = False
    watch: Watch = unwatched


def evaluate_pairs(
    pairs: Sequence[Pair],
    correspondence: Correspondence,
    out: str | Path,
    rules: Rules | None = None,
    running: Running | None = None,
    *,
    features: Path | None = None,
    told: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Match the pairs and return what OUT/results.json holds; the same call goes on where an earlier one stopped.

    Beside it lie matches.parquet with a row a point, and the stores of the images' features, unless `features` is
    another folder. told: what else the results are to say. Pairs with an image that cannot be read
    are left out, and named under `left_out`; where all are, there is nothing else.
    Raises ValueError where `out` holds the matches of something else, and for an image that was edited since.
    """
    folder, rules, running = Path(out), rules or Rules(), running or Running()
    if not pairs:
        raise ValueError("no pairs; give at least one")
    with made(folder), locked(folder):
        claim(folder, _settings(pairs, correspondence, rules), "matches", beside=(FEATURES, SEARCH))
        seen = _seen(pairs, correspondence, features or folder / FEATURES, rules, running)
        if rules.remove_position:
            correspondence = correspondence.replaced(positions=seen.positions())
        with running.watch("match", "pairs") as progress:
            options: dict[str, Any] = {"partner": rules.partner, "step": rules.step, "progress": progress}
            found = match_pairs(pairs, correspondence, seen, folder, **options)
        if not found.table.num_rows:
            return {**(told or {}), "pairs": 0, "left_out": found.left_out}
        results = {**(told or {}), **_results(found, rules), "cost": _cost(seen, found, folder)}
        publish(folder, {RESULTS: (json.dumps(results, indent=1) + "\n").encode()})
    return results


def search_weights(
    pairs: Sequence[Pair],
    correspondence: Correspondence,
    out: str | Path,
    weights: Sequence[Number],
    rules: Rules,
    running: Running,
) -> tuple[Correspondence, list[dict[str, Any]]]:
    """Score each weight of the second part, relative to the first, on `pairs`; the best, and the table of all.

    Stores are shared, and every weight has its own matches in OUT/val. The score is the first average of the protocol
    at the first alpha; of equal ones the first counts. An infinite weight is the second part alone.
    Raises ValueError unless there are two parts, and where no pair can be matched.
    """
    if len(correspondence.parts) != 2:
        raise ValueError(f"{len(correspondence.parts)} part; weights are searched for two, so give --dino or a preset")
    folder, features = Path(out) / SEARCH, Path(out) / SEARCH / FEATURES
    tried = [weighted(correspondence, weight) for weight in weights]
    scores: list[dict[str, Any]] = []
    for weight, one in zip(weights, tried, strict=True):
        results = evaluate_pairs(pairs, one, folder / f"weight-{float(weight)!r}", rules, running, features=features)
        if not results["pairs"]:
            name, why = next(iter(results["left_out"].items()))
            raise ValueError(f"no weight can be chosen: all {len(pairs)} pairs are left out; the first, {name}: {why}")
        scores.append({"weights": [part.weight for part in one.parts], "pck": headline(results)})
    best = max(range(len(scores)), key=lambda number: scores[number]["pck"])
    return tried[best], scores


def weighted(correspondence: Correspondence, weight: Number) -> Correspondence:
    """The same, with the second part's weight as so many times the first's."""
    first, second = correspondence.parts
    pair = (0.0, 1.0) if isinf(weight) else (1.0, float(weight))
    parts = [replace(part, weight=of) for part, of in zip((first, second), pair, strict=True)]
    return correspondence.replaced(parts=parts)


def headline(results: dict[str, Any]) -> float:
    """The one number: the first average of the first protocol and threshold, at the first alpha."""
    return results["pck"][results["threshold"]][results["protocol"]][results["average"]][0]


def _seen(
    pairs: Sequence[Pair], correspondence: Correspondence, folder: Path, rules: Rules, running: Running
) -> SeenStore:
    entries = [(image, pair.category) for pair in pairs for image in (pair.source, pair.target)]
    how: dict[str, Any] = {"batch_size": running.batch_size, "retry_failed": running.retry_failed}
    where: dict[str, Any] = {"device": running.device, "watch": running.watch}
    return store_seen(correspondence, entries, folder, dtype=rules.dtype, **how, **where)


def _results(found: Matched, rules: Rules) -> dict[str, Any]:
    report = pair_report(found.table, protocol=rules.protocol, threshold=rules.threshold, alphas=rules.alphas)
    return {**report, "position_removed": rules.remove_position, "left_out": found.left_out}


def _settings(pairs: Sequence[Pair], correspondence: Correspondence, rules: Rules) -> dict[str, Any]:
    """What decides the matches; in which order the pairs and their points come does not."""
    asked = sorted((_asked(pair) for pair in pairs), key=lambda one: one["id"])
    changes = {"remove_position": rules.remove_position, "stored": rules.dtype, "step": rules.step}
    return {
        **correspondence.identity,
        **changes,
        "pairs": {"count": len(pairs), "sha256": identity_hash({"pairs": asked})},
    }


def _asked(pair: Pair) -> dict[str, Any]:
    """A pair as JSON has it; files go by their names, so that a benchmark may be moved."""
    names = pair.names or [""] * len(pair.source_points)
    rows = sorted(zip(pair.source_points.tolist(), pair.target_points.tolist(), names, strict=True))
    return {
        "id": pair.id,
        "images": [pair.source.name, pair.target.name],
        "points": rows,
        "category": pair.category,
        "box": pair.target_box,
        "flow": pair.flow and [pair.flow.name, pair.flow.stat().st_size],
    }


def _cost(seen: SeenStore, found: Matched, folder: Path) -> dict[str, Any]:
    """What was measured; of pairs that an earlier run has matched, what that measured."""
    path = folder / RESULTS
    earlier = json.loads(path.read_text()).get("cost", {}) if path.is_file() else {}
    now: dict[str, Any] = {"flops_an_image": None if "flops_an_image" in earlier else _flops(seen)}
    now["seconds_an_image"] = seen.seconds
    now["seconds_a_pair"] = found.seconds / found.pairs if found.pairs else None
    now["points_a_second"] = found.points / found.seconds if found.seconds else None
    return {name: earlier.get(name) if value is None else value for name, value in now.items()}


def _flops(seen: SeenStore) -> int | None:
    found = [image_flops(extractor) for extractor in (*seen.kept, *seen.mirrored)]
    return None if None in found else sum(one or 0 for one in found)
