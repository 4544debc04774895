"""Which block and which time, on labelled images."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repkit.cli.mistakes import SOME_FAILED
from repkit.cli.options import Device, Images, Json, Model, Noise, Offline, Policy, Precision, Seed, Size, Taps
from repkit.cli.printing import in_bytes, print_json, say

if TYPE_CHECKING:
    from repkit.extractors import Extractor


def sweep(
    images: Images,
    model: Model,
    taps: Taps = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder; an unfinished sweep goes on")] = Path("sweep"),
    pool: Annotated[str, typer.Option(help="commas between: mean, max, gem, NxN such as 2x2")] = "mean",
    finalists: Annotated[int, typer.Option(min=1, help="best cells that logistic regression is tried on")] = 5,
    few_shot: Annotated[str | None, typer.Option(help="labels a class, such as 1,5,10")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="noises that the chosen cell is tested with")] = 3,
    size: Size = None,
    resize: Annotated[Policy | None, typer.Option(help="for images of another shape; default: crop")] = None,
    prompt: Annotated[str | None, typer.Option(help="what the network is told of every image")] = None,
    draws: Annotated[int, typer.Option(min=1, help="average over so many noises")] = 1,
    seed: Seed = 0,
    noise: Annotated[Noise, typer.Option(help="what the noise depends on")] = "image",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    workers: Annotated[int, typer.Option(min=0, help="decoding: 0 in line, 1 a thread, n processes")] = 1,
    device: Device = "cpu",
    precision: Precision = "float32",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Find the block, time and pooling that know the labels best.

    One pass over the images a time, all blocks at once. Validation images choose; test images are read once, for the
    cell that was chosen. The same is done with random weights, and raw pixels are tested too. Kill it at any time: the
    same command goes on.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for timm, which has no such argument; read when the hub is imported

    import pyarrow.parquet as pq

    from repkit.images import Resize
    from repkit.listing import list_images
    from repkit.progress import Progress
    from repkit.tasks.building import build_extractor
    from repkit.tasks.sweep import Rules
    from repkit.tasks.sweep import sweep as run
    from repkit.tasks.sweep_reading import Running, label
    from repkit.tasks.sweep_report import CELLS, PICTURE, words

    if size is None and resize not in (None, "crop"):
        raise ValueError(f"--resize {resize} needs --size; without a size, images are cropped to the model's own")
    rules = Rules(tuple(_commas(pool)), finalists, _shots(few_shot), seeds)
    listing = list_images(images)
    splits = label(listing).splits  # labels that will not do are told before a model is loaded
    extractor = build_extractor(
        model,
        taps or (["block.*"] if model.startswith("timm:") else []),
        resize=Resize(size, resize or "crop") if size else None,
        draws=draws,
        seed=seed,
        noise=noise,
        device=device,
        dtype=precision,
        offline=offline,
    )
    say(_plan(extractor, rules.pools, len(splits.train), len(splits.validation)))
    results = run(listing, extractor, out, rules, cond=prompt, running=Running(batch_size, workers, watch=Progress))
    if as_json:
        print_json({**results, "out": str(out)})
    else:
        print(words(pq.read_table(out / CELLS), results))
        print(f"\npicture: {out / PICTURE}")
    if results["failures"]:
        path, error = next(iter(results["failures"].items()))
        say(f"{len(results['failures'])} of {listing.num_rows} images could not be read; the first: {path}: {error}")
        raise typer.Exit(SOME_FAILED)


def _plan(extractor: "Extractor", pools: tuple[str, ...], train: int, validation: int) -> str:
    """What is going to be done, and the memory that it takes beside the model."""
    from repkit.pooling import pooled_shape
    from repkit.tasks.sweep_cells import split_levels
    from repkit.tasks.sweep_screen import held_bytes

    levels = [
        [pooled_shape(shape, pool)[0] for pool in pools for shape in one.shapes.values()]
        for one in split_levels(extractor)
    ]
    held = max(held_bytes(dims, train, validation) for dims in levels)
    cells = sum(map(len, levels))
    what = f"{cells} cell{'s' * (cells > 1)} at {len(levels)} time{'s' * (len(levels) > 1)}"
    return f"{train + validation} images, {what}, about {in_bytes(held)} in memory for those of one time"


def _commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _shots(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _commas(text or ""))
    except ValueError:
        raise ValueError(f"--few-shot {text!r}; write whole numbers with commas between, such as 1,5,10") from None
