"""Outlines: networks and checkpoint files as shapes alone, on the meta device, for what is asked before any run."""

import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.backbones.sit_weights import latent_channels, network_time
from repkit.catalog import entry
from repkit.checkpoints import family_of, read_checkpoint
from repkit.overlays import vae_folder
from repkit.pipelinefolder import blank_network, place, read_json

logger = logging.getLogger("repkit")

# Networks of our own, whose weights come as one file: the modules that hold them, and their families.
NATIVE: Mapping[str, tuple[str, str]] = {
    "ADMUNet": ("adm_unet", "adm"),
    "SiTTransformer": ("sit_transformer", "sit"),
}


def blank(config: Mapping[str, Any]) -> Any:
    """The network of a config, of diffusers or of our own, without weights."""
    class_name = config["_class_name"]
    if class_name not in NATIVE:
        return blank_network(config)
    network = getattr(import_module(f"repkit.backbones.{NATIVE[class_name][0]}"), class_name)
    with torch.device("meta"):
        made = network.from_config({key: value for key, value in config.items() if key != "_class_name"})
    place(made, "meta")
    return made


def outline_file(path: Path, vae: Path | None, config: Mapping[str, Any] | None) -> Backbone:
    """The backbone of a checkpoint file, whose names and shapes are read and no values.

    vae: the folder of an autoencoder, of which the config is read. Raises OSError and ValueError as `load_checkpoint`.
    """
    weights = read_checkpoint(path, values=False)
    family, made = family_of(weights, path), None if vae is None else _blank_vae(vae)
    if family == "sit":
        made = made or _usual_vae(weights, path.stem)
        config = {"time": _any_time(weights, path.stem), **(config or {})}
    module = import_module(f"repkit.backbones.{family}")
    backbone: Backbone = module.from_weights(weights, name=path.stem, config=config, vae=made)
    if vae is None and made is not None:
        logger.warning(
            "%s does not tell its autoencoder; sizes and strides are as with that of Stable Diffusion", path.stem
        )
    return backbone


def _blank_vae(folder: Path) -> Any:
    config = read_json(vae_folder(folder) / "config.json", "it says how many pixels are a latent pixel")
    return blank_network({**config, "_class_name": "AutoencoderKL"})


def _usual_vae(weights: Mapping[str, Tensor], name: str) -> Any:
    """The autoencoder of Stable Diffusion, without weights, for latents that look like its own; None for pixels."""
    channels, usual = latent_channels(weights), entry("sit-xl-2")["configs"]["vae"]
    if channels in (1, 3):
        return None
    if channels != usual["latent_channels"]:
        raise ValueError(
            f"{name} works on latents of {channels} channels, and no weight tells how many pixels each is; give vae=, "
            "the folder or hub id of their autoencoder, or load it with extractor= and see its `blocks`"
        )
    return blank_network(usual)


def _any_time(weights: Mapping[str, Tensor], name: str) -> str:
    """Which way the network's time runs, where something says it: shapes do not depend on it."""
    try:
        return network_time(weights, name)
    except ValueError:
        return "sit"
