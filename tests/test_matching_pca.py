"""Co-PCA against SVD, and positions planted in features and taken out again."""

import pytest
import torch

from repkit.matching.featuremap import FeatureMap, cell_centres
from repkit.matching.nearest import Matches, nearest
from repkit.matching.pca import co_pca
from repkit.matching.positions import position_component, same_position, stayed, without_position


def cells(maps):
    return torch.cat([values.flatten(1).T for values in maps])


def pair(generator, c, dtype=torch.float32):
    shapes = (c, 5, 6), (c, 4, 7)
    return [(torch.randn(*shape, generator=generator) + 3).to(dtype) for shape in shapes]


@pytest.mark.parametrize("channels", [12, 58, 90])  # of 58 cells
@pytest.mark.parametrize("dim", [1, 7, 12])
def test_co_pca_is_the_svd_of_both_images_cells(generator, channels, dim):
    maps = pair(generator, channels)
    joint = cells(maps).double()
    left, spread, _ = torch.linalg.svd(joint - joint.mean(0), full_matrices=False)
    reduced = co_pca(maps, dim)
    assert [values.shape for values in reduced] == [(dim, 5, 6), (dim, 4, 7)]
    expected = left[:, :dim] * spread[:dim]
    found = cells(reduced).double()
    signs = torch.sign((found * expected).sum(0))
    assert torch.allclose(found, expected * signs, atol=1e-5)
    assert torch.allclose(found @ found.T, expected @ expected.T, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(reduced, co_pca(maps, dim), strict=True))


def test_all_dimensions_keep_every_distance(generator):
    maps = pair(generator, 12)
    assert torch.allclose(torch.pdist(cells(maps)), torch.pdist(cells(co_pca(maps, 12))), atol=1e-5)


def test_directions_without_variance_are_zero(generator):
    maps = pair(generator, 90)
    spare = cells(co_pca(maps, 58))[:, -1]  # 58 centred cells span 57 directions
    assert spare.abs().max() < 1e-5


def test_half_precision_is_reduced_in_full(generator):
    maps = pair(generator, 12, torch.bfloat16)
    reduced = co_pca(maps, 3)
    assert reduced[0].dtype == torch.float32
    assert torch.equal(reduced[0], co_pca([values.float() for values in maps], 3)[0])


def test_co_pca_refuses_what_has_no_common_directions(generator):
    maps = pair(generator, 12)
    for dim in (0, 13):
        with pytest.raises(ValueError, match=f"dim={dim} of 12 channels at 58 cells; give 1 to 12"):
            co_pca(maps, dim)
    with pytest.raises(ValueError, match=r"maps with \[11, 12\] channels"):
        co_pca([maps[0], maps[1][:11]], 2)
    with pytest.raises(ValueError, match=r"maps with \[\] channels"):
        co_pca([], 2)


def blank(size, grid):
    return FeatureMap(torch.ones(1, *grid), size)


def test_the_same_position_keeps_its_share_of_both_sides():
    source, target = blank((10, 20), (2, 2)), blank((30, 10), (3, 5))
    points = torch.tensor([[-0.5, -0.5], [9.5, 4.5], [19.5, 9.5]])
    assert same_position(points, source, target).tolist() == [[-0.5, -0.5], [4.5, 14.5], [9.5, 29.5]]


def test_matches_that_stayed_are_counted_in_cells_of_the_target():
    source, target = blank((10, 20), (2, 2)), blank((30, 10), (3, 5))
    points = torch.tensor([[9.5, 4.5]] * 4)
    found = Matches(torch.tensor([[4.5, 14.5], [6.5, 24.5], [6.6, 14.5], [4.5, 4.4]]), torch.ones(4))
    assert stayed(found, points, source, target).tolist() == [True, True, False, False]
    assert stayed(found, points, source, target, within=0.5).tolist() == [True, False, False, False]


def test_a_planted_position_is_measured_and_taken_out(generator):
    content = torch.randn(400, 6, 4, 5, generator=generator) + 2
    planted = 3 * torch.randn(6, 4, 5, generator=generator)
    planted -= planted.mean((1, 2), keepdim=True)
    maps = content + planted
    component = position_component(maps.split(64))
    assert (component - planted).abs().max() < 5 * 400**-0.5
    assert torch.allclose(component.mean((1, 2)), torch.zeros(6), atol=1e-6)  # what all positions share stays
    exact = maps.double().mean(0) - maps.double().mean((0, 2, 3))[:, None, None]
    assert torch.allclose(component, exact.float(), atol=1e-6)
    assert torch.equal(position_component([maps[:100], maps[100:]]), position_component([maps[:300], maps[300:]]))
    assert torch.allclose(without_position(maps, component), maps - component)
    assert without_position(maps[0].half(), component).dtype == torch.float32


def test_without_its_position_a_texture_is_found_where_it_went(generator):
    planted = 4 * torch.randn(8, 6, 6, generator=generator)
    scenes = torch.randn(300, 8, 6, 7, generator=generator)
    component = position_component([scenes[..., :6] + planted, scenes[..., 1:] + planted])
    a, b = scenes[0, ..., :6] + planted, scenes[0, ..., 1:] + planted  # one cell to the left

    def flows(a, b):
        source, target = FeatureMap(a, (48, 48)), FeatureMap(b, (48, 48))
        points = cell_centres(source)[[i for i in range(36) if i % 6]]
        found = nearest(source, target, points)
        moved = (found.points - points - torch.tensor([-8.0, 0.0])).norm(dim=1) < 1
        return stayed(found, points, source, target, within=0.5).float().mean(), moved.float().mean()

    bound, moved = flows(a, b)
    assert bound > 0.9 and moved < 0.1
    bound, moved = flows(without_position(a, component), without_position(b, component))
    assert bound < 0.1 and moved > 0.9


def test_positions_of_another_grid_are_refused(generator):
    component = position_component([torch.randn(2, 3, 4, 4, generator=generator)])
    with pytest.raises(ValueError, match=r"maps \(3, 4, 5\), but positions were measured on \(3, 4, 4\)"):
        without_position(torch.zeros(3, 4, 5), component)
    with pytest.raises(ValueError, match=r"maps \(3, 2, 2\) after maps \(3, 4, 4\)"):
        position_component([torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)])
    with pytest.raises(ValueError, match="at least one image"):
        position_component([])
