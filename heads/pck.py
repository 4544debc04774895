"""PCK: the share of matched keypoints within a fraction of an object's size, as each published evaluation counts it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Number = int | float
Average = Literal["image", "point", "category", "pairs"]


@dataclass(frozen=True)
class Protocol:
    """How an evaluation counts and what it averages.

    inclusive: an error equal to the threshold is correct (<=), else not (<). averages: those it reports, the first
    first: "image", the mean over pairs; "point", over all points; "category", the mean of the categories' shares of
    points; "pairs", the same, weighted by each category's number of pairs.
    side: the longer side, in pixels, to which it scales images and, without regard to pixel centres, true points; None:
    it counts in the original image. shift: pixels, in that frame, from the centre of a cell to what it takes for it.
    """

    inclusive: bool
    averages: tuple[Average, ...]
    side: int | None = None
    shift: float = 0.0


PROTOCOLS = {
    "dift": Protocol(True, ("image", "point")),
    "sd-dino": Protocol(False, ("pairs", "category"), side=840),
    "geoaware": Protocol(False, ("image", "point"), side=840, shift=0.5),
    "spair": Protocol(True, ("image",)),
}


@dataclass(frozen=True, eq=False)
class Pck:
    """Shares of correct points, one number for each of `alphas` everywhere.

    averages: by name, all four whatever the protocol reports. categories: "image" and "point" of each. correct: for
    each pair, in the order given, which points are [n a].
    """

    alphas: tuple[float, ...]
    averages: dict[Average, Float[np.ndarray, " a"]]
    categories: dict[str, dict[Average, Float[np.ndarray, " a"]]]
    correct: list[Bool[np.ndarray, "_n a"]]


def box_length(box: Sequence[Number]) -> float:
    """The longer side of a box (left, top, right, bottom): what alpha is a fraction of; ValueError for an empty box."""
    left, top, right, bottom = box
    length = float(max(right - left, bottom - top))
    if not length > 0:
        raise ValueError(f"box ({left:g}, {top:g}, {right:g}, {bottom:g}); give left < right and top < bottom")
    return length


def pck(
    predicted: Sequence[np.ndarray],
    true: Sequence[np.ndarray],
    lengths: Sequence[Number],
    *,
    protocol: str | Protocol,
    alphas: Sequence[Number] = (0.1, 0.05, 0.01),
    sizes: Sequence[tuple[int, int]] | None = None,
    categories: Sequence[str] | None = None,
) -> Pck:
    """PCK of pairs of images, each with its points [n 2] (x, y), predicted and true, in pixels of the original target.

    Integer coordinates are pixel centres. lengths: of each pair, what alpha is a fraction of, in the same pixels: the
    longer side of the object's box (`box_length`), or of the image. sizes: (width, height) of each target, needed by
    protocols that scale it. categories: a name for each pair; without them all are one.
    Raises ValueError, naming the pair, for points that do not fit, no points, and a length that is not above 0.
    """
    rules = _rules(protocol)
    names = ["all"] * len(true) if categories is None else list(categories)
    counts = {len(predicted), len(true), len(lengths), len(names), len(true if sizes is None else sizes)}
    if counts == {0} or len(counts) > 1:
        raise ValueError(f"lists of {sorted(counts)} pairs; give at least one pair, and as many of each")
    if rules.side is not None and sizes is None:
        raise ValueError(f"a protocol in a frame of {rules.side} pixels needs the images' sizes; give (width, height)")
    fractions = np.asarray(alphas, dtype=np.float64)
    correct = []
    for i, (found, truth, length) in enumerate(zip(predicted, true, lengths, strict=True)):
        scale = 1.0 if rules.side is None or sizes is None else rules.side / max(sizes[i])
        # Of one quotient: 7 of 70 pixels is the very number 0.1, but 0.1 * 70 is more than 7.
        error = (_errors(i, found, truth, length, scale, rules) / (scale * length))[:, None]
        correct.append(error <= fractions if rules.inclusive else error < fractions)
    return Pck(tuple(map(float, alphas)), _averages(correct, names), _categories(correct, names), correct)


def _rules(protocol: str | Protocol) -> Protocol:
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"no PCK protocol {protocol!r}; have {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def _errors(
    pair: int, predicted: np.ndarray, true: np.ndarray, length: Number, scale: float, rules: Protocol
) -> Float[np.ndarray, " n"]:
    """Distances in the protocol's frame."""
    found, truth = predicted.astype(np.float64), true.astype(np.float64)
    if found.shape != truth.shape or truth.ndim != 2 or truth.shape[1] != 2 or not len(truth):
        raise ValueError(f"pair {pair}: points {found.shape} predicted, {truth.shape} true; give [n 2] for both")
    if not np.isfinite(truth).all() or not np.isfinite(found).all() or not 0 < length < np.inf:
        raise ValueError(f"pair {pair}: length {length:g} or points that are not finite; give finite ones above 0")
    # The centre of pixel x is at (x + 0.5) scale - 0.5 in the frame; these evaluations put the true point at x scale.
    offset = 0.0 if rules.side is None else 0.5 * scale - 0.5 + rules.shift
    return np.linalg.norm((found - truth) * scale + offset, axis=1)


def _averages(correct: list[Bool[np.ndarray, "_n a"]], names: list[str]) -> dict[Average, Float[np.ndarray, " a"]]:
    per_category = _categories(correct, names)
    points = np.stack([values["point"] for values in per_category.values()])
    pairs = [names.count(name) for name in per_category]
    whole = _shares(correct)
    return {**whole, "category": points.mean(0), "pairs": np.average(points, axis=0, weights=pairs)}


def _categories(
    correct: list[Bool[np.ndarray, "_n a"]], names: list[str]
) -> dict[str, dict[Average, Float[np.ndarray, " a"]]]:
    return {
        name: _shares([hits for hits, own in zip(correct, names, strict=True) if own == name])
        for name in sorted(set(names))
    }


def _shares(correct: list[Bool[np.ndarray, "_n a"]]) -> dict[Average, Float[np.ndarray, " a"]]:
    return {"image": np.mean([hits.mean(0) for hits in correct], axis=0), "point": np.concatenate(correct).mean(0)}
