"""Overlays: other weights laid over a loaded denoiser before its first use, swapped in whole or merged in as LoRA."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repkit.backbones.parts import Parts
from repkit.checkpoints import read_checkpoint
from repkit.pipelinefolder import place, read_network, reason

logger = logging.getLogger("repkit")

Lora = str | Path | tuple[str | Path, float]

# The pipelines that know the formats in which LoRA files are spread, by the class of the denoiser.
_LORA_FORMATS: Mapping[str, str] = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
}


def swap_denoiser(parts: Parts, source: Path) -> Parts:
    """The pipeline with other weights in its denoiser: of a file, every key of it, or of a folder with its own config.

    Raises OSError for what cannot be read, ValueError for the weights of another network.
    """
    old, part = parts.denoiser, "unet" if "unet" in parts.networks else "transformer"
    if not source.is_dir():
        _fill(old, read_checkpoint(source), str(source))
        return parts
    folder = source / part if (source / part).is_dir() else source
    new = read_network(folder, type(old).__name__, next(old.parameters()).dtype)
    place(new, next(old.parameters()).device)
    return replace(parts, networks={**parts.networks, part: new})


def read_vae(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Any:
    """The autoencoder in a folder of its own, or in that of a pipeline. Raises OSError where it cannot be read."""
    vae = read_network(vae_folder(folder), "AutoencoderKL", dtype)
    place(vae, device)
    return vae


def vae_folder(folder: Path) -> Path:
    """Where in a folder an autoencoder is: in it, or in its `vae` where it is a pipeline's."""
    return folder / "vae" if (folder / "vae").is_dir() else folder


def _fill(network: Any, weights: Mapping[str, Tensor], source: str) -> None:
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in weights]
    foreign = [key for key in weights if key not in wanted]
    shaped = [key for key in wanted if key in weights and weights[key].shape != wanted[key].shape]
    found = {"lacks": missing, "has the foreign": foreign, "has in other shapes": shaped}
    if wrong := [f"{how} {keys[0]} ({len(keys)} in all)" for how, keys in found.items() if keys]:
        raise ValueError(
            f"{source} is not the weights of this {type(network).__name__}: it {', '.join(wrong)}; give its state dict"
        )
    network.load_state_dict(weights)


def merge_loras(denoiser: Any, loras: Lora | Sequence[Lora]) -> list[tuple[str, float]]:
    """Merge LoRA files (safetensors; a scale beside the path, else 1) into the weights, one after the other.

    Returns each file's absolute path with its scale. What a file has for text encoders is left out, with a warning.
    Raises OSError for a file that cannot be read, ValueError for one that is no LoRA of this denoiser.
    """
    pairs = _pairs(loras)
    for path, scale in pairs:
        _merge(denoiser, path, scale)
    return [(str(path.resolve()), scale) for path, scale in pairs]


def check_loras(loras: Lora | Sequence[Lora]) -> None:
    """Raise OSError for a file that is not there, ValueError for another format, before any model is loaded."""
    for path, _ in _pairs(loras):
        if not path.is_file():
            raise OSError(f"no file {path} for lora=; give the path of a safetensors file")
        if path.suffix != ".safetensors":
            raise ValueError(f"lora={str(path)!r} is no .safetensors file; convert it")


def _pairs(loras: Lora | Sequence[Lora]) -> list[tuple[Path, float]]:
    """Paths and scales of one LoRA or of several."""
    if isinstance(loras, str | Path):
        return [(Path(loras), 1.0)]
    if len(loras) == 2 and isinstance(loras[1], int | float):
        return [(Path(str(loras[0])), float(loras[1]))]
    return [pair for one in loras for pair in _pairs(one)]  # type: ignore[arg-type]


def _merge(denoiser: Any, path: Path, scale: float) -> None:
    if type(denoiser).__name__ not in _LORA_FORMATS:
        raise ValueError(f"no LoRA for a {type(denoiser).__name__} ({path}); have {', '.join(_LORA_FORMATS)}")
    raw = read_checkpoint(path)
    try:
        _merge_layers(denoiser, raw, scale)
    except Exception as error:  # peft and diffusers each have their own way to say it
        raise ValueError(f"{path} is no LoRA of this {type(denoiser).__name__}: {reason(error)}") from error
    denoiser.requires_grad_(False).eval()


def _merge_layers(denoiser: Any, raw: Mapping[str, Tensor], scale: float) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers, alphas = _layers(denoiser, raw)
    if not layers:
        raise ValueError(f"it has no layers for one, but {next(iter(raw))}")
    denoiser.load_lora_adapter(layers, prefix="denoiser", network_alphas=alphas or None)
    placed = sum(isinstance(module, BaseTunerLayer) for module in denoiser.modules())
    if placed != (wanted := sum(tensor.ndim > 1 for tensor in layers.values()) // 2):
        raise ValueError(f"{wanted - placed} of its {wanted} layers have no place there")
    denoiser.fuse_lora(lora_scale=scale)
    denoiser.unload_lora()


def _layers(denoiser: Any, raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's layers for the denoiser, and their alphas, in diffusers' names under one prefix."""
    import diffusers

    formats = getattr(diffusers, _LORA_FORMATS[type(denoiser).__name__])
    told = {"unet_config": denoiser.config} if formats.__name__ == "StableDiffusionPipeline" else {}
    told |= {"return_alphas": True} if formats.__name__ == "FluxPipeline" else {}
    read = formats.lora_state_dict(dict(raw), **told)
    state, alphas = read if isinstance(read, tuple) else (read, None)
    if texts := [key for key in state if key.startswith("text_encoder")]:
        logger.warning("%d weights for text encoders are left out of the LoRA; prompts are encoded without", len(texts))
    return _prefixed(state, bare=True), _prefixed(alphas or {}, bare=False)


def _prefixed(state: Mapping[str, Any], *, bare: bool) -> dict[str, Any]:
    known = ("unet.", "transformer.")
    own = {key: value for key, value in state.items() if key.startswith(known)}
    if not own and bare:  # saved from the network itself
        return {f"denoiser.{key}": value for key, value in state.items() if not key.startswith("text_encoder")}
    return {f"denoiser.{key.partition('.')[2]}": value for key, value in own.items()}
