"""Reading a diffusers pipeline's folder into Parts: networks from safetensors, the schedule, text encoders."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repkit.backbones.latents import Latent
from repkit.backbones.parts import Parts
from repkit.backbones.prompts import TextEncoders
from repkit.schedule import Schedule

DENOISERS = ("unet", "transformer")
# What older pipelines call by the one class name Transformer2DModel, by the norm in its config.
_LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def read_folder(
    folder: Path,
    name: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None,
    latent: Latent,
    prompt_cache: Path | None = None,
) -> Parts:
    """The pipeline in `folder`, frozen, in place; its text encoders wait until a text is to be encoded.

    Raises OSError for what is missing or cannot be read.
    """
    index = read_json(folder / "model_index.json", "a diffusers pipeline folder has one")
    config = _read_scheduler(folder)
    classes = {part: found for part in (*DENOISERS, "vae") if (found := component(index, part))}
    networks = {part: read_network(_home(folder, part), class_name, dtype) for part, class_name in classes.items()}
    for part, network in networks.items():
        place(network, device, vae_dtype if part == "vae" else None)
    texts = _text_encoders(folder, index, device, dtype, prompt_cache)
    return Parts(name, networks, Schedule.from_diffusers(config), index, latent, texts)


def read_configs(folder: Path) -> dict[str, Any]:
    """A pipeline's configs, weights unread: `index`, `scheduler`, and those of the denoiser and the autoencoder.

    Raises OSError for what is missing or cannot be read.
    """
    index = read_json(folder / "model_index.json", "a diffusers pipeline folder has one")
    parts = {part: found for part in (*DENOISERS, "vae") if (found := component(index, part))}
    return {
        "index": index,
        "scheduler": _read_scheduler(folder),
        **{part: _read_config(folder, part, class_name) for part, class_name in parts.items()},
    }


def denoiser_classes(folder: Path) -> dict[str, str]:
    """The class of each of a pipeline's denoisers, by its name in there. Raises OSError for what cannot be read."""
    index = read_json(folder / "model_index.json", "a diffusers pipeline folder has one")
    found = {part: class_name for part in DENOISERS if (class_name := component(index, part))}
    legacy = [part for part, class_name in found.items() if class_name == "Transformer2DModel"]
    return found | {part: _read_config(folder, part, found[part])["_class_name"] for part in legacy}


def _read_config(folder: Path, part: str, class_name: str) -> dict[str, Any]:
    config = read_json(_home(folder, part) / "config.json", f"it says what {class_name} is")
    legacy = _LEGACY.get(config.get("norm_type", "")) if class_name == "Transformer2DModel" else None
    return {**config, "_class_name": legacy or class_name}


def _read_scheduler(folder: Path) -> dict[str, Any]:
    home = _home(folder, "scheduler", "scheduler_config.json")
    return read_json(home / "scheduler_config.json", "it says how the model was noised")


def _home(folder: Path, part: str, config: str = "config.json") -> Path:
    """Where a part of a pipeline is: in a folder of its own, or beside the index, as in the first DDPM pipelines."""
    beside = not (folder / part).is_dir() and (folder / config).is_file()
    return folder if beside else folder / part


def blank_network(config: Mapping[str, Any]) -> Any:
    """The diffusers network of a config, which names its class, without weights: on the meta device, frozen."""
    import diffusers

    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    place(network, "meta")  # buffers that were made from arrays
    return network


def component(index: Mapping[str, Any], part: str) -> str | None:
    """The class of a pipeline's component; None where it is absent or was saved empty."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) else None


def read_network(folder: Path, class_name: str, dtype: torch.dtype) -> Any:
    """A diffusers network saved by save_pretrained. Raises OSError where that fails or weights are missing."""
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
            f"cannot read {class_name} from {folder}: {reason(error).rstrip('.')}; it needs config.json and whole "
            "safetensors, so get it again if it was cut short"
        ) from error
    if missing := found["missing_keys"]:  # diffusers would leave them random
        raise OSError(f"{folder} lacks {len(missing)} weights of {class_name}, {missing[0]} first; get it again")
    return network


def place(network: Any, device: str | torch.device, dtype: torch.dtype | None = None) -> None:
    """Freeze a network and move it."""
    network.requires_grad_(False).eval().to(device)
    if dtype is not None:
        network.to(dtype)


def _text_encoders(
    folder: Path, index: Mapping[str, Any], device: str | torch.device, dtype: torch.dtype, cache: Path | None
) -> TextEncoders | None:
    parts = [
        part for part in index if part.startswith(("tokenizer", "text_encoder")) and component(index, part) is not None
    ]
    if not any(part.startswith("text_encoder") for part in parts):
        return None

    def open_encoders() -> dict[str, Any]:
        opened = {part: _read_text_part(folder / part, str(component(index, part)), dtype) for part in parts}
        for network in opened.values():
            if isinstance(network, nn.Module):
                place(network, device)
        return opened

    return TextEncoders(open_encoders, cache=cache, fingerprint=_fingerprint(folder, parts, dtype))


def _read_text_part(folder: Path, class_name: str, dtype: torch.dtype) -> Any:
    """A tokenizer, or a text encoder of transformers. Raises OSError where it cannot be read."""
    import transformers

    if not folder.is_dir() or not any(folder.iterdir()):  # transformers would ask the hub, or make an empty tokenizer
        raise OSError(f"no {folder.name} in {folder.parent}; without it no prompt can be encoded; get the whole model")
    options = {"dtype": dtype, "use_safetensors": True} if folder.name.startswith("text_encoder") else {}
    try:
        with _no_bars():
            return getattr(transformers, class_name).from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        raise OSError(
            f"cannot read {class_name} from {folder}: {reason(error)}; without it no prompt can be encoded"
        ) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bar for each of its networks."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _fingerprint(folder: Path, parts: list[str], dtype: torch.dtype) -> str:
    """Names, sizes and times of the encoders' files: tells in no time whether they are those of a cache."""
    files = sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(f"{facts}:{dtype}".encode()).hexdigest()


def reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(path: Path, why: str) -> dict[str, Any]:
    """An object in a JSON file. Raises OSError, with `why` it is needed, where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise OSError(f"no {path.name} in {path.parent}: {why}; save the pipeline with save_pretrained") from None
    except json.JSONDecodeError as error:
        raise OSError(f"{path} is no JSON: {error}") from error
