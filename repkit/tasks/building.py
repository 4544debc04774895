"""From names and flags to an extractor, and from a store's manifest back to the extractor that made it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from repkit.backbones.conditions import Cond
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor, Extractor
from repkit.features import Identity, identity_differences
from repkit.fusion import Fused, Part
from repkit.images import Resize
from repkit.indexsources import prompts_of_their_own
from repkit.mirrored import Mirrored
from repkit.zoo import load

# What provenance keeps of `load`.
CHANGES = ("lora", "denoiser", "vae", "config", "prompt_cache", "channels_last", "vae_dtype", "latent")
PYTHON = {"True": True, "False": False, "None": None}  # which JSON writes in small letters
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Sides:
    """Which sides, in pixels, a model's images may have: multiples of `step`, or where that is None only its `own`."""

    own: int
    step: int | None

    def nearest(self, size: int) -> int:
        """The valid side that is nearest to a size."""
        return self.own if self.step is None else max(1, round(size / self.step)) * self.step


def build_extractor(
    model: str,
    taps: Sequence[str],
    *,
    resize: Resize | Callable[[Sides], Resize] | None = None,
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

    resize: also what chooses one, once the model is loaded, by the sides that it takes.
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
        return _build_dino(model, taps or ("norm",), resize, device, _dtype(dtype))
    if not taps:
        raise ValueError(f"no taps for {model}; give -t BLOCKS@TIMES, for example -t mid@100 (blocks: repkit blocks)")
    backbone = load(model, device=device, dtype=_dtype(dtype), revision=revision, offline=offline, **changes)
    if callable(resize) and not isinstance(resize, Resize):  # a Resize is called with an image
        resize = resize(Sides(backbone.size, None if backbone.square else backbone.multiple))
    settings: dict[str, Any] = {"resize": resize, "cond": cond, "draws": draws, "seed": seed, "noise": noise}
    return DiffusionExtractor(backbone, taps, compile=compile, trim=trim, discard=discard, **settings)


def _build_dino(model: str, taps: Sequence[str], resize: Any, device: str, dtype: torch.dtype) -> DinoExtractor:
    if resize is None or isinstance(resize, Resize):
        return DinoExtractor(model, taps, resize=resize, device=device, dtype=dtype)
    loaded = DinoExtractor(model, taps, device=device, dtype=dtype)
    step = max(loaded.model.patch_embed.feat_ratio(as_scalar=False))
    chosen = resize(Sides(loaded.resize.shape[0], step if loaded.model.dynamic_img_size else None))
    extractor = DinoExtractor(loaded.model, taps, resize=chosen)
    extractor.name, extractor.provenance = loaded.name, loaded.provenance
    return extractor


def rebuild_extractor(
    identity: Identity, provenance: Mapping[str, Any], *, model: str | None = None, device: str = "cpu"
) -> Extractor:
    """The extractor that an identity describes; `model` overrides where the weights are loaded from.

    Of a fusion, it is for the diffusion models, or as timm:NAME for the DINO models.
    Raises ValueError, naming each difference, when what was built is not that extractor.
    """
    if identity.get("mirrored"):
        plain = {name: value for name, value in identity.items() if name != "mirrored"}
        return Mirrored(rebuild_extractor(plain, provenance, model=model, device=device))
    if "parts" in identity:
        return _rebuild_fused(identity, provenance, model, device)
    source = model or provenance.get("model")
    if source is None:
        raise ValueError("the model these features came from was not loaded by name; say which it is with -m MODEL")
    cond = identity.get("cond")
    if told := prompts_of_their_own(cond):
        raise ValueError(_told_apart(told))
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


def _rebuild_fused(identity: Identity, provenance: Mapping[str, Any], model: str | None, device: str) -> Fused:
    if any("bases" in part for part in identity["parts"]):
        raise ValueError(
            "these features are fused with principal components, which are not in the store; in Python, extract the "
            "query with the same Fused and search by its features"
        )
    if told := prompts_of_their_own(identity.get("cond")):
        raise ValueError(_told_apart(told))
    known: dict[str, Extractor] = {}  # parts may share an extractor
    parts = []
    for part, loaded in zip(identity["parts"], provenance.get("parts") or [{}] * len(identity["parts"]), strict=True):
        name = json.dumps(part["extractor"], sort_keys=True)
        if name not in known:
            known[name] = rebuild_extractor(part["extractor"], loaded, model=_meant(model, part), device=device)
        parts.append(Part(known[name], part["weight"], part["keys"], part["key_weights"]))
    grid = identity["grid"] if isinstance(identity["grid"], str) else tuple(identity["grid"])
    return Fused(parts, grid=grid, cond=identity.get("cond"))


def _meant(model: str | None, part: Mapping[str, Any]) -> str | None:
    """The model that was given, where it is one for this part."""
    if model is None or part["extractor"]["extractor"] == "fused":
        return model
    return model if model.startswith("timm:") == (part["extractor"]["extractor"] == "dino") else None


def _told_apart(told: str) -> str:
    return (
        f"each image was told {told}, which a query does not have; in Python, extract the query with a prompt, "
        "pool its features and search by that array"
    )


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
