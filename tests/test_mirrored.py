"""Mirrored: what the extractor finds in images turned by hand, and what of it an export keeps."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from repkit.dino import DinoExtractor
from repkit.exporting import export
from repkit.extractors import DiffusionExtractor
from repkit.fusion import Fused, Part
from repkit.images import Resize
from repkit.mirrored import Mirrored
from repkit.store import FeatureStore
from tests import tiny, tiny_vit
from tests.export_cases import write_images

SQUARE = Resize(16, "pad")


def diffusion(**options):
    return DiffusionExtractor(tiny.unet(), ["mid@50", "up.0@100"], resize=SQUARE, **options)


def fused():
    return Fused([Part(diffusion()), Part(DinoExtractor(tiny_vit.vit(), resize=SQUARE))])


@pytest.mark.parametrize(
    "make",
    [
        diffusion,
        lambda: diffusion(noise="shared", draws=2),
        lambda: DinoExtractor(tiny_vit.vit(), resize=SQUARE),
        fused,
    ],
)
def test_it_sees_what_was_turned_by_hand(make):
    extract, images = make(), tiny.images(2, 16, 16)
    found, turned = Mirrored(extract)(images), extract(images.flip(-1))
    assert found.keys() == turned.keys() and found.size == turned.size
    assert all(torch.equal(found[key], turned[key]) for key in found)
    plain = extract(images)
    # A network is not the same from left to right, so the mirror image of what it finds will not do.
    assert not any(torch.allclose(found[key], plain[key].flip(-1), atol=1e-3) for key in found)


def test_files_are_turned_after_they_are_resized():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (11, 14, 3), np.uint8))
    pixels, mask = SQUARE(picture)
    found = Mirrored(diffusion())([picture])
    assert mask is not None and found.mask is not None
    turned = diffusion()(torch.from_numpy(pixels[:, ::-1].copy()).permute(2, 0, 1)[None] / 255)
    assert all(torch.equal(found[key], turned[key]) for key in found)
    assert np.array_equal(found.mask[0].numpy(), mask[:, ::-1])


def test_the_mask_is_that_of_the_mirror_image():
    """Of odd padding one more column is on one side."""
    picture = Image.new("RGB", (11, 16), "red")
    turned, plain = Mirrored(diffusion())([picture]).mask, diffusion()([picture]).mask
    assert turned is not None and turned[0, 0].nonzero().flatten().tolist() == list(range(3, 14))
    assert plain is not None and plain[0, 0].nonzero().flatten().tolist() == list(range(2, 13))


def test_a_condition_and_a_gradient_pass():
    grey = DiffusionExtractor(tiny.grey_unet(), "mid@50")
    images = tiny.images(1, 16, 16).requires_grad_()
    found = Mirrored(grey)(images, "dog", grad=True)["mid@50"]
    assert torch.equal(found.detach(), grey(images.detach().flip(-1), "dog")["mid@50"])
    found.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_its_identity_says_so():
    extract = diffusion()
    mirrored = Mirrored(extract)
    assert dict(mirrored.identity) == {**extract.identity, "mirrored": True}
    assert mirrored(tiny.images(1, 16, 16)).identity == mirrored.identity
    assert mirrored.shapes == extract.shapes and mirrored.blocks == extract.blocks
    assert (mirrored.resize, mirrored.provenance) == (extract.resize, extract.provenance)


def test_an_export_holds_the_features_of_the_mirror_images(tmp_path):
    folder, turned = write_images(tmp_path / "images", 3), tmp_path / "turned"
    turned.mkdir()
    for path in folder.iterdir():
        with Image.open(path) as image:
            ImageOps.mirror(image).save(turned / path.name)
    resize = Resize(16, "squash")
    extract = DiffusionExtractor(tiny.unet(), "mid@50", resize=resize)
    export(folder, Mirrored(extract), tmp_path / "mirrored", pool="none")
    stores = [FeatureStore(tmp_path / "mirrored"), export(turned, extract, tmp_path / "plain", pool="none")]
    # Resizing is the same from both sides up to its rounding to 8 bits, and the noise depends on the very bits.
    with Image.open(folder / "000.png") as image:
        same = np.array_equal(resize(image)[0][:, ::-1], resize(ImageOps.mirror(image))[0])
    assert same
    assert np.array_equal(*(store.array("mid@50") for store in stores))
    assert stores[0].identity["extractor"] == json.loads(json.dumps(Mirrored(extract).identity))


def test_noise_that_is_new_each_time_is_refused_in_an_export(tmp_path):
    folder = write_images(tmp_path / "images", 1)
    with pytest.raises(ValueError, match="fresh"):
        export(folder, Mirrored(diffusion(noise="fresh")), tmp_path / "out")


def test_it_learns_what_its_extractor_is_told():
    told = []

    class Listening(DinoExtractor):
        def learn(self, conds=None, told_of=None):
            told.append((conds, told_of))

    Mirrored(Listening(tiny_vit.vit())).learn(["a", "b"])
    assert told == [(["a", "b"], None)]
