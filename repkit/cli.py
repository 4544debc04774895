"""The command line. Every command imports what it needs when it runs, so that `repkit --help` answers at once."""

import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from repkit.tasks.probe import ProbeReport

app = typer.Typer(
    name="repkit",
    help="Diffusion models as feature backbones: address an activation, export it, probe it, search with it.",
    epilog="REPKIT_TRACEBACK=1 in the environment shows where in the code an error came from.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers in half the time
    add_completion=False,
)

OK, USAGE, SOME_FAILED, NONE_SUCCEEDED, CANNOT_WRITE, INTERRUPTED = 0, 2, 3, 4, 5, 130
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WRITE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS} | _FULL | _IN_THE_WAY
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # newer typers hold a click of their own


Policy = Literal["crop", "squash", "pad"]
Noise = Literal["image", "shared"]
Precision = Literal["float32", "bfloat16", "float16"]
HeadName = Literal["ridge", "logistic", "knn"]
Metric = Literal["cosine", "ip", "l2"]
Images = Annotated[Path, typer.Argument(help="a folder, an image, or a .csv or .parquet list with a path column")]
Store = Annotated[Path, typer.Argument(help="a folder that repkit extract wrote")]
Model = Annotated[str, typer.Option("--model", "-m", help="name of repkit models, folder, file, hub id, or timm:NAME")]
Taps = Annotated[list[str] | None, typer.Option("--taps", "-t", help="BLOCKS@TIMES, e.g. 'mid,up.*@10,50'; repeatable")]
Size = Annotated[int | None, typer.Option(min=1, help="side in pixels; default: the model's own")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Seed = Annotated[int, typer.Option(help="seed of the noise")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    """Set up logging; runs before every command."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("repkit: %(message)s"))
    logging.getLogger("repkit").handlers = [handler]
    # Read when these are imported: what fails is told once, by us.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if version:
        import repkit

        print(repkit.__version__)
        raise typer.Exit()


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="show this one in full, with papers and mirrors")] = None,
    as_json: Json = False,
) -> None:
    """List what can be loaded by name.

    With the id on the hub, the licence, the image side, what the network predicts, and a tap that a paper recommends.
    """
    from repkit.catalog import aliases, bundled, describe

    if name is not None:
        _print_json(describe(name)) if as_json else _print_model(describe(name))
        return
    found = [describe(one) for one in (*bundled(), *aliases())]
    if as_json:
        _print_json({"models": found})
        return
    width = max(len(model["name"]) for model in found)
    for model in found:
        where = f"bundled, {model['classes']} classes" if model["bundled"] else _origin(model)
        print(f"{model['name']:{width}} {model['size']:5} px  {model['prediction']:4}  {where}")
    print("\nbesides these: a diffusers folder, a checkpoint file, a hub id (owner/name), timm:NAME or timm:FOLDER")


def _origin(model: dict[str, Any]) -> str:
    source = model["hub"] or f"file {model['file']['name']}"
    gated = ", gated" if model["gated"] else ""
    taps = [one for row in model["taps"] for one in row["taps"]]
    more = f" and {len(taps) - 1} more" if len(taps) > 1 else ""
    tap = f"; {taps[0] if len(taps[0]) < 40 else taps[0][:36] + ' ...'}{more}" if taps else ""
    return f"{source} ({model['licence']}{gated}){tap}"


def _print_model(model: dict[str, Any]) -> None:
    for key, value in model.items():
        if key in ("file", "denoiser"):
            print(f"{key:12} {' in '.join(value[part] for part in ('name', 'file', 'page', 'hub') if part in value)}")
        elif value and key not in ("taps", "like") and not isinstance(value, dict | bool):
            print(f"{key:12} {', '.join(value) if isinstance(value, list) else value}")
    for tap in model.get("taps", []):
        print(f"\n-t '{' '.join(tap['taps'])}'\n    {tap['task']}: {tap['paper']}")
        if "note" in tap:
            print(f"    {tap['note']}")


@app.command()
def blocks(
    model: Annotated[str, typer.Argument(help="bundled name, alias, diffusers folder, file or hub id")],
    everything: Annotated[bool, typer.Option("--all", help="also what lies inside the blocks")] = False,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """List a model's blocks, which taps are made of.

    With their channels, their stride in image pixels, the share of the FLOPs when the forward stops there, and the
    bytes of an image's map in float32. Only configs are read, no weights.
    """
    if model.startswith("timm:"):
        raise ValueError(f"{model} has the taps block.0, block.1, ... (also .norm, .q, .k, .v of each), norm and cls")
    from repkit.zoo import outline

    backbone = outline(model, size=size)
    stages = re.compile(r"(down|mid|up|block|single)(\.\d+)?")
    names = [name for name in backbone.points if everything or stages.fullmatch(name)]
    costs = backbone.costs(names, backbone.size, backbone.size)
    strides = {name: backbone.size // cost.shape[1] for name, cost in costs.items()}
    if as_json:
        rows = [
            {
                "block": name,
                "channels": cost.shape[0],
                "stride": strides[name],
                "flops": cost.flops,
                "bytes": cost.bytes,
            }
            for name, cost in costs.items()
        ]
        _print_json({"model": backbone.name, "size": backbone.size, "blocks": rows})
        return
    width = max(len(name) for name in ["block", *names])
    print(f"{backbone.name}, {backbone.size} px; a tap is BLOCK@TIME, for example {names[len(names) // 2]}@100\n")
    print(f"{'block':{width}}  channels  stride  FLOPs at exit  bytes an image")
    for name, cost in costs.items():
        figures = f"{cost.shape[0]:8}  {strides[name]:6}  {cost.flops:13.1%}  {_bytes(cost.bytes):>14}"
        print(f"{name:{width}}  {figures}")


@app.command()
def extract(
    images: Images,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the feature store; an unfinished one goes on")],
    taps: Taps = None,
    pool: Annotated[str, typer.Option(help="mean, max, gem, NxN such as 2x2, or none")] = "mean",
    dtype: Annotated[Precision, typer.Option(help="of the stored features")] = "float32",
    size: Size = None,
    resize: Annotated[Policy, typer.Option(help="for images of another shape")] = "crop",
    prompt: Annotated[str | None, typer.Option(help="condition; may use {label}, {id}, {split}")] = None,
    draws: Annotated[int, typer.Option(min=1, help="average over so many noises")] = 1,
    seed: Seed = 0,
    noise: Annotated[Noise, typer.Option(help="what the noise depends on")] = "image",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    shard_size: Annotated[int, typer.Option(min=1, help="images a shard")] = 1024,
    workers: Annotated[int, typer.Option(min=0, help="decoding: 0 in line, 1 a thread, n processes")] = 1,
    max_pixels: Annotated[int, typer.Option(min=1, help="a larger image is a failure")] = 50_000_000,
    retry: Annotated[bool, typer.Option("--retry", help="try images again that failed before")] = False,
    device: Device = "cpu",
    precision: Annotated[Precision, typer.Option(help="of the computation")] = "float32",
    revision: Annotated[str | None, typer.Option(help="commit of a hub model")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="never ask the network")] = False,
    lora: Annotated[list[str] | None, typer.Option(help="FILE or FILE:SCALE, merged into weights; repeatable")] = None,
    denoiser: Annotated[str | None, typer.Option(help="file or folder with other weights for the denoiser")] = None,
    vae: Annotated[str | None, typer.Option(help="folder or hub id of an autoencoder")] = None,
    prompt_cache: Annotated[str | None, typer.Option(help="folder that keeps encoded prompts")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False,
    as_json: Json = False,
) -> None:
    """Export features of images to a store.

    Kill it at any time: the same command goes on where it stopped.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for timm, which has no such argument; read when the hub is imported

    from repkit.exporting import estimate_bytes, export
    from repkit.images import Resize
    from repkit.listing import list_images
    from repkit.planning import check_conditions, make_conditions
    from repkit.progress import Progress
    from repkit.tasks.building import build_extractor, read_lora

    if size is None and resize != "crop":
        raise ValueError(f"--resize {resize} needs --size; without a size, images are cropped to the model's own")
    listing = list_images(images)
    extractor = build_extractor(
        model,
        taps or [],
        resize=Resize(size, resize) if size else None,
        draws=draws,
        seed=seed,
        noise=noise,
        device=device,
        dtype=precision,
        revision=revision,
        offline=offline,
        lora=[read_lora(one) for one in lora or []],
        denoiser=denoiser,
        vae=vae,
        prompt_cache=prompt_cache,
    )
    with _blaming("--prompt", prompt):
        check_conditions(extractor, make_conditions(listing, prompt))
    need = estimate_bytes(len(listing), extractor, pool, dtype)
    taps_of = f"{len(extractor.blocks)} tap{'s' * (len(extractor.blocks) > 1)} of {model}"
    _say(f"{len(listing)} images, {taps_of}, about {_bytes(need)} in {out}")
    if dry_run:
        shapes = {key: list(shape) for key, shape in extractor.shapes.items()}
        if as_json:
            _print_json({"images": len(listing), "taps": shapes, "bytes": need, "out": str(out)})
        else:
            print("\n".join(f"{key:32} {' x '.join(map(str, shape))}" for key, shape in shapes.items()))
        return
    with Progress("extract") as progress:
        store = export(
            listing,
            extractor,
            out,
            pool=pool,
            dtype=dtype,
            batch_size=batch_size,
            shard_size=shard_size,
            workers=workers,
            cond=prompt,
            max_pixels=max_pixels,
            retry_failed=retry,
            progress=progress,
        )
    failed = store.failures.num_rows
    if store.timing is not None:
        _say(store.timing.sentence)
    if failed:
        _say(f"{failed} of {len(store) + failed} images failed, all in {out / 'failures.parquet'}; the first:")
        for row in store.failures.slice(0, 3).to_pylist():
            _say(f"  {row['path']}: {row['error']}")
        _say("The same command with --retry tries them again.")
    if as_json:
        _print_json({"images": len(store), "failed": failed, "keys": list(store.keys), "out": str(out)})
    else:
        print(out)
    if failed:
        raise typer.Exit(SOME_FAILED if len(store) else NONE_SUCCEEDED)


@app.command()
def probe(
    store: Store,
    head: Annotated[HeadName, typer.Option(help="ridge, logistic or knn")] = "ridge",
    key: Annotated[list[str] | None, typer.Option(help="taps to compare; default: all in the store")] = None,
    seed: Annotated[int, typer.Option(help="of the split, where the store has none")] = 0,
    picture: Annotated[Path | None, typer.Option(help="confusion matrix; default: STORE-confusion.png")] = None,
    as_json: Json = False,
) -> None:
    """Fit a probe on the stored features of labelled images.

    Validation data chooses the tap and the hyper-parameter; test data is used once, to report.
    """
    from repkit.progress import Progress
    from repkit.store import FeatureStore
    from repkit.tasks.pictures import confusion_picture, save
    from repkit.tasks.probe import probe_store

    with Progress("probe", unit="taps") as progress:
        report = probe_store(FeatureStore(store), head=head, keys=key, seed=seed, progress=progress)
    title = f"{report.key}, {report.head}: {report.test:.1%}"
    path = picture or store.parent / f"{store.resolve().name}-confusion.png"
    save(confusion_picture(report.confusion, report.classes, title), path)
    if as_json:
        _print_json(report.to_json() | {"picture": str(path)})
        return
    _print_report(report)
    print(f"\nconfusion matrix: {path}")


@app.command()
def visualize(
    images: Images,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="the PNG to write")] = Path("features.png"),
    taps: Taps = None,
    size: Size = None,
    side: Annotated[int, typer.Option(min=1, help="pixels a picture in the mosaic")] = 128,
    most: Annotated[int, typer.Option(min=1, help="images at the most")] = 8,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Show feature maps as colours.

    The first three principal components as red, green and blue, in one basis for all images.
    """
    from repkit.images import Resize
    from repkit.listing import list_images
    from repkit.shards import made, publish
    from repkit.tasks.building import build_extractor
    from repkit.tasks.visualize import visualize as draw

    paths = [Path(path) for path in list_images(images)["path"].to_pylist()[:most]]
    extractor = build_extractor(model, taps or [], resize=Resize(size) if size else None, seed=seed, device=device)
    picture, keys = draw(paths, extractor, side=side)
    content = BytesIO()
    picture.save(content, "PNG")
    with made(out.parent):
        publish(out.parent, {out.name: content.getvalue()})
    _say(f"rows: images, {', '.join(keys)}")
    print(out)


@app.command()
def index(
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the index")],
    key: Annotated[str | None, typer.Option(help="which tap, where the store has several")] = None,
    metric: Annotated[Metric, typer.Option(help="how vectors are compared")] = "cosine",
    as_json: Json = False,
) -> None:
    """Build a search index from stored features."""
    from repkit.retrieval import Index
    from repkit.store import FeatureStore

    source = FeatureStore(store)
    if key is None and len(source.keys) > 1:
        raise ValueError(f"{store} has {len(source.keys)} taps; choose one with --key: {', '.join(source.keys)}")
    built = Index.build(source, key, metric=metric)
    built.save(out)
    _say(f"{len(built)} vectors of {built.dimension} numbers, {built.key}")
    if as_json:
        _print_json({"vectors": len(built), "dimension": built.dimension, "key": built.key, "out": str(out)})
    else:
        print(out)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="a folder that repkit index wrote")],
    image: Annotated[Path, typer.Argument(help="the image to find the like of")],
    k: Annotated[int, typer.Option("-k", min=1, help="how many")] = 10,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="where the weights are, if not where they were")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the images of an index that are most like one image."""
    from repkit.retrieval import Index
    from repkit.tasks.building import rebuild_extractor

    if not image.is_file():
        raise ValueError(f"no image {image}; give the file to find the like of")
    loaded = Index.load(index)
    if loaded.identity is None:
        raise ValueError(f"{index} was built from an array, so no extractor can make queries for it; search in Python")
    extractor = rebuild_extractor(loaded.identity, loaded.provenance or {}, model=model, device=device)
    hits = loaded.search(extractor([image]), k)
    labels = loaded.items["label"].to_pylist()
    found = [
        {"id": name, "score": float(score), "label": labels[row]}
        for name, score, row in zip(hits.ids[0], hits.scores[0], hits.rows[0], strict=True)
    ]
    if as_json:
        _print_json({"image": str(image), "hits": found})
        return
    for hit in found:
        print(f"{hit['score']:8.4f}  {hit['id']}  {hit['label'] or ''}".rstrip())


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("demo"),
) -> None:
    """Run the whole tour and write OUT/index.html.

    On the bundled models and images; features that are there from an earlier run are kept.
    """
    from repkit.tasks.demo import run_demo

    print(run_demo(out))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def pretrain(context: typer.Context) -> None:
    """Train a bundled model by its recipe."""
    from repkit.recipes.pretrain import main as train

    train(context.args)


@contextmanager
def _blaming(option: str, value: str | None) -> Iterator[None]:
    """Let a ValueError that comes from the value of an option name the option."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}" if value is not None else str(error)) from error


def _bytes(count: int) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    power = min(max(len(str(count)) - 1, 0) // 3, len(units) - 1)
    return f"{count / 1000**power:.3g} {units[power]}"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value))


def _print_report(report: "ProbeReport") -> None:
    splits, (low, high) = report.splits, report.interval
    counts = f"{len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test"
    print(f"{report.head} on {counts} images of {len(report.classes)} classes")
    print(f"({splits.source})\n")
    ranked = sorted(report.validation.items(), key=lambda item: -item[1])
    width = max(len(name) for name in ["validation accuracy", *report.validation, *report.classes])
    print("validation accuracy")
    for name, value in ranked:
        print(f"{name:{width}}  {value:7.2%}{'  <- chosen' if name == report.key else ''}")
    print(f"\ntest accuracy of {report.key}, {report.chosen.name} = {report.chosen.value:g}")
    print(f"{'all':{width}}  {report.test:7.2%}  of {len(splits.test)}, 95 % interval {low:.2%} to {high:.2%}")
    for score in report.per_class:
        share = "no test images" if score.accuracy is None else f"{score.accuracy:7.2%}  of {score.n}"
        print(f"{report.classes[score.label]:{width}}  {share}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; a user's mistake is one line on stderr and an exit code, never a traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(given or ["--help"], prog_name="repkit", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        line = _explain(error)
        if line is None or os.environ.get("REPKIT_TRACEBACK"):
            raise
        _say(f"repkit: {line}")
        sys.exit(CANNOT_WRITE if isinstance(error, OSError) and error.errno in _WRITE_ERRORS else USAGE)
    if code == INTERRUPTED:
        _say("repkit: interrupted; the same command again goes on, or starts over where nothing was kept")
    sys.exit(code or OK)


def _explain(error: Exception) -> str | None:
    """One line about what a user can do something about; None for what is our own mistake."""
    if isinstance(error, _ClickException):
        context = getattr(error, "ctx", None)
        return f"{error.format_message().rstrip('.')} (see {context.command_path if context else 'repkit'} --help)"  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        way = "; that is in the way, choose another place" if error.errno in _IN_THE_WAY else ""
        if error.errno in _FULL and ";" not in error.strerror:
            way = "; make room, or choose another place"
        return f"{error.filename}: {error.strerror}{way}"
    # torch tells of too little memory in RuntimeErrors of several kinds.
    memory = isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error))
    if memory or isinstance(error, MemoryError):
        return "not enough memory; a smaller --batch-size or --size, or pooling, would help"
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


if __name__ == "__main__":
    main()
