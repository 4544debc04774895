"""Presets: published ways to find correspondences, as plain data that builds what does it with any models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from repkit.fusion import Part
from repkit.images import Resize
from repkit.matching.method import Method
from repkit.tasks.building import build_extractor
from repkit.tasks.correspondence import Correspondence


@dataclass(frozen=True)
class PresetPart:
    """An extractor of a preset, and its share in the fusion.

    model: an alias, or timm:NAME. size: of the square that images are put in, by `policy`. cond: a template of what the
    network is told, which may use {label}. discard: channels by tap. pca: dimensions to which each tap is reduced by
    the principal components of the two images together.
    """

    model: str
    taps: tuple[str, ...]
    size: int
    policy: Literal["squash", "pad"] = "squash"
    cond: str | None = None
    draws: int = 1
    noise: Literal["image", "shared"] = "image"
    weight: float = 1.0
    key_weights: tuple[float, ...] | None = None
    discard: Mapping[str, Sequence[int]] = field(default_factory=dict)
    pca: int | None = None


@dataclass(frozen=True)
class Preset:
    """A published method: parts, how matches are chosen, the PCK protocol of its paper, and what is not as there."""

    name: str
    paper: str
    parts: tuple[PresetPart, ...]
    method: Method
    protocol: str
    differs: tuple[str, ...]
    flip: bool = False


DIFT = Preset(
    "dift",
    "Tang et al. 2023, Emergent Correspondence from Image Diffusion",
    (PresetPart("sd21", ("up.1@261",), 768, cond="a photo of a {label}", draws=8),),
    Method("pixel"),
    "dift",
    (
        "the noises are fixed by the seed and the image instead of new in each run",
        "the latent is the autoencoder's mode, not a sample",
    ),
)

PRESETS = {one.name: one for one in (DIFT,)}


def preset(name: str) -> Preset:
    """The preset of a name; ValueError listing them for another one."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; have {', '.join(PRESETS)}")
    return PRESETS[name]


def build_correspondence(of: Preset, *, device: str = "cpu", dtype: str = "float32", **load: Any) -> Correspondence:
    """Load the preset's models; load: what else `zoo.load` takes, for the diffusion models among them."""
    parts = []
    for one in of.parts:
        options: dict[str, Any] = {}
        if not one.model.startswith("timm:"):
            options = {"draws": one.draws, "noise": one.noise, "discard": dict(one.discard) or None, **load}
        resize = Resize(one.size, one.policy)
        extractor = build_extractor(one.model, one.taps, resize=resize, device=device, dtype=dtype, **options)
        parts.append(Part(extractor, one.weight, key_weights=one.key_weights))
    return Correspondence(
        parts,
        method=of.method,
        conds=[one.cond for one in of.parts],
        pca=[one.pca for one in of.parts],
        flip=of.flip,
    )
