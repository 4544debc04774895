"""Benchmarks: does a model match images with captions, and do its features match points of images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from repkit.cli.evaluate_pairs import pairs, pf_pascal, pf_willow, spair, tss
from repkit.cli.mistakes import NONE_SUCCEEDED, SOME_FAILED
from repkit.cli.options import Config, Denoiser, Device, Json, Lora, Precision, Seed, Vae
from repkit.cli.printing import print_json, say
from repkit.cli.sharing import sharing

if TYPE_CHECKING:
    from repkit.datasets.captions import Example
    from repkit.tasks.compositional import CompositionalReport, Share

MEAN = "mean of tags"
FIRST_FAILURES = 3
Root = Annotated[Path, typer.Argument(help="folder of the benchmark as it is published")]

evaluate = typer.Typer(help="Score a model on a benchmark.", rich_markup_mode=None)


def _options(
    model: Annotated[str, typer.Option("--model", "-m", help="name of repkit models, folder, file or hub id")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder of the scores; else BENCHMARK-MODEL")] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="noise levels, for each image and caption")] = 32,
    weighting: Annotated[str, typer.Option(help="of the levels: train, elbo, min-snr, ...")] = "train",
    loss: Annotated[Literal["l2", "l1", "huber"], typer.Option(help="summed over dimensions")] = "l2",
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="forwards at once; only rounding depends on it")] = 64,
    device: Device = "cpu",
    precision: Annotated[Precision, typer.Option(help="of the computation")] = "float32",
    revision: Annotated[str | None, typer.Option(help="commit of a hub model")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="never ask the network")] = False,
    lora: Lora = None,
    denoiser: Denoiser = None,
    vae: Vae = None,
    config: Config = None,
    prompt_cache: Annotated[str | None, typer.Option(help="folder that keeps encoded prompts")] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    return dict(locals())


@evaluate.command()
@sharing(_options)
def winoground(
    root: Root,
    fine: Annotated[bool, typer.Option("--fine", help="also by the fine tags")] = False,
    *,
    shared: dict[str, Any],
) -> None:
    """Match images with captions: Winoground.

    Kill it at any time: the same command goes on where it stopped.
    """
    from repkit.datasets.winoground import read_winoground

    _score("winoground", read_winoground(root, fine=fine), **shared)


@evaluate.command()
@sharing(_options)
def selfbench(
    root: Root,
    generator: Annotated[str | None, typer.Option(help="folder of the model that made the images")] = None,
    cfg: Annotated[str | None, typer.Option(help="folder of the guidance scale, e.g. 9.0")] = None,
    correct: Annotated[bool, typer.Option("--correct", help="images that people found right")] = False,
    *,
    shared: dict[str, Any],
) -> None:
    """Match images with captions: SelfBench.

    Kill it at any time: the same command goes on where it stopped.
    """
    from repkit.datasets.selfbench import read_selfbench

    _score("selfbench", read_selfbench(root, generator=generator, cfg=cfg, correct=correct), **shared)


@evaluate.command()
@sharing(_options)
def captions(
    root: Annotated[Path, typer.Argument(help="a .csv or .parquet list of your own")],
    *,
    shared: dict[str, Any],
) -> None:
    """Match images with captions: data of your own.

    A list has a row an example: image, caption_0, caption_1, ... and right (a number); or a row an image: pair, image
    and caption. Both may have id and tag. Kill it at any time: the same command goes on where it stopped.
    """
    from repkit.datasets.captions import read_captions

    _score("captions", read_captions(root), **shared)


for name, command in {
    "spair": spair,
    "pf-pascal": pf_pascal,
    "pf-willow": pf_willow,
    "tss": tss,
    "pairs": pairs,
}.items():
    evaluate.command(name)(command)


def _score(
    benchmark: str,
    examples: "list[Example]",
    *,
    model: str,
    out: Path | None,
    evaluations: int,
    weighting: str,
    loss: Literal["l2", "l1", "huber"],
    seed: int,
    batch_size: int,
    device: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Score the examples; given: what `load` takes, as on the command line."""
    from repkit.progress import Progress
    from repkit.tasks.building import DTYPES, check_device, read_config, read_lora
    from repkit.tasks.caption_scores import SCORES
    from repkit.tasks.compositional import evaluate_captions
    from repkit.tasks.judging import Judge
    from repkit.zoo import load

    images = sum(len(example.images) for example in examples)
    say(f"{len(examples)} examples with {images} images")
    check_device(device)
    given["dtype"] = DTYPES[given.pop("precision")]
    given["lora"] = [read_lora(one) for one in given["lora"] or []]
    given["config"] = read_config(given["config"] or []) or None
    backbone = load(model, device=device, **given)
    judge = Judge(backbone, evaluations, weighting=weighting, loss=loss, seed=seed, batch_size=batch_size)
    folder = out or Path(f"{benchmark}-{Path(model).name}")
    with Progress("evaluate") as progress:
        report = evaluate_captions(examples, judge, folder, progress=progress)
    if as_json:
        settings = {"model": model, "evaluations": evaluations, "weighting": weighting, "loss": loss, "seed": seed}
        print_json({"benchmark": benchmark, **settings, **report.to_json(), "out": str(folder / SCORES)})
    else:
        _print_report(report)
        print(f"\nevery score: {folder / SCORES}")
    _tell_failures(report, images)


def _print_report(report: "CompositionalReport") -> None:
    names = list(dict.fromkeys(name for of in report.shares.values() for name in of))
    width = max(map(len, [MEAN, *report.shares]))
    print(f"{'':{width}}{''.join(_cells('n', name, '95 % interval', 'chance') for name in names)}")
    for tag, of in report.shares.items():
        print(f"{tag:{width}}{''.join(_share(of.get(name)) for name in names)}".rstrip())
    if report.means:
        means = "".join(_cells("", f"{report.means[name]:.2%}" if name in report.means else "") for name in names)
        print(f"{MEAN:{width}}{means}".rstrip())


def _share(share: "Share | None") -> str:
    if share is None:
        return _cells()
    low, high = share.interval
    chance = "" if share.chance is None else f"{share.chance:.2%}"
    return _cells(str(share.n), f"{share.score:.2%}", f"{low:.2%} to {high:.2%}", chance)


def _cells(n: str = "", score: str = "", interval: str = "", chance: str = "") -> str:
    return f"  {n:>6}  {score:>7}  {interval:>17}  {chance:>7}"


def _tell_failures(report: "CompositionalReport", images: int) -> None:
    if not report.failures:
        return
    say(f"{len(report.failures)} of {images} images failed; their examples are left out. The first:")
    for name, error in list(report.failures.items())[:FIRST_FAILURES]:
        say(f"  {name}: {error}")
    say("The same command tries them again.")
    raise typer.Exit(SOME_FAILED if report.shares else NONE_SUCCEEDED)
