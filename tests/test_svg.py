"""A transformer on the normalised features of a small random ViT."""

import pytest
import torch

from repkit.backbones.base import Block
from repkit.backbones.sit import from_weights
from repkit.backbones.svg import FeatureLatents
from repkit.checkpoints import load_checkpoint
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor
from repkit.images import Resize
from tests import tiny, tiny_sit


@pytest.fixture(scope="module")
def svg():
    return tiny_sit.svg()


@pytest.fixture(scope="module")
def pictures():
    return tiny.images(2, 32, 32)


def per_channel(values):
    return torch.tensor(values)[:, None, None]


def test_latents_are_normalised_patch_tokens(svg, pictures):
    model = svg.features.extractor.model
    pixels = (pictures - per_channel([0.4, 0.5, 0.6])) / per_channel([0.2, 0.3, 0.4])
    tokens = model.forward_features(pixels)[:, 1:].mT.unflatten(2, (16, 16))
    x0 = (tokens - per_channel(tiny_sit.MEAN)) / per_channel(tiny_sit.STD)
    torch.testing.assert_close(svg.encode(pictures), x0)


def test_one_number_stands_for_all_channels(pictures):
    extract = tiny_sit.dino()
    latents = FeatureLatents(extract, mean=0.5, std=2.0)
    assert torch.equal(latents.encode(pictures), (extract(pictures)["norm"] - 0.5) / 2)
    assert torch.equal(FeatureLatents(extract).encode(pictures), extract(pictures)["norm"])


def test_sizes_follow_from_the_patch(svg):
    assert (svg.size, svg.multiple, svg.time) == (32, 2, "sit")
    assert svg.blocks["block.1"] == Block(12, 2)
    with pytest.raises(ValueError, match="svg.pt takes 32x32 images only, not 30x32"):
        svg.check_size(30, 32)


def test_shapes_need_no_forward_of_the_extractor(svg, monkeypatch):
    monkeypatch.setattr(DinoExtractor, "__call__", None)
    assert svg.shapes(["block.0"], 32, 32) == {"block.0": (12, 16, 16)}


def test_features_end_to_end(svg, pictures):
    extract = DiffusionExtractor(svg, "block.1@300", seed=3)
    together = extract(pictures)
    key = "block.1@300"
    alone = torch.cat([extract(pictures[row : row + 1])[key] for row in range(2)])
    torch.testing.assert_close(together[key], alone, rtol=0, atol=1e-5 * alone.abs().max().item())
    assert together.identity["latent"] == "features" and not together[key].requires_grad


def test_gradients_reach_the_images(svg, pictures):
    images = pictures.clone().requires_grad_()
    DiffusionExtractor(svg, "block.0@clean")(images, grad=True)["block.0@clean"].sum().backward()
    assert images.grad.abs().sum() > 0


def test_non_finite_features_are_left_to_the_caller(pictures):
    broken = tiny_sit.svg()
    broken.features.extractor.model.norm.weight.data.fill_(float("nan"))
    extract = DiffusionExtractor(broken, "block.0@clean")
    assert extract(pictures, check=False)["block.0@clean"].isnan().all()
    with pytest.raises(FloatingPointError, match="the latents are not finite in 2 of 2 images"):
        extract(pictures)


def changed(**config):
    return from_weights(
        tiny_sit.svg_weights(),
        name="svg.pt",
        config=tiny_sit.CONFIG | {"mean": tiny_sit.MEAN, "std": tiny_sit.STD} | config,
        extractor=tiny_sit.dino(config.pop("key", "norm")),
    )


def test_what_decides_the_latents_is_in_the_identity(svg):
    others = [changed(mean=0.0), changed(std=1.0), changed(key="block.0"), changed(time="repa")]
    assert changed().options == svg.options
    assert all(other.options != svg.options for other in others)
    weights = changed()
    weights.features.extractor.model.norm.bias.add_(1)
    assert weights.weights_hash != svg.weights_hash
    assert svg.networks.keys() == {"denoiser", "features"}


def test_the_extractor_s_own_resize_does_not_matter(svg):
    extract = DinoExtractor(svg.features.extractor.model, "norm", resize=Resize(64))
    assert FeatureLatents(extract, mean=tiny_sit.MEAN, std=tiny_sit.STD).identity == svg.features.identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "cls"}, "latents are one map of the extractor, not 'cls'; config={'key': one of"),
        ({}, "latents are one map of the extractor, not None; config={'key': one of .*'block.0', 'norm'"),
        ({"key": "norm", "mean": [0.0, 1.0]}, "2 statistics for latents of 4 channels; give one, or one a channel"),
        ({"key": "norm", "std": [1.0, 1.0, 0.0, 1.0]}, "a std of the latents is not positive"),
    ],
)
def test_latents_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureLatents(tiny_sit.dino("block.0,norm"), **options)


def test_a_checkpoint_file_is_known_by_its_names(tmp_path, svg, pictures):
    torch.save({"ema": tiny_sit.svg_weights()}, tmp_path / "0400000.pt")
    config = tiny_sit.CONFIG | {"mean": tiny_sit.MEAN, "std": tiny_sit.STD}
    loaded = load_checkpoint(tmp_path / "0400000.pt", config=config, extractor=tiny_sit.dino())
    assert loaded.weights_hash == svg.weights_hash and loaded.options == svg.options
    x0, condition = svg.encode(pictures), svg.condition(0, 2)
    assert torch.equal(loaded.denoise(x0, 300.0, condition), svg.denoise(x0, 300.0, condition))


def test_latents_that_do_not_fit_the_network_are_refused():
    with pytest.raises(ValueError, match="svg.pt takes latents of 3 channels, not 4; give another vae= or extractor="):
        from_weights(tiny_sit.svg_weights(3), name="svg.pt", extractor=tiny_sit.dino())
    with pytest.raises(ValueError, match="works on one kind of latents; give vae= or extractor=, not both"):
        from_weights(tiny_sit.svg_weights(), name="svg.pt", extractor=tiny_sit.dino(), vae=tiny.vae_model())
