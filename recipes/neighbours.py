"""Neighbours: kNN classification on frozen features, for several k; nothing is trained.

Vectors are kept in files of many images, so that a killed run goes on after the last whole one.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int64

from repkit.heads.knn import fit_knn
from repkit.heads.scores import accuracy
from repkit.pooling import pool as pooled
from repkit.progress import Progress
from repkit.publishing import made, publish
from repkit.recipes.image_data import ImageData
from repkit.recipes.reading import call
from repkit.shards import locked
from repkit.tasks.resuming import claim

Part = tuple[Float32[np.ndarray, "_n d"], Int64[np.ndarray, " _n"]]
BATCHES = 32  # whose vectors are a file


def neighbours(
    data: ImageData,
    pool: str = "mean",
    ks: list[int] = [10, 20, 100, 200],  # noqa: B006 - read only
    temperature: float = 0.07,
    device: str = "cpu",
    out: str = "fitted",
    recipe: Literal["knn"] = "knn",
) -> dict[str, Any]:
    """Classify the images of the validation split by their neighbours in the training split.

    Args:
        data: the images and the one tap that is compared, by cosine; its epochs are of no meaning here
        pool: how maps become vectors: mean, max, gem or NxN
        ks: how many neighbours vote, each scored
        temperature: a vote weighs exp(similarity / temperature)
        device: cpu, cuda, cuda:1 or mps
        out: folder for results.json and the vectors, which other ks and temperatures use again
        recipe: what this is
    """
    folder = Path(out)
    data.open(device)
    if len(data.sizes) != 1:
        raise ValueError(f"neighbours are found at one tap; got {', '.join(data.sizes)}")
    with made(folder), locked(folder):
        claim(folder, {"recipe": recipe, "pool": pool, "data": data.settings}, "neighbours")
        return _found(data, pool, ks, temperature, folder)


def _found(data: ImageData, pool: str, ks: Sequence[int], temperature: float, folder: Path) -> dict[str, Any]:
    bank, queries = (_vectors(data, part, pool, folder) for part in ("train", "validation"))
    scores = {k: _score(bank, queries, k, temperature, len(data.classes)) for k in ks}
    found = {"accuracy": scores, "images": {"train": len(bank[1]), "validation": len(queries[1])}}
    publish(folder, {"results.json": (json.dumps(found, indent=1) + "\n").encode()})
    return found


def _vectors(data: ImageData, part: str, pool: str, folder: Path) -> Part:
    """Pooled features and labels of all images of a part, read from the files that are there."""
    parts, n, size = list[Part](), data.count(part), BATCHES * data.batch
    with Progress(part) as progress:
        progress(0, n)
        for start in range(0, n, size):
            path = folder / f"{part}-{start // size:05d}.npz"
            if not path.exists():
                rows, labels = _computed(data, part, pool, range(start, min(start + size, n)), progress)
                publish(folder, {path.name: partial(np.savez, rows=rows, labels=labels)})
            with np.load(path) as kept:
                parts.append((kept["rows"], kept["labels"]))
    return _joined(parts)


def _computed(data: ImageData, part: str, pool: str, numbers: range, progress: Progress) -> Part:
    found = []
    for start in range(0, len(numbers), data.batch):
        batch = data.features(part, numbers[start : start + data.batch])
        (maps,) = batch["features"].values()
        found.append((pooled(maps, pool).cpu().numpy(), batch["label"].numpy()))
        progress(min(numbers[start] + data.batch, numbers.stop), data.count(part))
    return _joined(found)


def _joined(parts: Sequence[Part]) -> Part:
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([labels for _, labels in parts])


def _score(bank: Part, queries: Part, k: int, temperature: float, n_classes: int) -> float:
    probe = fit_knn(*bank, ks=[k], temperature=temperature, validation=queries, n_classes=n_classes)
    return accuracy(queries[1], probe.predict(queries[0]))


def fit_neighbours(args: Sequence[str]) -> str:
    """`repkit fit` of a recipe of knn; what to print."""
    found = call(neighbours, args)
    return "\n".join(f"k = {k:<5} {value:7.2%}" for k, value in found["accuracy"].items())
