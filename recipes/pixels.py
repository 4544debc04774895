"""Pixels: an ensemble of pixel classifiers learned from a few masks, as label-efficient segmentation is published.

Once trained, it is kept: a run that is killed while it scores goes on from there, one killed before starts over.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save

from repkit.heads.miou import MeanIou, count_pixels, mean_iou
from repkit.heads.pixel_bank import PixelBank
from repkit.heads.pixel_training import PixelRule, drop_small, train_pixels
from repkit.heads.pixels import PixelEnsemble
from repkit.heads.places import pixel_places
from repkit.progress import Progress
from repkit.publishing import made, publish
from repkit.recipes.image_data import ImageData
from repkit.recipes.reading import call
from repkit.shards import locked
from repkit.tasks.resuming import claim

HEAD = "head.safetensors"


def pixels(
    data: ImageData,
    networks: int = 10,
    rule: PixelRule = PixelRule(),  # noqa: B008 - frozen
    small: int = 20,
    seed: int = 0,
    device: str = "cpu",
    out: str = "fitted",
    recipe: Literal["pixels"] = "pixels",
) -> dict[str, Any]:
    """Train on the pixels of the training split's masks, and score the test split.

    Args:
        data: images with masks, and the taps whose maps make a pixel's vector; its batch and epochs are of no meaning
        networks: in the ensemble, whose majority decides
        rule: the optimizer's steps, and when a network stops
        small: a class with fewer pixels in a training image is not learned from it
        seed: of the first weights, and of the order of the pixels
        device: cpu, cuda, cuda:1 or mps
        out: folder for results.json and head.safetensors
        recipe: what this is
    """
    data.open(device)
    folder, channels = Path(out), [shape[0] for shape in data.extractor.shapes.values()]
    ensemble = PixelEnsemble(channels, len(data.classes), networks=networks, seed=seed).to(device)
    with made(folder), locked(folder):
        own = {"networks": networks, "rule": asdict(rule), "small": small, "seed": seed}
        claim(folder, {"recipe": recipe, **own, "data": data.settings}, "pixel classifiers")
        if not (folder / HEAD).exists():
            steps = _train(ensemble, data, rule, small, seed, device)
            publish(folder, {HEAD: _weights(ensemble, steps)})
        learned = load_file(folder / HEAD)
        steps = learned.pop("steps").tolist()
        ensemble.load_state_dict(learned)
        found = {"steps": steps, **_scores(ensemble, data)}
        publish(folder, {"results.json": (json.dumps(found, indent=1) + "\n").encode()})
    return found


def _train(ensemble: PixelEnsemble, data: ImageData, rule: PixelRule, small: int, seed: int, device: str) -> list[int]:
    """Train on the training split; how many steps each network took."""
    count = data.count("train")
    bank, masks = PixelBank(count, list(data.extractor.shapes.values()), device=device), []
    for row in range(count):
        batch = data.features("train", [row])
        bank.fill(row, [one[0] for one in batch["features"].values()])
        masks.append(drop_small(batch["mask"], small))
    with Progress("train", unit="steps") as progress:
        return train_pixels(ensemble, bank, torch.cat(masks), rule, seed=seed, progress=progress)


def _scores(ensemble: PixelEnsemble, data: ImageData) -> dict[str, Any]:
    """mIoU of the test split, as it is counted everywhere else and as the published code counts it."""
    k = len(data.classes)
    total, uncertain = np.zeros((k + 1, k), np.int64), []
    places = rearrange(pixel_places(*data.extractor.resize.shape), "H W xy -> (H W) xy")
    for row in range(data.count("test")):
        batch = data.features("test", [row])
        maps, truth = [one[0] for one in batch["features"].values()], batch["mask"][0]
        labels, nats = ensemble.predict(maps, places.to(maps[0]))
        total += count_pixels(labels.cpu().view(truth.shape).numpy(), truth.numpy(), k)
        uncertain.append(float(nats.sort().values[-max(1, len(nats) // 10) :].mean()))
    ours, theirs = mean_iou(total), mean_iou(total, compat=True)
    return {**_named(ours, data), "mIoU_compat": theirs.mean, "uncertainty": float(np.mean(uncertain))}


def _named(scores: MeanIou, data: ImageData) -> dict[str, Any]:
    return scores.to_json(data.classes)


def _weights(ensemble: PixelEnsemble, steps: list[int]) -> bytes:
    weights = {name: value.cpu().contiguous() for name, value in ensemble.state_dict().items()}
    return save({**weights, "steps": torch.tensor(steps)})


def fit_pixels(args: Sequence[str]) -> str:
    """`repkit fit` of a recipe of pixels; what to print."""
    found = call(pixels, args)
    return f"mIoU {found['mIoU']:.2%} (counted as published {found['mIoU_compat']:.2%}), steps {found['steps']}"
