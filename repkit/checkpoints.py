"""Checkpoints of one file, `.pt` or `.safetensors`: read without running code, and known by the names in them."""

import argparse
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.backbones.latents import Latent
from repkit.pipelinefolder import place, reason

SUFFIXES = (".pt", ".pth", ".safetensors")

# Names that only this family's weights have together; the family is a file in backbones/ with `from_weights`.
FAMILIES: Mapping[str, tuple[str, str]] = {
    "adm": ("input_blocks.0.0.weight", "out.2.weight"),
    "sit": ("blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight"),
}


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    vae: Any = None,
    extractor: Any = None,
    latent: Latent = "mode",
    name: str | None = None,
) -> Backbone:
    """The backbone of a checkpoint file: guided-diffusion's (ADM), or SiT's and REPA's.

    config: what the weights do not tell; files under their published names need none. vae, extractor: what makes the
    latents of a family that works on latents, used as they are. name: of the backbone; else the file's.

    Raises OSError for a file that cannot be read or is not whole, ValueError for what is of no known family.
    """
    path = Path(path)
    weights = read_checkpoint(path)
    family = import_module(f"repkit.backbones.{family_of(weights, path)}")
    backbone: Backbone = family.from_weights(
        weights, name=path.stem, config=config, vae=vae, extractor=extractor, latent=latent
    )
    place(backbone.model, device, dtype)
    backbone.name = name or path.stem
    backbone.provenance = {"model": str(path.resolve()), "revision": None}
    return backbone


def family_of(weights: Mapping[str, Tensor], path: Path) -> str:
    """The file in backbones/ for a checkpoint's weights. Raises ValueError where there is none."""
    known = [family for family, keys in FAMILIES.items() if all(key in weights for key in keys)]
    if not known:
        raise ValueError(
            f"{path} is of no family that is known by its weights (it has {', '.join(sorted(weights)[:3])} ...); "
            "have guided-diffusion's U-Nets (ADM), SiT and REPA; load other models from diffusers folders"
        )
    return known[0]


def read_checkpoint(path: str | Path, *, values: bool = True) -> dict[str, Tensor]:
    """The weights in a file, the averaged ones where it has both, under the names that the network gives them.

    values: False reads names and shapes alone, onto the meta device.
    Raises OSError for a file that is absent, cut short, or holds more than tensors and plain values.
    """
    path = Path(path)
    check_file(path)
    found = _unwrap((_read_safetensors if path.suffix == ".safetensors" else _read_torch)(path, values))
    weights = {str(key).removeprefix("module."): value for key, value in found.items() if isinstance(value, Tensor)}
    if not weights:
        raise OSError(f"{path} holds no weights (it has {', '.join(map(str, found)) or 'nothing'}); give a checkpoint")
    return weights


def check_file(path: Path) -> None:
    """Raise OSError for a checkpoint that is not there."""
    if not path.is_file():
        raise OSError(f"no file {path}; give a checkpoint ({', '.join(SUFFIXES)})")


def _unwrap(found: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """What a training run kept beside its optimiser: the averaged weights before the last ones."""
    for key in ("ema", "state_dict", "model"):
        if isinstance(found.get(key), Mapping):
            return _unwrap(found[key])
    return found


def _read_safetensors(path: Path, values: bool) -> Mapping[str, Tensor]:
    try:
        if values:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}
    except SafetensorError as error:
        raise OSError(f"cannot read {path}: {reason(error)}; the file is not whole, get it again") from error


def _read_torch(path: Path, values: bool) -> Mapping[Any, Any]:
    try:
        # Mapped, because a file may also hold an optimiser's state, of twice the size. A Namespace, which training
        # scripts leave in their checkpoints, is a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            place_for, mapped = "cpu" if values else "meta", zipfile.is_zipfile(path)
            found = torch.load(path, map_location=place_for, weights_only=True, mmap=mapped)
    except Exception as error:  # torch, zip files and pickles each have their own way to say it
        raise OSError(_unreadable(path, error)) from error
    if not isinstance(found, Mapping):
        raise OSError(f"{path} holds a {type(found).__name__} and no named weights; save the network's state_dict()")
    return found


def _unreadable(path: Path, error: Exception) -> str:
    what = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # before it stands advice to run what is inside
    if what.startswith("Unsupported global"):
        return (
            f"{path} holds Python objects, and reading those can run code; where you trust it, write its state_dict() "
            "with torch.save or safetensors and give that"
        )
    said = bool(what) and not what.isdigit()  # a number is a byte that pickle made nothing of
    why = what.splitlines()[0].partition(". ")[0] if said else type(error).__name__
    return f"cannot read {path}: {why}; the file is not whole or no checkpoint, get it again"
