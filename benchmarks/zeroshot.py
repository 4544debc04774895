"""What the zero-shot classifier is worth and what it costs: `python benchmarks/zeroshot.py`.

For each bundled model: the denoising errors of 600 Fashion-MNIST test images, all 10 classes at 64 evaluations each,
and of 300 other test images, from row 5,000 on, which only fit weights, temperatures and class biases. The tables of
errors are kept in `--tables`, a few images a file, so that a killed run goes on (an hour for mini-unet on one slow
core, half of that for mini-dit); strategies, weightings and calibration are replayed from them. Then the first 1,000
test images are classified as users would, by racing. Beside all that stand the linear probe of benchmarks/models.py and
a plain CNN of about the same size, trained with labels on the full training set. Writes docs/zeroshot.png and a section
of docs/RESULTS.md, and each model's zeroshot.json.
"""

import argparse
import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from plain_cnn import predict, train
from zeroshot_page import Curve, Report, write_page, write_picture

from repkit.datasets import fashion_mnist
from repkit.heads.calibration import expected_calibration_error
from repkit.heads.scores import accuracy
from repkit.images import Resize, to_tensor
from repkit.progress import Progress
from repkit.zeroshot.calibration import fit_rule
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.errortable import ErrorTable, join, replay
from repkit.zeroshot.learning import learn
from repkit.zeroshot.posterior import Posterior, Rule
from repkit.zeroshot.racing import Racing
from repkit.zeroshot.rules import make_rule
from repkit.zeroshot.staged import PUBLISHED, Staged
from repkit.zeroshot.strategies import Uniform, visit_order
from repkit.zeroshot.weighttable import WeightTable, whiten
from repkit.zoo import MODELS, bundled, load

ROOT = Path(__file__).parent.parent
BUDGET, CHUNK, HELD_OUT = 64, 50, 5000  # evaluations a class; images a file; first row of the images that fit
NAMED = ("train", "elbo", "min-snr", "sigmoid")
DELTA, DELTAS = 0.01, (0.2, 0.1, 0.05, 0.01, 0.001)

Labels = Int[np.ndarray, " b"]


def main() -> None:
    """Make what tables are missing, replay everything, write figures, picture and weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=bundled())
    parser.add_argument("--test", type=int, default=1000, help="test images that are classified, the first ones")
    parser.add_argument("--full", type=int, default=600, help="of these, images with errors of everything")
    parser.add_argument("--fitted", type=int, default=300, help="images that fit weights and temperatures")
    parser.add_argument("--tables", type=Path, default=ROOT / "zeroshot-tables")
    parser.add_argument("--training", type=Path, default=Path(fashion_mnist.DEBIAN), help="the full Fashion-MNIST")
    parser.add_argument("--models-folder", type=Path, default=MODELS, help="where zeroshot.json goes, a folder a model")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "RESULTS.md")
    options = parser.parse_args()
    images, labels = fashion_mnist.load("test")
    rows, curves = [], {}
    for name in options.models:
        fitted = tables(name, images, range(HELD_OUT, HELD_OUT + options.fitted), options.tables / name)
        judged = tables(name, images, range(options.full), options.tables / name)
        report, found = judge(judged, labels_of(judged, labels), fitted, labels_of(fitted, labels))
        raced = tables(name, images, range(options.full, options.test), options.tables / name, report["table"])
        report |= classified(join([report.pop("raced"), raced]), report["table"], report.pop("biased"), labels)
        curves[name] = found
        _as_loaded(report.pop("table"), name).save(options.models_folder / name / "zeroshot.json")
        rows.append(Report(name, probe=_probe_accuracy(options.models_folder / name), **report))
    supervised = cnn_accuracy(options.training, images[: options.test], labels[: options.test], options.tables)
    write_picture(curves, options.page.parent / "zeroshot.png")
    write_page(options.page, rows, curves, supervised, options.full, options.test)


def tables(
    name: str, images: UInt8[np.ndarray, "n 28 28"], rows: range, folder: Path, weights: WeightTable | None = None
) -> ErrorTable:
    """The errors of some of the images, CHUNK a file; files that are there are read. With weights: by racing."""
    if weights is not None:
        folder = folder / f"racing-{sha256(repr(weights.weights).encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    classifier = None
    parts = []
    with Progress(f"errors of {name}") as progress:
        for first in range(rows.start, rows.stop, CHUNK):
            path, last = folder / f"{first:05d}.parquet", min(first + CHUNK, rows.stop)
            if not path.exists():
                classifier = classifier or _classifier(name, weights)
                ids = [f"test/{row:05d}" for row in range(first, last)]
                made = classifier.measure(_tensors(images[first:last], classifier.resize), ids=ids)
                made.write(path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
            parts.append(ErrorTable.read(path))
            progress(last - rows.start, len(rows))
    return join(parts)


def _classifier(name: str, weights: WeightTable | None) -> DiffusionClassifier:
    """In bfloat16, which is twice as fast here, with errors summed in float64."""
    backbone = load(name, dtype=torch.bfloat16)
    assert backbone.class_names is not None
    strategy = Uniform(BUDGET) if weights is None else Racing(DELTA, BUDGET)
    return DiffusionClassifier(
        backbone, backbone.class_names, strategy=strategy, weighting=weights or "train", batch_size=160
    )


def _as_loaded(weights: WeightTable, name: str) -> WeightTable:
    """With the hash of the model as it is loaded by default, in float32, so that another one is told apart."""
    return replace(weights, weights_hash=load(name).weights_hash, dtype="float32")


def _tensors(images: UInt8[np.ndarray, "b 28 28"], resize: Resize) -> torch.Tensor:
    return to_tensor(np.stack([resize(Image.fromarray(image).convert("RGB"))[0] for image in images]))


def labels_of(table: ErrorTable, labels: Labels) -> Labels:
    """Class numbers of the images of a table."""
    return labels[[int(name.rpartition("/")[2]) for name in table.ids]].astype(np.int64)


def judge(
    table: ErrorTable, labels: Labels, fitted: ErrorTable, fitted_labels: Labels
) -> tuple[dict[str, Any], list[Curve]]:
    """The figures that complete errors give, with the learned weights (`table`) and the table of a race (`raced`)."""
    white, learned = whiten(fitted, fitted_labels), learn(fitted, fitted_labels)
    rules = {name: _rule(table, name) for name in NAMED}
    rules |= {one.name: _rule(table, one) for one in (white, learned)}
    curves = [_uniform(table, labels, rule, weighting) for weighting, rule in rules.items()]
    for weighting in ("train", "whitened", "learned"):
        curves += [make(table, labels, rules[weighting], weighting) for make in (_racing, _staged)]
    rule = rules["learned"]
    temperature, bias = fit_rule(rule, fitted, torch.from_numpy(fitted_labels), bias=True)
    biased = replace(rule, temperature=temperature, bias=bias)
    full = rule.posterior(table)
    plain = replace(rule, temperature=1.0, calibrated=False).posterior(table)
    raced = replay(table, Racing(DELTA, BUDGET), rule.weights)
    answers = rule.posterior(raced)
    differ = (answers.log_posterior.argmax(1) != full.log_posterior.argmax(1)).numpy()
    learned = replace(learned, made_from=f"{learned.made_from}; test images from row {HELD_OUT:,} on")
    return {
        "table": learned,
        "raced": raced,
        "biased": biased,
        "full": _accuracy(full, labels),
        "full_biased": _accuracy(biased.posterior(table), labels),
        "replayed": _accuracy(answers, labels),
        "used": float(raced.evaluations.mean()) / (BUDGET * len(table.classes)),
        "decided": float(raced.decided.mean()),
        "differ": float(differ[raced.decided].mean()),
        "ece_before": expected_calibration_error(plain.probabilities.numpy(), labels),
        "ece_after": expected_calibration_error(full.probabilities.numpy(), labels),
    }, curves


def classified(table: ErrorTable, weights: WeightTable, biased: Rule, labels: Labels) -> dict[str, float]:
    """Accuracy and calibration of the race over all test images."""
    posterior, truth = _rule(table, weights).posterior(table), labels_of(table, labels)
    return {
        "accuracy": _accuracy(posterior, truth),
        "biased": _accuracy(biased.posterior(table), truth),
        "ece": expected_calibration_error(posterior.probabilities.numpy(), truth),
        "evaluations": float(table.evaluations.mean()),
    }


def _rule(table: ErrorTable, weighting: str | WeightTable) -> Rule:
    return make_rule(table.levels, table.classes, table.info, weighting=weighting)


def _uniform(table: ErrorTable, labels: Labels, rule: Rule, weighting: str) -> Curve:
    """Every class at 4 to 64 evaluations, spread over the strata."""
    points = []
    for count in (4, 8, 16, 32, BUDGET):
        kept = np.full_like(table.errors, np.nan)
        chosen = visit_order(BUDGET)[:count]
        kept[:, :, chosen] = table.errors[:, :, chosen]
        points.append(_point(replace(table, errors=kept), labels, rule))
    return Curve("uniform", weighting, points)


def _racing(table: ErrorTable, labels: Labels, rule: Rule, weighting: str) -> Curve:
    raced = [replay(table, Racing(delta, BUDGET), rule.weights) for delta in DELTAS]
    return Curve("racing", weighting, [_point(one, labels, rule) for one in raced])


def _staged(table: ErrorTable, labels: Labels, rule: Rule, weighting: str) -> Curve:
    """The schedule published for CIFAR-10, which has ten classes as well, scaled from 500 evaluations to the budget."""
    keep, samples = PUBLISHED["cifar10"].keep, PUBLISHED["cifar10"].samples
    scaled = [round(count * BUDGET / samples[-1]) for count in samples]
    found = replay(table, Staged(keep, scaled), rule.weights)
    return Curve("staged", weighting, [_point(found, labels, rule)])


def _point(table: ErrorTable, labels: Labels, rule: Rule) -> tuple[float, float]:
    """(evaluations an image, accuracy)."""
    return float(table.evaluations.mean()), _accuracy(rule.posterior(table), labels)


def _accuracy(posterior: Posterior, labels: Labels) -> float:
    return accuracy(labels, posterior.log_posterior.argmax(1).numpy())


def cnn_accuracy(
    training: Path, images: UInt8[np.ndarray, "n 28 28"], labels: Labels, folder: Path
) -> dict[str, float]:
    """Accuracy of the plain CNN on the same images, and its size; kept in the folder."""
    kept = folder / f"plain-cnn-{len(images)}.json"
    if not kept.exists():
        network = train(*fashion_mnist.load_full(training, "train"))
        found = {
            "accuracy": accuracy(labels, predict(network, images)),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
        }
        kept.write_text(json.dumps(found) + "\n")
    return json.loads(kept.read_text())


def _probe_accuracy(folder: Path) -> float:
    """That of benchmarks/models.py, on all 10,000 test images."""
    return json.loads((folder / "figures.json").read_text())["probe, trained"]["accuracy"] / 100


if __name__ == "__main__":
    main()
