"""The catalog: what is known of models without loading them, from JSON files alone, so that asking is quick."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS, CONFIGS = HERE / "models", HERE / "configs"
PARTS = ("unet", "transformer")  # what a pipeline may call its denoiser

_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


def bundled() -> list[str]:
    """The names of the models that ship with the package."""
    return sorted(index.parent.name for index in MODELS.glob("*/model_index.json"))


def folder_of(name: str) -> Path:
    """Where a bundled model is."""
    return MODELS / name


@lru_cache(maxsize=1)
def aliases() -> tuple[str, ...]:
    """The names of the models that repkit knows where to get."""
    return tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))


@lru_cache
def entry(alias: str) -> Mapping[str, Any]:
    """What is known of an alias. One that is `like` another has the other's configs.

    name, title, hub (its id; None for a file), mirrors (ids with the same weights), licence, gated (the page where
    access is asked for, or None), size (pixels), prediction, parameters (of the denoiser), taps (each with the task
    and the paper it is from), configs (index, denoiser, autoencoder, scheduler: as diffusers has them); some have a
    file with its page, a denoiser to swap in, the clean_t that one is told, and a note.
    Raises KeyError for a name that is no alias.
    """
    if alias not in aliases():
        raise KeyError(alias)
    found = json.loads((CONFIGS / f"{alias}.json").read_text())
    like = entry(found["like"]) if "like" in found else {}
    return found | {key: like[key] for key in ("parameters", "configs") if key in like and key not in found}


def alias_of(hub_id: str) -> str | None:
    """The alias that stands for a hub id, its own or that of a mirror; those with other weights swapped in do not."""
    named = (name for name in aliases() if hub_id in (entry(name)["hub"], *entry(name)["mirrors"]))
    return next((name for name in named if "denoiser" not in entry(name)), None)


def describe(name: str) -> dict[str, Any]:
    """What a bundled model or an alias is: a bundled one with its figures and card, an alias as in `entry`.

    Raises ValueError for a name that is neither.
    """
    if name not in (*bundled(), *aliases()):
        near = get_close_matches(name, [*bundled(), *aliases()], n=3, cutoff=0.4)
        like = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"no model {name!r} in the catalog{like} (all of them: repkit models)")
    if name not in bundled():
        told = {key: value for key, value in entry(name).items() if key != "configs"}
        return {**told, "class": _denoiser(entry(name)["configs"])["_class_name"], "bundled": False}
    folder = folder_of(name)
    index, scheduler = _read(folder / "model_index.json"), _read(folder / "scheduler" / "scheduler_config.json")
    part = next(part for part in PARTS if (folder / part).is_dir())
    figures = folder / "figures.json"
    return {
        "name": name,
        "class": index[part][1],
        "prediction": prediction_of(scheduler),
        "size": _read(folder / part / "config.json")["sample_size"],
        "classes": len(index.get("id2label", {})),
        "figures": _read(figures) if figures.is_file() else {},
        "card": str(folder / "README.md"),
        "bundled": True,
    }


def prediction_of(scheduler: Mapping[str, Any]) -> str:
    """What a network predicts, by the config of its diffusers scheduler; the tests hold it to `Schedule`'s reading."""
    if scheduler["_class_name"].startswith("FlowMatch"):
        return "flow"
    return _PREDICTIONS[scheduler.get("prediction_type", "epsilon")]


def _denoiser(configs: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(configs[part] for part in PARTS if part in configs)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
