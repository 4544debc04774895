"""Neighbours: kNN classification on frozen features, for several k; nothing is trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int64

from repkit.heads.knn import fit_knn
from repkit.heads.scores import accuracy
from repkit.pooling import pool as pooled
from repkit.progress import Progress
from repkit.recipes.image_data import ImageData
from repkit.recipes.reading import call
from repkit.shards import publish

Part = tuple[Float32[np.ndarray, "_n d"], Int64[np.ndarray, " _n"]]


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
        out: folder for results.json
        recipe: what this is
    """
    data.open(device)
    if len(data.sizes) != 1:
        raise ValueError(f"neighbours are found at one tap; got {', '.join(data.sizes)}")
    bank, queries = (_vectors(data, part, pool) for part in ("train", "validation"))
    scores = {k: _score(bank, queries, k, temperature, len(data.classes)) for k in ks}
    found = {"accuracy": scores, "images": {"train": len(bank[1]), "validation": len(queries[1])}}
    Path(out).mkdir(parents=True, exist_ok=True)
    publish(Path(out), {"results.json": (json.dumps(found, indent=1) + "\n").encode()})
    return found


def _vectors(data: ImageData, part: str, pool: str) -> Part:
    """Pooled features and labels of all images of a part."""
    rows, labels, n = [], [], data.count(part)
    with Progress(part) as progress:
        for start in range(0, n, data.batch):
            batch = data.features(part, range(start, min(start + data.batch, n)))
            (maps,) = batch["features"].values()
            rows.append(pooled(maps, pool).cpu().numpy())
            labels.append(batch["label"].numpy())
            progress(min(start + data.batch, n), n)
    return np.concatenate(rows), np.concatenate(labels)


def _score(bank: Part, queries: Part, k: int, temperature: float, n_classes: int) -> float:
    probe = fit_knn(*bank, ks=[k], temperature=temperature, validation=queries, n_classes=n_classes)
    return accuracy(queries[1], probe.predict(queries[0]))


def fit_neighbours(args: Sequence[str]) -> str:
    """`repkit fit` of a recipe of knn; what to print."""
    found = call(neighbours, args)
    return "\n".join(f"k = {k:<5} {value:7.2%}" for k, value in found["accuracy"].items())
