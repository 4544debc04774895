import numpy as np
import pytest
import torch

from repkit.pooling import grid_side, pool, pooled_shape

HOWS = ["mean", "max", "gem", "2x2", "3x3", "1x1", "none"]


def cells(length, parts):
    """Where adaptive pooling cuts an axis: [floor(i*n/p), ceil((i+1)*n/p))."""
    return [slice(i * length // parts, -(-(i + 1) * length // parts)) for i in range(parts)]


def grid(maps, parts, reduce):
    """`reduce` over each cell of a parts x parts grid, [b c parts parts]."""
    rows, columns = cells(maps.shape[2], parts), cells(maps.shape[3], parts)
    return np.stack([np.stack([reduce(maps[:, :, row, column]) for column in columns], -1) for row in rows], -2)


def expected(maps, how):
    if how == "none":
        return maps
    if how == "max":
        return maps.max((2, 3))
    if how == "mean":
        return maps.mean((2, 3))
    if how == "gem":
        return np.cbrt((np.maximum(maps, 1e-6) ** 3).mean((2, 3)))
    return grid(maps, int(how[0]), lambda cell: cell.mean((2, 3))).reshape(len(maps), -1)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_equals_numpy(how, size, rng):
    maps = rng.normal(size=(2, 3, *size))
    found = pool(torch.from_numpy(maps).float(), how)
    np.testing.assert_allclose(found.numpy(), expected(maps, how), rtol=1e-5, atol=1e-6)
    assert tuple(found.shape[1:]) == pooled_shape((3, *size), how)


def masked_images(rng):
    """Maps on a 4x4 grid of stride 2, padded right and below: the first keeps 3x2 cells, the second all."""
    mask = np.zeros((2, 8, 8), bool)
    mask[0, :6, :4] = mask[1] = True
    return rng.normal(size=(2, 3, 4, 4)), mask


@pytest.mark.parametrize("how", ["mean", "max", "gem"])
def test_padding_is_left_out(how, rng):
    maps, mask = masked_images(rng)
    maps[0, :, 3:] = maps[0, :, :, 2:] = 1e3
    found = pool(torch.from_numpy(maps).float(), how, torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(found[0], expected(maps[:1, :, :3, :2], how)[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], expected(maps[1:], how)[0], rtol=1e-4, atol=1e-6)


def test_cells_are_weighed_by_the_share_they_cover(rng):
    maps = rng.normal(size=(1, 2, 2, 2))
    mask = np.zeros((1, 4, 4), bool)
    mask[0, :3, :1] = True  # of the four cells: 2/4, 0, 1/4, 0
    found = pool(torch.from_numpy(maps).float(), "mean", torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(found, (2 * maps[:, :, 0, 0] + maps[:, :, 1, 0]) / 3, rtol=1e-5)


def test_a_grid_cell_without_content_is_zero(rng):
    maps, mask = masked_images(rng)
    found = pool(torch.from_numpy(maps).float(), "2x2", torch.from_numpy(mask)).numpy().reshape(2, 3, 2, 2)
    top, bottom = maps[0, :, :2, :2].mean((1, 2)), maps[0, :, 2, :2].mean(1)
    np.testing.assert_allclose(found[0, :, :, 0], np.stack([top, bottom], 1), rtol=1e-5, atol=1e-6)
    assert (found[0, :, :, 1] == 0).all()
    np.testing.assert_allclose(found[1], grid(maps[1:], 2, lambda c: c.mean((2, 3)))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_a_full_mask_changes_nothing(how, rng):
    maps = torch.from_numpy(rng.normal(size=(2, 3, 5, 4))).float()
    torch.testing.assert_close(pool(maps, how, torch.ones(2, 20, 16, dtype=torch.bool)), pool(maps, how))


@pytest.mark.parametrize("how", ["", "median", "2x3", "0x0", "2", "-1x-1", "2x2x2", "Mean"])
def test_unknown_poolings_name_the_known_ones(how):
    with pytest.raises(ValueError, match="no pooling .*; have mean, max, gem, NxN"):
        pool(torch.ones(1, 1, 2, 2), how)
    with pytest.raises(ValueError, match="no pooling"):
        pooled_shape((1, 2, 2), how)


def test_grid_side():
    assert grid_side("2x2") == 2 and grid_side("16x16") == 16
