"""From a store's manifest back to the extractor that made it."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline

from repkit import zoo
from repkit.bases import fit_bases
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor
from repkit.fusion import Fused, Part
from repkit.images import Resize
from repkit.mirrored import Mirrored
from repkit.tasks.building import build_extractor, read_config, rebuild_extractor
from tests import tiny, tiny_vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dit"
    DiTPipeline(tiny.dit_model(), tiny.vae_model(), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny_vit.save_vit(tmp_path_factory.mktemp("models") / "vit")


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


def test_a_fusion_is_made_again_from_its_parts(folder, vit):
    backbone, square = zoo.load(folder), Resize(8, "squash")
    shared = DiffusionExtractor(backbone, ["block.0@10", "block.1@100"], resize=square)
    alone = DiffusionExtractor(backbone, "block.1@clean", resize=square, seed=3)
    dino = DinoExtractor(str(vit), "block.0,norm", resize=Resize(16, "squash"))
    inner = Fused([Part(alone, 0.5), Part(dino, 1, ["norm"])])
    parts = [Part(shared, 2, ["block.1@100"]), Part(shared, 1, None, [1, 0.25]), Part(inner), Part(Mirrored(alone))]
    fused = Fused(parts, grid=(3, 5))
    identity, provenance = (json.loads(json.dumps(one)) for one in (fused.identity, fused.provenance))
    again = rebuild_extractor(identity, provenance)
    assert isinstance(again, Fused)
    images = tiny.images(2, 16, 16)
    assert torch.equal(again(images)["fused"], fused(images)["fused"])
    assert again.parts[0].extractor is again.parts[1].extractor  # loaded and run once


def test_a_fusion_is_told_what_its_images_were_told(folder):
    fused = Fused([Part(DiffusionExtractor(zoo.load(folder), "block.1@100"))])
    told = fused(tiny.images(1, 8, 8), 2)
    again = rebuild_extractor({**fused.identity, "cond": 2}, fused.provenance)
    found = again(tiny.images(1, 8, 8))
    assert torch.equal(found["fused"], told["fused"]) and found.identity == told.identity
    assert not torch.equal(found["fused"], fused(tiny.images(1, 8, 8))["fused"])
    with pytest.raises(ValueError, match="each image was told its own form of 'a {label}'"):
        rebuild_extractor({**fused.identity, "cond": "a {label}"}, fused.provenance)


def test_weights_of_a_fusion_that_moved_are_found_by_kind(folder, vit, tmp_path):
    fused = Fused(
        [
            Part(DiffusionExtractor(zoo.load(folder), "block.1@100", resize=Resize(8, "squash"))),
            Part(DinoExtractor(str(vit), resize=Resize(16, "squash"))),
        ]
    )
    diffusion, dino = fused.provenance["parts"]
    lost = {"model": str(tmp_path / "nowhere")}
    for parts, model in (([lost, dino], folder), ([diffusion, lost], f"timm:{vit}")):
        again = rebuild_extractor(fused.identity, {"parts": parts}, model=str(model))
        assert again.identity == fused.identity
    with pytest.raises(ValueError, match="say which it is with -m MODEL"):
        rebuild_extractor(fused.identity, {}, model=str(folder))


def test_a_fusion_with_components_cannot_be_made_again(folder):
    extract = DiffusionExtractor(zoo.load(folder), "block.1@100")
    fused = Fused([Part(extract, bases=fit_bases(extract, tiny.images(2, 8, 8), 3))])
    with pytest.raises(ValueError, match="principal components, which are not in the store; .* with the same Fused"):
        rebuild_extractor(fused.identity, fused.provenance)


def test_a_size_is_chosen_once_the_model_is_known(folder, vit):
    """The tiny DiT takes images of 8 pixels alone, the vision transformer multiples of 4."""
    seen = []

    def choose(sides):
        seen.append((sides.own, sides.step))
        return Resize(sides.nearest(30), "squash")

    assert build_extractor(str(folder), ["block.0@10"], resize=choose).resize == Resize(8, "squash")
    dino = build_extractor(f"timm:{vit}", ["norm"], resize=choose)
    assert dino.resize == Resize(32, "squash") and dino.shapes["norm"] == (12, 8, 8)  # 30 / 4 = 7.5 is rounded to even
    assert dino.provenance == {"model": f"timm:{vit}"} and seen == [(8, None), (16, 4)]


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
