"""The mask of one image carried to many others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repkit.cli.mistakes import NONE_SUCCEEDED, SOME_FAILED
from repkit.cli.options import Images
from repkit.cli.pairing import Pairing, pairing
from repkit.cli.printing import print_json, say
from repkit.cli.sharing import sharing

if TYPE_CHECKING:
    import pyarrow as pa

    from repkit.tasks.mask_folder import Masks

FIRST_FAILURES = 3
Mask = Annotated[Path, typer.Option(help="PNG of the image's size; a value or colour a label, 0 or black background")]
MaskFolder = Annotated[Path, typer.Option("--out", "-o", help="folder of the masks; an unfinished one goes on")]


@sharing(pairing)
def transfer(
    image: Annotated[Path, typer.Argument(help="image with the mask")],
    targets: Images,
    mask: Mask,
    out: MaskFolder,
    top_k: Annotated[int, typer.Option(min=1, help="cells of the image that a cell takes labels from")] = 10,
    temperature: Annotated[float, typer.Option(help="their weights are softmax(cosine / temperature)")] = 0.1,
    *,
    shared: Pairing,
) -> None:
    """Carry the mask of one image to others.

    Each target gets a PNG with the labels of the mask; overlay.png shows some. Kill it at any time: the same command
    goes on where it stopped.
    """
    from repkit.listing import list_images
    from repkit.matching.propagation import check_rule
    from repkit.progress import Progress
    from repkit.tasks.mask_files import read_mask_of
    from repkit.tasks.mask_folder import check_names, refuse_inside
    from repkit.tasks.transfer import transfer_masks

    refuse_inside(targets, out)
    listing = list_images(targets, splits=False)
    # What is wrong is told before a model is loaded.
    check_rule(top_k, temperature)
    read_mask_of(image, mask)
    check_names(listing, mask, out)
    found = shared.correspondence()
    settings: dict[str, Any] = {"top_k": top_k, "temperature": temperature, "label": shared.label}
    with Progress("transfer") as progress:
        masks = transfer_masks(image, mask, listing, found, out, **settings, progress=progress)
    tell_masks(masks, listing, {}, shared.as_json)


def tell_masks(masks: "Masks", images: "pa.Table", more: dict[str, Any], as_json: bool) -> None:
    """Draw the masks, say where they are and which images have none; `more` is for the JSON object."""
    from repkit.tasks.mask_pictures import draw_overlays

    overlay = draw_overlays(masks, images) if masks.ids else None
    if masks.failures:
        say(f"{len(masks.failures)} of {images.num_rows} images failed and have no mask. The first:")
        for name, error in list(masks.failures.items())[:FIRST_FAILURES]:
            say(f"  {name}: {error}")
    if as_json:
        labels = [masks.labels.name(number) for number in masks.labels.objects]
        told = {"masks": len(masks.ids), "failed": len(masks.failures), "objects": labels, **more}
        print_json({**told, "out": str(masks.folder), "overlay": overlay and str(overlay)})
    else:
        print(masks.folder)
    if masks.failures:
        raise typer.Exit(SOME_FAILED if masks.ids else NONE_SUCCEEDED)
