"""The tour: what the bundled models know, on the bundled images, as one page."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

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
from repkit.zeroshot import DiffusionClassifier
from repkit.zoo import load, random_control

TRAIN, TEST = 150, 100  # images a class
TIMES = (10, 50, 100, 200, 400)
POOL = "2x2"
EVALUATIONS = 32


@dataclass(frozen=True)
class Contest:
    """One model against its own untrained copy, on the same taps."""

    name: str
    trained: ProbeReport
    random: ProbeReport
    store: FeatureStore


def run_demo(out: str | Path, models: Sequence[str] = ("mini-unet", "mini-dit")) -> Path:
    """Write out/index.html with pictures and figures, all measured now; returns its path.

    A second run into the same folder keeps the features that are there and takes seconds.
    """
    started, out = monotonic(), Path(out)
    images = _write_images(out / "images")
    contests = [_contest(name, images, out / "features") for name in models]
    raw = _probe_pixels(images)
    best = contests[0]
    backbone = load(best.name)
    page = write_page(
        out / "index.html",
        tables=[_table(contest, raw) for contest in contests],
        neighbours=_neighbours(best, images),
        verdicts=_verdicts(backbone, images),
        colors=_colors(backbone, images),
        facts={
            "images": f"{TRAIN * len(CLASSES)} to train the probes, {TEST * len(CLASSES)} to test them",
            "pooling": POOL,
            "seconds": f"{monotonic() - started:.0f}",
            "threads": str(torch.get_num_threads()),
        },
    )
    _say(f"done in {monotonic() - started:.0f} s")
    return page


def _write_images(root: Path) -> Path:
    _say(f"writing {(TRAIN + TEST) * len(CLASSES)} images to {root}")
    write_folder(root, "train", TRAIN)
    write_folder(root, "test", TEST)
    return root


def _contest(name: str, images: Path, out: Path) -> Contest:
    backbone = load(name)
    stages = [block for block in backbone.points if block == "mid" or block.count(".") == 1 and "skip" not in block]
    taps = [f"{','.join(stages)}@{','.join(map(str, TIMES))}"]
    found: list[tuple[FeatureStore, ProbeReport]] = []
    for network, label in ((backbone, name), (random_control(backbone), f"{name}, untrained")):
        extractor = DiffusionExtractor(network, taps)
        with Progress(f"extract {label}") as progress:
            folder = out / label.replace(", ", "-")
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
    blocks = list(dict.fromkeys(key.partition("@")[0] for key in contest.trained.validation))
    cells = {
        (block, t): Cell(
            contest.trained.validation[f"{block}@{t}"],
            contest.random.validation[f"{block}@{t}"],
            chosen=f"{block}@{t}" == contest.trained.key,
        )
        for block in blocks
        for t in TIMES
    }
    return Table(
        model=contest.name,
        blocks=blocks,
        times=TIMES,
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
            Image.open(images / test[row]["id"]),
            test[row]["label"],
            [(Image.open(images / name), labels[name], float(score)) for name, score in zip(ids, scores, strict=True)],
        )
        for row, ids, scores in zip(chosen, hits.ids, hits.scores, strict=True)
    ]


def _verdicts(backbone: Backbone, images: Path, queries: int = 10) -> list[Verdict]:
    """What the denoiser itself says of test images, without any probe."""
    assert backbone.class_names is not None
    paths = [images / row["id"] for row in _test_rows(images)]
    chosen = [paths[row] for row in _spread(len(paths), queries)]
    classifier = DiffusionClassifier(backbone, backbone.class_names, evaluations=EVALUATIONS)
    # The temperature belongs to other images than the ones shown: without it the posterior is far too sure.
    fitted = [path for path in _train_paths(images) if path.stem.endswith("7")][:40]
    with Progress("zero-shot", unit="steps") as progress:
        classifier = classifier.fit(fitted, [path.parent.name for path in fitted])
        progress(1, 2)
        posterior = classifier.classify(chosen)
        progress(2, 2)
    return [
        Verdict(Image.open(path), path.parent.name, row)
        for path, row in zip(chosen, posterior.top(len(CLASSES)), strict=True)
    ]


def _colors(backbone: Backbone, images: Path, count: int = 10) -> list[tuple[str, list[Image.Image]]]:
    """Rows of pictures: the images, then the PCA of each block's map at one time."""
    rows = _test_rows(images)
    paths = [images / rows[index]["id"] for index in _spread(len(rows), count)]
    extractor = DiffusionExtractor(backbone, ["down.*,mid,up.*@100"])
    features = extractor(paths)
    shown = [("image", [Image.fromarray(Resize(backbone.size)(decode(path))[0]) for path in paths])]
    return shown + [(key, [Image.fromarray(one) for one in pca_colors(features[key])]) for key in features]


def _test_rows(images: Path) -> list[dict[str, Any]]:
    return [row for row in list_images(images).to_pylist() if row["split"] == "test"]


def _train_paths(images: Path) -> list[Path]:
    return [images / row["id"] for row in list_images(images).to_pylist() if row["split"] == "train"]


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` row numbers spread evenly, which in a sorted list is over all classes."""
    return [int((index + 0.5) * count / wanted) for index in range(wanted)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
