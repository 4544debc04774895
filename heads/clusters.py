"""Clusters of cells: k-means over a data set, mean features of segments, and which of them a pixel is nearest to."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor

from repkit.heads.places import Levels, sample

ROWS = 50_000  # cells that are clustered at most
CHUNK = 16_384  # pixels at a time


@dataclass(frozen=True, eq=False)
class Centres:
    """The centres of clusters as the scores of each: weight @ x + bias is largest for the nearest centre."""

    weight: Float[Tensor, "s c"]
    bias: Float[Tensor, " s"]


def fit_kmeans(cells: Float[Tensor, "n c"], clusters: int, *, seed: int = 0, most: int = ROWS) -> Centres:
    """k-means on channels that are scaled to zero mean and unit variance, the largest cluster first.

    At most `most` of the cells, drawn by `seed`, are clustered. Raises ValueError for more clusters than cells.
    """
    if not 1 <= clusters <= len(cells):
        raise ValueError(f"{clusters} clusters of {len(cells)} cells; give 1 ... {len(cells)}")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(cells))[:most])
    rows = cells[torch.from_numpy(chosen).to(cells.device)].cpu().double()
    mean, scale = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * mean.abs(), scale, torch.inf)  # a constant channel tells nothing
    fitted = KMeans(clusters, n_init=4, random_state=seed).fit(((rows - mean) / scale).numpy())
    order = np.argsort(-np.bincount(fitted.labels_, minlength=clusters), kind="stable")
    centres = torch.from_numpy(fitted.cluster_centers_[order])
    # The squared distance to a centre is a constant less 2 c.x - c.c, which is linear in x.
    weight = 2 * centres / scale
    return Centres(weight.float(), (-centres.square().sum(1) - weight @ mean).float())


def nearest_cluster(levels: Levels, centres: Centres, places: Float[Tensor, "p 2"]) -> Int[Tensor, " p"]:
    """The nearest centre at each place of one image, of all its maps interpolated and side by side."""
    parts = centres.weight.split([one.shape[1] for one in levels.values()], 1)
    scores = [
        einsum(one.float(), part.to(one.device), "b c h w, s c -> b s h w")
        for one, part in zip(levels.values(), parts, strict=True)
    ]
    bias = centres.bias.to(scores[0])
    # A linear function of interpolated maps is the interpolation of the function, which has fewer channels.
    return torch.cat([(bias + sum(sample(one, some)[0] for one in scores)).argmax(1) for some in places.split(CHUNK)])


def mean_features(features: Float[Tensor, "c h w"], segments: Int[np.ndarray, "_h _w"]) -> Float[Tensor, "s c"]:
    """The mean unit vector of each segment's cells, itself of length 1; segments may lie on a coarser grid."""
    grid = F.adaptive_avg_pool2d(F.normalize(features.float(), dim=0), segments.shape)
    shares = F.one_hot(torch.from_numpy(segments).to(features.device)).float()
    return F.normalize(torch.einsum("c h w, h w s -> s c", grid, shares), dim=1)


def nearest_centre(
    features: Float[Tensor, "c h w"], centres: Float[Tensor, "s c"], places: Float[Tensor, "p 2"]
) -> Int[Tensor, " p"]:
    """The centre with the highest cosine at each place, where unit vectors are interpolated."""
    units = F.normalize(features.float(), dim=0)
    # The products commute with the interpolation, and are fewer than the channels.
    scores = rearrange(centres.to(units) @ rearrange(units, "c h w -> c (h w)"), "s (h w) -> 1 s h w", h=units.shape[1])
    return torch.cat([sample(scores, some)[0].argmax(1) for some in places.split(CHUNK)])
