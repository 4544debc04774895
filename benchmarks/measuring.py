"""What the benchmarks share: actions timed in turns, the ratios between them, and the page they are written to."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch

PAGE = Path(__file__).parent.parent / "docs" / "BENCHMARKS.md"
_HEADER = """# Benchmarks

Made by `make bench`: each script in `benchmarks/` times its actions in turns, in one run, and writes its section. What
counts is the ratios, each the median over the rounds with its quartiles in brackets; absolute numbers are those of the
machine that a section names, which was shared with other work.
"""


@dataclass(frozen=True)
class Spread:
    """The median of a figure over the rounds, and its quartiles."""

    low: float
    median: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def take_turns(actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round; a first round warms up and is not counted.

    Every second round goes backward, so that no action always follows the same one or profits from a slow drift.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name in list(actions)[:: -1 if number % 2 else 1]:
            started = perf_counter()
            actions[name]()
            seconds[name].append(perf_counter() - started)
    return {name: taken[1:] for name, taken in seconds.items()}


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of a single value, that value."""
    low, high = quantiles(values, n=4, method="inclusive")[::2] if len(values) > 1 else (values[0], values[0])
    return Spread(low, median(values), high)


def ratio(over: Sequence[float], under: Sequence[float], scale: float = 1) -> Spread:
    """Spread of scale * over / under, round by round, so that what slows a whole round cancels."""
    return spread([scale * one / other for one, other in zip(over, under, strict=True)])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def machine() -> str:
    """Processor, cores, versions and threads, in one line."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return (
        f"{processor} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s) for torch"
    )


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write_section(page: Path, title: str, body: str) -> None:
    """Put `## title` and the body on the page, in the place of an earlier one; the other sections stay."""
    head, *sections = page.read_text().split("\n## ") if page.exists() else [_HEADER]
    found = {section.partition("\n")[0]: section.partition("\n")[2].strip() for section in sections}
    found[title] = body.strip()
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join([head.rstrip() + "\n", *(f"## {name}\n\n{found[name]}\n" for name in sorted(found))]))
