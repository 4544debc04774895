"""load: a name, a folder, a hub id or a pipeline -> a Backbone, ready and frozen."""

import json
import logging
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from repkit.backbones.base import Backbone
from repkit.backbones.dit import DiT
from repkit.backbones.latents import Latent
from repkit.backbones.unet import UNet
from repkit.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODELS = Path(__file__).parent / "models"

logger = logging.getLogger("repkit")


@dataclass(frozen=True)
class Parts:
    """A pipeline taken apart: its networks by component name, its schedule, and what its index says."""

    name: str
    networks: Mapping[str, Any]
    schedule: Schedule
    index: Mapping[str, Any] = field(default_factory=dict)
    latent: Latent = "mode"

    @property
    def class_names(self) -> list[str] | None:
        names = self.index.get("id2label")
        return None if names is None else [str(names[key]) for key in sorted(names, key=int)]


def _unet(parts: Parts) -> Backbone:
    return UNet(parts.networks["unet"], parts.schedule, name=parts.name, class_names=parts.class_names)


def _dit(parts: Parts) -> Backbone:
    return DiT(
        parts.networks["transformer"],
        parts.schedule,
        parts.networks.get("vae"),
        name=parts.name,
        class_names=parts.class_names,
        latent=parts.latent,
    )


# The denoiser's class decides the family.
FAMILIES: Mapping[str, Callable[[Parts], Backbone]] = {"UNet2DModel": _unet, "DiTTransformer2DModel": _dit}
_DENOISERS = ("unet", "transformer")


def load(
    model: "str | Path | DiffusionPipeline",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    latent: Latent = "mode",
    revision: str | None = None,
    offline: bool = False,
) -> Backbone:
    """Load a backbone: a bundled name (mini-unet), a diffusers folder, a hub id, or a pipeline already in memory.

    Everything but a pipeline is moved to `device` and `dtype`; the autoencoder to `vae_dtype` where that is given. A
    pipeline is used as it is, so it has to be frozen and in eval mode already. latent: the autoencoder's posterior
    "mode", or a "sample" of it, which differs from call to call. revision: a commit of the hub. offline: never ask
    the network.

    Raises ValueError for a model of a family that repkit does not know, OSError where there is nothing to load.
    """
    if latent not in ("mode", "sample"):
        raise ValueError(f"no latent {latent!r}; have mode, sample")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r}; give a torch dtype such as torch.bfloat16")
    if not isinstance(model, str | Path):
        return _build(_take_apart(model, latent))
    folder = find(str(model), revision=revision, offline=offline)
    parts = _read(folder, folder.resolve().name if folder == Path(model) else str(model), dtype, latent)
    for component, network in parts.networks.items():
        network.requires_grad_(False).eval().to(device)
        if component == "vae" and vae_dtype is not None:
            network.to(vae_dtype)
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
    index = _read_json(folder / "model_index.json", "a bundled model has one")
    part = next(part for part in _DENOISERS if _component(index, part))
    schedule = Schedule.from_diffusers(_read_json(folder / "scheduler" / "scheduler_config.json", "a model has one"))
    figures = folder / "figures.json"
    return {
        "name": name,
        "class": _component(index, part),
        "prediction": schedule.prediction,
        "size": _read_json(folder / part / "config.json", "a model has one")["sample_size"],
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
            f"cannot get {model!r} from the hub ({_reason(_root(error))}); check the name and the network, or download "
            f"it elsewhere and give its folder; {known}"
        ) from error
    return Path(folder)


def _build(parts: Parts) -> Backbone:
    denoiser = next((parts.networks[name] for name in _DENOISERS if name in parts.networks), None)
    family = type(denoiser).__name__
    if family not in FAMILIES:
        raise ValueError(f"{parts.name} has a {family} for a denoiser; have {', '.join(FAMILIES)}")
    return FAMILIES[family](parts)


def _take_apart(pipeline: Any, latent: Latent) -> Parts:
    if not hasattr(pipeline, "components"):
        raise TypeError(f"cannot load a {type(pipeline).__name__}; give a name, a folder, a hub id or a pipeline")
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    training = [name for name, network in networks.items() if network.training]
    if training:
        raise ValueError(f"{', '.join(training)} in training mode; call .eval() on each, features must not be random")
    schedule = Schedule.from_diffusers(pipeline.scheduler)
    return Parts(type(pipeline).__name__, networks, schedule, dict(pipeline.config), latent)


def _read(folder: Path, name: str, dtype: torch.dtype, latent: Latent) -> Parts:
    index = _read_json(folder / "model_index.json", "a diffusers pipeline folder has one")
    config = _read_json(folder / "scheduler" / "scheduler_config.json", "it says how the model was noised")
    denoisers = {part: found for part in _DENOISERS if (found := _component(index, part))}
    if not denoisers or not set(denoisers.values()) <= set(FAMILIES):
        has = ", ".join(denoisers.values()) or "no unet or transformer"
        raise ValueError(f"{folder} has {has} for a denoiser; have {', '.join(FAMILIES)}")
    vae = _component(index, "vae")
    classes = denoisers if vae is None else denoisers | {"vae": vae}
    networks = {part: _read_network(folder / part, class_name, dtype) for part, class_name in classes.items()}
    return Parts(name, networks, Schedule.from_diffusers(config), index, latent)


def _component(index: Mapping[str, Any], part: str) -> str | None:
    """The class of a pipeline's component; None where it is absent or was saved empty."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) else None


def _read_network(folder: Path, class_name: str, dtype: torch.dtype) -> nn.Module:
    import diffusers

    try:
        network, found = getattr(diffusers, class_name).from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, diffusers and the file system each have their own way to say it
        raise OSError(
            f"cannot read {class_name} from {folder}: {_reason(error)}; it needs config.json and safetensors"
        ) from error
    if missing := found["missing_keys"]:  # diffusers would leave them random
        raise OSError(f"{folder} lacks {len(missing)} weights of {class_name}, {missing[0]} first; get it again")
    return network


def _root(error: BaseException) -> BaseException:
    """What an error was raised from, in the end: the hub's client wraps a lost network in several layers of advice."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_json(path: Path, why: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise OSError(f"no {path.name} in {path.parent}: {why}; save the pipeline with save_pretrained") from None
    except json.JSONDecodeError as error:
        raise OSError(f"{path} is no JSON: {error}") from error


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
