"""Flow: soft-argmax against sums written out, dense flow of moved textures, and mirrored objects."""

from functools import partial

import numpy as np
import pytest
import torch

from repkit.matching.featuremap import FeatureMap, cell_centres
from repkit.matching.flow import alignment_distance, dense_flow, flip_aligned, flip_points, partners
from repkit.matching.nearest import mutual_nearest, nearest, soft_nearest
from repkit.matching.softargmax import kernel_soft_argmax, soft_argmax


def expectation(scores, temperature):
    """(x, y) of one map by loops, in float64."""
    weights = np.exp((scores - scores.max()) / temperature)
    total = sum(weights[y, x] * np.array([x, y]) for y in range(len(scores)) for x in range(len(scores[0])))
    return total / weights.sum()


def peak(scores):
    return np.unravel_index(scores.argmax(), scores.shape)  # the first of equal ones


@pytest.mark.parametrize("outside", ["excluded", "zero"])
@pytest.mark.parametrize("window", [0, 1, 2, None])
def test_windowed_soft_argmax_is_its_sum_written_out(generator, window, outside):
    scores = torch.randn(20, 5, 7, generator=generator) * 0.1
    found = soft_argmax(scores, temperature=0.05, window=window, outside=outside)
    for row, values in zip(found, scores.double().numpy(), strict=True):
        (py, px), kept = peak(values), values.copy()
        for y in range(5):
            for x in range(7):
                if window is not None and max(abs(y - py), abs(x - px)) > window:
                    kept[y, x] = 0 if outside == "zero" else -np.inf
        assert np.allclose(row, expectation(kept, 0.05), atol=1e-4)


def test_a_window_of_no_cells_is_the_argmax_and_zeros_outside_leak():
    scores = torch.zeros(1, 9, 9)
    scores[0, 2, 6] = 0.1
    assert soft_argmax(scores, window=0).tolist() == [[6.0, 2.0]]
    leaking = soft_argmax(scores, window=1, outside="zero")[0]
    share = np.exp(0.1 / 0.02) / (np.exp(0.1 / 0.02) + 80)
    assert np.allclose(
        leaking, [6 * share + (9 * 36 - 6) * (1 - share) / 80, 2 * share + (9 * 36 - 2) * (1 - share) / 80]
    )


def test_kernel_soft_argmax_is_its_sum_written_out(generator):
    scores = torch.rand(20, 6, 5, generator=generator)
    found = kernel_soft_argmax(scores, temperature=0.04, sigma=1.5)
    for row, values in zip(found, scores.double().numpy(), strict=True):
        py, px = peak(values)
        y, x = np.mgrid[:6, :5]
        damped = values * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 1.5**2))
        assert np.allclose(row, expectation(damped, 0.04), atol=1e-4)


@pytest.mark.parametrize("locate", [soft_argmax, partial(soft_argmax, window=4)])
def test_a_sharp_gaussian_is_found_between_cells(generator, locate):
    # exp(score / temperature) is a Gaussian of one cell's width around `centre`.
    centres = 5 + 8 * torch.rand(50, 2, generator=generator)
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    squares = (x - centres[:, :1, None]) ** 2 + (y - centres[:, 1:, None]) ** 2
    found = locate(1 - 0.02 * squares / 2)
    assert (found - centres).abs().max() < 0.05
    # A bump of the shape that cosines have, and softmax of it still about a cell wide.
    bump = torch.exp(-squares / (2 * 2**2))
    assert (soft_argmax(bump, temperature=0.1, window=3) - centres).abs().max() < 0.05


def test_masked_cells_count_for_nothing(generator):
    scores = torch.rand(4, 6, 6, generator=generator)
    scores[:, :, 3:] = -torch.inf
    for found in (soft_argmax(scores, outside="zero", window=1), kernel_soft_argmax(scores, sigma=0.1)):
        assert found[:, 0].max() <= 2 and not found.isnan().any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: soft_argmax(s, temperature=0.0), "temperature=0.0"),
        (lambda s: soft_argmax(s, window=-1), "window=-1"),
        (lambda s: kernel_soft_argmax(s, sigma=0.0), "sigma=0.0"),
    ],
)
def test_soft_argmax_refuses_what_means_nothing(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2, 2))


def smooth(generator, c=32, side=16):
    """A texture whose neighbouring cells are alike: noise seen through a Gaussian, so that peaks have a width."""
    noise = torch.randn(1, c, side + 8, side + 8, generator=generator)
    steps = torch.arange(-4.0, 5)
    line = torch.exp(-(steps**2) / (2 * 1.5**2))
    kernel = (line[:, None] * line)[None, None].expand(c, 1, 9, 9)
    return torch.nn.functional.conv2d(noise, kernel, groups=c)[0]


def test_soft_nearest_finds_a_shift_of_a_fraction_of_a_cell(generator):
    places = torch.nn.functional.interpolate(smooth(generator, side=40)[None], scale_factor=4, mode="bicubic")[0]
    source = FeatureMap(places[:, :128:4, :128:4].contiguous(), (256, 256))
    target = FeatureMap(places[:, 2:130:4, 1:129:4].contiguous(), (256, 256))  # 1/4 cell to the left, 1/2 cell up
    points = cell_centres(source)[[32 * 8 + 9, 32 * 15 + 20, 32 * 22 + 13]]
    expected = points - torch.tensor([2.0, 4.0])
    locate = partial(soft_argmax, temperature=0.1, window=3)
    found, hard = soft_nearest(source, target, points, locate=locate), nearest(source, target, points)
    assert (found.points - expected).norm(dim=1).max() < 2.0  # pixels, of 8 a cell
    assert (hard.points - expected).norm(dim=1).min() > 4.0
    assert torch.allclose(found.scores, hard.scores)
    in_parts = soft_nearest(source, target, points, locate=locate, chunk=1)
    assert torch.allclose(in_parts.points, found.points, atol=1e-3)


def test_dense_flow_points_from_each_cell_to_where_it_went(generator):
    values = torch.randn(8, 10, 12, generator=generator)
    source, target = FeatureMap(values[:, :8, :9], (64, 72)), FeatureMap(values[:, 2:, 3:], (64, 72))
    flow, scores = dense_flow(source, target)
    assert flow.shape == (2, 8, 9) and scores.shape == (8, 9)
    assert torch.allclose(flow[:, 2:, 3:], torch.tensor([-24.0, -16.0])[:, None, None].expand(2, 6, 6), atol=1e-4)
    assert torch.allclose(scores[2:, 3:], torch.ones(6, 6))
    assert torch.allclose(dense_flow(source, source)[0], torch.zeros(2, 8, 9), atol=1e-4)
    pieces = dense_flow(source, target, match=partial(nearest, chunk=1))
    assert torch.equal(pieces[0], flow)


def test_flip_points_is_its_own_inverse_and_swaps_the_outer_pixels():
    points = torch.tensor([[0.0, 3.0], [9.0, 1.0], [2.25, 0.0]])
    assert flip_points(points, 10).tolist() == [[9.0, 3.0], [0.0, 1.0], [6.75, 0.0]]
    assert torch.equal(flip_points(flip_points(points, 10), 10), points)


def test_partners_trade_places():
    assert partners(5, [(0, 1), (4, 2)]) == [1, 0, 4, 3, 2]
    for pairs in ([(0, 5)], [(1, 1)], [(0, 1), (1, 2)], [(-1, 0)]):
        with pytest.raises(ValueError, match="of 5 keypoints; give two"):
            partners(5, pairs)


def test_the_alignment_distance_is_the_mean_over_cells_or_mutual_cells(generator):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    source = FeatureMap(torch.randn(5, 4, 4, generator=generator), (8, 8), mask)
    target = FeatureMap(torch.randn(5, 4, 4, generator=generator), (8, 8))
    units = [(m.values / m.values.norm(dim=0)).flatten(1).T for m in (source, target)]
    apart = torch.cdist(*units)
    assert alignment_distance(source, target) == pytest.approx(float(apart[:8].min(1).values.mean()), abs=1e-5)
    mutual = mutual_nearest(source, target)[1].scores
    expected = float((2 - 2 * mutual).sqrt().mean())
    assert alignment_distance(source, target, over="mutual") == pytest.approx(expected, abs=1e-6)


def face(generator):
    """An image and its mirror image as a network sees them that knows left from right; two eyes and a nose."""
    values, turned = torch.randn(2, 12, 8, 8, generator=generator)
    return (
        FeatureMap(values, (64, 64)),
        FeatureMap(turned, (64, 64)),
        torch.tensor([[11.5, 19.5], [51.5, 19.5], [27.5, 43.5]]),
    )


@pytest.mark.parametrize("over", ["mask", "mutual"])
def test_a_mirrored_object_is_matched_mirrored_and_left_becomes_right(generator, over):
    source, mirrored, points = face(generator)
    found, flipped = flip_aligned(source, mirrored, source, points, [1, 0, 2], over=over)
    assert not flipped and torch.allclose(found.points, points, atol=1e-4)
    # The target is the mirrored scene: there the left eye is where the right eye's mirror image is.
    found, flipped = flip_aligned(source, mirrored, mirrored, points, [1, 0, 2], over=over)
    assert flipped
    assert torch.allclose(found.points, flip_points(points, 64)[[1, 0, 2]], atol=1e-4)
    assert torch.allclose(found.scores, torch.ones(3))


def test_a_point_whose_partner_is_missing_keeps_its_plain_match(generator):
    source, mirrored, points = face(generator)
    plain = nearest(source, mirrored, points)
    found, flipped = flip_aligned(source, mirrored, mirrored, points, [None, None, 2])
    assert flipped
    assert torch.equal(found.points[:2], plain.points[:2]) and torch.equal(found.scores[:2], plain.scores[:2])
    assert torch.allclose(found.points[2], flip_points(points, 64)[2], atol=1e-4)
    none, flipped = flip_aligned(source, mirrored, mirrored, points, [None, None, None])
    assert flipped and torch.equal(none.points, plain.points)
    named, _ = flip_aligned(source, mirrored, mirrored, points)
    assert torch.allclose(named.points, flip_points(points, 64), atol=1e-4)


def test_flip_alignment_refuses_lists_and_sizes_that_do_not_fit(generator):
    source, mirrored, points = face(generator)
    for partner in ([0, 1], [0, 1, 3], [-1, 1, 2]):
        with pytest.raises(ValueError, match="of 3 points"):
            flip_aligned(source, mirrored, source, points, partner)
    with pytest.raises(ValueError, match="give both in one size"):
        flip_aligned(source, FeatureMap(mirrored.values, (32, 32)), source, points)
