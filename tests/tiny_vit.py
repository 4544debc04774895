"""A tiny random vision transformer of timm, and a folder of it."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

from tests import tiny


def vit(depth: int = 2) -> Any:
    """Patches of 4 pixels, 12 channels, made for images of 16 pixels."""
    return tiny.randomise(timm.create_model("vit_tiny_patch16_224", num_classes=0, **_sizes(depth)))


def save_vit(folder: Path, depth: int = 2) -> Path:
    """The folder, with what `timm:FOLDER` reads."""
    folder.mkdir()
    save_file(vit(depth).state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": _sizes(depth)}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {}}))
    return folder


def _sizes(depth: int) -> dict[str, int]:
    return {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": depth, "num_heads": 3}
