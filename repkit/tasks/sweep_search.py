"""One network's part of a sweep: every cell screened, the best ones compared again, the chosen one tested once."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Int

from repkit.extractors import DiffusionExtractor, Extractor
from repkit.heads.scores import accuracy
from repkit.publishing import publish
from repkit.tasks.probe import HEADS, probe_features
from repkit.tasks.sweep_cells import Cell, narrowed, split_levels
from repkit.tasks.sweep_reading import Gathered, Reader
from repkit.tasks.sweep_screen import by_cell, screen

DRAWS = 5  # of the labelled images of a few-shot probe


@dataclass(frozen=True, eq=False)
class Steps:
    """What is done, kept in a file for each step, so that the same run goes on where it was killed."""

    folder: Path
    reader: Reader
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a step, JSON-ready, computed unless it is there."""
        path = self.folder / f"part-{name}.json"
        if not path.exists():
            started = perf_counter()
            result = compute()
            done = {"result": result, "seconds": perf_counter() - started, "failures": self.reader.failures}
            publish(self.folder, {path.name: (json.dumps(done) + "\n").encode()})
        kept = json.loads(path.read_text())
        self.reader.failures.update(kept["failures"])
        self.seconds[name] = kept["seconds"]
        return kept["result"]


@dataclass(frozen=True, eq=False)
class Search:
    """The cells of one network. name: of the network in the names of steps; finalists: cells that logistic sees."""

    name: str
    extractor: Extractor
    cells: Mapping[str, Cell]
    reader: Reader
    steps: Steps
    finalists: int
    memory: dict[str, Gathered] = field(default_factory=dict)  # what finalists were fitted on

    def screen(self) -> dict[str, Mapping[str, Any]]:
        """Ridge on every cell, one noise level after the other, so that only one level's moments are in memory."""
        levels, rows = split_levels(self.extractor), []
        for number, level in enumerate(levels):
            cells = [cell for cell in self.cells.values() if cell.key in level.blocks]
            at = "" if cells[0].t is None else f", t = {cells[0].t:g}"
            what = f"{self.name}{at} ({number + 1}/{len(levels)})"
            rows += self.steps(f"{self.name}-screen-{number:03d}", partial(screen, level, cells, self.reader, what))
        found = by_cell(rows)
        return {name: found[name] for name in self.cells}

    def compare(self, screened: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Logistic regression along a path of C on the cells that screening likes best; by the cell's name.

        Their features were not kept, so each noise level among them takes one more forward an image.
        """
        best = sorted(self.cells, key=lambda name: (screened[name]["validation"], self._cheapness(name)))
        best = best[: -self.finalists - 1 : -1]
        rows: list[dict[str, Any]] = []
        for number, level in enumerate(split_levels(self.extractor)):
            names = [name for name in best if self.cells[name].key in level.blocks]
            if names:
                rows += self.steps(f"{self.name}-finalists-{number:03d}", partial(self._logistic, names))
        return by_cell(rows)

    def choose(
        self, screened: Mapping[str, Mapping[str, Any]], compared: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The finalist and head with the best validation accuracy; of equal ones logistic, then the cheaper cell."""
        found = [("logistic", name, row["validation"]) for name, row in compared.items()]
        found += [("ridge", name, screened[name]["validation"]) for name in compared]
        head, name, validation = max(found, key=lambda one: (one[2], one[0] == "logistic", self._cheapness(one[1])))
        for other in set(self.memory) - {name}:
            del self.memory[other]
        return {**self.cells[name].to_json(), "cell": name, "head": head, "validation": validation}

    def test(self, chosen: Mapping[str, Any], seed: int | None = None) -> dict[str, Any]:
        """The chosen cell's probe on the test rows: fitted with all others, at the value that validation chose.

        seed: of other noise, in fitting and in testing.
        """
        return tested(self.reader, self._all(chosen["cell"], seed), chosen["cell"], chosen["head"])

    def few_shot(self, chosen: Mapping[str, Any], shots: int) -> dict[str, Any]:
        """Test accuracies with so many labels a class, over several draws; all validation rows choose the penalty."""
        gathered, head = self._all(chosen["cell"]), chosen["head"]
        x, labels = gathered.features[chosen["cell"]], self.reader.data.labels[gathered.rows]
        splits = self.reader.splits(gathered)
        fit, kwargs = HEADS[head][0], {"refit": False} if head == "logistic" else {}
        held, found = (x[splits.validation], labels[splits.validation]), []
        for draw in range(DRAWS):
            rows = drawn(labels, splits.train, shots, draw)
            probe = fit(x[rows], labels[rows], validation=held, n_classes=len(self.reader.data.classes), **kwargs)
            found.append(accuracy(labels[splits.test], probe.predict(x[splits.test])))
        return {"shots": shots, **summary(found)}

    def noisy(self, chosen: Mapping[str, Any]) -> bool:
        """Whether a chosen cell's features depend on a seed."""
        return isinstance(self.extractor, DiffusionExtractor) and not self.extractor.levels[chosen["key"]].clean

    def _cheapness(self, name: str) -> tuple[float, int]:
        return -self.cells[name].flops, -self.cells[name].dim

    def _logistic(self, names: Sequence[str]) -> list[dict[str, Any]]:
        gathered = self._gather(names, None)
        splits, labels = self.reader.splits(gathered), self.reader.data.labels[gathered.rows]
        rows = []
        for name in names:
            self.memory[name] = gathered.only(name)
            x = gathered.features[name]
            held = (x[splits.validation], labels[splits.validation])
            options: dict[str, Any] = {"validation": held, "refit": False, "n_classes": len(self.reader.data.classes)}
            chosen = HEADS["logistic"][0](x[splits.train], labels[splits.train], **options).chosen
            rows.append({"cell": name, "C": chosen.value, "validation": max(chosen.scores)})
        return rows

    def _gather(self, names: Sequence[str], seed: int | None) -> Gathered:
        extractor = self._narrowed(names, seed)
        what = f"{self.name}, {', '.join(extractor.blocks)}"
        return self.reader.gather(extractor, names, self.reader.data.seen, what)

    def _all(self, name: str, seed: int | None = None) -> Gathered:
        """The features of all rows. Those that test come last and in batches of their own, as others saw theirs."""
        key = name if seed is None else f"{name} {seed}"
        if key not in self.memory:
            self.memory[key] = self._gather([name], seed)
        if not np.isin(self.reader.data.splits.test, self.memory[key].rows).any():
            test = self.reader.data.splits.test
            self.memory[key] += self.reader.gather(self._narrowed([name], seed), [name], test, f"{self.name}, test")
        return self.memory[key] if seed is None else self.memory.pop(key)

    def _narrowed(self, names: Sequence[str], seed: int | None) -> Extractor:
        return narrowed(self.extractor, list(dict.fromkeys(self.cells[name].key for name in names)), seed)


def tested(reader: Reader, gathered: Gathered, name: str, head: str) -> dict[str, Any]:
    """A probe of gathered features, chosen on validation rows and tested once."""
    labels = reader.data.labels[gathered.rows]
    features = {name: gathered.features[name]}
    report = probe_features(features, labels, reader.data.classes, reader.splits(gathered), head).to_json()
    kept = ("head", "chosen", "test_accuracy", "test_interval_95", "split", "per_class")
    return {"validation_accuracy": report["validation_accuracy"][name], **{key: report[key] for key in kept}}


def drawn(labels: Int[np.ndarray, " n"], train: Int[np.ndarray, " a"], shots: int, draw: int) -> Int[np.ndarray, " b"]:
    """So many of the training rows of each class, another choice for each draw."""
    random = np.random.default_rng([shots, draw])
    classes = np.unique(labels[train])
    found = [random.choice(train[labels[train] == one], shots, replace=False) for one in classes]
    return np.sort(np.concatenate(found))


def summary(accuracies: Sequence[float]) -> dict[str, Any]:
    """Accuracies with their mean and standard deviation (that of a sample; None of a single one)."""
    spread = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
    return {"accuracies": list(accuracies), "mean": float(np.mean(accuracies)), "deviation": spread}
