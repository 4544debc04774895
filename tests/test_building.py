"""From a store's manifest back to the extractor that made it."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline

from repkit import zoo
from repkit.extractors import DiffusionExtractor
from repkit.fusion import Fused, Part
from repkit.tasks.building import read_config, rebuild_extractor
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


def test_a_fusion_is_made_again_by_hand(folder):
    backbone = zoo.load(folder)
    fused = Fused([Part(DiffusionExtractor(backbone, tap)) for tap in ("block.0@10", "block.1@100")])
    for model in (None, str(folder)):
        with pytest.raises(ValueError, match="these features are fused of 2 extractors, .* with the same Fused"):
            rebuild_extractor(fused.identity, fused.provenance, model=model)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("False", False),
        ("false", False),
        ("True", True),
        ("None", None),
        ("null", None),
        ("linear", "linear"),
        ("8", 8),
        ("0.5", 0.5),
        ('["a", "b=c"]', ["a", "b=c"]),
        ("a=b", "a=b"),
    ],
)
def test_values_of_a_config_are_read_as_json_or_python(text, value):
    found = read_config([f"key={text}"])["key"]
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("pairs", "message"), [(["heads"], "'heads' is no KEY=VALUE"), (["a=1", "b=2", "a=1"], "--config a is given twice")]
)
def test_a_config_that_cannot_be_read_is_told(pairs, message):
    with pytest.raises(ValueError, match=message):
        read_config(pairs)
