"""Pictures of results: matplotlib figures and mosaics, drawn the same way each time and saved as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def confusion_picture(counts: Int[np.ndarray, "k k"], classes: Sequence[str], title: str) -> "Figure":
    """A confusion matrix: rows are true classes, columns predicted ones, colour is the share of the row."""
    from matplotlib.figure import Figure

    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.38 * len(classes), 24)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                dark = share[row, column] > 0.5
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color="w" if dark else "k")
    return figure


def posterior_picture(
    images: Sequence[tuple[Image.Image, str | None, Sequence[tuple[object, float]]]], columns: int = 3
) -> "Figure":
    """Images, each beside bars of its likeliest classes; of a known label the class is green, and others are red.

    images: the picture, its label or None, and (class, log-probability), likeliest first.
    """
    from matplotlib.figure import Figure

    wide = min(columns, len(images))
    rows = -(-len(images) // wide)
    figure = Figure(figsize=(4.2 * wide, 1.5 * rows), layout="constrained")
    grid = figure.subplots(rows, 2 * wide, squeeze=False, width_ratios=[1, 1.6] * wide)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (picture, label, ranked) in enumerate(images):
        row, column = divmod(number, wide)
        left, right = grid[row, 2 * column : 2 * column + 2]
        left.imshow(picture)
        left.set_title(label or "", fontsize=8)
        _posterior_bars(right, ranked, label)
    return figure


def _posterior_bars(axes: "Axes", ranked: Sequence[tuple[object, float]], label: str | None) -> None:
    """Bars from 0 to 1; the class's name stands above its bar, so that long ones have room."""
    known = label is not None
    for place, (name, value) in enumerate(ranked):
        color = "tab:blue" if not known else "tab:green" if str(name) == label else "tab:red"
        axes.barh(place, np.exp(value), height=0.45, color=color)
        axes.barh(place, 1, height=0.45, color="0.92", zorder=0)
        axes.text(0, place - 0.3, str(name), fontsize=7, va="bottom")
        axes.text(1, place - 0.3, f"{np.exp(value):.1%}", fontsize=7, va="bottom", ha="right")
    axes.set(xlim=(0, 1), ylim=(len(ranked) - 0.5, -0.9))


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure as PNG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def mosaic(rows: Sequence[Sequence[UInt8[np.ndarray, "_h _w 3"]]], side: int, gap: int = 4) -> Image.Image:
    """Pictures in a grid on white, each scaled to `side` pixels by nearest neighbour, so that cells stay visible."""
    height, width = len(rows), max(len(row) for row in rows)
    canvas = Image.new("RGB", (width * (side + gap) + gap, height * (side + gap) + gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            scaled = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(scaled, (gap + x * (side + gap), gap + y * (side + gap)))
    return canvas
