"""Small runs of `repkit fit`: a folder of ten classes, a recipe as a mapping, and what a run leaves."""

from pathlib import Path
from typing import Any

import torch
import yaml

from repkit.datasets.fashion_mnist import write_folder
from repkit.recipes.fit import fit, parse

CPU = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]


def clothes(root: Path, train: int = 4, test: int = 2) -> Path:
    write_folder(root, "train", train)
    write_folder(root, "test", test)
    return root


def images(root: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "name": "folder",
        "root": str(root),
        "extraction": {"model": "mini-unet", "taps": ["mid@50"]},
        "views": {"crop": "padded", "pad": 2, "flip": True},
        "batch": 8,
        "epochs": 2,
        "seed": 3,
    }
    return {"class_path": "ImageData", "init_args": settings | changes}


def write_recipe(path: Path, data: dict[str, Any], out: Path, model: dict[str, Any] | None = None, **more: Any) -> Path:
    given = {"optimising": {"lrs": [0.01, 0.003]}} if model is None else model
    recipe = {"model": {"class_path": "Probe", "init_args": given}, "data": data, "out": str(out), **more}
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(recipe: Path, *options: str) -> dict[str, Any]:
    return fit(parse([str(recipe), *CPU, *options]))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "last.ckpt", weights_only=True)["state_dict"]


def curves(out: Path) -> str:
    return (out / "curve.csv").read_text()
