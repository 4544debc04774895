"""An object of one image in the place of another's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repkit.cli.match import check_png, publish_one
from repkit.cli.mistakes import blaming
from repkit.cli.pairing import Pairing, pairing
from repkit.cli.printing import print_json, say
from repkit.cli.sharing import sharing

if TYPE_CHECKING:
    import numpy as np

    from repkit.backbones.base import Backbone
    from repkit.tasks.correspondence import Correspondence


@sharing(pairing)
def swap(
    source: Annotated[Path, typer.Argument(help="image with the object")],
    target: Annotated[Path, typer.Argument(help="image to put it into")],
    mask: Annotated[Path, typer.Option(help="picture of the source's size, 0 where the object is not")],
    target_mask: Annotated[Path | None, typer.Option(help="of the target; else where --mask transfers")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="the PNG to write")] = Path("swapped.png"),
    refine: Annotated[float, typer.Option(min=0, max=1, help="noise the object to this share of the schedule")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="--refine: from there down")] = 20,
    refiner: Annotated[str | None, typer.Option(help="--refine: the model; else the one of -m or the preset")] = None,
    refine_prompt: Annotated[str | None, typer.Option(help="--refine: else the prompt of the features")] = None,
    guidance: Annotated[float, typer.Option(help="--refine: scale of classifier-free guidance")] = 1.0,
    feather: Annotated[float, typer.Option(min=0, help="pixels over which the outline is blended")] = 3.0,
    smooth: Annotated[int, typer.Option(min=0, help="flow: median over so many cells around")] = 1,
    *,
    shared: Pairing,
) -> None:
    """Put an object in the place of another.

    Each pixel of the target's object gets the colour of the one that corresponds to it.
    """
    from io import BytesIO

    from repkit.images import decode
    from repkit.tasks.refine import Refinement, refined
    from repkit.tasks.swap import swap as put
    from repkit.tasks.templates import check_template, filled

    check_png(out, source, target, mask, *([] if target_mask is None else [target_mask]))
    with blaming("--refine-prompt", ""):
        check_template(refine_prompt)
    pictures = decode(source), decode(target)
    masks = _read(mask, source), None if target_mask is None else _read(target_mask, target)
    found = shared.correspondence()
    # What cannot refine is told before the features are computed.
    refining = _refiner(found, refiner, shared) if refine > 0 else None
    swapped = put(*pictures, masks[0], found, target_mask=masks[1], label=shared.label, feather=feather, smooth=smooth)
    if swapped.mirrored:
        say("the source is matched as its mirror image, which is more like the target")
    picture = swapped.picture
    if refining is not None:
        backbone, template = refining
        cond = filled(template if refine_prompt is None else refine_prompt, shared.label)
        how = Refinement(refine, steps, cond, guidance, shared.built["seed"])
        picture = refined(picture, swapped.share, backbone, how)
    content = BytesIO()
    picture.save(content, "PNG")
    publish_one(out, content.getvalue())
    if shared.as_json:
        print_json({"pixels": int(swapped.region.sum()), "mirrored": swapped.mirrored, "out": str(out)})
    else:
        print(out)


def _read(mask: Path, image: Path) -> "np.ndarray":
    """True where a mask has an object."""
    import numpy as np

    from repkit.tasks.mask_files import read_mask_of

    index, labels = read_mask_of(image, mask)
    return np.isin(index, labels.objects)


def _refiner(of: "Correspondence", name: str | None, shared: Pairing) -> "tuple[Backbone, str | None]":
    """The model that refines, and the template of what it is told: the first diffusion model, unless one is named."""
    from repkit.extractors import DiffusionExtractor
    from repkit.tasks.building import DTYPES
    from repkit.zoo import load

    if name is not None:
        built = shared.built
        return load(name, device=built["device"], dtype=DTYPES[built["dtype"]], offline=built["offline"]), None
    for extractor, template in of.extractors.items():
        if isinstance(extractor, DiffusionExtractor):
            return extractor.backbone, template
    raise ValueError("--refine takes a diffusion model, and these features come from none; give --refiner MODEL")
