"""Images to a feature store."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repkit.cli.mistakes import NONE_SUCCEEDED, SOME_FAILED, blaming
from repkit.cli.options import (
    Config,
    Denoiser,
    Device,
    Dino,
    DinoTaps,
    Images,
    Json,
    Lora,
    Noise,
    Policy,
    Precision,
    Preset,
    Seed,
    Size,
    Taps,
    Vae,
)
from repkit.cli.printing import in_bytes, print_json, say

if TYPE_CHECKING:
    from repkit.extractors import Extractor
    from repkit.store import FeatureStore


def extract(
    images: Images,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the feature store; an unfinished one goes on")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="name of repkit models, folder, file, hub id, or timm:NAME"),
    ] = None,
    taps: Taps = None,
    preset: Preset = None,
    dino: Dino = None,
    dino_taps: DinoTaps = None,
    pool: Annotated[str, typer.Option(help="mean, max, gem, NxN such as 2x2, or none")] = "mean",
    dtype: Annotated[Precision, typer.Option(help="of the stored features")] = "float32",
    size: Size = None,
    resize: Annotated[Policy | None, typer.Option(help="for images of another shape; default: crop")] = None,
    prompt: Annotated[str | None, typer.Option(help="condition; may use {label}, {id}, {split}")] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="average over so many noises; default: 1")] = None,
    seed: Seed = 0,
    noise: Annotated[Noise | None, typer.Option(help="what the noise depends on; default: image")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    shard_size: Annotated[int, typer.Option(min=1, help="images a shard")] = 1024,
    workers: Annotated[int, typer.Option(min=0, help="decoding: 0 in line, 1 a thread, n processes")] = 1,
    max_pixels: Annotated[int, typer.Option(min=1, help="a larger image is a failure")] = 50_000_000,
    retry: Annotated[bool, typer.Option("--retry", help="try images again that failed before")] = False,
    device: Device = "cpu",
    precision: Annotated[Precision, typer.Option(help="of the computation")] = "float32",
    vae_dtype: Annotated[Precision | None, typer.Option(help="of the autoencoder, where it is another")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="memory format of convolutions")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="blocks as compiled code; the first batches wait")] = False,
    trim: Annotated[bool, typer.Option("--trim", help="free the weights that no tap needs")] = False,
    revision: Annotated[str | None, typer.Option(help="commit of --model on the hub, not of --vae, --denoiser")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="never ask the network")] = False,
    lora: Lora = None,
    denoiser: Denoiser = None,
    vae: Vae = None,
    config: Config = None,
    prompt_cache: Annotated[str | None, typer.Option(help="folder that keeps encoded prompts")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False,
    as_json: Json = False,
) -> None:
    """Export features of images to a store.

    Kill it at any time: the same command goes on where it stopped. With --preset or --dino, what all models find is one
    map: each one's unit vectors, side by side, under the key "fused"; options that are left out are the preset's.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for timm, which has no such argument; read when the hub is imported

    from repkit.exporting import estimate_bytes, export
    from repkit.listing import list_images
    from repkit.planning import check_conditions, make_conditions
    from repkit.progress import Progress
    from repkit.tasks.building import read_config, read_lora

    listing = list_images(images)
    options: dict[str, Any] = {
        "seed": seed,
        "noise": noise,
        "device": device,
        "dtype": precision,
        "vae_dtype": vae_dtype,
        "channels_last": channels_last,
        "compile": compile,
        "trim": trim,
        "revision": revision,
        "offline": offline,
        "lora": [read_lora(one) for one in lora or []],
        "denoiser": denoiser,
        "vae": vae,
        "config": read_config(config or []),
        "prompt_cache": prompt_cache,
    }
    if preset is None and dino is None:
        if dino_taps:
            raise ValueError("--dino-taps without --dino or --preset; taps of -m are given with -t")
        extractor = _plain(model, taps or [], size, resize, draws, options)
        what = f"{len(extractor.blocks)} tap{'s' * (len(extractor.blocks) > 1)} of {model}"
    else:
        policy = resize if preset else resize or "crop"
        changes = {"dino_taps": dino_taps, "size": size, "policy": policy, "draws": draws}
        extractor, what = _fused((preset, model, taps, dino), changes, prompt, options)
    with blaming("--prompt", prompt):
        check_conditions(extractor, make_conditions(listing, prompt))
    need = estimate_bytes(len(listing), extractor, pool, dtype)
    say(f"{len(listing)} images, {what}, about {in_bytes(need)} in {out}")
    if dry_run:
        _print_plan(extractor, len(listing), need, out, as_json)
        return
    with Progress("prompts", unit="prompts") as encoded, Progress("extract") as progress:
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
            encoded=encoded,
        )
    _print_store(store, out, as_json)
    if store.failures.num_rows:
        raise typer.Exit(SOME_FAILED if len(store) else NONE_SUCCEEDED)


def _plain(
    model: str | None,
    taps: list[str],
    size: int | None,
    resize: Policy | None,
    draws: int | None,
    options: dict[str, Any],
) -> "Extractor":
    from repkit.images import Resize
    from repkit.tasks.building import build_extractor

    if model is None:
        raise ValueError("no model; give -m MODEL with -t TAPS, or --preset NAME (repkit presets lists them)")
    if size is None and resize not in (None, "crop"):
        raise ValueError(f"--resize {resize} needs --size; without a size, images are cropped to the model's own")
    chosen = Resize(size, resize or "crop") if size else None
    return build_extractor(
        model, taps, resize=chosen, draws=draws or 1, **options | {"noise": options["noise"] or "image"}
    )


def _fused(
    named: tuple[str | None, str | None, list[str] | None, str | None],
    changes: dict[str, Any],
    prompt: str | None,
    options: dict[str, Any],
) -> tuple["Extractor", str]:
    """What a preset, or a model and a DINO beside it, makes of an image, and what that is in words."""
    from repkit.tasks.presetchoice import choose
    from repkit.tasks.presets import build_fused

    chosen = choose(*named, **changes)
    used, extractor = build_fused(chosen, **options)
    if any(part.pca for part in used.parts):
        say(f"{used.name} takes principal components of two images together; alone, an image keeps all channels")
    templates = [part.cond for part in used.parts if part.cond is not None]
    if templates and prompt is None:
        say(f"{used.name} tells its network {templates[0]!r}; give that as --prompt if the images have labels")
    return extractor, " + ".join(f"{part.model} at {part.size} px" for part in used.parts)


def _print_plan(extractor: "Extractor", images: int, need: int, out: Path, as_json: bool) -> None:
    shapes = {key: list(shape) for key, shape in extractor.shapes.items()}
    if as_json:
        print_json({"images": images, "taps": shapes, "bytes": need, "out": str(out)})
    else:
        print("\n".join(f"{key:32} {' x '.join(map(str, shape))}" for key, shape in shapes.items()))


def _print_store(store: "FeatureStore", out: Path, as_json: bool) -> None:
    failed = store.failures.num_rows
    if store.timing is not None:
        say(store.timing.sentence)
    if failed:
        say(f"{failed} of {len(store) + failed} images failed, all in {out / 'failures.parquet'}; the first:")
        for row in store.failures.slice(0, 3).to_pylist():
            say(f"  {row['path']}: {row['error']}")
        say("The same command with --retry tries them again.")
    if as_json:
        print_json({"images": len(store), "failed": failed, "keys": list(store.keys), "out": str(out)})
    else:
        print(out)
