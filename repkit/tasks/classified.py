"""What a classification found: a row for each image, the file of them, and what can be said of them all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from repkit.heads.scores import wilson_interval
from repkit.publishing import parquet_bytes
from repkit.shards import FAILED, read_parquet
from repkit.zeroshot.errortable import ErrorTable
from repkit.zeroshot.posterior import Rule

FORMAT = 1
# log_posterior: of every class, in the order of `classes` in the schema's metadata.
COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("id", "path", "label", "predicted")]
    + [("probability", pa.float64()), ("decided", pa.bool_()), ("evaluations", pa.int64())]
    + [("log_posterior", pa.list_(pa.float64()))]
)


@dataclass(frozen=True)
class Accuracy:
    """Of the images whose label is one of the classes: share in [0, 1], and Wilson's 95 % interval."""

    right: int
    images: int

    @property
    def share(self) -> float:
        return self.right / self.images

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.images)


@dataclass(frozen=True)
class Shown:
    """An image, its label where that is a class, and its likeliest classes with log-probabilities, likeliest first."""

    path: str
    label: str | None
    ranked: Sequence[tuple[Any, float]]


@dataclass(frozen=True, eq=False)
class Classified:
    """rows: as in COLUMNS. failures: path and error of images without a row. settings: classes, model, strategy, ..."""

    rows: pa.Table
    failures: pa.Table
    settings: Mapping[str, Any]

    @property
    def accuracy(self) -> Accuracy | None:
        """None where no image has a label that is a class."""
        return accuracy_of(self.rows, self.settings["classes"])

    @property
    def evaluations(self) -> float | None:
        """How often the network ran for an image, on average; None without images."""
        counts = self.rows["evaluations"].to_pylist()
        return sum(counts) / len(counts) if counts else None

    def top(self, count: int) -> list[list[tuple[Any, float]]]:
        """For each image the likeliest classes with their log-probabilities, likeliest first."""
        classes = self.settings["classes"]
        ranked = (sorted(zip(classes, row, strict=True), key=lambda one: -one[1]) for row in self._posteriors)
        return [row[:count] for row in ranked]

    @property
    def _posteriors(self) -> list[list[float]]:
        return self.rows["log_posterior"].to_pylist()

    def shown(self, images: int, top: int = 4) -> list["Shown"]:
        """The first images, for a picture."""
        first = self.rows.slice(0, images).select(["path", "label"]).to_pylist()
        known = {str(name) for name in self.settings["classes"]}
        return [
            Shown(row["path"], row["label"] if row["label"] in known else None, of)
            for row, of in zip(first, self.top(top), strict=False)
        ]

    def write(self) -> bytes:
        """As a Parquet file, with the settings in its metadata under `repkit`."""
        return parquet_bytes(self.rows.replace_schema_metadata({"repkit": json.dumps(self.settings)}))


def read_classified(path: Path, failures: Path) -> Classified:
    """What `write` wrote; ValueError for another file."""
    try:
        table = read_parquet(path)
        settings = json.loads((table.schema.metadata or {})[b"repkit"])
        if not table.schema.equals(COLUMNS) or settings["format"] != FORMAT:
            raise KeyError("format")
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(f"{path} is there and holds no classified images; choose another file") from error
    failed = read_parquet(failures) if failures.is_file() else FAILED.empty_table()
    return Classified(table.replace_schema_metadata(None), failed, settings)


def result_rows(table: ErrorTable, rule: Rule, images: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """A row for each image of a table of errors; images: path and label by id."""
    found = rule.posterior(table)
    best = found.probabilities.max(1)
    told = [images.get(name, {}) for name in table.ids]
    columns = {
        "id": list(table.ids),
        "path": [one.get("path") for one in told],
        "label": [one.get("label") for one in told],
        "predicted": [str(label) for label in found.labels],
        "probability": best.values.numpy(),
        "decided": found.decided.numpy(),
        "evaluations": found.evaluations.numpy(),
        "log_posterior": list(found.log_posterior.numpy()),
    }
    return pa.table(columns, schema=COLUMNS)


def accuracy_of(rows: pa.Table, classes: Sequence[Any]) -> Accuracy | None:
    """The share of the images whose label is a class that are classified right; None where there is no such image."""
    known = {str(name) for name in classes}
    pairs = zip(rows["label"].to_pylist(), rows["predicted"].to_pylist(), strict=True)
    right = [label == predicted for label, predicted in pairs if label in known]
    return Accuracy(sum(right), len(right)) if right else None


class Tally:
    """What is found so far, in rows and in words."""

    def __init__(self, classes: Sequence[Any]) -> None:
        self._classes, self._rows, self._failures = classes, list[pa.Table](), list[pa.Table]()
        self.done = self.failed = self._evaluations = self._right = self._labelled = 0

    def add(self, rows: pa.Table, failures: pa.Table) -> None:
        """Rows and failures of the next images."""
        self._rows.append(rows)
        self._failures.append(failures)
        self.failed += failures.num_rows
        self.done += rows.num_rows + failures.num_rows
        self._evaluations += sum(rows["evaluations"].to_pylist())
        if accuracy := accuracy_of(rows, self._classes):
            self._right, self._labelled = self._right + accuracy.right, self._labelled + accuracy.images

    @property
    def words(self) -> str:
        """Evaluations an image and accuracy so far."""
        if self.done == self.failed:
            return ""
        right = f", {self._right / self._labelled:.1%} right" if self._labelled else ""
        return f"{self._evaluations / (self.done - self.failed):.0f} evaluations/image{right}"

    def classified(self, settings: Mapping[str, Any]) -> Classified:
        """All of it."""
        return Classified(
            pa.concat_tables([COLUMNS.empty_table(), *self._rows]),
            pa.concat_tables([FAILED.empty_table(), *self._failures]),
            settings,
        )
