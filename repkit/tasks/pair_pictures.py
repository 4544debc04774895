"""Pictures of matched pairs: the two images side by side, a line from each point to where it was found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from repkit.images import decode
from repkit.shards import read_parquet
from repkit.tasks.pair_report import pair_rows
from repkit.tasks.pair_table import MATCHES, by_pair
from repkit.tasks.pictures import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES, POINTS = 8, 24  # pairs on a picture, and points of a pair
RIGHT, WRONG = "tab:green", "tab:red"


def draw_pairs(results: Mapping[str, Any], folder: Path) -> None:
    """Write FOLDER/best.png and worst.png: of FOLDER/matches.parquet the pairs with the most and the fewest correct.

    results: which protocol and threshold counts, and the alphas, the first of which is taken.
    """
    table = read_parquet(folder / MATCHES)
    rows, alpha = pair_rows(table), results["alphas"][0]
    correct = [hits[:, 0] for hits in rows.pck(results["protocol"], results["threshold"], [alpha]).correct]
    errors = [
        float(np.linalg.norm(found - true, axis=1).mean()) / length
        for found, true, length in zip(rows.found, rows.true, rows.lengths[results["threshold"]], strict=True)
    ]
    order = sorted(range(len(errors)), key=lambda n: (-correct[n].mean(), errors[n], rows.ids[n]))
    pairs = dict(by_pair(table))
    for name, chosen in (("best", order[:PICTURES]), ("worst", order[::-1][:PICTURES])):
        draw([(pairs[rows.ids[n]], correct[n]) for n in chosen], f"PCK@{alpha:g}", folder / f"{name}.png")


def draw(pairs: Sequence[tuple[pa.Table, Bool[np.ndarray, " _n"]]], measure: str, path: Path) -> Path:
    """Pairs, each the rows of its points and which of them are correct, as one picture.

    Matches are green where they are correct and red where not; a ring is where a point truly is.
    """
    from matplotlib.figure import Figure

    wide = min(2, len(pairs))
    figure = Figure(figsize=(6.5 * wide, 3.4 * -(-len(pairs) // wide)), layout="constrained")
    grid = figure.subplots(-(-len(pairs) // wide), wide, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (rows, correct) in zip(grid.flat, pairs, strict=False):
        first = rows.slice(0, 1).to_pylist()[0]
        category = f"{first['category']}: " if first["category"] else ""
        axes.set_title(f"{category}{measure} {correct.mean():.0%} of {len(correct)}", fontsize=9)
        _draw_pair(axes, rows, correct)
    return save(figure, path)


def _draw_pair(axes: "Axes", rows: pa.Table, correct: Bool[np.ndarray, " n"]) -> None:
    """Both images at one height, the target on the right."""
    first = rows.slice(0, 1).to_pylist()[0]
    source, target = (decode(Path(first[name])) for name in ("source", "target"))
    scale, shift = source.height / target.height, source.width * 1.04
    axes.imshow(source, extent=(-0.5, source.width - 0.5, source.height - 0.5, -0.5))
    right = shift + target.width * scale
    axes.imshow(target, extent=(shift - 0.5, right - 0.5, source.height - 0.5, -0.5))
    axes.set(xlim=(-0.5, right - 0.5), ylim=(source.height - 0.5, -0.5), aspect="equal")
    shown = np.unique(np.linspace(0, len(correct) - 1, POINTS).round().astype(int))
    start, found, true = (_places(rows, what)[shown] for what in ("", "found_", "true_"))
    found, true = ((places + 0.5) * scale - 0.5 + [shift, 0] for places in (found, true))
    for one, other, where, right_one in zip(start, found, true, correct[shown], strict=True):
        colour = RIGHT if right_one else WRONG
        axes.plot(*np.stack([one, other]).T, color=colour, linewidth=1, marker=".", markersize=5)
        axes.plot(*where, marker="o", markersize=7, fillstyle="none", color=colour, linewidth=0)


def _places(rows: pa.Table, what: str) -> Float[np.ndarray, "n 2"]:
    return np.stack([rows[f"{what}{axis}"].to_numpy() for axis in "xy"], 1)
