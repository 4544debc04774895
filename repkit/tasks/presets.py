"""Presets by name, with other models in them, and built: what finds correspondences, from options."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from repkit.extractors import DiffusionExtractor, Extractor
from repkit.fusion import Fused, Part
from repkit.images import Number, Resize
from repkit.matching.method import Method
from repkit.tasks.building import Sides, build_extractor, check_device
from repkit.tasks.correspondence import Correspondence
from repkit.tasks.presetdata import PRESETS, Policy, Preset, PresetPart, get_preset


def make_correspondence(
    preset: str | None = None,
    model: str | None = None,
    taps: Sequence[str] | None = None,
    dino: str | None = None,
    size: int | None = None,
    policy: Policy | None = None,
    prompt: str | None = None,
    draws: int | None = None,
    weights: Sequence[Number] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    **load: Any,
) -> tuple[Preset, Correspondence]:
    """From what is given on a command line: the preset as it is used, with its sizes, and what it builds.

    preset: the name of one, in which the others replace what is its own, as in `adapt`. Without one, model and taps
    make a preset called "own" of one part, with dino of two: cells matched by cosine, images squashed to the model's
    own size. load: what else `build_extractor` takes: seed, noise, revision, offline, lora and so on.
    Raises ValueError for what does not go together, and as `load` and the extractors do.
    """
    changes: dict[str, Any] = {"size": size, "policy": policy, "prompt": prompt, "draws": draws, "weights": weights}
    return build_correspondence(choose(preset, model, taps, dino, **changes), device=device, dtype=dtype, **load)


def choose(
    preset: str | None, model: str | None, taps: Sequence[str] | None, dino: str | None, **changes: Any
) -> Preset:
    """A preset by name with changes as in `adapt`, or without a name `own_preset` with them."""
    if preset is None:
        return adapt(own_preset(model, taps, dino), **changes)
    return adapt(get_preset(preset), model=model, taps=taps, dino=dino, **changes)


def own_preset(model: str | None, taps: Sequence[str] | None = None, dino: str | None = None) -> Preset:
    """A preset of a model and its taps, of a timm model, or of both; the taps are the first one's.

    Raises ValueError without any model.
    """
    names = [name for name in (model, None if dino is None else _timm(dino)) if name is not None]
    if not names:
        raise ValueError(f"no model; give --preset ({', '.join(PRESETS)}), or -m MODEL with -t TAPS")
    given = [tuple(taps or ()), *[()] * (len(names) - 1)]
    parts = [
        PresetPart(name, own or (("norm",) if name.startswith("timm:") else ()), loose=("size",) if number else ())
        for number, (name, own) in enumerate(zip(names, given, strict=True))
    ]
    return Preset("own", "", tuple(parts), Method("cell"), "dift", ())


def adapt(
    chosen: Preset,
    *,
    model: str | None = None,
    taps: Sequence[str] | None = None,
    dino: str | None = None,
    size: int | None = None,
    policy: Policy | None = None,
    prompt: str | None = None,
    draws: int | None = None,
    weights: Sequence[Number] | None = None,
) -> Preset:
    """The preset with other models and settings; what is None stays.

    model: in place of the diffusion model. taps: of that part, or of the only one. dino: the timm model in place of the
    DINO part's. size: of the first part; the sizes of others change by the same factor. prompt, draws: of the diffusion
    part. weights: one for each part. A part that gets another model no longer discards channels, keeps its taps where
    none are given, and takes its size and prompt as `PresetPart.loose` says.
    Raises ValueError for what the preset has no part for.
    """
    _check_changes(chosen, model, dino, prompt, draws, weights)
    tapped = next((part for part in chosen.parts if not part.is_dino), chosen.parts[0])
    parts = []
    for number, part in enumerate(chosen.parts):
        changes: dict[str, Any] = {"policy": policy, "weight": None if weights is None else float(weights[number])}
        if part is tapped:
            changes["taps"] = tuple(taps or ()) or None
        if not part.is_dino:
            changes |= {"cond": prompt, "draws": draws}
        other = model if not part.is_dino else None if dino is None else _timm(dino)
        parts.append(_changed(part, other, **changes))
    return replace(chosen, parts=tuple(_resized(parts, size)))


def _check_changes(
    chosen: Preset,
    model: str | None,
    dino: str | None,
    prompt: str | None,
    draws: int | None,
    weights: Sequence[Number] | None,
) -> None:
    if model is not None and model.startswith("timm:"):
        raise ValueError(f"-m {model} with preset {chosen.name}: -m is for its diffusion model; for DINO give --dino")
    has = {part.is_dino for part in chosen.parts}
    for flag, value, dinos in (
        ("-m", model, False),
        ("--dino", dino, True),
        ("--prompt", prompt, False),
        ("--draws", draws, False),
    ):
        if value is not None and dinos not in has:
            kind = "DINO" if dinos else "diffusion"
            raise ValueError(f"{flag} {value} with preset {chosen.name}, which has no {kind} model; leave it out")
    if weights is not None and len(weights) != len(chosen.parts):
        raise ValueError(
            f"{len(weights)} weights for the {len(chosen.parts)} parts of {chosen.name}; give one for each"
        )


def _changed(part: PresetPart, model: str | None, **given: Any) -> PresetPart:
    """The part with another model and the fields given, None for those that stay."""
    changes = {name: value for name, value in given.items() if value is not None}
    if model is not None and model != part.model:
        part = replace(part, model=model, discard={}, loose=("taps", "size", "cond"))
    if "taps" in changes:
        blocks = [tap.partition("@")[0] for tap in changes["taps"]]
        discard = {name: own for name, own in part.discard.items() if name in (*changes["taps"], *blocks)}
        changes |= {"key_weights": None, "discard": discard}
    return replace(part, **changes, loose=tuple(name for name in part.loose if name not in changes))


def _resized(parts: Sequence[PresetPart], size: int | None) -> list[PresetPart]:
    """The first part at that size, the others in proportion."""
    if size is None:
        return list(parts)
    first = parts[0]
    sized = [replace(first, size=size, loose=tuple(name for name in first.loose if name != "size"))]
    for part in parts[1:]:
        side = size if first.size is None or part.size is None else round(part.size * size / first.size)
        sized.append(replace(part, size=side, loose=tuple(dict.fromkeys((*part.loose, "size")))))
    return sized


def _timm(name: str) -> str:
    return name if name.startswith("timm:") else f"timm:{name}"


def build_correspondence(
    of: Preset, *, device: str = "cpu", dtype: str = "float32", **load: Any
) -> tuple[Preset, Correspondence]:
    """Load the preset's models: the preset as the models take it (`PresetPart.loose`), and what it builds.

    load: what else `build_extractor` takes, for the diffusion models among them.
    """
    parts = build_parts(of, device=device, dtype=dtype, **load)
    used = as_used(of, parts)
    conds, pca = [one.cond for one in used.parts], [one.pca for one in used.parts]
    return used, Correspondence(parts, method=of.method, conds=conds, pca=pca, flip=of.flip)


def build_parts(of: Preset, *, device: str = "cpu", dtype: str = "float32", **load: Any) -> list[Part]:
    """The parts of a fusion that a preset describes; load: as of `build_correspondence`."""
    check_device(device)
    given = {name: value for name, value in load.items() if value is not None}
    alone = all(one.is_dino for one in of.parts)  # then it is told what it has no use for
    built = []
    for one in of.parts:
        options = given if alone else {}
        if not one.is_dino:
            options = {"draws": one.draws, "noise": one.noise, "discard": dict(one.discard) or None, **given}
        extractor = _extractor(one, {"device": device, "dtype": dtype, **options})
        built.append(Part(extractor, one.weight, key_weights=one.key_weights))
    return built


def build_fused(of: Preset, *, device: str = "cpu", dtype: str = "float32", **load: Any) -> tuple[Preset, Fused]:
    """The preset as an extractor of one image at a time, told nothing and without `pca`, for stores and search."""
    parts = build_parts(of, device=device, dtype=dtype, **load)
    return as_used(of, parts), Fused(parts)


def as_used(of: Preset, parts: Sequence[Part]) -> Preset:
    """The preset with the sizes, prompts and noise that its parts were built with."""
    return replace(of, parts=tuple(_as_used(one, part.extractor) for one, part in zip(of.parts, parts, strict=True)))


def _extractor(one: PresetPart, options: Mapping[str, Any]) -> Extractor:
    def resize(sides: Sides) -> Resize:
        size = sides.own if one.size is None else one.size
        return Resize(sides.nearest(size) if "size" in one.loose else size, one.policy)

    try:
        return build_extractor(one.model, one.taps, resize=resize, **options)
    except ValueError as error:
        if "taps" not in one.loose:
            raise
        raise ValueError(f"{error}; the preset's taps are {' '.join(one.taps)}, give others with -t") from error


def _as_used(one: PresetPart, extractor: Extractor) -> PresetPart:
    height, width = extractor.resize.shape
    one = replace(one, size=height if height == width else None)
    if isinstance(extractor, DiffusionExtractor):
        one = replace(one, draws=extractor.draws, noise=extractor.noise)
        if "cond" in one.loose and extractor.backbone.prompts is None:
            one = replace(one, cond=None)
    return replace(one, loose=())
