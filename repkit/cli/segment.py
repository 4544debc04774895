"""Segmentation by features: learned from a few masks, or without any."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from repkit.cli.mistakes import NONE_SUCCEEDED, SOME_FAILED
from repkit.cli.options import Device, Draws, Json, Offline, PairPolicy, Precision, Size, Taps
from repkit.cli.printing import print_json, say

if TYPE_CHECKING:
    import pyarrow as pa

    from repkit.store import FeatureStore
    from repkit.tasks.mask_folder import Masks
    from repkit.tasks.segment_method import Method
    from repkit.tasks.segment_source import Source
    from repkit.tasks.segment_truth import Truth

Head = Literal["linear", "mlp", "fpn", "ncut", "kmeans", "attention"]
SUPERVISED = ("linear", "mlp", "fpn")
FINER = {"attention": ("threshold", "lower"), "ncut": ("tau", "higher")}
FIRST_FAILURES = 3


def segment(
    images: Annotated[Path, typer.Argument(help="as in extract, or a store exported with --pool none")],
    head: Annotated[Head, typer.Option(help="the first three learn from --masks")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the results; an unfinished one goes on")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="as in extract; not for a store")] = None,
    taps: Taps = None,
    masks: Annotated[Path | None, typer.Option(help="folder of PNGs with images' names, to learn from")] = None,
    test_masks: Annotated[Path | None, typer.Option(help="such a folder, to score by")] = None,
    classes: Annotated[str | None, typer.Option(help="names with commas, in the order of the masks' labels")] = None,
    ignore: Annotated[
        int | None, typer.Option(min=-1, help="label without meaning, -1: none; default: 255, unless with 0 alone")
    ] = None,
    clusters: Annotated[
        int | None, typer.Option(min=1, max=255, help="of kmeans; default: classes of --test-masks")
    ] = None,
    tau: Annotated[float, typer.Option(help="of ncut: cost from which nothing is split, 0 ... 2")] = 0.5,
    alpha: Annotated[float, typer.Option(help="of ncut: power of the affinity")] = 10,
    threshold: Annotated[
        float, typer.Option(help="of attention: maps closer than this are merged, less: more segments")
    ] = 0.9,
    networks: Annotated[int, typer.Option(min=1, help="of mlp")] = 10,
    small: Annotated[int, typer.Option(min=0, help="of mlp: drop classes of fewer pixels in an image")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="of training; default: 400, of mlp until it stops")] = None,
    prompt: Annotated[str | None, typer.Option(help="what the network is told")] = None,
    size: Size = None,
    resize: PairPolicy = None,
    draws: Draws = None,
    seed: Annotated[int, typer.Option(help="of the noise, and of what is learned")] = 0,
    device: Device = "cpu",
    precision: Precision = "float32",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Segment images by their features.

    linear, fpn and mlp (an ensemble of pixel classifiers) learn from a handful of masks; ncut, kmeans and attention
    need none (attention: taps such as 'up.*.attn.*.self.map@50'). Writes masks, overlay.png and results.json. Kill it
    at any time: the same command goes on where it stopped.
    """
    from repkit.progress import Progress
    from repkit.tasks.mask_folder import refuse_inside
    from repkit.tasks.segment import check_names
    from repkit.tasks.segment import segment as run
    from repkit.tasks.segment_pictures import draw
    from repkit.tasks.segment_scores import class_names, report, write_report

    refuse_inside(images, out)
    listing, store = _listed(images, model, taps)
    # What is wrong is told before a model is loaded.
    train, test = _truths(head, images, listing, masks, test_masks, ignore)
    known = train or test
    given = [name.strip() for name in classes.split(",")] if classes else None
    names = class_names(known.labels, given) if known else []
    check_names(listing["id"].to_pylist(), out)
    options = {"tau": tau, "alpha": alpha, "threshold": threshold, "networks": networks, "small": small, "seed": seed}
    method = _method(head, clusters or len(names), steps, options)
    looks = {"cond": prompt, "draws": draws or 1, "seed": seed, "device": device, "dtype": precision}
    source = _source(listing, store, model, taps, size, resize, {**looks, "offline": offline})
    with Progress("learn", unit="steps") as learning, Progress("segment") as progress:
        found = run(source, method, out, truth=train, learning=learning, progress=progress)
    told = report(source, found, method.settings, names, test)
    write_report(out, told)
    overlay = draw(source, found, out, truth=test) if found.masks.ids else None
    if head in FINER and _undivided(found.masks):
        option, way = FINER[head]
        say(f"every image is one segment; a {way} --{option} than {options[option]:g} makes more")
    _tell(told, out, overlay, as_json)


def _listed(images: Path, model: str | None, taps: list[str] | None) -> "tuple[pa.Table, FeatureStore | None]":
    """The images to segment, and the store that has their features if there is one."""
    from repkit.listing import list_images
    from repkit.shards import MANIFEST
    from repkit.store import FeatureStore

    if (images / MANIFEST).exists():
        if model or taps:
            raise ValueError(f"-m or -t given for the store {images}, which has its features; leave them out")
        store = FeatureStore(images)
        return store.table, store
    if model is None:
        raise ValueError(f"no model for {images}; give -m MODEL and -t TAPS, or a store of repkit extract --pool none")
    return list_images(images, splits=False), None


def _truths(
    head: str, images: Path, listing: "pa.Table", masks: Path | None, test_masks: Path | None, ignore: int | None
) -> "tuple[Truth | None, Truth | None]":
    """The masks to learn from and to score by, with the labels that both have together."""
    from repkit.tasks.mask_folder import mask_path, refuse_inside
    from repkit.tasks.segment_truth import Truth, find_masks, read_labels

    if (masks is not None) != (head in SUPERVISED):
        need = "learns from masks; give --masks FOLDER" if masks is None else "learns from no masks; use --test-masks"
        raise ValueError(f"the head {head} {need}")
    ids = listing["id"].to_pylist()
    folders = [folder for folder in (masks, test_masks) if folder is not None]
    for folder in folders:
        refuse_inside(images, folder)
    rows = {folder: find_masks(folder, ids) for folder in folders}
    if masks and test_masks and not set(rows[test_masks]) - set(rows[masks]):
        raise ValueError(
            f"every image with a mask in {test_masks} has one in {masks}; score by others than are learned"
        )
    if not folders:
        return None, None
    labels = read_labels([mask_path(folder, ids[row]) for folder in folders for row in rows[folder]], ignore)
    made = {folder: Truth(folder, labels, rows[folder]) for folder in folders}
    return made.get(masks) if masks else None, made.get(test_masks) if test_masks else None


def _method(head: str, clusters: int, steps: int | None, options: dict[str, Any]) -> "Method":
    from repkit.heads.dense_training import DenseRule
    from repkit.heads.pixel_training import PixelRule
    from repkit.tasks.segment_supervised import METHODS as SUPERVISED_METHODS
    from repkit.tasks.segment_unsupervised import METHODS as UNSUPERVISED_METHODS

    if head == "kmeans" and not clusters:
        raise ValueError("kmeans without a number of clusters; give --clusters, or --test-masks, whose classes count")
    dense = DenseRule() if steps is None else DenseRule(steps=steps)
    settings = {
        "linear": {"rule": dense, "seed": options["seed"]},
        "fpn": {"rule": dense, "seed": options["seed"]},
        "mlp": {"rule": PixelRule(steps=steps), **{name: options[name] for name in ("networks", "small", "seed")}},
        "ncut": {name: options[name] for name in ("tau", "alpha")},
        "kmeans": {"clusters": clusters, "seed": options["seed"]},
        "attention": {"threshold": options["threshold"]},
    }
    return {**SUPERVISED_METHODS, **UNSUPERVISED_METHODS}[head](**settings[head])


def _source(
    listing: "pa.Table",
    store: "FeatureStore | None",
    model: str | None,
    taps: list[str] | None,
    size: int | None,
    policy: Any,
    options: dict[str, Any],
) -> "Source":
    from repkit.images import Resize
    from repkit.tasks.building import build_extractor
    from repkit.tasks.segment_source import Pictures, Stored

    if store is not None:
        return Stored(store)
    assert model is not None  # `_listed` has looked
    extractor = build_extractor(
        model, taps or [], resize=lambda sides: Resize(size or sides.own, policy or "squash"), **options
    )
    return Pictures(listing, extractor)


def _undivided(masks: "Masks") -> bool:
    """Whether every mask has one label only; it is read until one has more."""
    return bool(masks.ids) and all((mask == mask.flat[0]).all() for mask in map(masks.__getitem__, masks.ids))


def _tell(told: dict[str, Any], out: Path, overlay: Path | None, as_json: bool) -> None:
    for name, score in told.get("scores", {}).items():
        say(f"{name}: mIoU {score['mIoU']:.1%} over {told['scored']} images")
    if told["failed"]:
        count = told["images"] + len(told["failed"])
        say(f"{len(told['failed'])} of {count} images failed and have no mask. The first:")
        for name, error in list(told["failed"].items())[:FIRST_FAILURES]:
            say(f"  {name}: {error}")
    if as_json:
        print_json({**told, "out": str(out), "overlay": overlay and str(overlay)})
    else:
        print(out)
    if told["failed"]:
        raise typer.Exit(SOME_FAILED if told["images"] else NONE_SUCCEEDED)
