"""Unsupervised segmentation on planted segments, and against dense linear algebra and loops over everything."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import eigh

from repkit.heads.attention_merging import aggregate_attention, anchor_cells, divergence, merge_attention
from repkit.heads.clusters import fit_kmeans, mean_features, nearest_centre, nearest_cluster
from repkit.heads.ncut import affinity, cut_costs, ncut_segments, second_eigenvector, split
from repkit.heads.places import enlarged, pixel_places

SEGMENTS = np.zeros((9, 11), int)
SEGMENTS[:4, :5], SEGMENTS[5:, 6:] = 1, 2


def planted(generator, segments=SEGMENTS, noise=0.1):
    """A direction for each segment, and some noise."""
    directions = torch.eye(8)[: segments.max() + 1]
    clean = directions[torch.from_numpy(segments)].permute(2, 0, 1)
    return clean + noise * torch.randn(clean.shape, generator=generator)


def same_parts(one, other):
    """Whether two maps of labels are one but for the labels' names."""
    pairs = {*zip(np.ravel(one).tolist(), np.ravel(other).tolist(), strict=True)}
    return len(pairs) == len(np.unique(one)) == len(np.unique(other))


# --- normalised cut


def test_affinity_is_the_scaled_cosine_to_a_power(generator):
    features = torch.randn(5, 2, 3, generator=generator)
    cosine = F.cosine_similarity(features.flatten(1).T[:, None], features.flatten(1).T[None], dim=-1).double().numpy()
    expected = ((cosine - cosine.min()) / (cosine.max() - cosine.min())) ** 10
    assert np.allclose(affinity(features, 10), expected, atol=1e-5)
    assert (affinity(torch.ones(3, 2, 2), 10) == 1).all()


@pytest.mark.parametrize("nodes", [12, 90])
def test_the_second_eigenvector_is_that_of_the_generalised_problem(rng, nodes):
    """12 nodes go to a dense solver, 90 to a sparse one; scipy's own for (D - W) y = lambda D y is the oracle."""
    points = rng.normal(size=(nodes, 3))
    weights = np.exp(-((points[:, None] - points) ** 2).sum(-1))
    degrees = np.diag(weights.sum(1))
    expected = eigh(degrees - weights, degrees)[1][:, 1]
    found = second_eigenvector(weights)
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert abs(cosine) == pytest.approx(1, abs=1e-8)
    assert found[np.abs(found).argmax()] > 0 and np.array_equal(found, second_eigenvector(weights))


def test_costs_are_those_of_the_quadratic_form(rng):
    """Shi and Malik's y'(D - W)y / y'Dy at y = (1 + x) - b(1 - x), x = +-1, and cuts counted by hand."""
    weights = rng.random((7, 7))
    weights = weights + weights.T
    degrees = weights.sum(1)
    sides = rng.random((7, 5)) > 0.5
    sides[:, 4] = True
    costs = cut_costs(weights, sides)
    for column in range(4):
        side = sides[:, column]
        share = degrees[side].sum() / degrees.sum()
        y = 2.0 * side - share / (1 - share) * 2.0 * ~side
        expected = y @ (np.diag(degrees) - weights) @ y / (y * degrees @ y)
        cut = weights[side][:, ~side].sum()
        assert costs[column] == pytest.approx(expected)
        assert costs[column] == pytest.approx(cut / degrees[side].sum() + cut / degrees[~side].sum())
    assert costs[4] == np.inf


def test_two_obvious_clusters_are_split_and_one_is_not():
    weights = np.full((8, 8), 0.01)
    weights[:5, :5] = weights[5:, 5:] = 1
    side = split(weights, 0.5)
    assert side is not None and len({*side[:5]}) == len({*side[5:]}) == 1 and side[0] != side[5]
    assert split(np.ones((6, 6)), 0.5) is None and split(np.ones((1, 1)), 0.5) is None


def test_planted_segments_are_found(generator):
    found = ncut_segments(planted(generator))
    assert same_parts(found, SEGMENTS)
    sizes = np.bincount(found.ravel())
    assert (sizes[:-1] >= sizes[1:]).all()  # the largest first


def test_segments_stop_at_the_limit_and_at_the_threshold(generator):
    features = planted(generator)
    assert ncut_segments(features, most=2).max() == 1
    assert not ncut_segments(features, tau=1e-9).any()
    many = ncut_segments(torch.randn(8, 6, 6, generator=generator), tau=2.0)
    assert many.max() > 10


def test_a_fine_map_is_averaged_first(generator):
    large = planted(generator).repeat_interleave(3, 1).repeat_interleave(3, 2)
    found = ncut_segments(large, cells=99)
    assert found.shape == (9, 11) and same_parts(found, SEGMENTS)


def test_wrong_settings_are_refused(generator):
    with pytest.raises(ValueError, match="tau=0, alpha=10,"):
        ncut_segments(planted(generator), tau=0)


# --- centres


def test_pixels_go_to_the_nearest_centre_of_interpolated_features(generator):
    features = planted(generator, noise=0.5)
    centres = mean_features(features, SEGMENTS)
    units = F.normalize(features, dim=0)
    for segment in range(3):
        mean = units[:, torch.from_numpy(SEGMENTS == segment)].mean(1)
        assert torch.allclose(centres[segment], F.normalize(mean, dim=0), atol=1e-6)
    large = F.interpolate(units[None], (27, 40), mode="bilinear", align_corners=False)[0]
    expected = torch.einsum("s c, c h w -> s h w", centres, large).argmax(0)
    found = nearest_centre(features, centres, pixel_places(27, 40).flatten(0, 1)).view(27, 40)
    assert (found == expected).float().mean() > 0.999


def test_kmeans_is_that_of_scaled_channels(generator):
    """Distances by hand: all maps enlarged, every channel scaled, and the means of the clusters that were found."""
    fine, coarse = planted(generator), torch.randn(3, 4, 5, generator=generator) * 1e-3 + 50
    fine = fine * torch.logspace(-3, 3, 8)[:, None, None]  # channels of very different sizes
    levels = {1: fine[None], 2: coarse[None]}
    cells = enlarged(levels)[0].flatten(1).T
    centres = fit_kmeans(cells, 3)
    units = (cells - cells.mean(0)) / cells.std(0, correction=0)
    found = nearest_cluster(levels, centres, pixel_places(9, 11).flatten(0, 1))
    means = torch.stack([units[found == number].mean(0) for number in range(3)])
    assert (torch.cdist(units, means).argmin(1) == found).float().mean() > 0.97
    assert (found.bincount()[:-1] >= found.bincount()[1:]).all()
    assert torch.equal(centres.weight, fit_kmeans(cells, 3).weight)
    with pytest.raises(ValueError, match="100 clusters of 99 cells"):
        fit_kmeans(cells, 100)


def test_kmeans_finds_planted_segments_and_no_constant_channel(generator):
    features = torch.cat([planted(generator), torch.full((1, 9, 11), 7.0)])
    centres = fit_kmeans(features.flatten(1).T, 3)
    found = nearest_cluster({1: features[None]}, centres, pixel_places(9, 11).flatten(0, 1)).view(9, 11).numpy()
    assert same_parts(found, SEGMENTS) and (found[4] == 0).all()  # the largest cluster is the first
    assert not centres.weight[:, 8].any()


# --- attention


def test_divergence_is_the_mean_of_both_directions(rng):
    p, q = (torch.from_numpy(rng.dirichlet(np.ones(6), count)) for count in (3, 4))
    found = divergence(p.float(), q.float())
    for i, one in enumerate(p.numpy()):
        for j, other in enumerate(q.numpy()):
            both = (one * np.log(one / other)).sum() + (other * np.log(other / one)).sum()
            assert found[i, j].item() == pytest.approx(both / 2, abs=1e-5)
    assert divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).isfinite().all()


def test_layers_are_added_on_one_grid(rng):
    """By loops over cells: queries repeated, keys bilinear and scaled to sum to 1, weighted by side."""
    small, large = (torch.from_numpy(rng.dirichlet(np.ones(side**2), side**2)).float() for side in (2, 4))
    maps = [small.T.reshape(4, 2, 2), large.T.reshape(16, 4, 4)]  # [keys h w]
    found = aggregate_attention(maps)
    for row in range(4):
        for column in range(4):
            coarse = small[2 * (row // 2) + column // 2].view(1, 1, 2, 2)
            keys = F.interpolate(coarse, (4, 4), mode="bilinear", align_corners=False).flatten()
            expected = (2 * keys / keys.sum() + 4 * large[4 * row + column]) / 6
            assert torch.allclose(found[row, column], expected, atol=1e-6)
    assert torch.allclose(found.sum(2), torch.ones(4, 4), atol=1e-5)
    assert aggregate_attention(maps, side=2).shape == (2, 2, 4)
    with pytest.raises(ValueError, match=r"maps of shape \(3, 2, 2\); give self-attention"):
        aggregate_attention([torch.rand(3, 2, 2)])


def test_anchors_are_an_even_centred_grid():
    """64 cells a side and 16 points: every fourth cell from 1 on, as published."""
    cells = anchor_cells((64, 64), 16)
    assert len(cells) == 256
    assert (cells[:16] - 64).tolist() == list(range(1, 64, 4)) and (cells[::16] // 64).tolist() == list(range(1, 64, 4))
    assert anchor_cells((2, 3), 16).tolist() == [0, 1, 2, 3, 4, 5]
    assert anchor_cells((3, 3), 1).tolist() == [4]


def attending(segments, share, generator):
    """Attention that goes by `share` to the cell's own segment, and by the rest anywhere."""
    flat = torch.from_numpy(segments).flatten()
    same = (flat[:, None] == flat).float()
    noise = torch.rand(same.shape, generator=generator)
    return share * same / same.sum(1, keepdim=True) + (1 - share) * noise / noise.sum(1, keepdim=True)


def test_planted_segments_are_merged(generator):
    attention = attending(SEGMENTS, 0.9, generator)
    maps = merge_attention(attention.view(9, 11, 99), points=6)
    assert maps.shape == (3, 9, 11) and same_parts(maps.argmax(0).numpy(), SEGMENTS)


def test_merging_is_what_the_loops_say(generator):
    attention = attending(SEGMENTS, 0.3, generator)
    threshold = 0.35
    far = divergence(attention, attention).numpy()
    proposals = [
        attention[torch.from_numpy(far[anchor] < threshold)].mean(0) for anchor in anchor_cells((9, 11), 4).tolist()
    ]
    for _ in range(2):
        left, merged = list(range(len(proposals))), []
        apart = divergence(torch.stack(proposals), torch.stack(proposals))
        while left:
            alike = [other for other in range(len(proposals)) if other == left[0] or apart[left[0], other] < threshold]
            merged.append(torch.stack([proposals[other] for other in alike]).mean(0))
            left = [other for other in left if other not in alike]
        proposals = merged
    found = merge_attention(attention.view(9, 11, 99), threshold=threshold, points=4)
    assert len(found) == len(proposals)
    assert torch.allclose(found.flatten(1), torch.stack(proposals), atol=1e-6)
    with pytest.raises(ValueError, match="give as many columns as cells"):
        merge_attention(attention.view(9, 11, 99)[:8])
