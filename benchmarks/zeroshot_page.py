"""The picture and the section of docs/RESULTS.md that benchmarks/zeroshot.py makes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from measuring import table, write_section

_COLORS = {"train": "C0", "elbo": "C4", "min-snr": "C5", "sigmoid": "C8", "whitened": "C1", "learned": "C2"}
_MARKS = {"uniform": ".-", "racing": "D--", "staged": "*"}


@dataclass(frozen=True)
class Curve:
    """Accuracy in [0, 1] over evaluations an image, all classes together."""

    strategy: str
    weighting: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Report:
    """One model; accuracies, shares and errors in [0, 1]. used: share of the full budget's evaluations."""

    model: str
    probe: float
    accuracy: float
    biased: float
    ece: float
    evaluations: float
    full: float
    full_biased: float
    replayed: float
    used: float
    decided: float
    differ: float
    ece_before: float
    ece_after: float


def write_picture(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """One panel a model: a line for each strategy and weighting."""
    figure = Figure(figsize=(6.2 * len(curves), 4.6), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (name, lines) in zip(panels, curves.items(), strict=True):
        for line in lines:
            x, y = zip(*line.points, strict=True)
            shown = [100 * one for one in y]
            color, mark = _COLORS[line.weighting], _MARKS[line.strategy]
            axes.plot(x, shown, mark, color=color, label=f"{line.strategy}, {line.weighting}", markersize=7)
        axes.set(title=name, xlabel="evaluations an image", xscale="log")
        ticks = [40, 80, 160, 320, 640]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on test images, %")
    panels[-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def write_page(
    page: Path,
    reports: Sequence[Report],
    curves: Mapping[str, Sequence[Curve]],
    cnn: Mapping[str, float],
    full: int,
    test: int,
) -> None:
    """The section `Zero-shot classification` of the page."""
    body = f"""
Made by `python benchmarks/zeroshot.py`. As users would call it: racing with delta = 0.01, at most 64 evaluations for
each of the 10 classes, and the learned weights and temperature that come with the model, which were fitted on 300 other
images that the model has not seen either. First {test:,} test images; accuracy in percent; ECE is the expected
calibration error in 15 bins. With a bias for each class, fitted on the same 300 images, it is the second figure. The
probe is that of the table above. A plain CNN of {cnn["parameters"] / 1e6:.1f} million parameters, trained with the
labels of all 60,000 training images, has {100 * cnn["accuracy"]:.1f} on the same images.

{_summary(reports)}

On the first {full:,}, with the errors of everything (640 evaluations an image): racing against the full budget that it
is nested in, and the calibration of the full budget at temperature 1 and at the fitted one:

{_against_full(reports)}

![accuracy over evaluations](zeroshot.png)

Strategies and weightings on these images, all replayed from the same errors; racing at delta = 0.2, 0.1, 0.05, 0.01 and
0.001, staged by the schedule published for CIFAR-10 (keep 5, 1 after a tenth of the budget and all of it). The bound of
racing takes noise as even over the times, which holds with fitted weights and not with `train`.

{_curves(curves)}
"""
    write_section(page, "Zero-shot classification", body)


def _summary(reports: Sequence[Report]) -> str:
    head = ["model", "zero-shot", "with class bias", "linear probe", "evaluations an image", "ECE"]
    rows = [
        [one.model, *(f"{100 * value:.1f}" for value in (one.accuracy, one.biased, one.probe))]
        + [f"{one.evaluations:.0f}", f"{one.ece:.3f}"]
        for one in reports
    ]
    return table(head, rows)


def _against_full(reports: Sequence[Report]) -> str:
    head = [
        "model",
        "full",
        "with class bias",
        "racing",
        "its evaluations",
        "decided",
        "of these differ",
        "ECE, T = 1",
        "ECE, fitted T",
    ]
    rows = [
        [one.model, *(f"{100 * value:.1f}" for value in (one.full, one.full_biased, one.replayed))]
        + [f"{100 * one.used:.1f} %", f"{100 * one.decided:.1f} %", f"{100 * one.differ:.2f} %"]
        + [f"{one.ece_before:.3f}", f"{one.ece_after:.3f}"]
        for one in reports
    ]
    return table(head, rows)


def _curves(curves: Mapping[str, Sequence[Curve]]) -> str:
    rows = [
        [f"{name}, {line.strategy}, {line.weighting}", "; ".join(f"{100 * y:.1f} at {x:.0f}" for x, y in line.points)]
        for name, lines in curves.items()
        for line in lines
    ]
    return table(["model, strategy, weighting", "accuracy at evaluations an image"], rows)
