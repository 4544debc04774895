"""Benchmarks of a whole model: does it match images with captions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from repkit.cli.mistakes import NONE_SUCCEEDED, SOME_FAILED
from repkit.cli.options import Config, Denoiser, Device, Json, Lora, Precision, Seed, Vae
from repkit.cli.printing import print_json, say

if TYPE_CHECKING:
    from repkit.backbones.base import Backbone
    from repkit.datasets.captions import Example
    from repkit.tasks.compositional import CompositionalReport, Share

Benchmark = Literal["winoground", "selfbench", "captions"]
MEAN = "mean of tags"
FIRST_FAILURES = 3


def evaluate(
    benchmark: Annotated[Benchmark, typer.Argument(help="captions: a .csv or .parquet list of your own")],
    root: Annotated[Path, typer.Argument(help="folder of the benchmark as it is published, or the list")],
    model: Annotated[str, typer.Option("--model", "-m", help="name of repkit models, folder, file or hub id")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder of the scores; else BENCHMARK-MODEL")] = None,
    generator: Annotated[str | None, typer.Option(help="selfbench: folder of the model that made the images")] = None,
    cfg: Annotated[str | None, typer.Option(help="selfbench: folder of the guidance scale, e.g. 9.0")] = None,
    correct: Annotated[bool, typer.Option("--correct", help="selfbench: images that people found right")] = False,
    fine: Annotated[bool, typer.Option("--fine", help="winoground: also by the fine tags")] = False,
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
) -> None:
    """Measure how well a model matches images with captions.

    A list has a row an example: image, caption_0, caption_1, ... and right (a number); or a row an image: pair, image
    and caption. Both may have id and tag. Kill it at any time: the same command goes on where it stopped.
    """
    from repkit.progress import Progress
    from repkit.tasks.building import DTYPES, check_device, read_config, read_lora
    from repkit.tasks.caption_scores import SCORES
    from repkit.tasks.compositional import evaluate_captions
    from repkit.tasks.judging import Judge
    from repkit.zoo import load

    _refuse_options(benchmark, {"--generator": generator, "--cfg": cfg, "--correct": correct}, {"--fine": fine})
    examples = _read(benchmark, root, {"generator": generator, "cfg": cfg, "correct": correct}, fine)
    images = sum(len(example.images) for example in examples)
    say(f"{len(examples)} examples with {images} images")
    check_device(device)
    given: dict[str, Any] = {
        "dtype": DTYPES[precision],
        "revision": revision,
        "offline": offline,
        "prompt_cache": prompt_cache,
        "lora": [read_lora(one) for one in lora or []],
        "denoiser": denoiser,
        "vae": vae,
        "config": read_config(config or []) or None,
    }
    backbone: Backbone = load(model, device=device, **given)
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


def _read(benchmark: Benchmark, root: Path, selfbench: dict[str, Any], fine: bool) -> "list[Example]":
    from repkit.datasets.captions import read_captions
    from repkit.datasets.selfbench import read_selfbench
    from repkit.datasets.winoground import read_winoground

    if benchmark == "winoground":
        return read_winoground(root, fine=fine)
    return read_selfbench(root, **selfbench) if benchmark == "selfbench" else read_captions(root)


def _refuse_options(benchmark: Benchmark, selfbench: dict[str, Any], winoground: dict[str, Any]) -> None:
    """Raise ValueError for an option that is another benchmark's."""
    for owner, options in (("selfbench", selfbench), ("winoground", winoground)):
        given = [name for name, value in options.items() if value]
        if given and owner != benchmark:
            raise ValueError(f"{given[0]} is for {owner}, not for {benchmark}; leave it out")


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
