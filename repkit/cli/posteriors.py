"""What is printed of classified images: lines on stdout, what they rest on in words on stderr."""

import math
from typing import TYPE_CHECKING, Any

import typer

from repkit.cli.mistakes import NONE_SUCCEEDED, SOME_FAILED
from repkit.cli.printing import say

if TYPE_CHECKING:
    from repkit.tasks.classified import Classified

FIRST_FAILURES = 3


def print_lines(found: "Classified", top: int) -> None:
    """A line an image: its id, then the likeliest classes with probabilities."""
    for name, ranked in zip(found.rows["id"].to_pylist(), found.top(top), strict=True):
        print(name, *(f"{label} {math.exp(value):.4f}" for label, value in ranked), sep="\t", flush=True)


def as_data(found: "Classified", top: int, results: bool) -> dict[str, Any]:
    """What was found as JSON data; results: image by image too."""
    accuracy, evaluations = found.accuracy, found.evaluations
    told = {name: value for name, value in found.settings.items() if name not in ("identity", "provenance", "format")}
    told |= {
        "images": found.rows.num_rows,
        "failed": found.failures.num_rows,
        "evaluations_per_image": evaluations,
        "accuracy": None if accuracy is None else accuracy.share,
        "accuracy_interval_95": None if accuracy is None else list(accuracy.interval),
        "labelled": 0 if accuracy is None else accuracy.images,
    }
    if not results:
        return told
    columns = ("id", "label", "predicted", "probability", "decided", "evaluations")
    rows = [
        {**row, "top": [[label, math.exp(value)] for label, value in ranked]}
        for row, ranked in zip(found.rows.select(columns).to_pylist(), found.top(top), strict=True)
    ]
    return {**told, "results": rows, "failures": found.failures.to_pylist()}


def tell_summary(found: "Classified") -> None:
    """Cost, accuracy, and how far probabilities can be believed, once at the end; nothing where all images failed."""
    settings, full = found.settings, found.settings["full_budget"]
    if found.evaluations is None:
        return
    share = found.evaluations / full
    say(f"{found.evaluations:.1f} evaluations an image, {share:.0%} of the full budget of {full}")
    if accuracy := found.accuracy:
        low, high = accuracy.interval
        some = "" if accuracy.images == found.rows.num_rows else " whose label is a class"
        interval = f"95 % interval {low:.2%} to {high:.2%}"
        say(f"accuracy {accuracy.share:.2%} of {accuracy.images} images{some}, {interval}")
    weighting = f"weighting {settings['weighting']}, temperature {settings['temperature']:g}"
    if settings["calibrated"]:
        say(f"The probabilities are calibrated ({weighting}).")
    else:
        say(f"The probabilities are not calibrated ({weighting}): no temperature was fitted for just these classes and")
        say("evaluations. They are mostly far too sure, and only their order counts.")


def tell_failures(found: "Classified") -> None:
    """Say which images failed, and end with the exit code of it; return where none did."""
    failed, images = found.failures.num_rows, found.rows.num_rows
    if not failed:
        return
    say(f"{failed} of {images + failed} images failed; the first:")
    for row in found.failures.slice(0, FIRST_FAILURES).to_pylist():
        say(f"  {row['path']}: {row['error']}")
    raise typer.Exit(SOME_FAILED if images else NONE_SUCCEEDED)
