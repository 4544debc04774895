"""What the bundled models are worth: `python benchmarks/models.py` measures them, and writes what it finds.

For each model, on the bundled Fashion-MNIST images at 32x32: a ridge probe on 2x2-pooled features of every stage block
at several times, with noise and without, the cell chosen on a fifth of the 4,000 training images and tested once on
the 10,000 test images; the same for three untrained copies of the network, and for the raw pixels; and zero-shot
accuracy. The figures go to
`figures.json` in the model's folder and to docs/RESULTS.md. `--models`, `--test` and `--zero-shot` make it smaller.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image

from repkit.backbones.base import Backbone
from repkit.datasets import fashion_mnist
from repkit.extractors import DiffusionExtractor
from repkit.heads.ridge import fit_ridge
from repkit.heads.scores import accuracy, stratified_split, wilson_interval
from repkit.images import Resize, to_tensor
from repkit.pooling import pool
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.strategies import Uniform
from repkit.zoo import MODELS, bundled, load, random_control

ROOT = Path(__file__).parent.parent
TIMES = ("10", "25", "50", "100", "clean:100", "clean:200")  # the last two: no noise, the network told of some
POOL, BATCH, EVALUATIONS, CONTROLS = "2x2", 100, 16, 3

Tensors = Float[torch.Tensor, "n 3 H W"]
Labels = Int[np.ndarray, " n"]


def main() -> None:
    """Measure each model and write figures and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=bundled())
    parser.add_argument("--test", type=int, default=10_000, help="test images of the probe")
    parser.add_argument("--zero-shot", type=int, default=500, help="test images of the zero-shot classifier")
    parser.add_argument("--models-folder", type=Path, default=MODELS, help="where figures.json goes, a folder a model")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "RESULTS.md")
    options = parser.parse_args()
    for name in options.models:
        figures = measure(load(name), options.test, options.zero_shot)
        folder = options.models_folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    found = {path.parent.name: json.loads(path.read_text()) for path in options.models_folder.glob("*/figures.json")}
    _, mark, sections = options.results.read_text().partition("\n## ") if options.results.exists() else ("", "", "")
    options.results.write_text(_results(dict(sorted(found.items()))) + mark + sections)  # others' sections stay


def measure(backbone: Backbone, test: int, zero_shot: int) -> dict[str, Any]:
    """All figures of one model, accuracies in percent."""
    train_images, train_labels = fashion_mnist.load("train")
    test_images, test_labels = (array[:test] for array in fashion_mnist.load("test"))
    seen, held_out = tensors(train_images, backbone.size), tensors(test_images, backbone.size)
    trained = probe(backbone, seen, train_labels, held_out, test_labels)
    controls = [
        probe(random_control(backbone, seed), seen, train_labels, held_out, test_labels) for seed in range(CONTROLS)
    ]
    best_control = max(controls, key=lambda control: control["accuracy"])
    raw = probe_pixels(train_images, train_labels, test_images, test_labels)
    return {
        "probe, trained": trained,
        "probe, untrained (best of 3 seeds)": best_control,
        "probe, untrained (all seeds)": [control["accuracy"] for control in controls],
        "probe, raw pixels": raw,
        "points over untrained": round(trained["accuracy"] - best_control["accuracy"], 2),
        "points over raw pixels": round(trained["accuracy"] - raw["accuracy"], 2),
        "zero-shot": zero_shot_accuracy(backbone, held_out[:zero_shot], test_labels[:zero_shot]),
    }


def probe(
    backbone: Backbone, train: Tensors, train_labels: Labels, test: Tensors, test_labels: Labels
) -> dict[str, Any]:
    """The cell and alpha that validation images choose, and that cell's accuracy on the test images."""
    stages = [name for name in backbone.points if name == "mid" or name.count(".") == 1 and "skip" not in name]
    fit_rows, validation_rows = stratified_split(train_labels, 0.2, seed=0)
    scores: dict[str, tuple[float, float]] = {}
    for t in TIMES:
        for key, x in _pooled(backbone, [f"{','.join(stages)}@{t}"], train).items():
            held = (x[validation_rows], train_labels[validation_rows])
            chosen = fit_ridge(x[fit_rows], train_labels[fit_rows], validation=held).chosen
            scores[key] = max(chosen.scores), float(chosen.value)
        _say(f"{backbone.name} t={t}: best so far {max(scores.values())[0]:.2%} on validation")
    cell = max(scores, key=lambda key: scores[key][0])
    x = _pooled(backbone, [cell], train)[cell]
    predicted = fit_ridge(x, train_labels, alphas=[scores[cell][1]]).predict(_pooled(backbone, [cell], test)[cell])
    _say(f"{backbone.name}: {cell}, {accuracy(test_labels, predicted):.2%} on {len(test)} test images")
    return _scored(test_labels, predicted) | {"cell": cell, "alpha": scores[cell][1]}


def probe_pixels(train: np.ndarray, train_labels: Labels, test: np.ndarray, test_labels: Labels) -> dict[str, Any]:
    """The same on the pixels of the original images."""
    x, y = (images.reshape(len(images), -1).astype(np.float32) / 255 for images in (train, test))
    fit_rows, validation_rows = stratified_split(train_labels, 0.2, seed=0)
    held = (x[validation_rows], train_labels[validation_rows])
    alpha = float(fit_ridge(x[fit_rows], train_labels[fit_rows], validation=held).chosen.value)
    return _scored(test_labels, fit_ridge(x, train_labels, alphas=[alpha]).predict(y)) | {"alpha": alpha}


def zero_shot_accuracy(backbone: Backbone, images: Tensors, labels: Labels) -> dict[str, Any]:
    """Accuracy of Bayes' rule on the denoising errors, without any fitting."""
    assert backbone.class_names is not None
    classifier = DiffusionClassifier(
        backbone, range(len(backbone.class_names)), strategy=Uniform(EVALUATIONS), weighting="train"
    )
    predicted = []
    for start in range(0, len(images), BATCH):
        predicted += classifier.predict(images[start : start + BATCH])
        _say(f"{backbone.name} zero-shot: {accuracy(labels[: len(predicted)], np.array(predicted)):.2%} so far")
    return _scored(labels, np.array(predicted)) | {"evaluations a class": EVALUATIONS, "weighting": "train"}


def _pooled(backbone: Backbone, taps: Sequence[str], images: Tensors) -> dict[str, Float[np.ndarray, "n d"]]:
    extract = DiffusionExtractor(backbone, taps)
    batches = [extract(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return {key: torch.cat([pool(batch[key], POOL) for batch in batches]).numpy() for key in batches[0]}


def _scored(truth: Labels, predicted: Labels) -> dict[str, Any]:
    low, high = wilson_interval(int((truth == predicted).sum()), len(truth))
    interval = [round(100 * low, 2), round(100 * high, 2)]
    return {"accuracy": round(100 * accuracy(truth, predicted), 2), "interval 95": interval, "images": len(truth)}


def tensors(images: np.ndarray, size: int) -> Tensors:
    resize = Resize(size)
    return to_tensor(np.stack([resize(Image.fromarray(image).convert("RGB"))[0] for image in images]))


def _results(models: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "\n".join(
        f"| {name} | {_cell(one['probe, trained'])} | {_cell(one['probe, untrained (best of 3 seeds)'])} "
        f"| {_cell(one['probe, raw pixels'])} | {one['points over untrained']:+.2f}, {_over_mean(one):+.2f} "
        f"| {one['points over raw pixels']:+.2f} | {_cell(one['zero-shot'])} |"
        for name, one in models.items()
    )
    return f"""# Results

Made by `python benchmarks/models.py`; what is measured, and how, is at the top of that file. Accuracy in percent, with
the 95 % interval of the test images. The models are class-conditional, and were trained with the class of some images
withheld (`label_dropout` in their recipes). The probes' features are taken with the null class; zero-shot is with
weighting `train` and 16 evaluations a class.

| model | probe | best of {CONTROLS} untrained | raw pixels | over untrained: best, mean | over pixels | zero-shot |
|---|---|---|---|---|---|---|
{rows}
"""


def _over_mean(one: Mapping[str, Any]) -> float:
    """Points over the mean of the untrained copies."""
    untrained = one["probe, untrained (all seeds)"]
    return float(one["probe, trained"]["accuracy"] - sum(untrained) / len(untrained))


def _cell(one: Mapping[str, Any]) -> str:
    low, high = one["interval 95"]
    where = f" `{one['cell']}`" if "cell" in one else ""
    return f"{one['accuracy']:.2f}{where} ({low:.1f} to {high:.1f}, n = {one['images']:,})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
