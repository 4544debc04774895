"""load: a name, an alias, a folder, a file, a hub id or a pipeline -> a Backbone, ready and frozen."""

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from repkit.backbones.base import Backbone
from repkit.backbones.latents import Latent
from repkit.backbones.parts import Parts
from repkit.backbones.prompts import TextEncoders
from repkit.catalog import MODELS, aliases, bundled, describe, entry
from repkit.checkpoints import SUFFIXES, check_file, load_checkpoint
from repkit.hub import fetch_files, find, find_configs, find_part
from repkit.outlines import NATIVE, blank, outline_file
from repkit.overlays import Lora, check_loras, merge_loras, read_vae, swap_denoiser
from repkit.pipelinefolder import (
    DENOISERS,
    denoiser_classes,
    read_folder,
)
from repkit.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["FAMILIES", "MODELS", "bundled", "describe", "find", "load", "outline", "random_control"]

EVIDENCE_WEIGHTS = "zeroshot.json"  # in a model folder: the weights of a zero-shot classifier's evidence

# The class of the denoiser decides the family, a file in backbones/ with a function `from_parts`.
FAMILIES: Mapping[str, str] = {
    "UNet2DModel": "unet",
    "UNet2DConditionModel": "text_unet",
    "DiTTransformer2DModel": "dit",
    "PixArtTransformer2DModel": "pixart",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
}


def load(
    model: "str | Path | DiffusionPipeline",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    latent: Latent = "mode",
    revision: str | None = None,
    offline: bool = False,
    prompt_cache: str | Path | None = None,
    denoiser: str | Path | None = None,
    lora: Lora | Sequence[Lora] = (),
    vae: str | Path | None = None,
    extractor: Any = None,
    config: Mapping[str, Any] | None = None,
    channels_last: bool = False,
) -> Backbone:
    """Load a backbone: a bundled name or an alias (`repkit models`), a folder, a file, a hub id, or a pipeline.

    Everything but a pipeline is moved to `device` and `dtype`; the autoencoder to `vae_dtype` where that is given. A
    pipeline is used as it is, so it has to be frozen and in eval mode already. latent: the autoencoder's posterior
    "mode", or a "sample" of it, which differs from call to call. revision: a commit of the hub, of
    `model` alone. offline: never ask the network. prompt_cache: a folder that keeps encoded prompts, so that text
    encoders need not be loaded again.

    denoiser: other weights for the denoiser, in a file, a folder, or on the hub. vae: an autoencoder in a folder or on
    the hub, for a file that has none or in place of a pipeline's. On the hub both are `owner/name`, pinned as
    `owner/name@revision`. lora: safetensors files merged into the denoiser, each a path or (path, scale). For files
    alone, config: what their weights do not tell, and extractor: what makes their latents. channels_last: the memory
    format of convolutions, which is faster on some devices and moves the last bits.

    Raises ValueError for a model of a family that repkit does not know and for options that the model has no use for,
    OSError where there is nothing to load.
    """
    if latent not in ("mode", "sample"):
        raise ValueError(f"no latent {latent!r}; have mode, sample")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r}; give a torch dtype such as torch.bfloat16")
    cache = None if prompt_cache is None else Path(prompt_cache)
    if not isinstance(model, str | Path):
        changes = {"denoiser": denoiser, "lora": lora or None, "vae": vae, "extractor": extractor, "config": config}
        _refuse("a pipeline in memory, which stays as it is", **changes, channels_last=channels_last)
        return _build(_take_apart(model, latent, cache))
    if _is_file(model):
        _refuse("a file", denoiser=denoiser, prompt_cache=cache)
        check_file(Path(model))
    else:
        _refuse("a pipeline", extractor=extractor, config=config)
    check_loras(lora)
    swapped = None if denoiser is None else find_part("denoiser", denoiser, DENOISERS, offline=offline)
    vae_at = None if vae is None else find_part("vae", vae, ["vae"], offline=offline)
    if _is_file(model):
        other_vae = None if vae_at is None else read_vae(vae_at, device, vae_dtype or dtype)
        backbone = load_checkpoint(
            model, device=device, dtype=dtype, config=config, vae=other_vae, extractor=extractor, latent=latent
        )
    else:
        folder = find(str(model), revision=revision, offline=offline)
        read = {"device": device, "dtype": dtype, "vae_dtype": vae_dtype, "latent": latent, "prompt_cache": cache}
        backbone = _from_folder(folder, model, read, swapped, vae_at, offline)
        backbone.provenance = {"model": _named(model, folder), "revision": revision}
    if vae_dtype is not None and "vae" not in backbone.networks:
        raise ValueError(f"vae_dtype= given with {backbone.name}, which has no autoencoder; leave it out")
    merged = merge_loras(backbone.model, lora)
    if merged:
        backbone.evidence_weights = None  # they were fitted to the errors of the model as it was
    if channels_last:
        for network in backbone.networks.values():
            network.to(memory_format=torch.channels_last)
    given: dict[str, Any] = {"denoiser": _absolute(denoiser), "lora": merged, "vae": _absolute(vae), "config": config}
    given |= {"prompt_cache": _absolute(cache), "channels_last": channels_last}
    given |= {
        "vae_dtype": vae_dtype and str(vae_dtype).removeprefix("torch."),
        "latent": latent if latent != "mode" else None,
    }
    backbone.provenance = {**backbone.provenance, **{key: value for key, value in given.items() if value}}
    return backbone


def outline(
    model: str | Path,
    *,
    size: int | None = None,
    offline: bool = False,
    vae: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> Backbone:
    """A backbone without weights, of an alias, a bundled name, a folder, a file or a hub id, from configs alone.

    Its blocks, shapes and shares of FLOPs are those of the real one; it computes no values. size: image side in
    pixels in place of the model's own. Of a file (`.pt`) only the shapes are read; vae, whose config is read, and
    config are as in `load`.

    Raises ValueError and OSError as `load` does.
    """
    if _is_file(model):
        at = None if vae is None else find_part("vae", vae, ["vae"], offline=offline)
        backbone = outline_file(Path(model), at, config)
    else:
        _refuse("a pipeline", vae=vae, config=config)
        name, configs = find_configs(str(model), offline=offline)
        networks = {part: blank(configs[part]) for part in (*DENOISERS, "vae") if part in configs}
        _check_known({part: type(network).__name__ for part, network in networks.items() if part in DENOISERS}, name)
        backbone = _build(Parts(name, networks, Schedule.from_diffusers(configs["scheduler"]), configs["index"]))
    if size is not None:
        backbone.check_size(size, size)
        backbone.size = size
    return backbone


def _is_file(model: str | Path) -> bool:
    return Path(model).suffix in SUFFIXES and not Path(model).is_dir()


def _named(model: str | Path, folder: Path) -> str:
    """What finds the model again: a folder's absolute path, since it is found from anywhere; a name or id as it is."""
    name = str(model) in (*bundled(), *aliases()) or not Path(model).is_dir()
    return str(model) if name else str(folder.resolve())


def _absolute(path: str | Path | None) -> str | None:
    """A path that is found from anywhere; what is no path here, such as a hub id, as it is."""
    if path is None:
        return None
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


def _refuse(kind: str, **options: Any) -> None:
    """Raise ValueError for options that this kind of model has no use for."""
    if given := [name for name, value in options.items() if value is not None and value is not False]:
        raise ValueError(f"{', '.join(given)}= given with {kind}; leave it out")


def _from_folder(
    folder: Path, model: str | Path, read: Mapping[str, Any], denoiser: Path | None, vae: Path | None, offline: bool
) -> Backbone:
    """The backbone of a pipeline, with another autoencoder, or another denoiser: the one given, or an alias's own."""
    _check_known(denoiser_classes(folder), str(folder))  # before any weights are read
    known = entry(str(model)) if str(model) in aliases() and denoiser is None else {}
    if own := known.get("denoiser"):
        denoiser = fetch_files(own["hub"], [own["file"]], offline=offline) / own["file"]
    parts = read_folder(folder, folder.resolve().name if folder == Path(model) else str(model), **read)
    if vae is not None:
        other = read_vae(vae, read["device"], read["vae_dtype"] or read["dtype"])
        parts = replace(parts, networks={**parts.networks, "vae": other})
    backbone = _build(parts if denoiser is None else swap_denoiser(parts, denoiser))
    backbone.clean_t = known.get("clean_t", backbone.clean_t)
    weights = folder / EVIDENCE_WEIGHTS
    if denoiser is None and vae is None and weights.is_file():
        backbone.evidence_weights = json.loads(weights.read_text(encoding="utf-8"))
    return backbone


def _build(parts: Parts) -> Backbone:
    class_name = type(parts.denoiser).__name__
    family = FAMILIES[class_name] if class_name in FAMILIES else NATIVE[class_name][1]
    return import_module(f"repkit.backbones.{family}").from_parts(parts)


def _check_known(denoisers: Mapping[str, str], name: str) -> None:
    """Raise ValueError for denoisers of a family that is not known."""
    if not denoisers or not set(denoisers.values()) <= {*FAMILIES, *NATIVE}:
        has = ", ".join(denoisers.values()) or "no unet or transformer"
        raise ValueError(f"{name} has {has} for a denoiser; have {', '.join(FAMILIES)}")


def _take_apart(pipeline: Any, latent: Latent, prompt_cache: Path | None) -> Parts:
    if not hasattr(pipeline, "components"):
        raise TypeError(f"cannot load a {type(pipeline).__name__}; give a name, a folder, a hub id or a pipeline")
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    training = [name for name, network in networks.items() if network.training]
    if training:
        raise ValueError(f"{', '.join(training)} in training mode; call .eval() on each, features must not be random")
    encoders = {
        name: part
        for name, part in pipeline.components.items()
        if name.startswith(("tokenizer", "text_encoder")) and part is not None
    }
    _check_known(
        {name: type(networks[name]).__name__ for name in DENOISERS if name in networks}, type(pipeline).__name__
    )
    return Parts(
        type(pipeline).__name__,
        {name: network for name, network in networks.items() if name in (*DENOISERS, "vae")},
        Schedule.from_diffusers(pipeline.scheduler),
        dict(pipeline.config),
        latent,
        TextEncoders(lambda: encoders, cache=prompt_cache) if encoders else None,
    )


def random_control(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same network with freshly initialised weights: what its features are worth without any training."""
    control = copy(backbone)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(backbone.model).from_config(backbone.model.config)
    # Not diffusers' own `to`, which warns of layers that it would keep in float32 even where there are none.
    control.model = nn.Module.to(model, backbone.device, backbone.dtype).eval().requires_grad_(False)
    control.name, control.provenance, control.evidence_weights = f"{backbone.name} (random init)", {}, None
    return control
