"""Matching: against loops in numpy over every pixel, textures moved by a known shift, and counted memory."""

import weakref
from functools import partial
from inspect import unwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repkit.features import Features
from repkit.images import grid_to_pixel
from repkit.matching import scoring
from repkit.matching.featuremap import FeatureMap, cell_centres, descriptors, feature_maps
from repkit.matching.nearest import k_nearest, mutual_nearest, nearest, ratio_nearest, round_trip, soft_nearest


def random_map(generator, c=6, h=3, w=4, size=(13, 18), mask=None):
    return FeatureMap(torch.randn(c, h, w, generator=generator), size, mask)


def interpolated(image, x, y):
    """The features at one pixel, in float64, as the textbook has bilinear interpolation between centres of cells."""
    values, (h, w) = image.values.double().numpy(), image.grid
    gx = np.clip((x + 0.5) * w / image.size[1] - 0.5, 0, w - 1)
    gy = np.clip((y + 0.5) * h / image.size[0] - 0.5, 0, h - 1)
    x0, y0 = int(gx), int(gy)
    x1, y1, fx, fy = min(x0 + 1, w - 1), min(y0 + 1, h - 1), gx - x0, gy - y0
    top = (1 - fx) * values[:, y0, x0] + fx * values[:, y0, x1]
    return (1 - fy) * top + fy * ((1 - fx) * values[:, y1, x0] + fx * values[:, y1, x1])


def like(a, b, metric):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b) if metric == "cosine" else -np.linalg.norm(a - b)


def brute_force(source, target, points, metric, exact):
    """[n p] scores at all places in order of rows."""
    h, w = target.size if exact else target.grid
    rows = []
    for x, y in points.tolist():
        query = interpolated(source, x, y)
        places = [(i, j) for j in range(h) for i in range(w)]
        found = [interpolated(target, i, j) if exact else target.values[:, j, i].double().numpy() for i, j in places]
        rows.append([like(query, f, metric) for f in found])
    return np.array(rows)


POINTS = torch.tensor([[0.0, 0.0], [17.0, 12.0], [5.3, 7.9], [-0.5, 12.5], [9.0, 2.0]])


def test_descriptors_are_those_of_the_upsampled_map_between_pixels_too(generator):
    image = random_map(generator)
    upsampled = F.interpolate(image.values[None], image.size, mode="bilinear", align_corners=False)[0]
    pixels = [[x, y] for y in range(13) for x in range(18)]
    assert torch.allclose(descriptors(image, torch.tensor(pixels).float()), upsampled.flatten(1).T, atol=1e-6)
    expected = np.stack([interpolated(image, x, y) for x, y in POINTS.tolist()])
    assert np.allclose(descriptors(image, POINTS), expected, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("exact", [False, True])
def test_scores_and_matches_are_those_of_loops_over_every_place(generator, metric, exact):
    source, target = random_map(generator), random_map(generator, h=5, w=3, size=(11, 9))
    expected = brute_force(source, target, POINTS, metric, exact)
    scores = scoring.similarity(source, target, POINTS, metric=metric, exact=exact)
    assert np.allclose(scores.flatten(1), expected, atol=2e-6)
    for chunk in (1, 31, 10_000):
        found = k_nearest(source, target, POINTS, 4, metric=metric, exact=exact, chunk=chunk)
        order = np.argsort(-expected, axis=1, kind="stable")[:, :4]
        width = 9 if exact else 3
        cells = torch.tensor(np.stack([order % width, order // width], -1)).float()
        assert torch.allclose(found.points, cells if exact else grid_to_pixel(cells, target.stride), atol=1e-5)
        assert np.allclose(found.scores, np.take_along_axis(expected, order, 1), atol=2e-6)


def test_exact_is_neither_the_grid_nor_the_interpolated_similarity():
    # Two long descriptors that are nothing alike: between them the interpolated one is short and its cosine high.
    target = FeatureMap(torch.tensor([[[3.0, 1.0]], [[-3.0, 3.2]]]), (1, 8))
    source = FeatureMap(torch.tensor([[[1.0]], [[0.1]]]), (1, 1))
    point = torch.zeros(1, 2)
    exact = scoring.similarity(source, target, point, exact=True)[0, 0]
    grid = scoring.similarity(source, target, point)
    smoothed = F.interpolate(grid[None], (1, 8), mode="bilinear", align_corners=False)[0, 0, 0]
    assert exact.argmax() == 4 and smoothed.argmax() == 0
    assert nearest(source, target, point, exact=True).points.tolist() == [[4.0, 0.0]]
    assert nearest(source, target, point).points.tolist() == [[1.5, 0.0]]


@pytest.mark.parametrize("cells", [(1, 1), (1, 5), (4, 1), (6, 7)])
@pytest.mark.parametrize("size", [(1, 1), (6, 7), (3, 11), (20, 33)])
def test_the_norms_of_interpolated_features_are_exact_on_any_grid(generator, cells, size):
    values = torch.randn(5, *cells, generator=generator)
    features = F.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]
    assert torch.allclose(scoring.interpolated_squares(values, size), features.square().sum(0), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_scores_of_any_floating_type_are_computed_in_float32_at_least(generator, dtype):
    source, target = (FeatureMap(random_map(generator).values.to(dtype), (13, 18)) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = nearest(source, target, POINTS)
    assert found.scores.dtype == found.points.dtype == wide
    source, target = (FeatureMap(image.values.to(wide), image.size) for image in (source, target))
    again = nearest(source, target, POINTS)
    assert torch.equal(found.scores, again.scores) and torch.equal(found.points, again.points)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_the_first_of_equal_places_wins_however_the_points_are_chunked(metric, chunk):
    labels = torch.tensor([[2, 1, 0, 1], [0, 2, 1, 1], [1, 0, 0, 2]])
    one_hot = FeatureMap(F.one_hot(labels).permute(2, 0, 1).float(), (3, 4))  # scores without rounding
    found = k_nearest(one_hot, one_hot, cell_centres(one_hot), 2, metric=metric, chunk=chunk)
    first_two = {0: [[2.0, 0], [0, 1]], 1: [[1.0, 0], [3, 0]], 2: [[0.0, 0], [1, 1]]}
    assert found.points.tolist() == [first_two[label] for label in labels.flatten().tolist()]


def texture(generator, c=8, side=12):
    return torch.randn(c, side, side, generator=generator)


def test_a_shifted_and_a_turned_texture_are_found_where_they_went(generator):
    values = texture(generator)
    source = FeatureMap(values[:, :8, :8].contiguous(), (64, 64))
    inner = torch.tensor([[20.0, 30.0], [33.5, 41.0], [12.0, 27.25]])
    shifted = FeatureMap(values[:, 2:10, 1:9].contiguous(), (64, 64))  # content moves one cell left and two up
    for metric in ("cosine", "l2"):
        found = nearest(source, shifted, inner, metric=metric, exact=True)
        # A pixel is the finest answer there is, so half a pixel is the error that remains.
        assert (found.points - (inner - torch.tensor([8.0, 16.0]))).abs().max() <= 0.5 + 1e-4
    turned = FeatureMap(source.values.rot90(1, (1, 2)).contiguous(), (64, 64))  # (x, y) to (y, 63 - x)
    found = nearest(source, turned, inner.round(), exact=True)
    assert torch.equal(found.points, torch.stack([inner.round()[:, 1], 63 - inner.round()[:, 0]], 1))


def test_the_identity_maps_every_pixel_to_itself(generator):
    image = random_map(generator, c=16, h=6, w=5, size=(20, 21))
    pixels = torch.tensor([[x, y] for y in range(20) for x in range(21)]).float()
    inner = pixels[((pixels > 2) & (pixels < 17)).all(1)]  # at the rim interpolation is constant over some pixels
    assert torch.equal(nearest(image, image, inner, exact=True).points, inner)
    assert torch.allclose(nearest(image, image, cell_centres(image)).points, cell_centres(image))


def test_masked_places_are_never_found(generator):
    mask = torch.zeros(13, 18, dtype=torch.bool)
    mask[3:9, 5:14] = True
    source, target = random_map(generator), random_map(generator, mask=mask)
    expected = brute_force(source, target, POINTS, "cosine", True)
    expected[:, ~mask.flatten().numpy()] = -np.inf
    best = expected.argmax(1)
    found = nearest(source, target, POINTS, exact=True).points
    assert np.array_equal(found, np.stack([best % 18, best // 18], 1))
    cells = nearest(source, target, POINTS).points
    # Of 4.33 x 4.5 pixels a cell, the middle row and the two middle columns are covered by at least half.
    assert set(cells[:, 1].tolist()) == {6.0} and set(cells[:, 0].tolist()) <= {6.25, 10.75}
    with pytest.raises(ValueError, match="k=3 of 2 places"):
        k_nearest(source, target, POINTS, 3)


def test_the_k_best_can_be_kept_apart(generator):
    source, target = random_map(generator), random_map(generator, h=8, w=8, size=(32, 32))
    expected = brute_force(source, target, POINTS, "cosine", False)
    centres = cell_centres(target).numpy()
    found = k_nearest(source, target, POINTS, 3, apart=9.0)
    for row, scores in enumerate(expected):
        taken = []
        for i in np.argsort(-scores):
            if all(np.linalg.norm(centres[i] - centres[j]) >= 9 for j in taken):
                taken.append(i)
        assert np.array_equal(found.points[row], centres[taken[:3]])
    assert k_nearest(source, target, POINTS, 2, apart=1000.0).scores[:, 1].isneginf().all()


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_the_ratio_is_of_the_two_smallest_distances(generator, metric):
    source, target = random_map(generator), random_map(generator)
    scores = brute_force(source, target, POINTS, metric, False)
    distances = np.sort(np.sqrt(2 - 2 * scores) if metric == "cosine" else -scores, axis=1)
    found, ratio = ratio_nearest(source, target, POINTS, metric=metric)
    assert np.allclose(ratio, distances[:, 0] / distances[:, 1], atol=1e-5)
    assert torch.equal(found.points, nearest(source, target, POINTS, metric=metric).points)


def test_a_match_with_a_double_has_ratio_one_and_one_without_rival_zero():
    pair = FeatureMap(torch.eye(2)[:, None, [0, 0, 1]], (1, 3))
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert ratio_nearest(pair, pair, points)[1].tolist() == [1.0, 0.0]
    assert ratio_nearest(pair, pair, points, apart=10.0)[1].tolist() == [0.0, 0.0]


def test_mutual_cells_are_each_others_best(generator):
    source, target = random_map(generator), random_map(generator, h=4, w=5, size=(20, 20))
    scores = brute_force(source, target, cell_centres(source), "cosine", False)
    pairs = [(i, j) for i, j in enumerate(scores.argmax(1)) if scores[:, j].argmax() == i]
    here, there = mutual_nearest(source, target)
    assert 0 < len(pairs) < 12
    assert torch.allclose(here, cell_centres(source)[[i for i, _ in pairs]])
    assert torch.allclose(there.points, cell_centres(target)[[j for _, j in pairs]])
    forth, away = round_trip(source, target, cell_centres(source))
    assert [i for i, _ in pairs] == (away < 1).nonzero().flatten().tolist()
    assert torch.equal(forth.points, nearest(source, target, cell_centres(source)).points)


class Peak(TorchDispatchMode):
    """Bytes of the tensors that operations have made and somebody still holds, at their most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                holders = self.live.setdefault(key, [size, 0])
                holders[1] += 1
                weakref.finalize(tensor, self._release, key)
                self.largest = max(self.largest, size)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))
        return out

    def _release(self, key):
        self.live[key][1] -= 1
        if not self.live[key][1]:
            del self.live[key]


@pytest.mark.parametrize("find", [nearest, partial(nearest, metric="l2"), partial(nearest, exact=True), soft_nearest])
def test_memory_is_bounded_whatever_the_number_of_points(generator, find):
    image = random_map(generator, c=4, h=16, w=16, size=(40, 40))
    chunk = 4000
    peaks = []
    for count in (100, 400):
        points = torch.rand(count, 2, generator=generator) * 39
        with Peak() as memory:
            find(image, image, points, chunk=chunk)
        assert memory.largest <= 4 * chunk  # one array of scores
        peaks.append(memory.peak)
    grown = 300 * 4 * 20  # 20 numbers a point: descriptor, place, score, and what is on the way to them
    assert (
        peaks[1] <= peaks[0] + grown and max(peaks) <= 4 * (8 * chunk + 8 * image.values.numel()) + 100 * 4 * 20 + grown
    )


def test_features_become_maps_with_their_padding_masked(generator):
    maps = torch.randn(2, 3, 2, 2, generator=generator)
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[1, :, 6:] = False
    first, second = feature_maps(Features({"mid@50": maps}, (8, 8), mask))
    assert torch.equal(second.values, maps[1]) and first.size == (8, 8)
    assert bool(second.cell_mask.all()) and second.mask.sum() == 48
    both = Features({"a": maps, "b": maps}, (8, 8))
    assert torch.equal(feature_maps(both, "b")[0].values, maps[0]) and feature_maps(both, "b")[0].mask is None
    with pytest.raises(ValueError, match="keys a, b; say which"):
        feature_maps(both)


def test_a_mask_finer_than_a_cell_leaves_the_cells_it_touches():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[5, 1] = True
    assert FeatureMap(torch.ones(1, 2, 2), (8, 8), mask).cell_mask.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("point", [(-0.6, 0.0), (0.0, 12.6), (18.0, 3.0), (float("nan"), 0.0)])
def test_a_point_outside_is_named_with_the_limits(generator, point):
    image = random_map(generator)
    with pytest.raises(ValueError, match=r"point 1 at .* outside the image of 18x13 .*0 to 17.*0 to 12"):
        nearest(image, image, torch.tensor([(3.0, 3.0), point]))


def test_what_cannot_be_matched_is_refused(generator):
    image, other = random_map(generator), random_map(generator, c=3)
    with pytest.raises(ValueError, match="source has 6 channels, the target 3"):
        nearest(image, other, POINTS)
    with pytest.raises(ValueError, match="no metric 'l1'; have cosine, l2"):
        unwrap(scoring.scorer)(image, "l1", False)  # past the type check, which only the tests have
    with pytest.raises(ValueError, match="chunk=0"):
        nearest(image, image, POINTS, chunk=0)
    with pytest.raises(ValueError, match="k=0 of 12 places"):
        k_nearest(image, image, POINTS, 0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        FeatureMap(torch.full((1, 2, 2), torch.nan), (4, 4))
    with pytest.raises(ValueError, match=r"mask \(3, 4\) for an image of \(4, 4\)"):
        FeatureMap(torch.ones(1, 2, 2), (4, 4), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="False everywhere"):
        FeatureMap(torch.ones(1, 2, 2), (4, 4), torch.zeros(4, 4, dtype=torch.bool))


def test_a_descriptor_of_zeros_is_like_nothing(generator):
    empty = FeatureMap(torch.zeros(6, 3, 4), (13, 18))
    assert nearest(random_map(generator), empty, POINTS).scores.tolist() == [0.0] * 5
    assert nearest(empty, random_map(generator), POINTS, exact=True).scores.tolist() == [0.0] * 5
