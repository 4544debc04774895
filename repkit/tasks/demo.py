"""The tour: what the bundled models know, on the bundled images, as one page."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from PIL import Image

from repkit.backbones.base import Backbone
from repkit.datasets.fashion_mnist import CLASSES, write_folder
from repkit.exporting import export
from repkit.extractors import DiffusionExtractor
from repkit.images import Resize, decode
from repkit.listing import list_images
from repkit.progress import Progress
from repkit.retrieval import Index
from repkit.store import FeatureStore
from repkit.tasks.page import Cell, Neighbours, Table, Verdict, write_page
from repkit.tasks.probe import ProbeReport, probe_features, probe_store, read_labels, split_rows
from repkit.tasks.visualize import pca_colors
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.strategies import Uniform
from repkit.zoo import load, random_control

POOL = "2x2"
SHOWN = 100  # the time at which maps are shown


@dataclass(frozen=True)
class Tour:
    """How much is measured; as it stands, it takes two slow cores about four minutes.

    train, test: images a class. evaluations: of the denoiser, for each class of an image. fitted: labelled images that
    set the temperature of the zero-shot classifier.
    """

    train: int = 120
    test: int = 80
    times: tuple[int, ...] = (10, 50, 100, 300)
    evaluations: int = 16
    fitted: int = 40


TOUR = Tour()


@dataclass(frozen=True)
class Contest:
    """One model against its own untrained copy, on the same taps."""

    name: str
    trained: ProbeReport
    random: ProbeReport
    store: FeatureStore


def run_demo(out: str | Path, models: Sequence[str] = ("mini-unet", "mini-dit"), tour: Tour = TOUR) -> Path:
    """Write out/index.html with pictures and figures, all measured now; returns its path.

    A second run into the same folder keeps the features that are there.
    """
    started, out = monotonic(), Path(out)
    images = _write_images(out / "images", tour)
    contests = [_contest(name, images, out / "features", tour.times) for name in models]
    raw = _probe_pixels(images)
    best = contests[0]
    backbone = load(best.name)
    calibrated, verdicts = _verdicts(backbone, images, tour)
    page = write_page(
        out / "index.html",
        tables=[_table(contest, raw) for contest in contests],
        neighbours=_neighbours(best, images),
        verdicts=verdicts,
        colors=_colors(backbone, images),
        facts={
            "train": f"{len(best.trained.splits.train) + len(best.trained.splits.validation):,}",
            "test": f"{len(best.trained.splits.test):,}",
            "pooling": POOL,
            "model": best.name,
            "evaluations": str(tour.evaluations),
            "temperature": _temperature(calibrated, tour.fitted),
            "shown": str(SHOWN),
            "seconds": f"{monotonic() - started:.0f}",
            "threads": _threads(torch.get_num_threads()),
        },
    )
    _say(f"done in {monotonic() - started:.0f} s")
    return page


def _write_images(root: Path, tour: Tour) -> Path:
    _say(f"writing {(tour.train + tour.test) * len(CLASSES)} images to {root}")
    write_folder(root, "train", tour.train)
    write_folder(root, "test", tour.test)
    return root


def _contest(name: str, images: Path, out: Path, times: Sequence[int]) -> Contest:
    backbone = load(name)
    stages = [block for block in backbone.points if block == "mid" or block.count(".") == 1 and "skip" not in block]
    taps = [f"{','.join(stages)}@{','.join(map(str, times))}"]
    found: list[tuple[FeatureStore, ProbeReport]] = []
    for network, label in ((backbone, name), (random_control(backbone), f"{name}, untrained")):
        extractor = DiffusionExtractor(network, taps)
        with Progress(f"extract {label}") as progress:
            folder = out / f"{label.replace(', ', '-')}-{network.weights_hash[:8]}"  # other weights, other folder
            store = export(images, extractor, folder, pool=POOL, dtype="float16", batch_size=50, progress=progress)
        with Progress(f"probe {label}", unit="taps") as progress:
            found.append((store, probe_store(store, progress=progress)))
    (store, trained), (_, random) = found
    _say(f"{name}: {trained.test:.1%} trained, {random.test:.1%} untrained, on test images")
    return Contest(name, trained, random, store)


def _probe_pixels(images: Path) -> ProbeReport:
    """The same probe on the pixels themselves."""
    listing = list_images(images)
    pixels = [np.asarray(decode(path).convert("L"), np.float32).ravel() / 255 for path in listing["path"].to_pylist()]
    classes, labels = read_labels(listing["label"].to_pylist())
    splits = split_rows(labels, listing["split"].to_pylist())
    return probe_features({"raw pixels": np.stack(pixels)}, labels, classes, splits)


def _table(contest: Contest, raw: ProbeReport) -> Table:
    keys = [key.split("@") for key in contest.trained.validation]
    blocks, times = list(dict.fromkeys(block for block, _ in keys)), list(dict.fromkeys(int(t) for _, t in keys))
    cells = {
        (block, t): Cell(
            contest.trained.validation[f"{block}@{t}"],
            contest.random.validation[f"{block}@{t}"],
            chosen=f"{block}@{t}" == contest.trained.key,
        )
        for block in blocks
        for t in times
    }
    return Table(
        model=contest.name,
        blocks=blocks,
        times=times,
        cells=cells,
        key=contest.trained.key,
        trained=contest.trained.test,
        interval=contest.trained.interval,
        random=contest.random.test,
        random_key=contest.random.key,
        pixels=raw.test,
    )


def _neighbours(contest: Contest, images: Path, queries: int = 8, k: int = 7) -> list[Neighbours]:
    """Test images with the training images nearest to them, under cosine at the chosen tap."""
    store, key = contest.store, contest.trained.key
    table = store.table.to_pylist()
    train = [row for row in table if row["split"] == "train"]
    index = Index.build(
        store.array(key, split="train"), ids=[row["id"] for row in train], labels=[row["label"] for row in train]
    )
    test = [row for row in table if row["split"] == "test"]
    chosen = _spread(len(test), queries)
    hits = index.search(store.array(key, split="test")[chosen], k)
    labels = {row["id"]: row["label"] for row in train}
    return [
        Neighbours(
            decode(images / test[row]["id"]),
            test[row]["label"],
            [(decode(images / name), labels[name], float(score)) for name, score in zip(ids, scores, strict=True)],
        )
        for row, ids, scores in zip(chosen, hits.ids, hits.scores, strict=True)
    ]


def _verdicts(backbone: Backbone, images: Path, tour: Tour, queries: int = 10) -> tuple[bool, list[Verdict]]:
    """What the denoiser itself says of test images, without any probe, and whether its temperature was fitted."""
    assert backbone.class_names is not None
    classifier = DiffusionClassifier(backbone, backbone.class_names, strategy=Uniform(tour.evaluations))
    # The temperature belongs to other images than the ones shown: without it the posterior is far too sure.
    train, test = _paths(images, "train"), _paths(images, "test")
    fitted = [train[row] for row in _spread(len(train), tour.fitted)]
    chosen = [test[row] for row in _spread(len(test), queries)]
    with Progress("zero-shot", unit="stages") as progress:
        progress(0, 2)
        try:
            classifier = classifier.fit(fitted, [path.parent.name for path in fitted])
        except ValueError as error:  # so few images may all be right, or all wrong
            _say(f"no temperature: {error}")
        progress(1, 2)
        posterior = classifier.classify(chosen)
        progress(2, 2)
    return posterior.calibrated, [
        Verdict(decode(path), path.parent.name, row)
        for path, row in zip(chosen, posterior.top(len(CLASSES)), strict=True)
    ]


def _temperature(calibrated: bool, fitted: int) -> str:
    if calibrated:
        return f"One number, the temperature, was fitted on {fitted} other labelled images."
    return "No temperature was fitted, so the shares are far too sure; only their order counts."


def _colors(backbone: Backbone, images: Path, count: int = 10) -> list[tuple[str, list[Image.Image]]]:
    """Rows of pictures: the images, then the PCA of each block's map at one time."""
    test = _paths(images, "test")
    paths = [test[row] for row in _spread(len(test), count)]
    extractor = DiffusionExtractor(backbone, [f"down.*,mid,up.*@{SHOWN}"])
    features = extractor(paths)
    shown = [("image", [Image.fromarray(Resize(backbone.size)(decode(path))[0]) for path in paths])]
    return shown + [(key, [Image.fromarray(one) for one in pca_colors(features[key])]) for key in features]


def _paths(images: Path, split: str) -> list[Path]:
    return [Path(row["path"]) for row in list_images(images).to_pylist() if row["split"] == split]


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` row numbers spread evenly, which in a sorted list is over all classes."""
    wanted = min(wanted, count)
    return [int((index + 0.5) * count / wanted) for index in range(wanted)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
