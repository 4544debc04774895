"""Correspondence against plain calls: extractors by hand, maps resampled by torch, cosines and argmax by numpy."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor
from repkit.fusion import Part
from repkit.images import Resize, to_tensor
from repkit.matching.method import Method
from repkit.tasks.correspondence import Correspondence
from repkit.tasks.templates import filled
from tests import tiny
from tests.pair_trees import SIZES, texture
from tests.test_fusion import vit

POINTS = torch.tensor([[3.0, 4.0], [20.5, 11.0], [0.0, 29.0], [27.0, 2.0]], dtype=torch.float64)


@pytest.fixture(scope="module")
def networks():
    return tiny.unet(), vit()


def parts(networks, resize=Resize(16, "squash")):  # noqa: B008
    diffusion, dino = extractors(*networks, resize)
    return [Part(diffusion), Part(dino, 0.5)]


@cache
def extractors(unet, dino, resize) -> tuple[DiffusionExtractor, DinoExtractor]:
    diffusion = DiffusionExtractor(unet, ["mid@50", "up.0@100"], resize=resize)
    return diffusion, DinoExtractor(dino, "block.0", resize=resize)


def pictures() -> list[Image.Image]:
    return [texture(seed, size) for seed, size in enumerate(SIZES)]


def unit_map(networks, picture: Image.Image, mirrored: bool = False) -> np.ndarray:
    """Both parts' unit vectors on a 16x16 grid, the second half as long."""
    resize = Resize(16, "squash")
    pixels = to_tensor(resize(picture)[0])[None]
    pixels = pixels.flip(-1) if mirrored else pixels
    one, two = (part.extractor(pixels) for part in parts(networks))
    grown = [F.interpolate(one[key], (16, 16), mode="bilinear", align_corners=False) for key in ("mid@50", "up.0@100")]
    first = F.normalize(torch.cat(grown, 1), dim=1)
    second = F.normalize(F.interpolate(two["block.0"], (16, 16), mode="bilinear", align_corners=False), dim=1)
    return torch.cat([first, 0.5 * second], 1)[0].numpy()


def cell_match(source: np.ndarray, target: np.ndarray, points: np.ndarray, sizes) -> np.ndarray:
    """Descriptors from the map enlarged to the image, and the centre of the cell with the largest cosine."""
    (w0, h0), (w1, h1) = sizes
    full = F.interpolate(torch.from_numpy(source)[None], (h0 * 2, w0 * 2), mode="bilinear", align_corners=False)[0]
    found = []
    for x, y in points:
        # Half pixels: the value at x is the mean of those at 2x and 2x + 1 in the doubled image.
        columns, rows = [int(2 * x), int(2 * x) + 1], [int(2 * y), int(2 * y) + 1]
        query = full[:, rows][:, :, columns].mean((1, 2)).numpy()
        cells = target.reshape(len(target), -1)
        best = int(np.argmax(query @ cells / np.linalg.norm(cells, axis=0)))
        found.append([(best % 16 + 0.5) * w1 / 16 - 0.5, (best // 16 + 0.5) * h1 / 16 - 0.5])
    return np.array(found)


def test_matches_are_those_of_plain_calls(networks):
    one, two, _ = pictures()
    correspondence = Correspondence(parts(networks))
    source, target = correspondence.see([one, two])
    found = correspondence.match(source, target, POINTS[:, [0, 1]].clamp(max=27))
    expected = cell_match(unit_map(networks, one), unit_map(networks, two), POINTS.clamp(max=27).numpy(), SIZES[:2])
    np.testing.assert_allclose(found.points.numpy(), expected, atol=1e-4)


def test_images_seen_one_by_one_or_fused_alone_match_the_same(networks):
    correspondence = Correspondence(parts(networks), flip=True, method=Method("window", window=2))
    images = pictures()[:2]
    together = correspondence.see(images)
    alone = [correspondence.see([image])[0] for image in images]
    whole, turned = correspondence.matched(together[0], together[1], POINTS)
    again, also = correspondence.found(correspondence.view(alone[0]), correspondence.view(alone[1]), POINTS)
    torch.testing.assert_close(whole.points, again.points, atol=1e-3, rtol=0)
    assert turned == also and correspondence.apart


def test_a_mirrored_target_is_matched_from_the_mirror_image(networks):
    """The target is the source's mirror image, so its own mirror image is the source to the last bit."""
    picture = texture(3, (32, 32))
    correspondence = Correspondence(parts(networks), flip=True)
    source, target = correspondence.see([picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    np.testing.assert_array_equal(source.mirrored[0][0].numpy(), target.maps[0][0].numpy())
    points = torch.tensor([[4.5, 8.5], [20.5, 16.5]])  # centres of cells of 2 pixels
    found, turned = correspondence.matched(source, target, points)
    assert turned
    torch.testing.assert_close(found.points, torch.tensor([[26.5, 8.5], [10.5, 16.5]]))


def test_the_padding_holds_no_match_and_points_go_there_and_back(networks):
    resize = Resize(16, "pad")
    correspondence = Correspondence(parts(networks, resize))
    one, two = texture(1, (40, 10)), texture(2, (10, 40))
    source, target = correspondence.see([one, two])
    points = torch.tensor([[0.0, 0.0], [39.0, 9.0], [20.0, 5.0]])
    np.testing.assert_allclose(
        correspondence.from_frame(correspondence.to_frame(points, one.size), one.size).numpy(), points, atol=1e-5
    )
    assert correspondence.frame(one.size) == (16, 16)
    mask = correspondence.view(target).plain.mask
    assert mask.shape == (16, 16) and mask.sum() == 16 * 4 and mask[:, 6:10].all()
    places = correspondence.match(source, target, points).points.numpy()
    assert ((places >= -0.5) & (places <= [9.5, 39.5])).all()


def test_co_pca_needs_both_images(networks):
    correspondence = Correspondence(parts(networks), pca=[4, None])
    source, target = correspondence.see(pictures()[:2])
    assert not correspondence.apart
    assert len(correspondence.views(source, target)[0].plain.values) == 2 * 4 + 12
    with pytest.raises(ValueError, match="depends on both images"):
        correspondence.view(source)
    plain = Correspondence(parts(networks)).match(source, target, POINTS)
    assert not torch.equal(correspondence.match(source, target, POINTS).points, plain.points)


def test_positions_are_taken_off(networks):
    plain = Correspondence(parts(networks))
    source, target = plain.see(pictures()[:2])
    own = {(0, "mid@50"): source.maps[0][0] * 0.5}
    taken = plain.replaced(positions=own)
    fused = taken.view(source).plain.values
    half = replace(source, maps=((source.maps[0][0] * 0.5, source.maps[0][1]), source.maps[1]))
    torch.testing.assert_close(fused, plain.view(half).plain.values)
    assert taken.identity["positions"] == ["0 mid@50"]


def test_the_identity_is_json_and_tells_what_changes_matches(networks):
    plain = Correspondence(parts(networks))
    assert json.loads(json.dumps(plain.identity)) == plain.identity
    assert plain.identity == plain.replaced().identity
    changes = [
        {"flip": True},
        {"pca": [4, None]},
        {"conds": ["a cat", None]},
        {"method": Method("pixel")},
        {"grid": (8, 8)},
        {"parts": [plain.parts[0], replace(plain.parts[1], weight=2.0)]},
    ]
    for change in changes:
        assert plain.replaced(**change).identity != plain.identity, change


def test_one_part_matches_as_dift_does(networks):
    """Raw maps enlarged to both images, unit norm after that, and the pixel with the largest cosine."""
    resize, images = Resize(16, "squash"), pictures()[:2]
    extract = DiffusionExtractor(networks[0], "up.0@100", resize=resize)
    correspondence = Correspondence([Part(extract, 0.3)], method=Method("pixel"))
    y, x = torch.meshgrid(torch.arange(30), torch.arange(40), indexing="ij")
    points = torch.stack([x, y], -1).reshape(-1, 2).double()
    source, target = correspondence.see(images)
    found = correspondence.match(source, target, points)

    def cosines(first, second):
        pair = zip((first, second), images, strict=True)
        full = [F.interpolate(one, i.size[::-1], mode="bilinear", align_corners=False)[0] for one, i in pair]
        return F.normalize(full[0].flatten(1), dim=0).T @ F.normalize(full[1].flatten(1), dim=0)

    raw = [extract([image])["up.0@100"].double() for image in images]
    expected = cosines(*raw)
    places = found.points.round().long()
    chosen = expected.gather(1, (places[:, 1] * 28 + places[:, 0])[:, None])[:, 0]
    torch.testing.assert_close(chosen, expected.max(1).values, rtol=0, atol=1e-6)
    same = (places[:, 1] * 28 + places[:, 0] == expected.argmax(1)).double().mean()
    units = cosines(*(F.normalize(one, dim=1) for one in raw))
    assert same > 0.99 > (units.argmax(1) == expected.argmax(1)).double().mean()


def test_one_part_joins_its_keys_by_their_weights(networks):
    diffusion = extractors(*networks, Resize(16, "squash"))[0]
    correspondence = Correspondence([Part(diffusion, 2.0, key_weights=[3, 0.5])])
    (seen,) = correspondence.see(pictures()[:1])
    first, second = (F.interpolate(one[None], (16, 16), mode="bilinear")[0] for one in seen.maps[0])
    torch.testing.assert_close(correspondence.fuse(seen)[0].values, torch.cat([3 * first, 0.5 * second]))


def test_a_template_without_its_label_is_nothing():
    assert filled("a photo of a {label}", "cat") == "a photo of a cat"
    assert filled("a photo of a {label}", None) is None and filled("a photo", None) == "a photo" == filled(
        "a photo", "x"
    )
    assert filled(None, "cat") is None


def test_what_does_not_go_together_is_refused(networks):
    with pytest.raises(ValueError, match="2 parts, 1 conds, 2 pca"):
        Correspondence(parts(networks), conds=[None])
    one = extractors(*networks, Resize(16, "squash"))[0]
    with pytest.raises(ValueError, match="is told 'sneaker' in one part and 'bag' in another; build an extractor for"):
        Correspondence([Part(one), Part(one)], conds=["sneaker", "bag"])
    assert len(Correspondence([Part(one, keys=[key]) for key in one.blocks], conds=["bag"] * 2).extractors) == 1
    with pytest.raises(ValueError, match="2 parts, none of a weight above 0"):
        Correspondence([replace(part, weight=0) for part in parts(networks)])
    with pytest.raises(ValueError, match="crop"):
        Correspondence(parts(networks, Resize(16, "crop")))


@pytest.mark.parametrize("template", ["a {thing}", "a {}", "a {0}", "a {label", "a }", "{label!r}", "{label:>9}"])
def test_a_template_of_other_fields_is_refused(networks, template):
    with pytest.raises(ValueError, match=r"write \{label\}"):
        filled(template, "cat")
    with pytest.raises(ValueError, match=r"write \{label\}"):
        Correspondence(parts(networks), conds=[template, None])


def test_doubled_braces_are_braces():
    assert filled("a {{{label}}}", "cat") == "a {cat}"
