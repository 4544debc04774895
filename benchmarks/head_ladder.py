"""What each head makes of the same features: `python benchmarks/head_ladder.py` measures the bundled models.

On the bundled Fashion-MNIST images: for each model, and for an untrained copy of it, the tap that ridge finds best on
validation images, its maps averaged to 4x4 cells. Every head reads these (those of vectors averaged to 2x2), DifFormer
the two best blocks at all times; then the same with few labels a class. The section `Heads` of docs/RESULTS.md has the
tables. `--train`, `--test`, `--seeds`, `--epochs`, `--width` and `--shots` make it smaller.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from measuring import table, write_section
from PIL import Image
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.datasets import fashion_mnist
from repkit.extractors import DiffusionExtractor
from repkit.heads.ridge import fit_ridge
from repkit.heads.rows import Examples
from repkit.heads.scores import stratified_split
from repkit.heads.trained import Training
from repkit.images import Resize, to_tensor
from repkit.pooling import pool
from repkit.tasks.ladder import Rung, few_shot_rows, fit_rung
from repkit.zoo import load, random_control

ROOT = Path(__file__).parent.parent
BLOCKS = {"mini-unet": ("down.2", "mid", "up.0"), "mini-dit": ("block.1", "block.4", "block.6")}
TIMES = {"mini-unet": ("10", "50"), "mini-dit": ("clean:100", "50")}
SIDE, BATCH = 4, 100
VECTOR, TOKEN = ("ridge", "logistic", "knn", "linear", "bn-linear", "mlp"), ("attention", "difformer")
FEW = ("ridge", "logistic", "knn", "linear")
TOKEN_LRS = (0.01, 0.05)

Maps = Mapping[str, Float[np.ndarray, "_n _c 4 4"]]  # by tap


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=400, help="training images a class, at most 400")
    parser.add_argument("--test", type=int, default=2_000, help="test images, at most 10,000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8, help="of attention and DifFormer")
    parser.add_argument("--width", type=int, default=64, help="of attention and DifFormer")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10, 50], help="labels a class")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "RESULTS.md")
    options = parser.parse_args(arguments)
    networks = {}
    for name in BLOCKS:
        trained = load(name)
        networks[name] = measure(trained, name, options)
        networks[f"{name}, untrained"] = measure(random_control(trained), name, options)
    body = section(networks, options)
    print(body)
    write_section(options.page, "Heads", body)


def measure(backbone: Backbone, family: str, options: argparse.Namespace) -> dict[str, Any]:
    """The taps that were chosen, every head's rung, and the rungs of the few-shot curve."""
    train, test = features(backbone, family, options)
    cell, blocks = best_cell(train)
    several = [f"{block}@{t}" for block in blocks for t in TIMES[family]]
    vectors, maps, many = (
        [Examples(view(one.features), one.labels) for one in (train, test)]
        for view in (
            lambda every: grid(every[cell]),
            lambda every: every[cell],
            lambda every: {key: every[key] for key in several},
        )
    )
    seeds = range(options.seeds)
    tokens: dict[str, Any] = {"training": Training(epochs=options.epochs, width=options.width), "lrs": TOKEN_LRS}
    ladder = {}
    for head in (*VECTOR, *TOKEN):
        data = {"attention": maps, "difformer": many}.get(head, vectors)
        ladder[head] = fit_rung(head, *data, n_classes=10, seeds=seeds, **(tokens if head in TOKEN else {}))
        print(f"{backbone.name}, {cell}, {head}: {percent(ladder[head])}", flush=True)
    few = {
        head: [fit_rung(head, *vectors, n_classes=10, seeds=seeds, shots=shots) for shots in options.shots]
        for head in FEW
    }
    return {"cell": cell, "several": several, "ladder": ladder, "few": few}


def features(backbone: Backbone, family: str, options: argparse.Namespace) -> tuple[Examples, Examples]:
    """Every tap's maps of the training and of the test images."""
    images, labels = fashion_mnist.load("train")
    rows = few_shot_rows(labels, options.train)
    others, truth = (array[: options.test] for array in fashion_mnist.load("test"))
    extract = DiffusionExtractor(backbone, [f"{','.join(BLOCKS[family])}@{','.join(TIMES[family])}"])
    return Examples(extracted(extract, images[rows]), labels[rows]), Examples(extracted(extract, others), truth)


def extracted(extract: DiffusionExtractor, images: np.ndarray) -> Maps:
    """Every tap's maps, averaged to 4x4 cells."""
    resize = Resize(extract.backbone.size)
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), BATCH):
        batch = [resize(Image.fromarray(image).convert("RGB"))[0] for image in images[start : start + BATCH]]
        for key, maps in extract(to_tensor(np.stack(batch))).items():
            found.setdefault(key, []).append(F.adaptive_avg_pool2d(maps, SIDE))
    return {key: torch.cat(parts).numpy() for key, parts in found.items()}


def best_cell(train: Examples) -> tuple[str, list[str]]:
    """The tap of the highest ridge accuracy on a fifth of the images, and the blocks of the two best at any time."""
    labels = train.labels
    fitted, held = stratified_split(labels, 0.2, seed=0)
    scores = {}
    for key, maps in train.by_key.items():
        x = grid(maps)
        scores[key] = max(fit_ridge(x[fitted], labels[fitted], validation=(x[held], labels[held])).chosen.scores)
    ranked = sorted(scores, key=lambda key: -scores[key])
    return ranked[0], list(dict.fromkeys(key.rpartition("@")[0] for key in ranked))[:2]


def grid(maps: Float[np.ndarray, "n c 4 4"]) -> Float[np.ndarray, "n d"]:
    """Averages over 2x2 cells, as `--pool 2x2` stores them."""
    return pool(torch.from_numpy(maps), "2x2").numpy()


def section(networks: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> str:
    """Both tables, with what they mean."""
    ladder = [
        [head, *(percent(network["ladder"][head]) for network in networks.values())] for head in (*VECTOR, *TOKEN)
    ]
    few = [
        [f"{name}, {head}", *map(percent, rungs)]
        for name, network in networks.items()
        for head, rungs in network["few"].items()
    ]
    taps = "; ".join(f"{name}: `{network['cell']}`" for name, network in networks.items())
    several = "; ".join(f"{name}: `{', '.join(network['several'])}`" for name, network in networks.items())
    return f"""Made by `python benchmarks/head_ladder.py`: {10 * options.train:,} training and {options.test:,} test
images. Test accuracy in percent, mean ± standard deviation over {options.seeds} seeds. A seed decides which fifth of
the training images chooses the hyper-parameter (the heads see the rest only), and the first weights and the order of
the images of heads that are trained. Untrained networks have random weights. Each network's tap is
the one, of three blocks at two times, at which ridge is best on the validation images of the first seed. Attention and
DifFormer have width {options.width} in place of the published 1024, train for {options.epochs} epochs and see 4x4
cells, DifFormer those of the two best blocks at both times; the other heads see 2x2 averages of the one tap.

Taps: {taps}.

DifFormer's: {several}.

{table(["head", *networks], ladder)}

With few labels a class; the hyper-parameter is still chosen on the fifth of all training images.

{table(["features and head", *(f"{shots} a class" for shots in options.shots)], few)}"""


def percent(rung: Rung) -> str:
    """Mean and standard deviation in percent, with one decimal."""
    return f"{100 * rung.mean:.1f} ± {100 * rung.spread:.1f}"


if __name__ == "__main__":
    main()
