"""Presets built: what finds correspondences, from options."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from repkit.extractors import DiffusionExtractor, Extractor
from repkit.fusion import Fused, Part
from repkit.images import Number, Resize
from repkit.tasks.building import Sides, build_extractor, check_device
from repkit.tasks.correspondence import Correspondence
from repkit.tasks.presetchoice import choose
from repkit.tasks.presetdata import Policy, Preset, PresetPart


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
    dino_taps: Sequence[str] | None = None,
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
    chosen = choose(preset, model, taps, dino, dino_taps, **changes)
    return build_correspondence(chosen, device=device, dtype=dtype, **load)


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
        flag = "--dino-taps" if one.is_dino and not alone else "-t"
        extractor = _extractor(one, {"device": device, "dtype": dtype, **options}, flag)
        built.append(Part(extractor, one.weight, key_weights=one.key_weights))
    return built


def build_fused(of: Preset, *, device: str = "cpu", dtype: str = "float32", **load: Any) -> tuple[Preset, Fused]:
    """The preset as an extractor of one image at a time, told nothing and without `pca`, for stores and search."""
    parts = build_parts(of, device=device, dtype=dtype, **load)
    return as_used(of, parts), Fused(parts)


def as_used(of: Preset, parts: Sequence[Part]) -> Preset:
    """The preset with the sizes, prompts and noise that its parts were built with."""
    return replace(of, parts=tuple(_as_used(one, part.extractor) for one, part in zip(of.parts, parts, strict=True)))


def _extractor(one: PresetPart, options: Mapping[str, Any], flag: str) -> Extractor:
    """A part's extractor; flag: the option that other taps are given by."""

    def resize(sides: Sides) -> Resize:
        size = sides.own if one.size is None else one.size
        return Resize(sides.nearest(size) if "size" in one.loose else size, one.policy)

    try:
        return build_extractor(one.model, one.taps, resize=resize, **options)
    except ValueError as error:
        if "taps" not in one.loose:
            raise
        raise ValueError(f"{error}; the preset's taps are {' '.join(one.taps)}, give others with {flag}") from error


def _as_used(one: PresetPart, extractor: Extractor) -> PresetPart:
    height, width = extractor.resize.shape
    one = replace(one, size=height if height == width else None)
    if isinstance(extractor, DiffusionExtractor):
        one = replace(one, draws=extractor.draws, noise=extractor.noise)
        if "cond" in one.loose and extractor.backbone.prompts is None:
            one = replace(one, cond=None)
    return replace(one, loose=())
