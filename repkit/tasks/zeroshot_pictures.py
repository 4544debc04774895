"""Pictures of a zero-shot classifier: how far its probabilities can be believed, and where in an image it looks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from repkit.heads.calibration import ReliabilityBin

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability_picture(bins: Sequence[ReliabilityBin], title: str) -> "Figure":
    """Accuracy against top probability above, on the diagonal where they agree, and how many rows there are below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    edges = [one.low for one in bins]
    width = bins[0].high - bins[0].low
    upper.bar(edges, [one.accuracy or 0 for one in bins], width, align="edge", color="C0", edgecolor="w")
    upper.plot([0, 1], [0, 1], color="k", linewidth=0.8, linestyle="--")
    filled = [one for one in bins if one.n]
    upper.plot([one.confidence for one in filled], [one.accuracy for one in filled], "o", color="C3", markersize=4)
    upper.set(title=title, ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    lower.bar(edges, [one.n for one in bins], width, align="edge", color="0.6", edgecolor="w")
    lower.set(xlabel="top probability", ylabel="images")
    return figure


def evidence_picture(
    images: Sequence[UInt8[np.ndarray, "H W 3"]], maps: Float[np.ndarray, "b h w"], titles: Sequence[str]
) -> "Figure":
    """Images above, and below each its evidence map over it in grey: red for the first class, blue for the second.

    All maps have one scale, that of the colour bar.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * len(images) + 0.8, 4.2), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    limit = float(np.abs(maps).max()) or 1.0
    for column, (image, evidence, title) in enumerate(zip(images, maps, titles, strict=True)):
        above, below = axes[:, column]
        above.imshow(image)
        above.set_title(title, fontsize=8)
        below.imshow(image.mean(2), cmap="gray", vmin=-255, vmax=255)  # pale, so that the colours show
        side = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        over = below.imshow(evidence, cmap="bwr", vmin=-limit, vmax=limit, extent=side, alpha=0.6)
        for one in (above, below):
            one.set_axis_off()
    figure.colorbar(over, ax=list(axes[1]), label="evidence for the first class")
    return figure
