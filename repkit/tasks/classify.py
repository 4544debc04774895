"""Classify a list of images, replay saved errors as another classifier would see them, fit weights to labelled ones."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from repkit.features import identity_hash
from repkit.publishing import made, parquet_bytes, publish
from repkit.shards import FAILED
from repkit.tasks.classified import COLUMNS, Classified, Tally, read_classified, result_rows
from repkit.tasks.measuring import forget, keeping, measure_images, part_size, refuse_other, table_bytes
from repkit.tasks.runsettings import live_settings, replay_settings
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.errortable import ErrorTable, join, replay
from repkit.zeroshot.learning import learn
from repkit.zeroshot.racing import Racing
from repkit.zeroshot.rules import make_rule
from repkit.zeroshot.staged import Staged
from repkit.zeroshot.strategies import Strategy, Uniform
from repkit.zeroshot.weighttable import WeightTable, whiten

Fitted = Literal["whitened", "learned"]
Progress = Callable[[int, int, int, str], None]  # images done, of how many, failed, and in words how it goes
UNLABELLED = "no image has a label that is a class; give a tree of class folders, or a list with labels"


def make_strategy(
    name: str,
    evaluations: int | None = None,
    delta: float | None = None,
    keep: Sequence[int] | None = None,
    samples: Sequence[int] | None = None,
) -> Strategy:
    """A strategy by its name, uniform, staged or racing; ValueError for settings that are another one's."""
    given = {"delta": delta, "keep": keep, "samples": samples, "evaluations": evaluations}
    takes = {"uniform": ("evaluations",), "staged": ("keep", "samples"), "racing": ("evaluations", "delta")}
    if name not in takes:
        raise ValueError(f"no strategy {name!r}; have {', '.join(takes)}")
    if wrong := [one for one, value in given.items() if value is not None and one not in takes[name]]:
        raise ValueError(f"--{wrong[0]} is not for --strategy {name}, which takes {' and '.join(takes[name])}")
    if name == "staged":
        if keep is None or samples is None:
            raise ValueError("--strategy staged needs --keep and --samples, such as --keep 5,1 --samples 16,64")
        return Staged(keep, samples)
    if name == "uniform":
        return Uniform() if evaluations is None else Uniform(evaluations)
    settings = {"delta": delta, "max_evaluations": evaluations}
    return Racing(**{key: value for key, value in settings.items() if value is not None})  # type: ignore[arg-type]


def classify_images(
    classifier: DiffusionClassifier,
    listing: pa.Table,
    *,
    out: Path | None = None,
    errors: Path | None = None,
    own_part_size: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[Classified], None] | None = None,
) -> Classified:
    """The posterior of every image, in their order, also written to `out` and the errors to `errors`, both Parquet.

    What is done is kept in OUT.parts until the end, `own_part_size` images at a time; killed at any moment, the same
    call goes on from there, and the files are those of an undisturbed run. tell: is given each part as it is done.
    Raises ValueError where `out`, `errors` or unfinished work was made with other settings, and for a shortlist without
    an attribute `identity`, which is what tells its results from those of another one.
    """
    check_distinct_files({"--errors": errors}, out)
    settings = live_settings(classifier, listing)
    if out is not None and out.exists():
        return _finished(out, errors, settings)
    _check_errors(errors, settings)
    images = {row["id"]: row for row in listing.to_pylist()}
    tally, tables = Tally(settings["classes"]), list[ErrorTable]()

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, tally.failed, tally.words)

    with keeping(out or errors, settings, part_size(classifier), own_part_size) as kept:
        for measured in measure_images(classifier, listing, kept, report):
            rows = COLUMNS.empty_table()
            if measured.table is not None:
                rows = result_rows(measured.table, classifier.rule, images)
                tables += [measured.table] if errors is not None else []
            tally.add(rows, measured.failures)
            if not measured.earlier:
                report(tally.done, listing.num_rows)
            if tell is not None:
                tell(Classified(rows, measured.failures, settings))
        classified = tally.classified(settings)
        if errors is not None and tables:
            _write_errors(errors, _labelled(join(tables), classifier, settings, images))
        if out is not None:
            _publish(out, classified)
    return classified


def replay_errors(
    table: ErrorTable,
    strategy: Strategy,
    *,
    out: Path | None = None,
    weighting: str | WeightTable | None = None,
    **rule: Any,
) -> Classified:
    """What another strategy and rule find in saved errors, without a network; rule: as `make_rule` takes it.

    Raises ValueError where `out` is there and is not the result of this very replay.
    """
    made_rule = make_rule(
        table.levels,
        table.classes,
        table.info,
        weighting=weighting,
        shipped=table.info.get("evidence_weights"),
        prompts=len(table.conditions),
        full=isinstance(strategy, Uniform | Racing),
        **rule,
    )
    settings = replay_settings(made_rule, strategy, table)
    if out is not None and out.exists():
        refuse_other(out, settings, read_classified(out, _failures(out)).settings)
    replayed = replay(table, strategy, made_rule.weights, loss=made_rule.loss)
    labels = table.info.get("labels", {})
    rows = result_rows(replayed, made_rule, {name: {"label": label} for name, label in labels.items()})
    classified = Classified(rows, FAILED.empty_table(), settings)
    if out is not None:
        with made(out.parent):
            _publish(out, classified)
    return classified


def fit_images(
    classifier: DiffusionClassifier,
    listing: pa.Table,
    path: Path,
    *,
    kind: Fitted = "whitened",
    errors: Path | None = None,
    own_part_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[WeightTable, ErrorTable]:
    """Weights and temperature fitted to labelled images, written to `path`, and the errors they were fitted to.

    Every class is evaluated at every level. What is done is kept in PATH.parts until the end, also where the labels
    determine no temperature. Raises ValueError there, and where no image has a label that is a class.
    """
    classifier = classifier.complete
    settings = live_settings(classifier, listing)
    images = {row["id"]: row for row in listing.to_pylist()}
    if not {row["label"] for row in images.values()} & {str(name) for name in classifier.classes}:
        raise ValueError(UNLABELLED)
    _check_errors(errors, settings)

    tables, failed = list[ErrorTable](), 0

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, failed, "")

    with keeping(path, settings, part_size(classifier), own_part_size) as kept:
        for measured in measure_images(classifier, listing, kept, report):
            tables += [] if measured.table is None else [measured.table]
            failed += measured.failures.num_rows
            if not measured.earlier:
                report(sum(map(len, tables)) + failed, listing.num_rows)
        if not tables:
            raise ValueError("none of the images can be read, so nothing can be fitted to them; give others")
        table = _labelled(join(tables), classifier, settings, images)
        if errors is not None:
            _write_errors(errors, table)
        fitted = fit_weights(table, kind, classifier.rule.loss)
        fitted.save(path)
    return fitted, table


def fit_weights(table: ErrorTable, kind: Fitted, loss: str = "l2") -> WeightTable:
    """Weights and their temperature, fitted to the images of a table whose labels are classes of it.

    Raises ValueError where too few images have such labels, or these do not determine a temperature.
    """
    number = {str(name): index for index, name in enumerate(table.classes)}
    labels = table.info.get("labels", {})
    rows = np.array([row for row, name in enumerate(table.ids) if labels.get(name) in number], dtype=np.int64)
    if not len(rows):
        raise ValueError(UNLABELLED)
    numbers = np.array([number[labels[table.ids[row]]] for row in rows])
    return (whiten if kind == "whitened" else learn)(table[rows], numbers, loss=loss)


def check_distinct_files(files: Mapping[str, Path | None], out: Path | None) -> None:
    """Raise ValueError where a file, by its option, is `out` or what failures go to beside it."""
    taken = {} if out is None else {out.resolve(): "--out", _failures(out).resolve(): "the failures of --out"}
    for option, path in files.items():
        if path is not None and (other := taken.get(path.resolve())):
            raise ValueError(f"{option} {path} is also the file of {other}; give each a file of its own")


def _finished(out: Path, errors: Path | None, settings: Mapping[str, Any]) -> Classified:
    """The results that are there already."""
    found = read_classified(out, _failures(out))
    refuse_other(out, settings, found.settings)
    if errors is not None and not errors.exists():
        raise ValueError(f"{out} is complete, and its errors were not kept; give another --out to have them")
    _check_errors(errors, settings)
    forget(out)
    return found


def _publish(out: Path, classified: Classified) -> None:
    failed = {_failures(out).name: parquet_bytes(classified.failures)} if classified.failures.num_rows else {}
    publish(out.parent, {**failed, out.name: classified.write()})


def _failures(out: Path) -> Path:
    return out.with_name(f"{out.stem}.failures.parquet")


def _check_errors(path: Path | None, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where the file is there and is not what these settings make."""
    if path is None or not path.exists():
        return
    try:
        told = json.loads((pq.read_schema(path).metadata or {})[b"repkit"])
        same = told["info"].get("run") == identity_hash(settings["identity"])
    except (pa.ArrowException, KeyError, ValueError):
        same = False
    if not same:
        raise ValueError(f"{path} is there and holds something else; choose another file for --errors")


def _write_errors(path: Path, table: ErrorTable) -> None:
    with made(path.parent):
        publish(path.parent, {path.name: table_bytes(table)})


def _labelled(
    table: ErrorTable,
    classifier: DiffusionClassifier,
    settings: Mapping[str, Any],
    images: Mapping[str, Mapping[str, Any]],
) -> ErrorTable:
    """With what a replay needs beside the errors, labels by id and the model's own weights, and what run made it."""
    labels = {name: images[name]["label"] for name in table.ids if images[name]["label"] is not None}
    more = {"labels": labels, "evidence_weights": classifier.backbone.evidence_weights}
    return replace(table, info={**table.info, **more, "run": identity_hash(settings["identity"])})
