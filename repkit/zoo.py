"""load: a name, a folder, a hub id or a pipeline -> a Backbone, ready and frozen."""

import json
import logging
from collections.abc import Mapping
from copy import copy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from repkit.backbones.base import Backbone
from repkit.backbones.latents import Latent
from repkit.backbones.parts import Parts
from repkit.backbones.prompts import TextEncoders
from repkit.pipelinefolder import DENOISERS, component, read_folder, read_json, reason
from repkit.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODELS = Path(__file__).parent / "models"

logger = logging.getLogger("repkit")


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
    prompt_cache: Path | None = None,
) -> Backbone:
    """Load a backbone: a bundled name (mini-unet), a diffusers folder, a hub id, or a pipeline already in memory.

    Everything but a pipeline is moved to `device` and `dtype`; the autoencoder to `vae_dtype` where that is given. A
    pipeline is used as it is, so it has to be frozen and in eval mode already. latent: the autoencoder's posterior
    "mode", or a "sample" of it, which differs from call to call. revision: a commit of the hub. offline: never ask
    the network. prompt_cache: a folder that keeps encoded prompts, so that text encoders need not be loaded again.

    Raises ValueError for a model of a family that repkit does not know, OSError where there is nothing to load.
    """
    if latent not in ("mode", "sample"):
        raise ValueError(f"no latent {latent!r}; have mode, sample")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r}; give a torch dtype such as torch.bfloat16")
    if not isinstance(model, str | Path):
        return _build(_take_apart(model, latent, prompt_cache))
    folder = find(str(model), revision=revision, offline=offline)
    _check_family(folder)
    name = folder.resolve().name if folder == Path(model) else str(model)
    parts = read_folder(
        folder, name, device=device, dtype=dtype, vae_dtype=vae_dtype, latent=latent, prompt_cache=prompt_cache
    )
    backbone = _build(parts)
    named = model in bundled() or not Path(model).is_dir()
    # A folder is found again from anywhere, a name or a hub id as it is.
    backbone.provenance = {"model": str(model) if named else str(folder.resolve()), "revision": revision}
    return backbone


def bundled() -> list[str]:
    """The names of the models that ship with the package."""
    return sorted(index.parent.name for index in MODELS.glob("*/model_index.json"))


def describe(name: str) -> dict[str, Any]:
    """What a bundled model is, from its configs alone: class, prediction, image side, classes, measured figures."""
    folder = MODELS / name
    index = read_json(folder / "model_index.json", "a bundled model has one")
    part = next(part for part in DENOISERS if component(index, part))
    schedule = Schedule.from_diffusers(read_json(folder / "scheduler" / "scheduler_config.json", "a model has one"))
    figures = folder / "figures.json"
    return {
        "name": name,
        "class": component(index, part),
        "prediction": schedule.prediction,
        "size": read_json(folder / part / "config.json", "a model has one")["sample_size"],
        "classes": len(index.get("id2label", {})),
        "figures": json.loads(figures.read_text()) if figures.is_file() else {},
        "card": str(folder / "README.md"),
    }


def find(model: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The folder of a bundled name, a path or a hub id (downloaded to the hub's cache unless it is there)."""
    if model in bundled():
        if Path(model).is_dir():
            logger.warning("%s is the bundled model, not the folder of that name; write ./%s for that", model, model)
        return MODELS / model
    if Path(model).is_dir():
        return Path(model)
    known = f"bundled models: {', '.join(bundled())}; or give a diffusers folder, or a hub id such as owner/name"
    if model.startswith("timm:"):
        raise ValueError(f"{model} is no diffusion model; repkit.DinoExtractor({model!r}) takes its features")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise OSError(f"no model {model!r} here; {known}")
    from diffusers import DiffusionPipeline

    try:
        folder = DiffusionPipeline.download(model, revision=revision, local_files_only=offline, use_safetensors=True)
    except Exception as error:
        # The hub's client raises a dozen classes from requests, httpx and its own; what a user can do is the same.
        raise OSError(
            f"cannot get {model!r} from the hub ({reason(_root(error))}); check the name and the network, or download "
            f"it elsewhere and give its folder; {known}"
        ) from error
    return Path(folder)


def _build(parts: Parts) -> Backbone:
    _check_known(
        {name: type(parts.networks[name]).__name__ for name in DENOISERS if name in parts.networks}, parts.name
    )
    family = import_module(f"repkit.backbones.{FAMILIES[type(parts.denoiser).__name__]}")
    return family.from_parts(parts)


def _check_family(folder: Path) -> None:
    """Raise ValueError, before any weights are read, for a pipeline of a family that is not known."""
    index = read_json(folder / "model_index.json", "a diffusers pipeline folder has one")
    _check_known({part: found for part in DENOISERS if (found := component(index, part))}, str(folder))


def _check_known(denoisers: Mapping[str, str], name: str) -> None:
    if not denoisers or not set(denoisers.values()) <= set(FAMILIES):
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
    return Parts(
        type(pipeline).__name__,
        {name: network for name, network in networks.items() if name in (*DENOISERS, "vae")},
        Schedule.from_diffusers(pipeline.scheduler),
        dict(pipeline.config),
        latent,
        TextEncoders(lambda: encoders, cache=prompt_cache) if encoders else None,
    )


def _root(error: BaseException) -> BaseException:
    """What an error was raised from, in the end: the hub's client wraps a lost network in several layers of advice."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def random_control(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same network with freshly initialised weights: what its features are worth without any training."""
    control = copy(backbone)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(backbone.model).from_config(backbone.model.config)
    # Not diffusers' own `to`, which warns of layers that it would keep in float32 even where there are none.
    control.model = nn.Module.to(model, backbone.device, backbone.dtype).eval().requires_grad_(False)
    control.name, control.provenance = f"{backbone.name} (random init)", {}
    return control
