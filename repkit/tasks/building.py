"""From names and flags to an extractor, and from a store's manifest back to the extractor that made it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from repkit.backbones.conditions import Cond
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor, Extractor
from repkit.features import Identity, identity_differences
from repkit.images import Resize
from repkit.retrieval import prompts_of_their_own
from repkit.zoo import load

# What provenance keeps of `load`.
CHANGES = ("lora", "denoiser", "vae", "config", "prompt_cache", "channels_last", "vae_dtype", "latent")
PYTHON = {"True": True, "False": False, "None": None}  # which JSON writes in small letters
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_extractor(
    model: str,
    taps: Sequence[str],
    *,
    resize: Resize | None = None,
    cond: Cond = None,
    draws: int = 1,
    seed: int = 0,
    noise: Any = "image",
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    offline: bool = False,
    compile: bool = False,
    trim: bool = False,
    discard: Mapping[str, Sequence[int]] | None = None,
    **changes: Any,
) -> Extractor:
    """An extractor by name: `timm:NAME` is a DinoExtractor, anything else a diffusion backbone as `load` takes it.

    changes: what else `load` takes: lora, denoiser, vae, prompt_cache and so on, dtypes by their names; what is None
    or empty is left out.
    """
    check_device(device)
    changes = {name: value for name, value in changes.items() if value}
    given = [*changes, *(name for name, value in (("compile", compile), ("trim", trim)) if value)]
    if model.startswith("timm:") and given:
        raise ValueError(f"{', '.join(given)} given for {model}; that is for diffusion models")
    if "vae_dtype" in changes:
        changes["vae_dtype"] = _dtype(changes["vae_dtype"])
    if model.startswith("timm:"):
        return DinoExtractor(model, taps or ("norm",), resize=resize, device=device, dtype=_dtype(dtype))
    if not taps:
        raise ValueError(f"no taps for {model}; give -t BLOCKS@TIMES, for example -t mid@100 (blocks: repkit blocks)")
    backbone = load(model, device=device, dtype=_dtype(dtype), revision=revision, offline=offline, **changes)
    settings: dict[str, Any] = {"resize": resize, "cond": cond, "draws": draws, "seed": seed, "noise": noise}
    return DiffusionExtractor(backbone, taps, compile=compile, trim=trim, discard=discard, **settings)


def rebuild_extractor(
    identity: Identity, provenance: Mapping[str, Any], *, model: str | None = None, device: str = "cpu"
) -> Extractor:
    """The extractor that an identity describes; `model` overrides where the weights are loaded from.

    Raises ValueError, naming each difference, when what was built is not that extractor.
    """
    if "taps" not in identity:
        parts = f" of {len(identity['parts'])} extractors" if "parts" in identity else ""
        raise ValueError(
            f"these features are fused{parts}, which no model's name makes again; in Python, extract the query with "
            "the same Fused and search by its features"
        )
    source = model or provenance.get("model")
    if source is None:
        raise ValueError("the model these features came from was not loaded by name; say which it is with -m MODEL")
    cond = identity.get("cond")
    if told := prompts_of_their_own(cond):
        raise ValueError(
            f"each image was told {told}, which a query does not have; in Python, extract the query with a prompt, "
            "pool its features and search by that array"
        )
    extractor = build_extractor(
        source,
        list(identity["taps"]),
        resize=Resize(tuple(identity["resize"]["size"]), identity["resize"]["policy"]),
        cond=cond,
        draws=identity.get("draws", 1),
        seed=identity.get("seed", 0),
        noise=identity.get("noise", "image"),
        discard=identity.get("discard"),
        device=device,
        dtype=identity["dtype"],
        revision=None if model else provenance.get("revision"),
        **_changes(provenance),
    )
    if differences := identity_differences(dict(extractor.identity), dict(identity)):
        raise ValueError(f"{source} is not what made these features: {'; '.join(differences)}")
    return extractor


def _changes(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What was changed when the model was loaded; JSON has made lists of the pairs of path and scale."""
    changes = {name: provenance[name] for name in CHANGES if name in provenance}
    if "lora" in changes:
        changes["lora"] = [tuple(one) for one in changes["lora"]]
    return changes


def read_lora(text: str) -> tuple[str, float]:
    """A LoRA as it is written on the command line: FILE or FILE:SCALE."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # a colon of the path
        return text, 1.0


def read_config(pairs: Sequence[str]) -> dict[str, Any]:
    """A config as it is written on the command line: KEY=VALUE, each once, as in JSON or True, False and None.

    What is neither is a text. Raises ValueError for what is no KEY=VALUE, and for a key that is given twice.
    """
    config: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--config {pair!r} is no KEY=VALUE; write for example --config time=sit")
        if key in config:
            raise ValueError(f"--config {key} is given twice, the second time as {pair}; give it once")
        try:
            config[key] = json.loads(value)
        except ValueError:  # a plain word
            config[key] = PYTHON.get(value, value)
    return config


def check_device(name: str) -> None:
    """Raise ValueError for a device that torch does not find here."""
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"no device {name!r} here ({reason}); have cpu, and cuda or mps where torch finds one"
        ) from error


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"no precision {name!r}; have {', '.join(DTYPES)}")
    return DTYPES[name]
