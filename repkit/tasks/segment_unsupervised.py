"""Segmentation without masks: normalised cuts, clusters, and merged self-attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from repkit.heads.attention_merging import aggregate_attention, merge_attention
from repkit.heads.clusters import ROWS, Centres, fit_kmeans, mean_features, nearest_centre, nearest_cluster
from repkit.heads.miou import IGNORE
from repkit.heads.ncut import ncut_segments
from repkit.heads.places import by_stride, enlarged, joined
from repkit.images import Number
from repkit.matching.propagation import likeliest
from repkit.tasks.segment_method import Learned, Masks, Method, Tell, batch, device_of
from repkit.tasks.segment_source import Maps, Source


@dataclass
class Ncut(Method):
    """Normalised cuts of each image on its own; see `ncut_segments`."""

    tau: Number = 0.5
    alpha: Number = 10
    cells: int = 1024
    name: ClassVar[str] = "ncut"

    def segment(self, source: Source, maps: Maps, places: Float[Tensor, "H W 2"]) -> Int[Tensor, "H W"]:
        features = _features(source, maps)
        segments = ncut_segments(features, tau=self.tau, alpha=self.alpha, cells=self.cells)
        centres, flat = mean_features(features, segments), places.flatten(0, 1).to(features.device)
        found = nearest_centre(features, centres, flat)
        return found.view(places.shape[:2])


@dataclass
class Kmeans(Method):
    """Clusters of the cells of all images, whose numbers mean the same in all; see `fit_kmeans`."""

    clusters: int
    seed: int = 0
    name: ClassVar[str] = "kmeans"

    def learn(self, source: Source, rows: Sequence[int], masks: Masks, classes: int, tell: Tell) -> Learned:
        cells, rng = [], np.random.default_rng(self.seed)
        for done, row in enumerate(rows):
            tell(done, len(rows))
            try:
                features = enlarged(by_stride(batch(source.maps(row)[0]), source.strides))[0].flatten(1).T
            except (OSError, ValueError, FloatingPointError):
                continue  # what is wrong is told when the image is segmented
            chosen = np.sort(rng.permutation(len(features))[: max(1, ROWS // len(rows))])
            cells.append(features[torch.from_numpy(chosen).to(features.device)].cpu())
        tell(len(rows), len(rows))
        if not cells:
            raise ValueError(f"none of the {len(rows)} images can be read; give at least one that can")
        found = fit_kmeans(torch.cat(cells), self.clusters, seed=self.seed)
        return {"weight": found.weight, "bias": found.bias}

    def ready(self, source: Source, learned: Learned, classes: int) -> None:
        self.centres = Centres(learned["weight"], learned["bias"])

    def segment(self, source: Source, maps: Maps, places: Float[Tensor, "H W 2"]) -> Int[Tensor, "H W"]:
        levels = by_stride(batch(maps), source.strides)
        return nearest_cluster(levels, self.centres, places.flatten(0, 1).to(device_of(maps))).view(places.shape[:2])


@dataclass
class Attention(Method):
    """Merged self-attention of each image on its own; see `merge_attention`."""

    threshold: Number = 0.9
    side: int = 64
    name: ClassVar[str] = "attention"

    def check(self, source: Source) -> None:
        for key, (c, h, w) in source.shapes.items():
            if c != h * w:
                raise ValueError(
                    f"{key} has maps of shape {(c, h, w)}; attention merges self-attention [h*w h w], taps such as "
                    "'up.*.attn.*.self.map@50'"
                )

    def segment(self, source: Source, maps: Maps, places: Float[Tensor, "H W 2"]) -> Int[Tensor, "H W"]:
        merged = merge_attention(aggregate_attention(list(maps.values()), self.side), threshold=self.threshold)
        return likeliest(merged[:IGNORE], places.to(merged))  # masks hold no more labels


METHODS: dict[str, type[Method]] = {one.name: one for one in (Ncut, Kmeans, Attention)}


def _features(source: Source, maps: Maps) -> Float[Tensor, "c h w"]:
    return joined(by_stride(batch(maps), source.strides))[0]
