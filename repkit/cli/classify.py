"""Images to classes, by what a denoiser makes of them."""

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from repkit.cli.options import Config, Denoiser, Device, Json, Lora, Precision, Seed, Vae
from repkit.cli.posteriors import as_data, print_lines, tell_failures, tell_summary
from repkit.cli.printing import print_json, say

if TYPE_CHECKING:
    import pyarrow as pa

    from repkit.backbones.base import Backbone
    from repkit.tasks.classified import Classified
    from repkit.tasks.classify import Fitted
    from repkit.zeroshot.classifier import DiffusionClassifier
    from repkit.zeroshot.weighttable import WeightTable

MOST_PICTURES = 24
Name = Literal["uniform", "staged", "racing"]
ONLY_LIVE = (
    *"images model classes template errors pictures seed batch_size part_size device precision".split(),
    *"revision offline config lora denoiser vae prompt_cache".split(),
)
NOT_FITTED = "out pictures temperature prior strategy delta keep samples".split()


def classify(
    images: Annotated[Path | None, typer.Argument(help="a folder, an image, or a .csv or .parquet list")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="name of repkit models, folder, file, hub id")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="a,b,c; a .txt, one on a line; a .csv prompt,classname,classidx; else the model's"),
    ] = None,
    template: Annotated[list[str] | None, typer.Option(help="such as 'a photo of a {}'; repeatable")] = None,
    mixture: Annotated[
        Literal["logsumexp", "best"], typer.Option(help="several prompts of a class: evenly mixed, or the best")
    ] = "logsumexp",
    strategy: Annotated[Name | None, typer.Option(help="how evaluations are spent; else racing")] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(help="of a class, at most: 32 for uniform, 64 for racing, which saves nothing of the first 8"),
    ] = None,
    delta: Annotated[float | None, typer.Option(help="racing: chance to miss the full budget's answer; 0.01")] = None,
    keep: Annotated[str | None, typer.Option(help="staged: how many classes go on, such as 5,1")] = None,
    samples: Annotated[str | None, typer.Option(help="staged: evaluations they had by then, such as 16,64")] = None,
    weighting: Annotated[
        str | None, typer.Option(help="train, elbo, ..., or FILE.json that --fit wrote; with --fit whitened or learned")
    ] = None,
    loss: Annotated[Literal["l2", "l1", "huber"], typer.Option(help="summed over dimensions")] = "l2",
    temperature: Annotated[float | None, typer.Option(help="of the posterior; else the weighting's own, or 1")] = None,
    prior: Annotated[str | None, typer.Option(help="a weight a class: 3,1,1, or a file with one on a line")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="a .parquet; an unfinished one goes on")] = None,
    errors: Annotated[Path | None, typer.Option(help="a .parquet for the raw errors")] = None,
    fit: Annotated[
        Path | None, typer.Option(help="a .json for weights and temperature that fit labelled images")
    ] = None,
    replay: Annotated[Path | None, typer.Option(help="what --errors wrote, in place of images and a model")] = None,
    pictures: Annotated[Path | None, typer.Option(help="folder for a sheet of the first images' posteriors")] = None,
    top: Annotated[int, typer.Option(min=1, help="classes shown for each image")] = 1,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="forwards at once; only rounding depends on it")] = 64,
    part_size: Annotated[int | None, typer.Option(min=1, help="images that are kept at a time")] = None,
    device: Device = "cpu",
    precision: Annotated[Precision, typer.Option(help="of the computation")] = "float32",
    revision: Annotated[str | None, typer.Option(help="commit of a hub model")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="never ask the network")] = False,
    config: Config = None,
    lora: Lora = None,
    denoiser: Denoiser = None,
    vae: Vae = None,
    prompt_cache: Annotated[str | None, typer.Option(help="folder that keeps encoded prompts")] = None,
    as_json: Json = False,
) -> None:
    """Classify images by a diffusion model, without training.

    By Bayes' rule on how well it denoises an image when it is told each class. With --out, kill it at any time: the
    same command goes on where it stopped.
    """
    values = dict(locals())
    from repkit.listing import list_images
    from repkit.tasks.classify import check_distinct_files, make_strategy
    from repkit.tasks.classnames import read_prior

    _check_files({"--out": out, "--errors": errors, "--replay": replay, "--fit": fit})
    check_distinct_files({"--errors": errors, "--replay": replay}, out)
    _refuse("--replay", values, ONLY_LIVE)
    _refuse("--fit", values, NOT_FITTED)
    spend: dict[str, Any] = {"evaluations": evaluations, "delta": delta}
    spend |= {"keep": _counts("--keep", keep), "samples": _counts("--samples", samples)}
    name = strategy or ("uniform" if fit else "racing")
    rule: dict[str, Any] = {"loss": loss, "mixture": mixture, "temperature": temperature, "prior": read_prior(prior)}
    if replay is not None:
        _print(_replayed(replay, name, spend, rule, weighting, fit, out), fit or out, top, as_json)
        return
    if images is None or model is None:
        raise ValueError("classify needs IMAGES and -m MODEL, or --replay with what --errors wrote")
    chosen = make_strategy(name, **spend)
    weights = None if fit and _kind(weighting) else _weighting(weighting)
    listing = list_images(images)
    loads = {"revision": revision, "offline": offline, "denoiser": denoiser, "vae": vae, "prompt_cache": prompt_cache}
    backbone = _load(model, device, precision, lora or [], config or [], loads)
    asked = {"strategy": chosen, "weighting": weights, **rule, "batch_size": batch_size, "seed": seed}
    classifier = _classifier(backbone, classes, template, asked)
    say(f"{listing.num_rows} images, {len(classifier.classes)} classes, {len(classifier.prompts)} prompts")
    if fit is not None:
        found = _fitted(classifier, listing, fit, _kind(weighting), errors, part_size, rule)
    else:
        found = _classified(classifier, listing, out, errors, part_size, None if out or as_json else top)
    if pictures is not None:
        say(f"posteriors: {_draw(found, pictures)}")
    _print(found, fit or out, top, as_json, told=True)


def _load(
    model: str, device: str, precision: Precision, lora: list[str], config: list[str], loads: dict[str, Any]
) -> "Backbone":
    from repkit.tasks.building import DTYPES, check_device, read_config, read_lora
    from repkit.zoo import load

    if model.startswith("timm:"):
        raise ValueError(f"{model} denoises nothing; give a diffusion model (repkit models)")
    check_device(device)
    given = {name: value for name, value in (loads | {"config": read_config(config)}).items() if value}
    return load(model, device=device, dtype=DTYPES[precision], lora=[read_lora(one) for one in lora], **given)


def _classifier(
    backbone: "Backbone", classes: str | None, templates: list[str] | None, asked: dict[str, Any]
) -> "DiffusionClassifier":
    from repkit.tasks.classnames import read_classes
    from repkit.zeroshot.classifier import DiffusionClassifier

    if templates and backbone.prompts is None:
        raise ValueError(f"--template is for models that are told texts, and {backbone.name} is told a class")
    classifier = DiffusionClassifier(backbone, read_classes(classes, backbone), templates=templates, **asked)
    if backbone.prompts is not None:
        backbone.prompts.free()  # every prompt has been encoded
    return classifier


def _classified(
    classifier: "DiffusionClassifier",
    listing: "pa.Table",
    out: Path | None,
    errors: Path | None,
    part_size: int | None,
    top: int | None,
) -> "Classified":
    """top: how many classes to print of each image as it is done, or None."""
    from repkit.progress import Progress
    from repkit.tasks.classify import classify_images

    tell = None if top is None else partial(print_lines, top=top)
    with Progress("classify") as progress:
        return classify_images(
            classifier, listing, out=out, errors=errors, own_part_size=part_size, progress=progress, tell=tell
        )


def _fitted(
    classifier: "DiffusionClassifier",
    listing: "pa.Table",
    fit: Path,
    kind: "Fitted",
    errors: Path | None,
    part_size: int | None,
    rule: dict[str, Any],
) -> "Classified":
    """Fit to the images, and classify them by what was fitted."""
    from repkit.progress import Progress
    from repkit.tasks.classify import fit_images, replay_errors
    from repkit.zeroshot.strategies import Uniform

    with Progress("classify") as progress:
        weights, table = fit_images(
            classifier, listing, fit, kind=kind, errors=errors, own_part_size=part_size, progress=progress
        )
    return replay_errors(table, Uniform(len(table.levels)), weighting=weights, **rule)


def _replayed(
    replay: Path,
    name: str,
    spend: dict[str, Any],
    rule: dict[str, Any],
    weighting: str | None,
    fit: Path | None,
    out: Path | None,
) -> "Classified":
    from repkit.tasks.classify import fit_weights, make_strategy, replay_errors
    from repkit.zeroshot.errortable import ErrorTable

    table = ErrorTable.read(replay)
    if name != "staged":
        spend = {**spend, "evaluations": len(table.levels) if spend["evaluations"] is None else spend["evaluations"]}
    strategy = make_strategy(name, **spend)
    if fit is None:
        return replay_errors(table, strategy, out=out, weighting=_weighting(weighting), **rule)
    weights = fit_weights(table, _kind(weighting), rule["loss"])
    weights.save(fit)
    return replay_errors(table, strategy, weighting=weights, **rule)


def _draw(found: "Classified", folder: Path) -> Path:
    from repkit.images import decode
    from repkit.tasks.pictures import posterior_picture, save

    shown = [(decode(Path(one.path)), one.label, one.ranked) for one in found.shown(MOST_PICTURES)]
    return save(posterior_picture(shown), folder / "posteriors.png")


def _print(found: "Classified", made: Path | None, top: int, json: bool, told: bool = False) -> None:
    """told: whether the lines of images are printed already."""
    tell_summary(found)
    if made is not None and made.suffix == ".json":
        say("All of this is about the images that were fitted to; only others tell how good the fit is.")
    if json:
        print_json(as_data(found, top, results=made is None) | ({} if made is None else {"out": str(made)}))
    elif made is not None:
        print(made)
    elif not told:
        print_lines(found, top)
    tell_failures(found)


def _weighting(given: str | None) -> "str | WeightTable | None":
    from repkit.zeroshot.weighttable import WeightTable

    return WeightTable.load(given) if given is not None and given.endswith(".json") else given


def _kind(given: str | None) -> "Fitted":
    if given not in (None, "whitened", "learned"):
        raise ValueError(
            f"--fit makes weights that are whitened or learned, not {given}; give --weighting one of these"
        )
    return "learned" if given == "learned" else "whitened"


def _counts(option: str, given: str | None) -> list[int] | None:
    try:
        return None if given is None else [int(one) for one in given.split(",")]
    except ValueError:
        raise ValueError(f"{option} {given}: give whole numbers with commas between, such as 5,1") from None


def _refuse(mode: str, values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError for parameters of `classify` that are not as by default and have no meaning beside another."""
    defaults = signature(classify).parameters
    given = [name for name in names if values[name] not in (defaults[name].default, [])]
    if values[mode.removeprefix("--")] is not None and given:
        options = ["IMAGES" if name == "images" else f"--{name.replace('_', '-')}" for name in given]
        verb, which = ("has", "it") if len(given) == 1 else ("have", "them")
        raise ValueError(f"{', '.join(options)} {verb} no use with {mode}; leave {which} out")


def _check_files(files: dict[str, Path | None]) -> None:
    for option, path in files.items():
        ending = ".json" if option == "--fit" else ".parquet"
        if path is not None and path.suffix != ending:
            raise ValueError(f"{option} {path}: give a file that ends in {ending}")
