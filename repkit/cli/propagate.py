"""The mask of a video's first frame carried through the others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from repkit.cli.pairing import Pairing, pairing
from repkit.cli.printing import say
from repkit.cli.sharing import sharing
from repkit.cli.transfer import Mask, MaskFolder, tell_masks


@sharing(pairing)
def propagate(
    frames: Annotated[Path, typer.Argument(help="folder of a video's frames, or a .csv or .parquet list")],
    mask: Mask,
    out: MaskFolder,
    top_k: Annotated[int, typer.Option(min=1, help="cells that a cell takes labels from")] = 15,
    temperature: Annotated[float, typer.Option(help="their weights are softmax(cosine / temperature)")] = 0.2,
    radius: Annotated[int, typer.Option(min=0, help="how many cells away they may be; 0: no limit")] = 15,
    context: Annotated[int, typer.Option(min=0, help="frames before, beside the first one")] = 28,
    stretch: Annotated[bool, typer.Option(help="scale each label to 0 ... 1 in a frame before they compete")] = True,
    truth: Annotated[Path | None, typer.Option(help="folder of true masks, to tell each object's J")] = None,
    *,
    shared: Pairing,
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
    found = shared.correspondence()
    with Progress("propagate", unit="frames") as progress:
        masks = propagate_mask(listing, mask, found, out, rule, label=shared.label, progress=progress)
    scores, count = score_masks(masks, truth) if truth else ({}, 0)
    for name, score in scores.items():
        say(f"object {name}: J {score:.1%} over {count} frames")
    tell_masks(masks, listing, {"J": scores, "scored": count} if truth else {}, shared.as_json)


def _check_truth(truth: Path, frames: Sequence[str]) -> None:
    from repkit.tasks.mask_folder import mask_path

    if not any(mask_path(truth, name).exists() for name in frames[1:]):
        have = "has no mask of a frame after the first" if truth.is_dir() else "is no folder"
        raise ValueError(f"--truth {truth} {have}; give a folder of masks with the frames' names, as PNG")
