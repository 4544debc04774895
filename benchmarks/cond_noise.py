"""What noise on the class embedding does to the features: `python benchmarks/cond_noise.py` pretrains with and without.

"Slight corruption in pre-training data makes better diffusion models" (Chen et al. 2024) adds Gaussian noise of scale
gamma to the embedding of the condition while pretraining. For each gamma and seed, the recipe of a bundled model for a
few thousand steps, then the probe of `benchmarks/models.py` on what it made. Runs lie in `--out` and go on when
killed. The section `Condition noise` of docs/RESULTS.md has the table; `--seeds`, `--steps`, `--test` make it smaller.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from measuring import table, write_section
from models import probe, tensors

from repkit.datasets import fashion_mnist
from repkit.recipes.pretrain import parse_options, pretrain
from repkit.zoo import load

ROOT = Path(__file__).parent.parent
RECIPES = {"mini-unet": "pretrain.yaml", "mini-dit": "pretrain-dit.yaml"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain, probe, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-dit", choices=RECIPES)
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seeds", type=int, default=2, help="runs of each, from other weights and orders")
    parser.add_argument("--steps", type=int, default=2_000, help="of pretraining, of 64 images each")
    parser.add_argument("--test", type=int, default=10_000, help="test images of the probe")
    parser.add_argument("--out", type=Path, default=Path("pretrained/cond-noise"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "RESULTS.md")
    options = parser.parse_args(arguments)
    found: dict[float, list[dict[str, Any]]] = {gamma: [] for gamma in options.gammas}
    for seed in range(options.seeds):  # seed by seed, so that what is there of a cut run compares
        for gamma in options.gammas:
            folder = pretrained(gamma, seed, options)
            found[gamma].append(probed(folder, options.test))
            print(f"gamma {gamma}, seed {seed}: {found[gamma][-1]}", flush=True)
    body = section(found, options)
    print(body)
    write_section(options.page, "Condition noise", body)


def pretrained(gamma: float, seed: int, options: argparse.Namespace) -> Path:
    """The folder of the model that the recipe makes."""
    out = options.out / f"{options.model}-{options.steps}-gamma-{gamma}-seed-{seed}"
    given = {"out": out, "steps": options.steps, "seed": seed, "cond_noise": gamma}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return pretrain(parse_options(["--config", str(ROOT / "recipes" / RECIPES[options.model]), *words]))


def probed(folder: Path, test: int) -> dict[str, Any]:
    """The cell that validation images choose and its accuracy on the test images."""
    backbone = load(folder)
    train_images, train_labels = fashion_mnist.load("train")
    test_images, test_labels = (array[:test] for array in fashion_mnist.load("test"))
    seen, held_out = tensors(train_images, backbone.size), tensors(test_images, backbone.size)
    return probe(backbone, seen, train_labels, held_out, test_labels)


def section(found: Mapping[float, Sequence[Mapping[str, Any]]], options: argparse.Namespace) -> str:
    """The table, with what it means."""
    rows = []
    for gamma, runs in found.items():
        scores = [run["accuracy"] for run in runs]
        spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
        each = ", ".join(f"{run['accuracy']:.2f} (`{run['cell']}`)" for run in runs)
        rows.append([f"{gamma:g}", f"{mean(scores):.2f}{spread}", each])
    return f"""Made by `python benchmarks/cond_noise.py`: {options.model} pretrained anew by its recipe for
{options.steps:,} steps of 64 images, from {options.seeds} seeds, with Gaussian noise of deviation gamma / sqrt(length)
on the embedding of the class (`repkit pretrain --cond_noise`). Ridge probe of the best cell as at the top of this page,
accuracy in percent on {min(options.test, 10_000):,} test images: mean and standard deviation over the seeds, and each
run.

{table(["gamma", "probe", "each run"], rows)}"""


if __name__ == "__main__":
    main()
