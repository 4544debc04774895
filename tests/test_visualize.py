"""PCA colours against numpy's SVD, mosaics, and pictures of results."""

import numpy as np
import pytest
import torch
from PIL import Image

from repkit.extractors import DiffusionExtractor
from repkit.images import decode
from repkit.tasks.pictures import confusion_picture, mosaic, save
from repkit.tasks.visualize import pca_colors, visualize
from tests.export_cases import tiny_unet, write_images


def colors_by_svd(maps: np.ndarray) -> np.ndarray:
    """The three directions of largest variance, stretched from the 1st to the 99th percentile; signs by loading."""
    b, c, h, w = maps.shape
    flat = maps.transpose(0, 2, 3, 1).reshape(-1, c).astype(np.float64)
    flat = flat - flat.mean(0)
    directions = np.linalg.svd(flat, full_matrices=False)[2][:3]
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
    values = flat @ (directions * signs[:, None]).T
    low, high = np.percentile(values, [1, 99], axis=0)
    return (255 * ((values - low) / (high - low)).clip(0, 1)).reshape(b, h, w, -1)


@pytest.mark.parametrize("channels", [3, 5, 20])
def test_colors_are_the_first_three_components(channels, rng):
    scales = 2.0 ** -np.arange(channels)
    rotation = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
    maps = (rng.normal(size=(2, 6, 7, channels)) * scales @ rotation + 3).transpose(0, 3, 1, 2)
    found = pca_colors(torch.from_numpy(maps).float())
    assert found.shape == (2, 6, 7, 3)
    np.testing.assert_allclose(found, colors_by_svd(maps), atol=0.51)


def test_a_known_component_is_the_red_channel():
    """One direction holds all the variance: red follows it, in the sense in which its largest loading grows."""
    ramp = torch.linspace(0, 1, 100).reshape(1, 1, 10, 10)
    maps = torch.cat([-0.2 * ramp, 0.9 * ramp, 0.1 * ramp, torch.zeros_like(ramp)], 1)
    red = pca_colors(maps)[0, :, :, 0].ravel().astype(int)
    assert (np.diff(red) >= 0).all()
    assert (red[0], red[-1]) == (0, 255)


@pytest.mark.parametrize("channels", [1, 2])
def test_maps_of_few_channels_leave_colors_black(channels, rng):
    maps = rng.normal(size=(2, channels, 4, 4))
    found = pca_colors(torch.from_numpy(maps))
    np.testing.assert_allclose(found[..., :channels], colors_by_svd(maps), atol=0.51)
    assert (found[..., channels:] == 0).all()


def test_the_same_maps_give_the_same_colors_and_one_basis_serves_all_images(generator):
    maps = torch.randn(2, 6, 4, 4, generator=generator)
    assert (pca_colors(maps) == pca_colors(maps.clone())).all()
    twice = pca_colors(torch.cat([maps, maps]))
    assert (twice[:2] == twice[2:]).all()


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps_are_one_color(value):
    found = pca_colors(torch.full((2, 4, 3, 3), value))
    assert len(np.unique(found.reshape(-1, 3), axis=0)) == 1


def test_a_single_cell_has_a_color():
    assert pca_colors(torch.ones(1, 4, 1, 1)).shape == (1, 1, 1, 3)


def test_mosaic_puts_each_picture_in_its_cell():
    red, blue = np.full((2, 2, 3), (255, 0, 0), np.uint8), np.full((4, 4, 3), (0, 0, 255), np.uint8)
    canvas = np.asarray(mosaic([[red, blue], [blue]], side=8, gap=2))
    assert canvas.shape == (22, 22, 3)
    assert (canvas[2:10, 2:10] == (255, 0, 0)).all()
    assert (canvas[2:10, 12:20] == (0, 0, 255)).all()
    assert (canvas[12:20, 2:10] == (0, 0, 255)).all()
    assert (canvas[12:20, 12:20] == 255).all() and (canvas[:2] == 255).all() and (canvas[:, 10:12] == 255).all()


def test_visualize_shows_the_images_and_a_row_for_each_tap(tmp_path):
    paths = sorted(write_images(tmp_path, 3).iterdir())
    extractor = DiffusionExtractor(tiny_unet(), "mid,up.0@50")
    picture, keys = visualize(paths, extractor, side=16)
    again, _ = visualize([decode(path) for path in paths], extractor, side=16, batch_size=2)
    assert keys == ["mid@50", "up.0@50"]
    assert picture.size == (3 * 20 + 4, 3 * 20 + 4)
    canvas = np.asarray(picture)
    for column, path in enumerate(paths):
        seen = extractor.resize(decode(path))[0]
        assert (canvas[4:20, 4 + 20 * column : 20 + 20 * column] == seen).all()
    maps = extractor(paths)["mid@50"]
    expected = pca_colors(maps).repeat(16 // maps.shape[2], 1).repeat(16 // maps.shape[3], 2)
    for column in range(3):
        assert (canvas[24:40, 4 + 20 * column : 20 + 20 * column] == expected[column]).all()
    # Another batch size may move the last bits of features, and a colour by one step.
    assert np.abs(np.asarray(again).astype(int) - canvas).max() <= 1


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        visualize([], DiffusionExtractor(tiny_unet(), "mid@50"))


def test_figures_are_saved_the_same_each_time(tmp_path):
    counts = np.array([[3, 1], [0, 0]])
    figures = [confusion_picture(counts, ["cat", "dog"], "two classes") for _ in range(2)]
    first, second = (save(one, tmp_path / "deep" / f"{run}.png").read_bytes() for run, one in enumerate(figures))
    assert first == second
    with Image.open(tmp_path / "deep" / "0.png") as picture:
        assert min(picture.size) > 100


def test_many_classes_still_make_a_picture(tmp_path):
    path = save(confusion_picture(np.eye(120, dtype=int), [str(k) for k in range(120)], "many"), tmp_path / "m.png")
    with Image.open(path) as picture:
        assert max(picture.size) <= 24 * 130
