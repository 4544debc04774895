"""Presets: published ways to find correspondences, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from repkit.extractors import Noise
from repkit.matching.method import Method

Policy = Literal["crop", "squash", "pad"]


@dataclass(frozen=True)
class PresetPart:
    """An extractor of a preset, and its share in the fusion.

    model: what `load` takes, or timm:NAME. size: of the square that images are put in, by `policy`; None is the
    model's own. cond: a template of what the network is told, which may use {label}. discard: channels by tap. pca: to
    how many dimensions at most each tap is reduced by the principal components of the two images together.
    loose: fields that need not fit the model as they are: "size" becomes the nearest that it takes, "cond" nothing
    where it reads no texts, and "taps" are those of another model.
    """

    model: str
    taps: tuple[str, ...]
    size: int | None = None
    policy: Policy = "squash"
    cond: str | None = None
    draws: int = 1
    noise: Noise = "image"
    weight: float = 1.0
    key_weights: tuple[float, ...] | None = None
    discard: Mapping[str, Sequence[int]] = field(default_factory=dict)
    pca: int | None = None
    loose: tuple[str, ...] = ()

    @property
    def is_dino(self) -> bool:
        """Whether the model is a vision transformer of timm, and not a diffusion model."""
        return self.model.startswith("timm:")


@dataclass(frozen=True)
class Preset:
    """A published method: parts, how matches are chosen, the PCK protocol of its paper, and what is not as there.

    flip: match from the source's mirror image where that is nearer.
    """

    name: str
    paper: str
    parts: tuple[PresetPart, ...]
    method: Method
    protocol: str
    differs: tuple[str, ...]
    flip: bool = False


_NOISE = "the noises are fixed by the seed and the image, there they are new in each run"
_MODE = "the latent is the mode of the autoencoder's posterior, there a sample of it"
_BICUBIC = "images are resized by bicubic interpolation, there by Lanczos"
_POINT = "descriptors are interpolated at the source points, there they are those of the cells that the points are in"
_PADDING = "matches are looked for in the image, there in its black padding too"
_POSITIONS = "DINOv2's position embeddings are interpolated as timm does, which is not quite as there"
_ODISE = (
    "the diffusion model is plain Stable Diffusion, there ODISE's, whose text and time embeddings also depend on the "
    "image"
)
_SHARED = "the noise that all images share is white, there a 64x64 noise enlarged to the size of the latent"
_PADDED = (_BICUBIC, _POINT, _PADDING, _POSITIONS)
_MUTUAL = (
    "the way round is the one with the nearer mutual nearest neighbours, which is an option there; by default the "
    "cells of the object's mask decide there"
)

_DINO = PresetPart("timm:vit_base_patch14_dinov2", ("block.11",), 840, "pad")
_LAYERS = "up.2.attn.1", "up.1.attn.1", "up.0.resnet.1"  # s3, s4, s5
_SD = PresetPart("sd15", tuple(f"{layer}@100" for layer in _LAYERS), 960, "pad", noise="shared", pca=256)

DIFT = Preset(
    "dift",
    "Tang et al. 2023, Emergent Correspondence from Image Diffusion",
    (PresetPart("sd21", ("up.1@261",), 768, cond="a photo of a {label}", draws=8),),
    Method("pixel"),
    "dift",
    (_NOISE, _MODE),
)
DIFT_ADM = Preset(
    "dift-adm",
    DIFT.paper,
    (PresetPart("adm-256-uncond", ("output_blocks.4@101",), 512, draws=8),),
    Method("pixel"),
    "dift",
    (_NOISE,),
)
SD_DINO = Preset(
    "sd-dino",
    "Zhang et al. 2023, A Tale of Two Features: Stable Diffusion Complements DINO for Zero-Shot Semantic "
    "Correspondence",
    (_SD, _DINO),
    Method("cell"),
    "sd-dino",
    (
        _ODISE,
        _SHARED,
        "the principal components of a pair are exact, there by a randomised algorithm",
        "each tap is enlarged to the finest grid at once, there from grid to grid",
        *_PADDED,
    ),
)
GEOAWARE = Preset(
    "geoaware-zeroshot",
    "Zhang et al. 2024, Telling Left from Right: Identifying Geometry-Aware Semantic Correspondence",
    (replace(_SD, taps=tuple(f"{layer}@50" for layer in _LAYERS), pca=None), _DINO),
    Method("window", window=5, temperature=0.02, outside="zero"),
    "geoaware",
    (_ODISE, _SHARED, _MUTUAL, *_PADDED),
    flip=True,
)
CLEANDIFT = Preset(
    "cleandift",
    "Stracke et al. 2025, CleanDIFT: Diffusion Features without Noise",
    (PresetPart("cleandift-sd21", ("up.1@clean",), 768, cond="A photo of a {label}"),),
    Method("pixel"),
    "dift",
    (
        _MODE,
        "values are computed in float32, there in bfloat16",
        "the protocol is DIFT's; the authors' evaluation of these features on their own is not published",
    ),
)
CLEANDIFT_DINO = Preset(
    "cleandift-dino",
    CLEANDIFT.paper,
    (
        replace(
            _SD,
            model="cleandift-sd15",
            taps=tuple(f"{layer}@clean" for layer in _LAYERS),
            cond="A photo of a {label}",
            noise="image",
            pca=None,
        ),
        _DINO,
    ),
    GEOAWARE.method,
    "geoaware",
    (
        "the time embedding is CleanDIFT's own, there ODISE adds to it what depends on the image",
        _MUTUAL,
        *_PADDED,
    ),
    flip=True,
)
DITF = Preset(
    "ditf",
    "Gan et al. 2025, Unleashing Diffusion Transformers for Visual Correspondence by Modulating Massive Activations",
    (
        PresetPart(
            "flux-dev",
            ("single.9.in.adaln@260",),
            640,
            cond="a photo of a {label}",
            draws=8,
            discard={"single.9.in.adaln": (154, 1446)},
        ),
    ),
    Method("pixel"),
    "dift",
    (
        "images are squashed to a square of 640 pixels, there 640 is the longer side and the proportions stay",
        "the prompt is DIFT's, there a caption of each image by a language model",
        "the mean over the noises is taken after the norm and the modulation, there before",
        "values are compared in float32, there in float16",
        _NOISE,
        _MODE,
    ),
)
HYPERFEATURES_RAW = Preset(
    "hyperfeatures-raw",
    "Luo et al. 2023, Diffusion Hyperfeatures: Searching Through Time and Space for Semantic Correspondence",
    (PresetPart("sd15", ("up.*.resnet.*.conv2@260",), 512),),
    Method("pixel"),
    "dift",
    (
        "the twelve layers are joined as they are, there a trained network projects and weighs them",
        "images get noise to t=260 in one step, there they are inverted step by step and features are taken at eleven "
        "times, of which 260 is one",
        "images are resized by bicubic interpolation, there by bilinear interpolation",
        "matches are pixels of the image, there of its copy of 512 pixels a side",
        _MODE,
    ),
)
DINO = Preset(
    "dino",
    SD_DINO.paper,
    (_DINO,),
    Method("cell"),
    "sd-dino",
    _PADDED,
)
SDXL_TURBO_DINO = Preset(
    "sdxl-turbo-dino",
    "Fundel et al. 2025, Distillation of Diffusion Features for Semantic Correspondence",
    (
        PresetPart("sdxl-turbo", ("up.0.attn.0@101",), 976, cond="a photo of a {label}"),
        PresetPart("timm:vit_base_patch14_reg4_dinov2", ("norm",), 980),
    ),
    Method("pixel"),
    "dift",
    (
        "the diffusion model sees 976 pixels a side, the multiple of 8 that gives the same latent as the 980 there",
        "both networks see images in the range that they were trained on, there from 0 to 1",
        "maps get unit norm after they are enlarged, there before",
        "images are resized by bicubic interpolation, there by bilinear interpolation",
        _POSITIONS,
        _NOISE,
        _MODE,
    ),
)

PRESETS: Mapping[str, Preset] = {
    one.name: one
    for one in (
        DIFT,
        DIFT_ADM,
        SD_DINO,
        GEOAWARE,
        CLEANDIFT,
        CLEANDIFT_DINO,
        DITF,
        HYPERFEATURES_RAW,
        DINO,
        SDXL_TURBO_DINO,
    )
}


def get_preset(name: str) -> Preset:
    """The preset of a name; ValueError listing them for another one."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; have {', '.join(PRESETS)}")
    return PRESETS[name]
