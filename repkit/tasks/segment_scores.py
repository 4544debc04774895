"""Segmentation scored against true masks, and the report of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repkit.heads.matching_labels import matched_iou
from repkit.heads.miou import Counts, count_pixels, mean_iou
from repkit.heads.votes import most_uncertain
from repkit.publishing import publish
from repkit.tasks.mask_files import Labels
from repkit.tasks.segment import Segmented
from repkit.tasks.segment_source import Source
from repkit.tasks.segment_truth import Truth

RESULTS = "results.json"


def report(
    source: Source,
    found: Segmented,
    settings: dict[str, Any],
    classes: Sequence[str],
    truth: Truth | None = None,
) -> dict[str, Any]:
    """What a run found, as JSON-ready data; the scores are over the images that have a true mask and did not train.

    Scores of named classes are over the pixels of all images: plain, and as ddpm-segmentation counts them. Clusters
    have two as well: matched to the classes in each image anew, and once for all.
    """
    masks, ids = found.masks, source.ids
    told: dict[str, Any] = {"head": settings["head"], "settings": settings, "classes": list(classes)}
    told |= {"images": len(masks.ids), "failed": dict(masks.failures)}
    told |= {"trained on": [ids[row] for row in found.trained]}
    if "steps" in found.learned:
        told["steps"] = found.learned["steps"].tolist()
    uncertain = {
        name: most_uncertain(torch.from_numpy(values.ravel()))
        for name in masks.ids
        if (values := found.uncertainty(name)) is not None
    }
    if uncertain:
        told["uncertainty"] = {"mean": float(np.mean(list(uncertain.values()))), "images": uncertain}
    if truth is not None:
        told |= _scored(source, found, classes, truth)
    return told


def write_report(out: Path, told: dict[str, Any]) -> None:
    """Put results.json in place."""
    publish(out, {RESULTS: (json.dumps(told, indent=1) + "\n").encode()})


def _scored(source: Source, found: Segmented, classes: Sequence[str], truth: Truth) -> dict[str, Any]:
    ids, masks = source.ids, found.masks
    rows = [row for row in truth.rows if row not in found.trained and ids[row] in masks.ids]
    if not rows:
        raise ValueError(f"{truth.folder} has no mask of an image that was not trained on; give some to score")
    named, counts = bool(found.trained), []
    if named and masks.labels.values != truth.labels.values:
        raise ValueError(f"the true masks have labels {truth.labels.values}, the found ones {masks.labels.values}")
    for row in rows:
        mask = masks[ids[row]]
        true = truth.read(ids[row], (mask.shape[1], mask.shape[0]))
        counts.append(count_pixels(mask, true, len(classes), None if named else int(mask.max()) + 1))
    return {"scored": len(rows), "scores": _scores(counts, classes, named)}


def _scores(counts: Sequence[Counts], classes: Sequence[str], named: bool) -> dict[str, Any]:
    if not named:
        return {name: score.to_json(classes) for name, score in matched_iou(counts).items()}
    whole = np.asarray(sum(counts))
    scores = {"data set": mean_iou(whole), "data set, as ddpm-segmentation": mean_iou(whole, compat=True)}
    return {name: score.to_json(classes) for name, score in scores.items()}


def class_names(labels: Labels, given: Sequence[str] | None) -> list[str]:
    """The classes' names in the order of the labels; ValueError where another number is given."""
    names = [labels.name(number) for number in range(len(labels))]
    if given is None:
        return names
    if len(given) != len(names):
        raise ValueError(f"{len(given)} classes for {len(names)} labels, {', '.join(names)}; give a name for each")
    return list(given)
