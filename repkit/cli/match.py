"""Points of one image found in another."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repkit.cli.mistakes import blaming
from repkit.cli.pairing import Pairing, pairing
from repkit.cli.printing import print_json, say
from repkit.cli.sharing import sharing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from repkit.tasks.alignment import Framed
    from repkit.tasks.match import Match

HEATS = 4  # heat maps in a picture
HEAT_HEIGHT = 240


@sharing(pairing)
def match(
    source: Annotated[Path, typer.Argument(help="image with the points")],
    target: Annotated[Path, typer.Argument(help="image to find them in")],
    point: Annotated[list[str] | None, typer.Option(help="x,y in pixels of the source; repeatable")] = None,
    points: Annotated[Path | None, typer.Option(help=".csv with columns x and y")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="the picture to write, a PNG")] = Path("matches.png"),
    table: Annotated[Path | None, typer.Option(help=".csv or .parquet file of the matches")] = None,
    k: Annotated[int, typer.Option(min=1, help="best places told for each point")] = 3,
    mutual: Annotated[bool, typer.Option("--mutual", help="only points that their match is matched with")] = False,
    most: Annotated[int, typer.Option(min=1, help="without points: mutual nearest cells at the most")] = 20,
    dense: Annotated[bool, typer.Option("--dense", help="draw where every pixel goes; also as a .flo file")] = False,
    smooth: Annotated[int, typer.Option(min=0, help="--dense: median over so many cells around")] = 0,
    *,
    shared: Pairing,
) -> None:
    """Find points of one image in another.

    Without points, the cells that are each other's nearest are shown.
    """
    from repkit.images import decode
    from repkit.tasks.alignment import align
    from repkit.tasks.match_pictures import flow_picture, match_picture

    if dense and (point or points or table or mutual):
        raise ValueError("--dense is about all pixels; leave out --point, --points, --table and --mutual")
    check_png(out, source, target)
    _check_table(table, points)
    pictures = decode(source), decode(target)
    wanted = None if dense else _wanted(point, points, pictures[0].size)
    found = shared.correspondence()
    one, other = align(found, *found.see(pictures, shared.label))
    if one.mirrored:
        say("the source is matched as its mirror image, which is more like the target")
    if dense:
        from repkit.tasks.match import pixel_flow

        flow = pixel_flow(one, other, smooth=smooth)
        _write_flow(flow, flow_picture(*pictures, flow), out, shared.as_json)
        return
    matches, heats = _find(one, other, wanted, k, most, mutual)
    _write(match_picture(*pictures, matches, heats), matches, out, table)
    _print(matches, out, table, one.mirrored, shared.as_json)


def _wanted(point: Sequence[str] | None, points: Path | None, size: tuple[int, int]) -> "Tensor | None":
    """The points that are asked for, all of them inside the source."""
    from repkit.matching.featuremap import check_inside
    from repkit.tasks.match import read_points

    if point and points:
        raise ValueError(f"--point and --points {points} are both given; give one of them")
    if points is None and not point:
        return None
    wanted = _read_point(point or []) if points is None else read_points(points)
    with blaming("--points" if points else "--point", ""):
        check_inside(wanted, (size[1], size[0]))
    return wanted


def _read_point(texts: Sequence[str]) -> "Tensor":
    import torch

    from repkit.datasets.pairs import numbers

    cells = [text.split(",") for text in texts]
    for text, pair in zip(texts, cells, strict=True):
        if len(pair) != 2:
            raise ValueError(f"--point {text!r} is no point; write x,y, for example --point 120,80.5")
    return torch.tensor([numbers(pair, f"--point {text}") for text, pair in zip(texts, cells, strict=True)])


def _find(
    one: "Framed", other: "Framed", wanted: "Tensor | None", k: int, most: int, mutual: bool
) -> "tuple[list[Match], Tensor | None]":
    """The matches, and the heat maps of the first of them that were asked for."""
    import torch

    from repkit.tasks.match import find, heat, mutual_points

    matches = find(one, other, mutual_points(one, other, most) if wanted is None else wanted, k=k)
    if mutual:
        matches = [match for match in matches if match.mutual]
        if not matches:
            raise ValueError("no match is mutual; leave out --mutual, or take other points or taps")
    if wanted is None:
        return matches, None
    shape = HEAT_HEIGHT, max(1, round(HEAT_HEIGHT * other.size[0] / other.size[1]))
    return matches, heat(one, other, torch.tensor([match.point for match in matches[:HEATS]]), shape)


def check_png(out: Path, *inputs: Path) -> None:
    """Raise ValueError for a name that is not that of a PNG, or that of a file to be read."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out} ends in {out.suffix or 'nothing'}; give the name of a .png file")
    if out.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"--out {out} is one of the files to read; give another name")


def _check_table(table: Path | None, points: Path | None) -> None:
    if table is None:
        return
    if table.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"--table {table} ends in {table.suffix or 'nothing'}; give a .csv or .parquet file")
    if points is not None and table.resolve() == points.resolve():
        raise ValueError(f"--table {table} is the list of points; give another name")


def _write(figure: "Figure", matches: "Sequence[Match]", out: Path, table: Path | None) -> None:
    from repkit.tasks.match import table_bytes

    publish_one(out, png_bytes(figure))
    if table is not None:
        publish_one(table, table_bytes(matches, table.suffix.lower()))


def _write_flow(flow: "Tensor", figure: "Figure", out: Path, as_json: bool) -> None:
    from repkit.datasets.tss import flow_bytes

    publish_one(out, png_bytes(figure))
    publish_one(out.with_suffix(".flo"), flow_bytes(flow.numpy()))
    length = flow.norm(dim=-1)
    if as_json:
        told = {"mean_length": float(length.mean()), "longest": float(length.max())}
        print_json({**told, "out": str(out), "flow": str(out.with_suffix(".flo"))})
    else:
        print(f"{out}\n{out.with_suffix('.flo')}")


def png_bytes(figure: "Figure") -> bytes:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()


def publish_one(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    from repkit.publishing import made, publish

    with made(path.parent):
        publish(path.parent, {path.name: content})


def _print(matches: "Sequence[Match]", out: Path, table: Path | None, mirrored: bool, as_json: bool) -> None:
    if as_json:
        found = [{**match.row, "places": [list(place) for place in match.places]} for match in matches]
        print_json({"matches": found, "mirrored": mirrored, "out": str(out), "table": table and str(table)})
        return
    print("         x        y   ->   to x     to y    score  ratio  round trip")
    for number, match in enumerate(matches):
        (x, y), (to_x, to_y) = match.point, match.place
        back = f"{match.round_trip:8.1f} px{'  mutual' if match.mutual else ''}"
        print(f"{number:2} {x:8.1f} {y:8.1f}  {to_x:9.1f} {to_y:8.1f}  {match.score:7.4f}  {match.ratio:5.3f} {back}")
        for to_x, to_y, score in match.places[1:]:
            print(f"{'or':>20}  {to_x:9.1f} {to_y:8.1f}  {score:7.4f}")
    print(out)
