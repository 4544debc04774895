"""Recursive normalised cut: the cells of one image split in two as long as the cut is cheap.

The segmentation of DiffCut (Couairon et al. 2024) on Shi and Malik's normalised cut: affinity is the cosine of two
cells' features, scaled to 0 ... 1 and to the power alpha.
"""

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from repkit.images import Number

SMALL = 64  # nodes up to which all eigenvectors are quicker than the second one alone
Affinity = Float[np.ndarray, "n n"]
Nodes = Int[np.ndarray, " m"]


def ncut_segments(
    features: Float[Tensor, "c h w"],
    *,
    tau: Number = 0.5,
    alpha: Number = 10,
    thresholds: int = 100,
    most: int = 255,
    cells: int = 1024,
) -> Int[np.ndarray, "_h _w"]:
    """The segment of each cell, 0 the largest: parts are split until the best split's cost, in 0 ... 2, is `tau`.

    most: segments, after which nothing is split any more. cells: a finer map is averaged to at most so many first.
    Raises ValueError for settings that make no sense.
    """
    if not (0 < tau and 0 < alpha and thresholds >= 1 and most >= 1 and cells >= 1):
        raise ValueError(f"tau={tau}, alpha={alpha}, thresholds={thresholds}, most={most}, cells={cells}; all are > 0")
    coarse = _at_most(features, cells)
    weights = affinity(coarse, alpha)
    left: list[Nodes] = [np.arange(len(weights))]
    parts: list[Nodes] = []
    while left:
        nodes = left.pop()
        side = None if len(left) + len(parts) + 2 > most else split(weights[np.ix_(nodes, nodes)], tau, thresholds)
        if side is None:
            parts.append(nodes)
        else:
            left += [nodes[side], nodes[~side]]
    segments = np.empty(len(weights), np.int64)
    for number, nodes in enumerate(sorted(parts, key=lambda part: (-len(part), part[0]))):
        segments[nodes] = number
    return segments.reshape(coarse.shape[1:])


def affinity(features: Float[Tensor, "c h w"], alpha: Number) -> Affinity:
    """((cos - min) / (max - min)) ** alpha between all cells, in float64; ones where all are alike."""
    units = F.normalize(rearrange(features, "c h w -> (h w) c").double().cpu(), dim=1).numpy()
    cosine = units @ units.T
    low, high = cosine.min(), cosine.max()
    return ((cosine - low) / (high - low)) ** alpha if high > low else np.ones_like(cosine)


def split(weights: Affinity, tau: Number, thresholds: int = 100) -> Bool[np.ndarray, " n"] | None:
    """The cheapest of the splits of the second eigenvector at evenly spaced thresholds; None where it costs tau."""
    if len(weights) < 2:
        return None
    vector = second_eigenvector(weights)
    sides = vector[:, None] > 0.99 * np.linspace(vector.min(), vector.max(), thresholds)
    costs = cut_costs(weights, sides)
    best = int(costs.argmin())
    return sides[:, best] if costs[best] < tau else None


def second_eigenvector(weights: Affinity) -> Float[np.ndarray, " n"]:
    """The second smallest solution of (D - W) y = lambda D y, with its largest entry positive."""
    scale = 1 / np.sqrt(weights.sum(1).clip(1e-12))
    # The second smallest of I - M is the second largest of M.
    scaled = weights * scale[:, None] * scale
    vector = scale * (_dense(scaled) if len(scaled) <= SMALL else _sparse(scaled))
    return vector * np.sign(vector[np.abs(vector).argmax()])


def cut_costs(weights: Affinity, sides: Bool[np.ndarray, "n t"]) -> Float[np.ndarray, " t"]:
    """The normalised cut of each split (Shi and Malik 2000): cut / volume of one side + cut / volume of the other.

    Infinite for a split with an empty side.
    """
    inside = sides.astype(weights.dtype)
    degrees = weights.sum(1)
    volume = degrees @ inside
    cut = volume - (inside * (weights @ inside)).sum(0)
    rest = degrees.sum() - volume
    with np.errstate(divide="ignore", invalid="ignore"):
        costs = cut / volume + cut / rest
    return np.where((volume > 0) & ~sides.all(0), costs, np.inf)


def _dense(scaled: Affinity) -> Float[np.ndarray, " n"]:
    return np.linalg.eigh(scaled)[1][:, -2]


def _sparse(scaled: Affinity) -> Float[np.ndarray, " n"]:
    # A start of its own, or ARPACK would draw another each time.
    start = np.random.default_rng(0).standard_normal(len(scaled))
    try:
        values, vectors = eigsh(scaled, k=2, which="LA", v0=start)
    except ArpackNoConvergence:
        return _dense(scaled)
    return vectors[:, values.argmin()]


def _at_most(features: Float[Tensor, "c h w"], cells: int) -> Float[Tensor, "c _h _w"]:
    height, width = features.shape[1:]
    if height * width <= cells:
        return features
    ratio = (cells / (height * width)) ** 0.5
    grid = max(1, int(height * ratio)), max(1, int(width * ratio))
    return F.adaptive_avg_pool2d(features.float(), grid)
