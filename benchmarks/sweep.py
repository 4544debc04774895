"""What a sweep costs: `python benchmarks/sweep.py` measures it and writes docs/BENCHMARKS.md.

On a bundled model and PNG files of Fashion-MNIST, as ratios within one run: screening every cell from one pass a
time, over an export and a probe for each cell (a block at one time, under one pooling).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import torch
from measuring import PAGE, machine, ratio, spread, table, take_turns, write_section

from repkit.backbones.base import Backbone
from repkit.datasets import fashion_mnist
from repkit.exporting import export
from repkit.extractors import DiffusionExtractor
from repkit.heads.ridge import fit_ridge
from repkit.listing import list_images
from repkit.tasks.sweep_cells import make_cells, split_levels
from repkit.tasks.sweep_reading import Labelled, Reader, Running, label
from repkit.tasks.sweep_screen import by_cell, screen
from repkit.zoo import load

TAPS = "down.*,mid,up.*@10,100"
POOLS = ("mean", "2x2")


@dataclass(frozen=True)
class Setting:
    """The files, their labels, and the cells."""

    extractor: DiffusionExtractor
    listing: pa.Table
    data: Labelled
    root: Path
    batch: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-unet", help="a bundled model")
    parser.add_argument("--taps", default=TAPS)
    parser.add_argument("--images", type=int, default=50, help="images a class")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        setting = make_setting(load(options.model), options.taps, Path(folder), options.images, options.batch)
        figures = measure(setting, options.rounds)
    about = (
        f"`python benchmarks/sweep.py --images {options.images} --rounds {options.rounds}`: {options.model}, "
        f"`{options.taps}`, poolings {', '.join(POOLS)}, "
        f"{len(setting.data.labels)} PNG files of 28x28 pixels, batches of {options.batch}, {options.rounds} rounds."
    )
    body = f"{about}\n\n{machine()}\n\n{figures}"
    print(body)
    write_section(options.page, "Sweep", body)


def make_setting(backbone: Backbone, taps: str, root: Path, images: int, batch: int) -> Setting:
    """Write the files, which have no test split: all are for fitting and choosing but a fifth."""
    fashion_mnist.write_folder(root / "images", "train", images)
    listing = list_images(root / "images" / "train")
    return Setting(DiffusionExtractor(backbone, taps), listing, label(listing), root, batch)


def measure(setting: Setting, rounds: int) -> str:
    """Screening over an export for each cell."""
    numbers = count()
    actions: dict[str, Callable[[], object]] = {
        "sweep": partial(one_pass, setting),
        "export and probe each cell": partial(each_cell, setting, numbers),
    }
    check(setting, one_pass(setting), each_cell(setting, numbers))
    seconds = take_turns(actions, rounds)
    cells = len(make_cells(setting.extractor, POOLS))
    levels = len(split_levels(setting.extractor))
    rows = [
        (name, f"{spread([cells / one for one in taken]).median:.2f}", f"{ratio(taken, seconds['sweep']):.2f}")
        for name, taken in seconds.items()
    ]
    return f"""Validation accuracies of ridge for {cells} cells at {levels} times, on the same training and validation
images. One by one, each cell's images are decoded, run to its block, stored, read back and probed.

{table(("", "cells/s", "time over the sweep"), rows)}"""


def one_pass(setting: Setting) -> dict[str, float]:
    """The validation accuracy of each cell, as `repkit sweep` screens them."""
    reader, cells = Reader(setting.data, Running(setting.batch)), make_cells(setting.extractor, POOLS)
    levels = split_levels(setting.extractor)
    groups = [[cell for cell in cells.values() if cell.key in level.blocks] for level in levels]
    rows = [row for level, group in zip(levels, groups, strict=True) for row in screen(level, group, reader, "")]
    return {name: row["validation"] for name, row in by_cell(rows).items()}


def each_cell(setting: Setting, numbers: "count[int]") -> dict[str, float]:
    """The same from an export for each cell, of the images that fit and choose."""
    seen, labels, found = setting.data.seen, setting.data.labels, {}
    listing = setting.listing.take(pa.array(seen))
    parts = {name: [row in rows for row in seen] for name, rows in _parts(setting).items()}
    for cell in make_cells(setting.extractor, POOLS).values():
        extractor = DiffusionExtractor(setting.extractor.backbone, [cell.key])
        out = setting.root / f"store-{next(numbers)}"
        x = export(listing, extractor, out, pool=cell.pool, batch_size=setting.batch).array(cell.key)
        train, held = ((x[parts[name]], labels[seen][parts[name]]) for name in ("train", "validation"))
        found[cell.name] = max(fit_ridge(*train, validation=held).chosen.scores)
    return found


def _parts(setting: Setting) -> dict[str, set[int]]:
    splits = setting.data.splits
    return {"train": {*splits.train.tolist()}, "validation": {*splits.validation.tolist()}}


def check(setting: Setting, ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Raise ValueError unless both ways agree, but for an image that rounding decides."""
    most = 1.5 / len(setting.data.splits.validation)
    if wrong := [name for name in theirs if abs(ours[name] - theirs[name]) > most]:
        raise ValueError(f"the accuracies of {', '.join(wrong)} differ between the sweep and the exports")


if __name__ == "__main__":
    main()
