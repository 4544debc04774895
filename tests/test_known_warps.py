"""Photographs under known deformations: what features find again is scored against maps that nobody typed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage
import timm
import torch
import torch.nn.functional as F

from repkit.datasets.pairs import read_pairs
from repkit.datasets.warps import write_warps
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor
from repkit.fusion import Fused, Part
from repkit.heads.pck import pck
from repkit.images import Resize
from repkit.matching.featuremap import FeatureMap
from repkit.matching.nearest import nearest
from repkit.zoo import load
from tests import tiny

PHOTOGRAPHS = [Path(skimage.__file__).parent / "data" / name for name in ("astronaut.png", "chelsea.png")]
ALPHAS = (0.1, 0.05, 0.02)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return read_pairs(write_warps(PHOTOGRAPHS, tmp_path_factory.mktemp("warps"), size=96, points=8))


@pytest.fixture(scope="module")
def extractors():
    unet = load("mini-unet")
    # Cells of two pixels: beyond the outermost centres features are constant, and every pixel there is as good.
    vit = tiny.randomise(
        timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=2, embed_dim=24, depth=4, num_heads=3)
    )
    squash = {"resize": Resize(64, "squash")}
    diffusion, dino = DiffusionExtractor(unet, "up.1@50", **squash), DinoExtractor(vit, "block.3", **squash)
    return {
        "mini-unet": diffusion,
        "mini-unet, trained size": DiffusionExtractor(unet, "up.1@50", resize=Resize(32, "squash")),
        "mini-dit": DiffusionExtractor(load("mini-dit"), "block.3@100", resize=Resize(32, "squash")),
        "vit": dino,
        "fused": Fused([Part(diffusion), Part(dino)]),
    }


def found(extractor, pairs, exact=True):
    """Where each pair's points are, with maps over the whole images."""
    points = []
    for pair in pairs:
        features = extractor([pair.source, pair.target])
        maps = features[next(iter(features))]
        one, other = (FeatureMap(maps[i], size[::-1]) for i, size in enumerate((pair.source_size, pair.target_size)))
        points.append(nearest(one, other, torch.from_numpy(pair.source_points).float(), exact=exact).points.numpy())
    return points


def score(pairs, points):
    return pck(
        points, [one.target_points for one in pairs], [max(one.target_size) for one in pairs],
        protocol="dift", alphas=ALPHAS, categories=[one.category for one in pairs],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mini-unet", "mini-unet, trained size", "mini-dit", "vit", "fused"])
def test_the_identity_is_found_without_an_error(name, pairs, extractors):
    same = [pair for pair in pairs if pair.category == "identity"]
    scores = score(same, found(extractors[name], same))
    assert scores.averages["point"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["homography", "thin-plate", "crop"])
def test_a_deformation_is_found_far_more_often_than_by_chance(kind, pairs, extractors):
    bent = [pair for pair in pairs if pair.category == kind]
    chance = np.pi * 0.1**2 * max(bent[0].target_size) / min(bent[0].target_size)
    assert score(bent, found(extractors["mini-unet"], bent)).averages["image"][0] > 8 * chance


def test_sampled_descriptors_have_the_pck_of_maps_upsampled_to_the_images(pairs, extractors):
    """As evaluations are commonly written: both maps at full size, descriptors read off at whole pixels."""
    expected = []
    for pair in pairs:
        features = extractors["mini-unet"]([pair.source, pair.target])["up.1@50"]
        full = [
            F.interpolate(features[i][None], size[::-1], mode="bilinear", align_corners=False)[0]
            for i, size in enumerate((pair.source_size, pair.target_size))
        ]
        x, y = pair.source_points.round().astype(int).T
        queries, keys = F.normalize(full[0][:, y, x].T), F.normalize(full[1].flatten(1), dim=0)
        best = (queries @ keys).argmax(1).numpy()
        expected.append(np.stack([best % pair.target_size[0], best // pair.target_size[0]], 1).astype(np.float64))
    whole = [replace(pair, source_points=pair.source_points.round()) for pair in pairs]  # where a map has values
    np.testing.assert_array_equal(
        score(pairs, found(extractors["mini-unet"], whole)).averages["image"], score(pairs, expected).averages["image"]
    )
