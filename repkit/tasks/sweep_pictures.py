"""A sweep as a picture: blocks by times, for each pooling, of the network and of its control."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from repkit.tasks.sweep_report import grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NETWORKS = {"validation": "", "random_validation": ", random weights"}


def heat_map(table: pa.Table, results: Mapping[str, Any]) -> "Figure":
    """Validation accuracies of ridge; the chosen cell is framed, and all maps share their colours."""
    from matplotlib.figure import Figure

    pools = list(dict.fromkeys(table["pool"].to_pylist()))
    values = [name for name in NETWORKS if table[name].null_count < table.num_rows]
    rows = table.to_pylist()
    blocks, times, _ = grid(rows, "validation")
    width, height = 1.8 + 0.6 * len(times), 1 + 0.3 * len(blocks)
    figure = Figure(figsize=(max(7, width * len(pools)), 1 + height * len(values)), layout="constrained")
    axes = figure.subplots(len(values), len(pools), squeeze=False)
    found = [row[name] for row in rows for name in values]
    for line, value in zip(axes, values, strict=True):
        for one, pool in zip(line, pools, strict=True):
            _draw(one, [row for row in rows if row["pool"] == pool], value, (min(found), max(found)))
            one.set_title(f"{pool}{NETWORKS[value]}", fontsize=9)
    figure.suptitle(_title(results), fontsize=9)
    return figure


def _draw(axes: "Axes", rows: list[dict[str, Any]], value: str, limits: tuple[float, float]) -> None:
    from matplotlib.patches import Rectangle

    blocks, times, values = grid(rows, value)
    cells = np.array([[np.nan if one is None else one for one in line] for line in values])
    axes.imshow(cells, cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_xticks(range(len(times)), times, fontsize=7)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
    middle = (limits[0] + limits[1]) / 2
    for (row, column), one in np.ndenumerate(cells):
        if np.isfinite(one):
            color = "w" if one < middle else "k"
            axes.text(column, row, f"{100 * one:.0f}", ha="center", va="center", fontsize=6, color=color)
    for row in rows:
        if row["chosen"] and value == "validation":
            corner = times.index(row["time"] or "") - 0.5, blocks.index(row["block"]) - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="tab:red", linewidth=2))


def _title(results: Mapping[str, Any]) -> str:
    parts = [f"{results['chosen']['cell']}: {results['test']['test_accuracy']:.1%} on test images"]
    controls = {"random": "random weights", "pixels": "raw pixels"}
    parts += [
        f"{name} {results['controls'][key]['test']['test_accuracy']:.1%}"
        for key, name in controls.items()
        if key in results["controls"]
    ]
    return f"validation accuracy of ridge in %\n{', '.join(parts)}"
