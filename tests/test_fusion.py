"""Fused against its parts run alone and fused by hand, and through everything that takes an extractor."""

import json
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import repkit
from repkit.bases import Basis, fit_bases, load_bases, save_bases
from repkit.dino import DinoExtractor
from repkit.exporting import export
from repkit.extractors import DiffusionExtractor
from repkit.features import identity_hash
from repkit.fusion import Fused, Part
from repkit.heads.transformer import Transformer
from repkit.images import Resize, decode, to_tensor
from repkit.retrieval import Index
from repkit.store import FeatureStore
from tests import tiny
from tests.export_cases import write_image, write_images

TAPS = ["mid@50", "up.0@100"]  # 8x8 and 16x16 cells of a 16-pixel image


def vit(side=16, patch=4):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=side, patch_size=patch, embed_dim=12, depth=2, num_heads=3, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    return tiny.randomise(model)


@pytest.fixture(scope="module")
def diffusion():
    return DiffusionExtractor(tiny.unet(), TAPS)


@pytest.fixture(scope="module")
def dino():
    return DinoExtractor(vit(), "norm,block.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 5)


def by_hand(maps, weights, size):
    """One part's vectors, unit norm: numpy on torch's own resampling of each map."""
    grown = [
        weight * F.interpolate(one, size, mode="bilinear", align_corners=False).numpy()
        for weight, one in zip(weights, maps, strict=True)
    ]
    joined = np.concatenate(grown, 1)
    return joined / np.linalg.norm(joined, axis=1, keepdims=True)


def gram(vectors):
    """Cosines of all pixels of all images with each other."""
    rows = np.moveaxis(np.asarray(vectors, np.float64), 1, -1).reshape(-1, vectors.shape[1])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_the_fused_map_is_what_the_words_say(diffusion, dino):
    fused = Fused([Part(diffusion, 0.5, key_weights=[2, 3]), Part(dino, 1.5, keys=["norm"])])
    images = tiny.images()
    alone, other = diffusion(images), dino(images)
    assert {one.shape[-1] for one in alone.values()} == {8, 16}
    expected = [0.5 * by_hand(list(alone.values()), [2, 3], (16, 16)), 1.5 * by_hand([other["norm"]], [1], (16, 16))]
    found = fused(images)
    assert list(found) == ["fused"] and found.size == (16, 16) and found.mask is None
    np.testing.assert_allclose(found["fused"], np.concatenate(expected, 1), atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (0.3, 2), (1, 0)])
def test_the_cosine_is_the_mean_of_cosines_with_squared_weights(diffusion, dino, first, second):
    images = tiny.images()
    fused = Fused([Part(diffusion, first), Part(dino, second)])(images)["fused"]
    cosines = [gram(by_hand(list(one(images).values()), [1, 1], (16, 16))) for one in (diffusion, dino)]
    expected = (first**2 * cosines[0] + second**2 * cosines[1]) / (first**2 + second**2)
    assert abs(gram(fused) - expected).max() < 1e-6
    assert torch.allclose(fused.norm(dim=1), torch.tensor(sqrt(first**2 + second**2)))


def test_nearest_by_distance_is_nearest_by_cosine(diffusion, dino):
    one, two = Fused([Part(diffusion), Part(dino, 2)])(tiny.images(2))["fused"].flatten(2).mT
    assert torch.equal(torch.cdist(one, two).argmin(1), (one @ two.T).argmax(1))


@pytest.mark.parametrize(("grid", "size"), [("finest", (16, 16)), ((4, 4), (4, 4)), ((5, 7), (5, 7))])
def test_declared_shapes_are_the_real_ones(diffusion, dino, grid, size):
    fused = Fused([Part(diffusion), Part(dino)], grid=grid)
    channels = sum(block.channels for part in (diffusion, dino) for block in part.blocks.values())
    assert fused.shapes == {"fused": (channels, *size)}
    assert fused.blocks == {"fused": repkit.Block(channels, 16 // size[0])}
    assert fused(tiny.images())["fused"].shape == (3, channels, *size)


def test_an_image_is_the_same_in_every_batch(diffusion, dino):
    fused, images = Fused([Part(diffusion), Part(dino)]), tiny.images(3)
    together = fused(images)["fused"]
    alone = torch.cat([fused(image[None])["fused"] for image in images.flip(0)]).flip(0)
    assert (together - alone).abs().max() <= 1e-5 * together.abs().max()


def test_an_extractor_of_two_parts_runs_once(diffusion, dino, monkeypatch):
    calls: list[int] = []
    encode = diffusion.backbone.encode

    def counted(images):
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(diffusion.backbone, "encode", counted)
    parts = [Part(diffusion, keys=TAPS[:1]), Part(diffusion, 2, keys=TAPS[1:]), Part(dino)]
    fused = Fused(parts)(tiny.images())["fused"]
    assert calls == [3]
    separate = torch.cat([Fused([part], grid=(16, 16))(tiny.images())["fused"] for part in parts], 1)
    assert torch.equal(fused, separate)


# --- sizes


def test_a_part_of_another_size_sees_the_same_picture(diffusion, folder):
    dino = DinoExtractor(vit(), "norm", resize=Resize(12))
    fused = Fused([Part(diffusion), Part(dino)])
    assert fused.resize == diffusion.resize
    path = folder / "000.png"
    once = Image.fromarray(fused.resize(decode(path))[0])
    expected = [diffusion([path]), dino(to_tensor(np.array(once.resize((12, 12), Image.Resampling.BICUBIC)))[None])]
    parts = [by_hand(list(one.values()), [1] * len(one), (16, 16)) for one in expected]
    np.testing.assert_allclose(fused([path])["fused"], np.concatenate(parts, 1), atol=1e-6)


def test_files_pixels_and_exports_agree(diffusion, folder, tmp_path):
    fused = Fused([Part(diffusion), Part(DinoExtractor(vit(), "norm", resize=Resize(12)))])
    path = folder / "000.png"
    pixels = to_tensor(fused.resize(decode(path))[0])[None]
    assert torch.equal(fused([path])["fused"], fused(pixels)["fused"])
    store = export([path], fused, tmp_path / "store", pool="none")
    np.testing.assert_array_equal(store.array("fused")[0], fused([path])["fused"][0])


def test_tensors_of_twice_the_size_are_so_for_every_part(diffusion):
    fused = Fused([Part(diffusion), Part(DinoExtractor(vit(), "norm", resize=Resize(12)))])
    found = fused(tiny.images(1, 32, 32))
    assert found["fused"].shape[-2:] == (32, 32) and found.size == (32, 32)
    assert found.identity["resize"] == {"size": [32, 32], "policy": "as given"}
    with pytest.raises(ValueError, match="multiples of its patch of 4x4, not 15x15"):
        fused(tiny.images(1, 20, 20))


@pytest.mark.parametrize("size", [16, 12])
def test_gradients_reach_the_images(size, diffusion):
    images = tiny.images(1)
    fused = Fused([Part(diffusion, 0), Part(DinoExtractor(vit(), "norm", resize=Resize(size)))])
    plain = fused(images)["fused"]
    assert not plain.requires_grad
    features = fused(images.requires_grad_(), grad=True)["fused"]
    torch.testing.assert_close(features.detach(), plain, atol=1e-5, rtol=0)
    features[0, -3:].sum().backward()
    assert images.grad is not None and float(images.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Resize(16), Resize(16, "pad")),
        (Resize(16), Resize(16, "squash")),
        (Resize(16), Resize((16, 32))),
        (Resize((16, 32), "pad"), Resize(16, "pad")),
    ],
)
def test_parts_that_see_different_regions_are_refused(one, two):
    unet, model = tiny.unet(), vit()
    parts = [Part(DiffusionExtractor(unet, "mid@50", resize=one)), Part(DinoExtractor(model, resize=two))]
    with pytest.raises(ValueError, match="would see different regions; give both extractors the same policy"):
        Fused(parts)


def test_a_padded_image_keeps_its_mask(folder):
    fused = Fused([Part(DinoExtractor(vit(), resize=Resize(side, "pad"))) for side in (16, 12)])
    found = fused([folder / "000.png"])  # 20 high, 16 wide
    assert found.mask is not None and found.mask.shape == (1, 16, 16)
    assert int(found.mask.sum()) == 16 * 13


def test_squashed_parts_may_have_any_proportions(folder):
    parts = [Part(DinoExtractor(vit(), resize=Resize(size, "squash"))) for size in (16, (8, 24))]
    assert Fused(parts)([folder / "000.png"])["fused"].shape == (1, 24, 4, 6)


# --- identity


def changes(diffusion, dino):
    one, two = Part(diffusion, keys=TAPS), Part(dino, keys=["norm"])
    bases = fit_bases(dino, tiny.images(), 4, keys=["norm"])
    negated = {"norm": Basis(bases["norm"].mean, -bases["norm"].components)}
    return {
        "as it is": Fused([one, two]),
        "weight": Fused([one, replace(two, weight=2.0)]),
        "keys": Fused([replace(one, keys=TAPS[:1]), two]),
        "order": Fused([replace(one, keys=TAPS[::-1]), two]),
        "key weights": Fused([replace(one, key_weights=[1, 2]), two]),
        "grid": Fused([one, two], grid=(8, 8)),
        "parts": Fused([two, one]),
        "weights": Fused([Part(DiffusionExtractor(tiny.unet(seed=1), TAPS)), two]),
        "seed": Fused([Part(DiffusionExtractor(diffusion.backbone, TAPS, seed=1)), two]),
        "basis": Fused([one, replace(two, bases=bases)]),
        "other basis": Fused([one, replace(two, bases=negated)]),
    }


def test_whatever_changes_the_values_changes_the_identity(diffusion, dino):
    hashes = {
        name: identity_hash(json.loads(json.dumps(one.identity))) for name, one in changes(diffusion, dino).items()
    }
    assert len(set(hashes.values())) == len(hashes)


def test_what_is_written_out_and_what_is_understood_have_one_identity(diffusion, dino):
    brief = Fused([Part(diffusion), Part(dino)])
    long = Fused([Part(diffusion, 1, TAPS, [1, 1]), Part(dino, 1.0, list(dino.blocks), (1.0, 1.0))], grid="finest")
    assert json.dumps(brief.identity) == json.dumps(long.identity)
    assert brief(tiny.images()).identity == brief.identity


def test_fresh_noise_cannot_be_stored(dino, folder, tmp_path):
    fresh = DiffusionExtractor(tiny.unet(), "mid@50", noise="fresh")
    with pytest.raises(ValueError, match="noise='fresh' is different each time"):
        export(folder, Fused([Part(dino), Part(Fused([Part(fresh)]))]), tmp_path / "store")


# --- conditions


def test_a_condition_reaches_those_that_take_one(dino):
    named = DiffusionExtractor(tiny.grey_unet(), "mid@50")
    fused, images = Fused([Part(named), Part(dino)]), tiny.images()
    told = fused(images, ["cat", "dog", "cat"])
    expected = by_hand(list(named(images, ["cat", "dog", "cat"]).values()), [1], (8, 8))
    np.testing.assert_allclose(told["fused"][:, : expected.shape[1]], expected, atol=1e-6)
    assert told.identity == {**fused.identity, "cond": ["cat", "dog", "cat"]}
    assert not torch.equal(told["fused"], fused(images)["fused"])


def test_without_a_part_that_takes_one_a_condition_is_refused(dino):
    with pytest.raises(ValueError, match="no part takes a condition; leave cond out instead of giving 'cat'"):
        Fused([Part(dino), Part(Fused([Part(dino)]))])(tiny.images(), "cat")


def test_an_export_with_labels_is_searched_by_the_same_condition(dino, folder, tmp_path):
    fused = Fused([Part(DiffusionExtractor(tiny.grey_unet(), "mid@50")), Part(dino)])
    index = Index.build(export(folder, fused, tmp_path / "store", cond="dog"))
    assert index.search(fused([folder / "003.png"], "dog"), 1).ids == [["003.png"]]
    with pytest.raises(ValueError, match="another extractor.*cond: dog here, cat there"):
        index.search(fused([folder / "003.png"], "cat"))


# --- where extractors are taken


def test_store_index_and_search(diffusion, dino, folder, tmp_path):
    fused = Fused([Part(diffusion), Part(dino, 2)])
    store = export(folder, fused, tmp_path / "store", batch_size=2)
    assert list(store.keys) == ["fused"] and len(FeatureStore(tmp_path / "store")) == 5
    index = Index.build(store)
    hits = index.search(fused(sorted(folder.iterdir())), 1)
    assert hits.ids == [[path.name] for path in sorted(folder.iterdir())]
    with pytest.raises(ValueError, match="another extractor.*weight"):
        index.search(Fused([Part(diffusion), Part(dino, 3)])([folder / "000.png"]))
    with pytest.raises(ValueError, match="made with other settings"):
        export(folder, Fused([Part(diffusion), Part(dino)]), tmp_path / "store")


def test_a_step_of_a_pipeline(diffusion, dino, folder):
    fused, paths = Fused([Part(diffusion), Part(dino)]), sorted(folder.iterdir())
    rows = Transformer(fused, batch_size=2).fit_transform(paths)
    expected = fused(paths)["fused"].mean((2, 3))
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_a_bundled_model_and_a_vit(folder):
    backbone = repkit.load("mini-unet")
    side = backbone.size
    dino = repkit.DinoExtractor(vit(side, side // 8), resize=repkit.Resize(side))
    fused = repkit.Fused([repkit.Part(repkit.DiffusionExtractor(backbone, ["mid@50", "up.0@100"])), repkit.Part(dino)])
    found = fused([folder / "000.png"], backbone.class_names[0])["fused"]
    assert found.shape[1:] == fused.shapes["fused"]
    assert torch.allclose(found.norm(dim=1), torch.tensor(sqrt(2)))


# --- bases


def test_a_basis_is_that_of_an_svd(dino):
    images = tiny.images(6)
    pixels = dino(images)["norm"].permute(0, 2, 3, 1).reshape(-1, 12).double()
    centred = pixels - pixels.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    basis = fit_bases(dino, images, 5, keys=["norm"], batch_size=4)["norm"]
    found = basis.project(dino(images)["norm"]).permute(0, 2, 3, 1).reshape(-1, 5).double()
    expected = centred @ axes[:5].T
    assert torch.allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    assert torch.allclose(found.var(0).sort(descending=True).values, found.var(0))


def test_a_full_basis_keeps_the_cosines_of_centred_maps(dino):
    images = tiny.images()
    bases = fit_bases(dino, images, 12, keys=["norm"])
    maps = dino(images)["norm"]
    fused = Fused([Part(dino, keys=["norm"], bases=bases)])(images)["fused"]
    assert abs(gram(fused) - gram(maps - maps.mean((0, 2, 3), keepdim=True))).max() < 1e-5


def test_a_basis_replaces_the_channels_before_the_weights(dino):
    images = tiny.images()
    bases = fit_bases(dino, images, 3, keys=["norm"])
    fused = Fused([Part(dino, keys=["norm", "block.0"], key_weights=[2, 1], bases=bases)])
    assert fused.shapes["fused"] == (3 + 12, 4, 4)
    alone = dino(images)
    expected = by_hand([bases["norm"].project(alone["norm"]), alone["block.0"]], [2, 1], (4, 4))
    np.testing.assert_allclose(fused(images)["fused"], expected, atol=1e-6)


def test_padding_is_no_part_of_a_basis(tmp_path):
    slim = write_image(tmp_path / "slim.png", 0, (40, 8))
    padded = DinoExtractor(vit(), resize=Resize(16, "pad"))
    features = padded([slim])
    assert features.mask is not None
    assert features.mask[0, 0].tolist() == [False] * 6 + [True] * 3 + [False] * 7  # half of cell 1, a quarter of cell 2
    basis = fit_bases(padded, [slim], 2)["norm"]
    torch.testing.assert_close(basis.mean, features["norm"][0, :, :, 1].mean(1))


def test_bases_survive_a_file(dino, tmp_path):
    bases = fit_bases(dino, tiny.images(), 4)
    found = load_bases(save_bases(bases, tmp_path / "bases.safetensors"))
    assert {key: one.hash for key, one in found.items()} == {key: one.hash for key, one in bases.items()}
    assert all(torch.equal(found[key].components, bases[key].components) for key in bases)


def test_other_files_are_no_bases(tmp_path):
    save_file({"mean.norm": torch.ones(3)}, str(tmp_path / "half.safetensors"))
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="holds no bases but mean.norm"):
        load_bases(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="cannot read .*text.safetensors"):
        load_bases(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError):
        load_bases(tmp_path / "none.safetensors")


@pytest.mark.parametrize("dim", [0, 13])
def test_a_basis_has_no_more_directions_than_channels(dino, dim):
    with pytest.raises(ValueError, match=f"dim={dim} for norm, which has 12 channels .* 48 pixels; give 1 ... 12$"):
        fit_bases(dino, tiny.images(3), dim, keys=["norm"])


def test_a_basis_needs_pixels(dino, folder):
    vectors = DinoExtractor(dino.model, "cls")
    with pytest.raises(ValueError, match="seen at 3 pixels; give 1 ... 2, or more images"):
        fit_bases(vectors, tiny.images(3), 3)
    with pytest.raises(ValueError, match="0 images and 1 keys"):
        fit_bases(vectors, [], 3)


# --- what cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keys": ["block.9"]}, "no key 'block.9' in the extractor; have norm, block.0"),
        ({"keys": []}, "give at least one, and each once"),
        ({"keys": ["norm", "norm"]}, "give at least one, and each once"),
        ({"key_weights": [1]}, "1 key weights for 2 keys"),
        ({"key_weights": [0, 0]}, "one key above 0"),
        ({"weight": -1}, "weight=-1"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"key_weights": [1, -1]}, "at least 0"),
        ({"bases": {"cls": Basis(torch.zeros(12), torch.eye(12))}}, "a basis for 'cls', which is none"),
        ({"bases": {"norm": Basis(torch.zeros(8), torch.eye(8))}}, "the basis of norm is for 8 channels, not 12"),
    ],
)
def test_a_part_says_what_is_wrong(dino, settings, message):
    with pytest.raises(ValueError, match=message):
        Part(dino, **settings)


def test_a_lone_string_is_no_list_of_keys(dino):
    with pytest.raises(TypeError, match="keys='norm' is one string; give a list"):
        Part(dino, keys="norm")


@pytest.mark.parametrize("grid", ["coarsest", (0, 4), (4,)])
def test_an_unknown_grid(dino, grid):
    with pytest.raises(ValueError, match='no grid .*; give "finest" or .height, width. in cells'):
        Fused([Part(dino)], grid=grid)


def test_something_must_count(dino):
    for parts in ([], [Part(dino, 0)]):
        with pytest.raises(ValueError, match="none of a weight above 0"):
            Fused(parts)
