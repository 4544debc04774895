"""From a store's manifest back to the extractor that made it."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline

from repkit import zoo
from repkit.extractors import DiffusionExtractor
from repkit.tasks.building import rebuild_extractor
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dit"
    DiTPipeline(tiny.dit_model(), tiny.vae_model(), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("loaded", "built"),
    [
        ({}, {"draws": 2, "seed": 3, "noise": "shared", "cond": 1}),
        ({"vae_dtype": torch.bfloat16}, {}),
        ({"dtype": torch.bfloat16, "vae_dtype": torch.float32}, {}),
        ({"channels_last": True}, {"discard": {"block.1.in.adaln": [2, 5]}}),
    ],
)
def test_what_a_manifest_holds_gives_the_same_features(folder, loaded, built):
    extract = DiffusionExtractor(zoo.load(folder, **loaded), ["block.1.in.adaln@100", "block.0@clean"], **built)
    # A manifest is JSON, which has no tuples and no dtypes.
    identity, provenance = (json.loads(json.dumps(one)) for one in (extract.identity, extract.provenance))
    again = rebuild_extractor(identity, provenance)
    images = tiny.images(2, 8, 8)
    first, second = extract(images), again(images)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_sampled_latent_is_remembered(folder):
    extract = DiffusionExtractor(zoo.load(folder, latent="sample"), "block.0@clean")
    again = rebuild_extractor(extract.identity, extract.provenance)
    assert again.identity["latent"] == "sample"
