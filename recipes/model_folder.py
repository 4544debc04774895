"""A pretraining's checkpoint -> a model folder that diffusers and `repkit.load` read, with its card and pictures."""

import argparse
import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import torch
import yaml
from einops import rearrange
from jaxtyping import Float, Int64
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from repkit.datasets.fashion_mnist import CLASSES
from repkit.recipes.mini_models import build_network, mini_model, predict
from repkit.sampling import sample as from_noise
from repkit.sampling import sampling_times
from repkit.schedule import Schedule
from repkit.zeroshot.weighttable import WeightTable
from repkit.zoo import EVIDENCE_WEIGHTS

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_ROWS, _ZOOM = 8, 2  # of the picture of samples
_WINDOW = 100  # steps to a row of loss.csv


def export_model(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write a checkpoint's averaged weights, in float16, as a diffusers folder with a model card; return the folder.

    The loss is read from loss.csv beside the checkpoint. Taken up from the folder, where they are: origin.md, which
    says where the steps were run if not by the recipe alone, and figures.json, which maps names to measured numbers or
    text, or to such a mapping. Weights of evidence, fitted to other weights of the network, are deleted from it.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
    options = saved["hyper_parameters"]
    model = mini_model(options["model"])
    network = build_network(options["model"], options["network"])
    network.load_state_dict(_averaged(saved))
    network.eval()
    folder.mkdir(parents=True, exist_ok=True)
    _sample_picture(network, model.schedule).save(folder / "samples.png")
    _save_network(network, folder, model.component)
    model.scheduler(**model.scheduler_config).save_pretrained(folder / "scheduler")
    _write_json(folder / "model_index.json", _model_index(options["model"]))
    (folder / "loss.csv").write_bytes((checkpoint.parent / "loss.csv").read_bytes())
    _loss_picture(folder / "loss.csv", folder / "loss.png")
    (folder / "README.md").write_text(_card(folder, network, options, saved["global_step"]), encoding="utf-8")
    return folder


def read_weights(source: str | Path, name: str) -> dict[str, Tensor]:
    """The weights of a model folder, or the averaged ones of a checkpoint, for the network of `mini_model(name)`.

    Raises FileNotFoundError if there is nothing of the kind.
    """
    model, source = mini_model(name), Path(source)
    if source.is_file():
        return _averaged(torch.load(source, weights_only=True, map_location="cpu"))
    if not (source / model.component / _WEIGHTS).is_file():
        raise FileNotFoundError(f"no {model.component}/{_WEIGHTS} in {source}; give a {name} folder or a checkpoint")
    network = model.network.from_pretrained(source / model.component, torch_dtype=torch.float32, local_files_only=True)
    return network.state_dict()


def _averaged(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    state = checkpoint["state_dict"]
    return {name.removeprefix("ema."): value for name, value in state.items() if name.startswith("ema.")}


def write_losses(losses: Float[Tensor, " n"], path: str | Path) -> None:
    """Write the loss of every step as a CSV file: a row for each 100 steps, with the last of them and their mean."""
    windows = losses.double().split(_WINDOW)
    rows = [(min((i + 1) * _WINDOW, len(losses)), f"{window.mean():.6f}") for i, window in enumerate(windows)]
    with Path(path).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("step", "loss"), *rows])


@torch.no_grad()
def sample(
    network: nn.Module, schedule: Schedule, labels: Int64[Tensor, " b"], *, size: int, seed: int = 0, steps: int = 50
) -> Float[Tensor, "b 1 h w"]:
    """Images in [-1, 1] by the deterministic sampler: DDIM for discrete schedules, Euler steps for a flow."""
    noise = torch.randn(len(labels), 1, size, size, generator=torch.Generator().manual_seed(seed))
    times = sampling_times(schedule, steps)
    return from_noise(
        schedule, lambda x_t, t: predict(network, x_t, t.expand(len(labels)), labels), noise, times
    ).clamp(-1, 1)


def _save_network(network: Any, folder: Path, component: str) -> None:
    weights = folder / component / _WEIGHTS
    before = weights.read_bytes() if weights.is_file() else None
    network.half().save_pretrained(folder / component)
    if weights.read_bytes() != before:
        (folder / EVIDENCE_WEIGHTS).unlink(missing_ok=True)


def _sample_picture(network: nn.Module, schedule: Schedule) -> Image.Image:
    """A column for each class."""
    labels = torch.arange(len(CLASSES)).repeat(_ROWS)
    images = sample(network, schedule, labels, size=network.config.sample_size)  # type: ignore[union-attr, arg-type]
    grid = rearrange(images, "(row column) 1 h w -> (row h) (column w)", row=_ROWS)
    picture = Image.fromarray(((grid + 1) * 127.5).round().byte().numpy())
    return picture.resize((picture.width * _ZOOM, picture.height * _ZOOM), Image.Resampling.NEAREST)


def _loss_picture(source: Path, path: Path) -> None:
    with source.open(newline="") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*rows, strict=True), linewidth=0.8)
    axes.set(xlabel="step", ylabel=f"loss, mean of {_WINDOW} steps", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120, metadata={"Software": f"matplotlib {matplotlib.__version__}"})


def _model_index(name: str) -> dict[str, Any]:
    model = mini_model(name)
    return {
        "_class_name": model.pipeline,
        "_diffusers_version": diffusers.__version__,
        "id2label": {str(label): name for label, name in enumerate(CLASSES)},
        "scheduler": ["diffusers", model.scheduler.__name__],
        model.component: ["diffusers", model.network.__name__],
    } | ({"vae": [None, None]} if model.pipeline == "DiTPipeline" else {})  # a slot of that pipeline: pixels need none


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _card(folder: Path, network: nn.Module, options: Mapping[str, Any], step: int) -> str:
    model = mini_model(options["model"])
    weights = folder / model.component / _WEIGHTS
    bundled = options["data"] == "bundled"
    facts = {
        "network": f"diffusers `{model.network.__name__}`, class-conditional, 32x32 grey pixels in [-1, 1]",
        "parameters": f"{sum(parameter.numel() for parameter in network.parameters()):,}",
        "prediction": f"{model.schedule.prediction}, `{model.scheduler.__name__}`",
        "labels": f"0 to {len(CLASSES) - 1}: {', '.join(CLASSES)}; {len(CLASSES)} is the null class",
        "steps": f"{step:,} of {options['batch']} images",
        "images seen": f"{step * options['batch']:,}",
        "seed": f"{options['seed']}",
        "weights": f"averaged over the steps, float16, `{weights.relative_to(folder).as_posix()}`",
        "sha256": f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}`",
    }
    return _CARD.format(
        name=options["model"],
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        data="4,000 training images that ship with repkit" if bundled else "60,000 training images",
        recipe=yaml.safe_dump(_recipe(options), sort_keys=False).strip(),
        origin=_text(folder / "origin.md"),
        figures=_figures(folder / "figures.json"),
        zeroshot=_zeroshot(folder / EVIDENCE_WEIGHTS),
    )


def _recipe(options: Mapping[str, Any]) -> dict[str, Any]:
    # Where it ran says nothing about the model.
    return {name: value for name, value in options.items() if name not in ("out", "data", "checkpoint_every")}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else "All steps were run by this command."


def _figures(path: Path) -> str:
    if not path.is_file():
        return "None yet."
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows = [f"| {name} | {_cell(value)} |" for name, value in measured.items()]
    return "\n".join(["| figure | measured |", "|---|---|", *rows])


def _zeroshot(path: Path) -> str:
    if not path.is_file():
        return "No weights of the zero-shot classifier have been fitted to this model."
    table = WeightTable.load(path)
    return (
        f"`{path.name}` holds {table.name} weights and a temperature for the zero-shot classifier, which takes them by "
        f"default. They were fitted by `python benchmarks/zeroshot.py` to {table.made_from}."
    )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


_CARD = """\
---
license: apache-2.0
library_name: diffusers
---
# {name}

A small diffusion model of Fashion-MNIST, made to make repkit's demo, tests and benchmarks real. It is no generator for
any other use.

| | |
|---|---|
{facts}

## Data

Fashion-MNIST, copyright 2017 Zalando SE, MIT licence: the {data}, resized from 28x28 to 32x32
(bicubic). No test image was used. The 4,000 training images that repkit's probes use are among the 60,000.

## Recipe

`repkit pretrain --config FILE` with this file, and `data` naming the folder of the original files
(Debian's package `dataset-fashion-mnist`) or `bundled`:

```yaml
{recipe}
```

{origin}

Times are stratified over each batch; the loss is the mean squared error of the prediction, at every time alike.

![loss](loss.png)

## Samples

Not chosen, without guidance, 50 steps of the deterministic sampler; a column for each class, in the order of their
labels.

![samples](samples.png)

## Measured figures

{figures}

{zeroshot}
"""


def main() -> None:
    """Write a checkpoint as a model folder; again, to take up a new figures.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint", help="last.ckpt of a pretraining")
    parser.add_argument("folder", help="model folder to write")
    arguments = parser.parse_args()
    print(export_model(arguments.checkpoint, arguments.folder))


if __name__ == "__main__":
    main()
