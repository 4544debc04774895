"""Feature maps as colours."""

from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer

from repkit.cli.options import Device, Images, Model, Seed, Size, Taps
from repkit.cli.printing import say


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
    from repkit.publishing import made, publish
    from repkit.tasks.building import build_extractor
    from repkit.tasks.visualize import visualize as draw

    paths = [Path(path) for path in list_images(images)["path"].to_pylist()[:most]]
    extractor = build_extractor(model, taps or [], resize=Resize(size) if size else None, seed=seed, device=device)
    picture, keys = draw(paths, extractor, side=side)
    content = BytesIO()
    picture.save(content, "PNG")
    with made(out.parent):
        publish(out.parent, {out.name: content.getvalue()})
    say(f"rows: images, {', '.join(keys)}")
    print(out)
