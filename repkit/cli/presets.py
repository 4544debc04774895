"""The presets of correspondence, and one of them in full."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from repkit.cli.options import Json
from repkit.cli.printing import print_json, say

if TYPE_CHECKING:
    from repkit.tasks.presetdata import Preset, PresetPart


def presets(
    name: Annotated[str | None, typer.Argument(help="show this one in full")] = None,
    as_json: Json = False,
) -> None:
    """List published ways to find correspondences, which --preset takes.

    With the parts that each is made of. In full also how matches are chosen, the paper's PCK protocol, and in what it
    differs from the paper.
    """
    from repkit.tasks.presetdata import PRESETS, get_preset

    if name is not None:
        print_json(_plain(get_preset(name))) if as_json else _print_preset(get_preset(name))
        return
    if as_json:
        print_json({"presets": [_plain(one) for one in PRESETS.values()]})
        return
    width = max(map(len, PRESETS))
    for one in PRESETS.values():
        parts = " + ".join(f"{part.model} {part.size} px" for part in one.parts)
        print(f"{one.name:{width}}  {parts}; {one.paper.partition(',')[0]}")
    print("\nother models take a preset's place with -m MODEL and --dino MODEL, other taps with -t and --dino-taps")


def say_parts(preset: "Preset") -> None:
    """On stderr, a line a part: what a preset, as it is used, runs on each image."""
    for part in preset.parts:
        draws = "" if part.is_dino else f", {part.draws} draw{'s' * (part.draws != 1)}"
        size = "sides of its own" if part.size is None else f"{part.size} px"
        say(f"{part.model}: {', '.join(part.taps)}; {size}, {part.policy}{draws}")


def _plain(preset: "Preset") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(preset)


def _print_preset(preset: "Preset") -> None:
    for key, value in (("name", preset.name), ("paper", preset.paper), ("protocol", preset.protocol)):
        print(f"{key:9} {value}")
    print(f"{'matches':9} {_matches(preset)}")
    for part in preset.parts:
        print(f"\n{part.model}")
        for key, value in _settings(part).items():
            print(f"    {key:12} {value}")
    print("\nnot as in the paper's code:")
    print("\n".join(f"    {line}" for line in preset.differs))


def _matches(preset: "Preset") -> str:
    method = preset.method
    found = f"{method.choice}, by {'cosine' if method.metric == 'cosine' else 'Euclidean distance'}"
    if method.choice == "window":
        found += (
            f"; soft-argmax of temperature {method.temperature} within {method.window} cells, {method.outside} outside"
        )
    return found + ("; from the mirror image where that is nearer" if preset.flip else "")


def _settings(part: "PresetPart") -> dict[str, Any]:
    """A part's settings by name, without those that it has no use for."""
    settings: dict[str, Any] = {"taps": ", ".join(part.taps), "size": f"{part.size} px, {part.policy}"}
    if part.cond is not None:
        settings["prompt"] = part.cond
    if not part.is_dino:
        settings |= {"draws": part.draws, "noise": part.noise}
    if part.discard:
        settings["discard"] = "; ".join(f"{tap}: {', '.join(map(str, own))}" for tap, own in part.discard.items())
    if part.pca is not None:
        settings["pca"] = f"each tap to {part.pca} dimensions, of both images together"
    return settings | {"weight": part.weight}
