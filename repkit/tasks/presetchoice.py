"""Presets chosen by name or made of a model's own, with other models and settings in them."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from repkit.images import Number
from repkit.matching.method import Method
from repkit.tasks.presetdata import PRESETS, Policy, Preset, PresetPart, get_preset
from repkit.tasks.templates import check_template


def choose(
    preset: str | None,
    model: str | None,
    taps: Sequence[str] | None,
    dino: str | None,
    dino_taps: Sequence[str] | None = None,
    **changes: Any,
) -> Preset:
    """A preset by name with changes as in `adapt`, or without a name `own_preset` with them."""
    if preset is None:
        return adapt(own_preset(model, taps, dino), dino_taps=dino_taps, **changes)
    return adapt(get_preset(preset), model=model, taps=taps, dino=dino, dino_taps=dino_taps, **changes)


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
    dino_taps: Sequence[str] | None = None,
) -> Preset:
    """The preset with other models and settings; what is None stays.

    model: in place of the diffusion model. taps: of that part, or of the only one. dino: the timm model in place of the
    DINO part's. size: of the first part; the sizes of others change by the same factor. prompt, draws: of the diffusion
    part. weights: one for each part. dino_taps: of the DINO part. A part that gets another model no longer discards
    channels, keeps its taps where none are given, and takes its size and prompt as `PresetPart.loose` says.
    Raises ValueError for what the preset has no part for, for a prompt that uses anything but {label}, and for weights
    that are not finite and at least 0, or all 0.
    """
    _check_changes(chosen, model, dino, prompt, draws, dino_taps)
    _check_weights(chosen, weights)
    given = _tapped(chosen, taps, dino_taps)
    parts = []
    for number, part in enumerate(chosen.parts):
        changes: dict[str, Any] = {"policy": policy, "weight": None if weights is None else float(weights[number])}
        changes["taps"] = given.get(number)
        if not part.is_dino:
            changes |= {"cond": prompt, "draws": draws}
        other = model if not part.is_dino else None if dino is None else _timm(dino)
        parts.append(_changed(part, other, **changes))
    return replace(chosen, parts=tuple(_resized(parts, size)))


def _tapped(chosen: Preset, taps: Sequence[str] | None, dino_taps: Sequence[str] | None) -> dict[int, tuple[str, ...]]:
    """By part number the taps that are given for it."""
    kinds = [part.is_dino for part in chosen.parts]
    first = kinds.index(False) if False in kinds else 0
    if taps and dino_taps and len(kinds) == 1:
        raise ValueError(f"-t and --dino-taps for the one model of {chosen.name}; give one of them")
    given = {first: tuple(taps)} if taps else {}
    if dino_taps:
        given[len(kinds) - 1 - kinds[::-1].index(True)] = tuple(dino_taps)
    return given


def _check_changes(
    chosen: Preset,
    model: str | None,
    dino: str | None,
    prompt: str | None,
    draws: int | None,
    dino_taps: Sequence[str] | None,
) -> None:
    if model is not None and model.startswith("timm:"):
        raise ValueError(f"-m {model} with preset {chosen.name}: -m is for its diffusion model; for DINO give --dino")
    has = {part.is_dino for part in chosen.parts}
    for flag, value, dinos in (
        ("-m", model, False),
        ("--dino", dino, True),
        ("--dino-taps", " ".join(dino_taps or ()) or None, True),
        ("--prompt", prompt, False),
        ("--draws", draws, False),
    ):
        if value is not None and dinos not in has:
            kind = "DINO" if dinos else "diffusion"
            raise ValueError(f"{flag} {value} with preset {chosen.name}, which has no {kind} model; leave it out")
    try:
        check_template(prompt)
    except ValueError as error:
        raise ValueError(f"--prompt {error}") from error


def _check_weights(chosen: Preset, weights: Sequence[Number] | None) -> None:
    if weights is None:
        return
    parts = len(chosen.parts)
    if len(weights) != parts:
        raise ValueError(
            f"{_many(len(weights), 'weight')} for the {_many(parts, 'part')} of {chosen.name}; give one for each"
        )
    if not all(isfinite(one) and one >= 0 for one in weights) or not any(weights):
        raise ValueError(f"--weights {','.join(f'{one:g}' for one in weights)}; give 0 or more, and one above 0")


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


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
