"""Learning curves: what a run measured over its steps, as a table and as a picture."""

from collections.abc import Mapping

from matplotlib.figure import Figure

Curves = dict[str, list[tuple[int, float]]]  # by the measure's name: (steps done, value)


def curve_table(curves: Mapping[str, list[tuple[int, float]]]) -> str:
    """The points as CSV: step, measure and value."""
    rows = sorted((step, name, value) for name, curve in curves.items() for step, value in curve)
    return "step,measure,value\n" + "".join(f"{step},{name},{value:.6g}\n" for step, name, value in rows)


def curve_picture(curves: Mapping[str, list[tuple[int, float]]], title: str) -> Figure:
    """Losses on the left; everything else, which lies between 0 and 1, on the right."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, shares = figure.subplots(1, 2)
    figure.suptitle(title)
    for name, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        axes = losses if name.endswith("loss") else shares
        axes.plot(steps, values, label=name, marker="o" if len(values) < 20 else None, markersize=3)
    losses.set(xlabel="step", ylabel="loss")
    shares.set(xlabel="step", ylim=(0, 1))
    for axes in (losses, shares):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure
