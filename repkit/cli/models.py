"""What can be loaded, and the blocks of a model."""

import re
from typing import Annotated, Any

import typer

from repkit.cli.options import Config, Json, Size
from repkit.cli.printing import in_bytes, print_json


def models(
    name: Annotated[str | None, typer.Argument(help="show this one in full, with papers and mirrors")] = None,
    as_json: Json = False,
) -> None:
    """List what can be loaded by name.

    With the id on the hub, the licence, the image side, what the network predicts, and a tap that a paper recommends.
    """
    from repkit.catalog import aliases, bundled, describe

    if name is not None:
        print_json(describe(name)) if as_json else _print_model(describe(name))
        return
    found = [describe(one) for one in (*bundled(), *aliases())]
    if as_json:
        print_json({"models": found})
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


def blocks(
    model: Annotated[str, typer.Argument(help="bundled name, alias, diffusers folder, file or hub id")],
    everything: Annotated[bool, typer.Option("--all", help="also what lies inside the blocks")] = False,
    size: Size = None,
    vae: Annotated[str | None, typer.Option(help="of a file: folder or hub id of its autoencoder")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List a model's blocks, which taps are made of.

    With their channels, their stride in image pixels, the share of the FLOPs when the forward stops there, and the
    bytes of an image's map in float32. Only configs and shapes are read, no weights.
    """
    if model.startswith("timm:"):
        raise ValueError(f"{model} has the taps block.0, block.1, ... (also .norm, .q, .k, .v of each), norm and cls")
    from repkit.tasks.building import read_config
    from repkit.zoo import outline

    backbone = outline(model, size=size, vae=vae, config=read_config(config or []) or None)
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
        print_json({"model": backbone.name, "size": backbone.size, "blocks": rows})
        return
    width = max(len(name) for name in ["block", *names])
    print(f"{backbone.name}, {backbone.size} px; a tap is BLOCK@TIME, for example {names[len(names) // 2]}@100\n")
    print(f"{'block':{width}}  channels  stride  FLOPs at exit  bytes an image")
    for name, cost in costs.items():
        figures = f"{cost.shape[0]:8}  {strides[name]:6}  {cost.flops:13.1%}  {in_bytes(cost.bytes):>14}"
        print(f"{name:{width}}  {figures}")
