"""The mask of a video's first frame carried through the others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from repkit.cli.match import correspondence_of, read_weights
from repkit.cli.options import (
    Device,
    Dino,
    DinoTaps,
    Draws,
    Json,
    Label,
    Offline,
    PairPolicy,
    Precision,
    Preset,
    PresetModel,
    Prompt,
    Seed,
    Size,
    Taps,
    Weights,
)
from repkit.cli.printing import say
from repkit.cli.transfer import Mask, MaskFolder, tell_masks


def propagate(
    frames: Annotated[Path, typer.Argument(help="folder of a video's frames, or a .csv or .parquet list")],
    mask: Mask,
    out: MaskFolder,
    preset: Preset = None,
    model: PresetModel = None,
    taps: Taps = None,
    dino: Dino = None,
    dino_taps: DinoTaps = None,
    top_k: Annotated[int, typer.Option(min=1, help="cells that a cell takes labels from")] = 15,
    temperature: Annotated[float, typer.Option(help="their weights are softmax(cosine / temperature)")] = 0.2,
    radius: Annotated[int, typer.Option(min=0, help="how many cells away they may be; 0: no limit")] = 15,
    context: Annotated[int, typer.Option(min=0, help="frames before, beside the first one")] = 28,
    stretch: Annotated[bool, typer.Option(help="scale each label to 0 ... 1 in a frame before they compete")] = True,
    truth: Annotated[Path | None, typer.Option(help="folder of true masks, to tell each object's J")] = None,
    label: Label = None,
    prompt: Prompt = None,
    size: Size = None,
    resize: PairPolicy = None,
    draws: Draws = None,
    weights: Weights = None,
    seed: Seed = 0,
    device: Device = "cpu",
    precision: Precision = "float32",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Carry the mask of a video's first frame through the others.

    --mask is that of the first frame. The defaults are DIFT's for Stable Diffusion on DAVIS (-m sd21 -t up.2@51 --draws
    8); for ADM it has --top-k 10 --temperature 0.1. Kill it at any time: the same command goes on where it stopped.
    """
    from repkit.progress import Progress
    from repkit.tasks.mask_files import read_mask_of
    from repkit.tasks.mask_folder import check_names, refuse_inside
    from repkit.tasks.mask_scores import score_masks
    from repkit.tasks.propagate import Rule, list_frames, propagate_mask

    refuse_inside(frames, out)
    listing = list_frames(frames)
    # What is wrong is told before a model is loaded.
    rule = Rule(top_k, temperature, radius or None, context, stretch)
    read_mask_of(Path(listing["path"][0].as_py()), mask)
    check_names(listing, mask, out)
    if truth is not None:
        _check_truth(truth, listing["id"].to_pylist())
    given: dict[str, Any] = {"preset": preset, "model": model, "taps": taps, "dino": dino, "dino_taps": dino_taps}
    given |= {"size": size, "policy": resize, "prompt": prompt, "draws": draws, "weights": read_weights(weights)}
    given |= {"seed": seed, "offline": offline}
    found = correspondence_of(given, label, device=device, precision=precision)
    with Progress("propagate", unit="frames") as progress:
        masks = propagate_mask(listing, mask, found, out, rule, label=label, progress=progress)
    scores, count = score_masks(masks, truth) if truth else ({}, 0)
    for name, score in scores.items():
        say(f"object {name}: J {score:.1%} over {count} frames")
    tell_masks(masks, listing, {"J": scores, "scored": count} if truth else {}, as_json)


def _check_truth(truth: Path, frames: Sequence[str]) -> None:
    from repkit.tasks.mask_folder import mask_path

    if not any(mask_path(truth, name).exists() for name in frames[1:]):
        have = "has no mask of a frame after the first" if truth.is_dir() else "is no folder"
        raise ValueError(f"--truth {truth} {have}; give a folder of masks with the frames' names, as PNG")
