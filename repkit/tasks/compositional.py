"""Does a diffusion model tell captions apart, and images: scores of compositional benchmarks, overall and by tag."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from repkit.datasets.captions import Example
from repkit.heads.pair_scores import SCORES, chance, evidence, matched
from repkit.heads.scores import wilson_interval
from repkit.tasks.caption_scores import Progress, score_captions
from repkit.tasks.judging import Judge

ALL = "all"


@dataclass(frozen=True)
class Share:
    """So many of `n` examples right, in [0, 1]; what chance reaches, None where that is not known."""

    n: int
    correct: int
    score: float
    interval: tuple[float, float]  # 95 %, Wilson
    chance: float | None


@dataclass(frozen=True)
class CompositionalReport:
    """For each tag, and last for all examples, the scores by name: text, image, group.

    text: every image prefers its own caption. image: every caption prefers its own image, each image's own likelihood
    taken off. Examples with an image that failed count nowhere. means: over the tags, where each example has just one.
    """

    shares: dict[str, dict[str, Share]]
    means: dict[str, float]
    failures: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        shares = {tag: {name: asdict(share) for name, share in of.items()} for tag, of in self.shares.items()}
        return {"scores": shares, "mean_of_tags": self.means, "failures": self.failures}


def evaluate_captions(
    examples: Sequence[Example],
    judge: Judge,
    out: str | Path,
    *,
    progress: Progress | None = None,
) -> CompositionalReport:
    """Score `examples` and write OUT/scores.parquet; the same call goes on where an earlier one stopped.

    Raises ValueError where the backbone cannot be told such captions, or where `out` holds other scores.
    """
    judge.backbone.condition(examples[0].captions[0], 1)  # told now, rather than as a failure of every image
    if any(len(example.images) > 1 for example in examples):
        judge.backbone.condition(None, 1)
    found = score_captions(examples, judge, out, progress=progress)
    return report(examples, found.table, found.failures)


def report(examples: Sequence[Example], table: pa.Table, failures: dict[str, str]) -> CompositionalReport:
    """The scores of a table that `score_captions` wrote."""
    errors = _errors(table)
    outcomes: dict[str, list[tuple[dict[str, bool], dict[str, float]]]] = {}
    complete = [e for e in examples if all((e.id, image) in errors for image in range(len(e.images)))]
    for example in complete:
        rows = [errors[example.id, image] for image in range(len(example.images))]
        told, nothing = (np.array(part) for part in zip(*rows, strict=True))
        scores = evidence(told, nothing if len(rows) > 1 else None)
        guess = chance(len(rows), len(example.captions), sum(place is not None for place in example.right))
        for tag in (*example.tags, ALL):
            outcomes.setdefault(tag, []).append((matched(scores, example.right), guess))
    order = sorted(outcomes, key=lambda tag: tag == ALL)
    shares = {tag: _shares(outcomes[tag]) for tag in order}
    single = len(shares) > 2 and all(len(example.tags) == 1 for example in complete)
    return CompositionalReport(shares, _means(shares) if single else {}, failures)


def _errors(table: pa.Table) -> dict[tuple[str, int], tuple[list[float], float | None]]:
    """By id and image: the error of each caption, and that of the null prompt."""
    found: dict[tuple[str, int], tuple[list[float], float | None]] = {}
    columns = [table[name].to_pylist() for name in ("id", "image", "error", "null_error")]
    for name, image, error, null_error in zip(*columns, strict=True):
        found.setdefault((name, image), ([], null_error))[0].append(error)
    return found


def _shares(outcomes: Sequence[tuple[dict[str, bool], dict[str, float]]]) -> dict[str, Share]:
    shares = {}
    for name in SCORES:
        asked = [(right[name], guess.get(name)) for right, guess in outcomes if name in right]
        if asked:
            n, correct = len(asked), sum(right for right, _ in asked)
            known = [guess for _, guess in asked if guess is not None]
            guessed = sum(known) / n if len(known) == n else None
            shares[name] = Share(n, correct, correct / n, wilson_interval(correct, n), guessed)
    return shares


def _means(shares: dict[str, dict[str, Share]]) -> dict[str, float]:
    """Of each score that every tag has."""
    tags = [of for tag, of in shares.items() if tag != ALL]
    names = [name for name in SCORES if all(name in of for of in tags)]
    return {name: sum(of[name].score for of in tags) / len(tags) for name in names}
