"""What a sweep found: a row for each cell, and the words for people."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from repkit.tasks.sweep_cells import Cell

CELLS, RESULTS, PICTURE = "cells.parquet", "results.json", "sweep.png"

SCHEMA = pa.schema(
    [("block", pa.string()), ("time", pa.string()), ("t", pa.float64()), ("logsnr", pa.float64())]
    + [("pool", pa.string()), ("channels", pa.int64()), ("dim", pa.int64())]
    + [("flops", pa.float64()), ("bytes", pa.int64())]
    + [("alpha", pa.float64()), ("validation", pa.float64())]
    + [("C", pa.float64()), ("logistic", pa.float64())]
    + [("random_alpha", pa.float64()), ("random_validation", pa.float64()), ("chosen", pa.bool_())]
)


def cells_table(cells: Mapping[str, Cell], screened: Mapping[str, Any], results: Mapping[str, Any]) -> pa.Table:
    """A row for each cell; validation accuracies are those of ridge, and of logistic regression for the finalists.

    Seconds are in the results alone: with the same images and settings, these bytes are the same.
    """
    ridge, logistic = screened["trained"]["ridge"], screened["trained"]["logistic"]
    random = screened.get("random", {"ridge": {}})["ridge"]
    rows = [
        {
            **cell.to_json(),
            "alpha": ridge[name]["alpha"],
            "validation": ridge[name]["validation"],
            "C": logistic.get(name, {}).get("C"),
            "logistic": logistic.get(name, {}).get("validation"),
            "random_alpha": random.get(name, {}).get("alpha"),
            "random_validation": random.get(name, {}).get("validation"),
            "chosen": name == results["chosen"]["cell"],
        }
        for name, cell in cells.items()
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def grid(rows: Sequence[Mapping[str, Any]], value: str) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Blocks, times, and a value of the rows for each of both, None where a block was not tapped at that time."""
    blocks, times = (list(dict.fromkeys(row[name] or "" for row in rows)) for name in ("block", "time"))
    found = {(row["block"], row["time"] or ""): row[value] for row in rows}
    return blocks, times, [[found.get((block, time)) for time in times] for block in blocks]


def words(table: pa.Table, results: Mapping[str, Any]) -> str:
    """The report: a grid of validation accuracies a pooling, the finalists, and what was tested."""
    rows = table.to_pylist()
    split = results["test"]["split"]
    counts = ", ".join(f"{split[name]} {name}" for name in ("train", "validation", "test"))
    head = f"{counts} images of {len(results['classes'])} classes\n({split['source']})"
    pools = dict.fromkeys(row["pool"] for row in rows)
    grids = [_grid_words(pool, [row for row in rows if row["pool"] == pool]) for pool in pools]
    return "\n\n".join([head, *grids, _finalists(rows), _tests(results)])


def _grid_words(pool: str, rows: Sequence[Mapping[str, Any]]) -> str:
    blocks, times, values = grid(rows, "validation")
    chosen = {(row["block"], row["time"] or "") for row in rows if row["chosen"]}
    width, column = max(map(len, blocks)), max(8, *(len(time) + 2 for time in times))
    lines = [f"validation accuracy of ridge, pool {pool}, in %", " " * width + "".join(f"{t:>{column}}" for t in times)]
    for block, accuracies in zip(blocks, values, strict=True):
        cells = [
            "-" if one is None else f"{'*' * ((block, time) in chosen)}{100 * one:.1f}"
            for time, one in zip(times, accuracies, strict=True)
        ]
        lines.append(f"{block:{width}}" + "".join(f"{cell:>{column}}" for cell in cells))
    return "\n".join(lines)


def _finalists(rows: Sequence[Mapping[str, Any]]) -> str:
    best = sorted((row for row in rows if row["logistic"] is not None), key=lambda row: -row["validation"])
    names = [_name(row) for row in best]
    width = max(8, *map(len, names))
    lines = [f"{'best cells':{width}}   ridge  logistic  random ridge   FLOPs  bytes/image"]
    for name, row in zip(names, best, strict=True):
        random = "-" if row["random_validation"] is None else f"{row['random_validation']:.1%}"
        lines.append(
            f"{name:{width}}  {row['validation']:6.1%}  {row['logistic']:8.1%}  {random:>12}  {row['flops']:6.1%}  "
            f"{row['bytes']:11,}{'  <- chosen' if row['chosen'] else ''}"
        )
    return "\n".join(lines)


def _tests(results: Mapping[str, Any]) -> str:
    chosen, test = results["chosen"], results["test"]
    lines = [("test accuracy", _tested(test), f"{chosen['cell']}, {_head(test)}")]
    if (seeds := results["noise_seeds"]) is not None:
        spread = "" if seeds["deviation"] is None else f" +- {seeds['deviation']:.1%}"
        lines.append(("  other noise", f"{seeds['mean']:.1%}{spread}", f"seeds {', '.join(map(str, seeds['seeds']))}"))
    for few in results["few_shot"]:
        draws = f"mean and deviation of {len(few['accuracies'])} draws"
        lines.append((f"  {few['shots']} a class", f"{few['mean']:.1%} +- {few['deviation']:.1%}", draws))
    if (random := results["controls"].get("random")) is not None:
        told = f"{random['chosen']['cell']}, {_head(random['test'])}, chosen in the same way"
        lines.append(("random weights", _tested(random["test"]), told))
    else:
        lines.append(("random weights", "-", "not known how to build this network without its weights"))
    pixels = results["controls"]["pixels"]["test"]
    lines.append(("raw pixels", _tested(pixels), _head(pixels)))
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"{what:{widths[0]}}  {value:{widths[1]}}  {told}" for what, value, told in lines)


def _tested(test: Mapping[str, Any]) -> str:
    low, high = test["test_interval_95"]
    return f"{test['test_accuracy']:.1%} ({low:.1%} to {high:.1%})"


def _head(test: Mapping[str, Any]) -> str:
    ((name, value),) = ((name, value) for name, value in test["chosen"].items() if name != "by")
    return f"{test['head']}, {name} = {value:g}"


def _name(row: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (row["block"] + (f"@{row['time']}" if row["time"] else ""), row["pool"])))
