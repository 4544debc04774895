"""What the commands that find points of one image in others share: their options, and what these build."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from repkit.cli.presets import say_parts
from repkit.cli.printing import say
from repkit.cli.sharing import sharing

if TYPE_CHECKING:
    from repkit.tasks.correspondence import Correspondence


@dataclass(frozen=True)
class Pairing:
    """The shared options as they were given; built: those that `make_correspondence` takes."""

    label: str | None
    as_json: bool
    built: dict[str, Any]

    def correspondence(self) -> "Correspondence":
        """What the options say, built; a line on stderr where a prompt or a label is of no use."""
        from repkit.tasks.presets import make_correspondence

        used, found = make_correspondence(**self.built)
        say_parts(used)
        templates = [part.cond for part in used.parts if part.cond is not None]
        if self.label is None and any("{label}" in template for template in templates):
            say("no --label, so the network is told nothing of what the images show")
        if self.label is not None and not any("{label}" in template for template in templates):
            say(
                f"--label {self.label} is not used: no part of {used.name} is told a text with {{label}} (see --prompt)"
            )
        return found


def building(
    preset: Preset = None,
    model: PresetModel = None,
    taps: Taps = None,
    dino: Dino = None,
    dino_taps: DinoTaps = None,
    prompt: Prompt = None,
    size: Size = None,
    resize: PairPolicy = None,
    draws: Draws = None,
    weights: Weights = None,
    seed: Seed = 0,
    device: Device = "cpu",
    precision: Annotated[Precision, typer.Option(help="of the computation")] = "float32",
    offline: Offline = False,
) -> dict[str, Any]:
    """The options from which a correspondence is built, as `make_correspondence` takes them."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for timm, which has no such argument; read when the hub is imported
    built: dict[str, Any] = {"preset": preset, "model": model, "taps": taps, "dino": dino, "dino_taps": dino_taps}
    built |= {"size": size, "policy": resize, "prompt": prompt, "draws": draws}
    built["weights"] = None if weights is None else read_numbers("--weights", weights)
    return built | {"seed": seed, "device": device, "dtype": precision, "offline": offline}


@sharing(building, first=True)
def pairing(label: Label = None, as_json: Json = False, *, shared: dict[str, Any]) -> Pairing:
    """The options, for `sharing`."""
    return Pairing(label, as_json, shared)


def read_numbers(option: str, text: str) -> list[float]:
    """The numbers of an option, with commas between; ValueError for what is none."""
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: give numbers with commas between, such as 1,0.5") from None
