"""Pictures of results: matplotlib figures and mosaics, drawn the same way each time and saved as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

if TYPE_CHECKING:
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
