"""Label propagation against loops over single cells in numpy, and masks to cells and back against plain torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repkit.heads.masks import region_similarity
from repkit.matching.featuremap import FeatureMap
from repkit.matching.propagation import Labelled, cell_shares, likeliest, propagate_labels


def image(generator, grid=(5, 6), channels=4, mask=None) -> FeatureMap:
    values = torch.randn(channels, *grid, generator=generator)
    return FeatureMap(values, (grid[0] * 4, grid[1] * 4), mask)


def labelled(generator, count=3, **options) -> Labelled:
    features = image(generator, **options)
    return Labelled(features, torch.rand(count, *features.grid, generator=generator))


def by_hand(target: FeatureMap, context: list[Labelled], top_k: int, temperature: float, radius: int | None):
    """Every cell of the target against every cell of the context, one after the other."""
    queries = target.values.double().numpy()
    found = np.zeros((len(context[0].labels), *target.grid))
    for y, x in np.ndindex(*target.grid):
        query = queries[:, y, x]
        pairs = []
        for one in context:
            keys, labels = one.features.values.double().numpy(), one.labels.double().numpy()
            mask = one.features.cell_mask
            for v, u in np.ndindex(*one.features.grid):
                near = radius is None or max(abs(v - y), abs(u - x)) <= radius
                if near and (mask is None or mask[v, u]):
                    key = keys[:, v, u]
                    cosine = query @ key / (np.linalg.norm(query) * np.linalg.norm(key))
                    pairs.append((cosine, labels[:, v, u]))
        pairs.sort(key=lambda pair: -pair[0])
        best = pairs[:top_k]
        weights = np.exp(np.array([cosine for cosine, _ in best]) / temperature)
        if best:
            found[:, y, x] = sum(w * label for w, (_, label) in zip(weights, best, strict=True)) / weights.sum()
    return found


@pytest.mark.parametrize("radius", [None, 0, 1, 2, 9])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 0.1), (4, 0.2), (500, 1.0)])
def test_each_cell_is_the_softmax_mean_of_its_best(generator, radius, top_k, temperature):
    target, context = image(generator), [labelled(generator) for _ in range(3)]
    found = propagate_labels(target, context, top_k=top_k, temperature=temperature, radius=radius)
    expected = by_hand(target, context, top_k, temperature, radius)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


def test_a_low_temperature_does_not_overflow(generator):
    target, context = image(generator), [labelled(generator)]
    found = propagate_labels(target, context, top_k=3, temperature=1e-4)
    np.testing.assert_allclose(found.numpy(), by_hand(target, context, 1, 1.0, None), atol=1e-2)


@pytest.mark.parametrize("radius", [None, 2])
@pytest.mark.parametrize("chunk", [1, 50, 333])
def test_the_chunk_does_not_matter(generator, radius, chunk):
    target, context = image(generator, grid=(6, 9)), [labelled(generator, grid=(6, 9)) for _ in range(2)]
    whole = propagate_labels(target, context, top_k=5, radius=radius)
    torch.testing.assert_close(propagate_labels(target, context, top_k=5, radius=radius, chunk=chunk), whole)


def test_masked_cells_give_no_labels(generator):
    mask = torch.zeros(20, 24, dtype=torch.bool)
    mask[:12, 4:] = True
    target, context = image(generator), [labelled(generator, mask=mask), labelled(generator)]
    found = propagate_labels(target, context, top_k=6, temperature=0.3)
    np.testing.assert_allclose(found.numpy(), by_hand(target, context, 6, 0.3, None), atol=2e-6)


def test_a_cell_with_nothing_in_reach_gets_zeros(generator):
    mask = torch.zeros(20, 24, dtype=torch.bool)
    mask[:4, :4] = True
    context = [labelled(generator, mask=mask)]
    found = propagate_labels(image(generator), context, radius=1)
    torch.testing.assert_close(found[:, :2, :2], context[0].labels[:, :1, :1].expand(-1, 2, 2))
    assert found[:, 2:].abs().max() == 0 and found[:, :, 2:].abs().max() == 0


def test_all_that_are_as_similar_as_the_last_count():
    features = FeatureMap(torch.ones(2, 1, 4), (1, 4))
    labels = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, 1.0]]])
    found = propagate_labels(features, [Labelled(features, labels)], top_k=1)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.75])[:, None, None].expand(2, 1, 4))


def test_grids_may_differ_without_a_radius(generator):
    target, context = image(generator), [labelled(generator, grid=(3, 4)), labelled(generator, grid=(5, 2))]
    found = propagate_labels(target, context, top_k=7)
    np.testing.assert_allclose(found.numpy(), by_hand(target, context, 7, 0.2, None), atol=2e-6)
    with pytest.raises(ValueError, match=r"a radius between grids \[\(3, 4\), \(5, 2\), \(5, 6\)\]"):
        propagate_labels(target, context, radius=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"radius": -1}, "radius=-1"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_settings_that_are_none(generator, options, words):
    with pytest.raises(ValueError, match=words):
        propagate_labels(image(generator), [labelled(generator)], **options)


def test_images_that_do_not_go_together(generator):
    with pytest.raises(ValueError, match="at least one"):
        propagate_labels(image(generator), [])
    with pytest.raises(ValueError, match=r"\[3, 4\] channels"):
        propagate_labels(image(generator, channels=3), [labelled(generator)])
    with pytest.raises(ValueError, match=r"\[2, 3\] labels"):
        propagate_labels(image(generator), [labelled(generator), labelled(generator, count=2)])
    with pytest.raises(ValueError, match=r"labels \(2, 3, 3\) for features of \(5, 6\) cells"):
        Labelled(image(generator), torch.zeros(2, 3, 3))


def test_cells_have_the_mean_of_their_pixels(rng):
    index = rng.integers(0, 3, (12, 20))
    shares = cell_shares(torch.from_numpy(index), 3, (3, 5))
    for label in range(3):
        expected = (index == label).reshape(3, 4, 5, 4).mean((1, 3))
        np.testing.assert_allclose(shares[label].numpy(), expected, atol=1e-6)


def test_pixels_without_a_label_do_not_count():
    index = torch.tensor([[0, -1, -1, -1], [1, 1, -1, -1]])
    shares = cell_shares(index, 2, (1, 2))
    torch.testing.assert_close(shares[:, 0, 0], torch.tensor([1 / 3, 2 / 3]))
    assert shares[:, 0, 1].tolist() == [0, 0]


@pytest.mark.parametrize("stretch", [False, True])
def test_the_likeliest_label_is_that_of_the_enlarged_shares(generator, stretch):
    shares = torch.rand(4, 5, 7, generator=generator)
    shares[3] = 0
    y, x = torch.meshgrid((torch.arange(20) + 0.5) / 10 - 1, (torch.arange(28) + 0.5) / 14 - 1, indexing="ij")
    full = F.interpolate(shares[None], (20, 28), mode="bilinear", align_corners=False)[0]
    if stretch:
        low, high = full.amin((1, 2), keepdim=True), full.amax((1, 2), keepdim=True)
        full[:3] = ((full - low) / (high - low))[:3]
    found = likeliest(shares, torch.stack([x, y], -1), stretch=stretch)
    assert torch.equal(found, full.argmax(0))


def test_stretching_favours_a_label_that_is_unsure_everywhere():
    shares = torch.stack([torch.full((1, 8), 0.9), torch.linspace(0, 0.1, 8)[None]])
    places = torch.stack([torch.linspace(-0.9, 0.9, 8), torch.zeros(8)], -1)[None]
    assert likeliest(shares, places).sum() == 0
    assert likeliest(shares, places, stretch=True).sum() == 7  # all but where its share is the smallest


def test_region_similarity_is_intersection_over_union():
    found, truth = np.zeros((6, 6), int), np.zeros((6, 6), int)
    found[:3, :4], truth[1:4, 1:5] = 1, 1  # 12 pixels each, 6 of them the same
    truth[5, 5] = 2
    expected = [(36 - 19) / (36 - 6), 6 / 18, 0, 1]
    np.testing.assert_allclose(region_similarity(found, truth, 4), expected)
    with pytest.raises(ValueError, match=r"\(6, 6\).*\(5, 6\)"):
        region_similarity(found, truth[1:], 4)
