"""Pictures of calibration and evidence: what is drawn is what was given."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from repkit.heads.calibration import reliability
from repkit.tasks.pictures import save
from repkit.tasks.zeroshot_pictures import evidence_picture, reliability_picture


def test_a_reliability_picture_has_the_bars_of_the_table(tmp_path):
    table = reliability([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6]], [0, 1, 1], bins=4)
    figure = reliability_picture(table, "mini-unet")
    upper, lower = figure.axes
    heights = [[bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)] for axes in (upper, lower)]
    assert heights == [[0, 0, 1, 0.5], [0, 0, 1, 2]]
    again = reliability_picture(table, "mini-unet")
    assert save(figure, tmp_path / "a.png").read_bytes() == save(again, tmp_path / "b.png").read_bytes()


def test_an_evidence_picture_is_symmetric_about_zero_and_fits_the_image(rng):
    images = list(rng.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8))
    maps = rng.normal(size=(2, 4, 4))
    figure = evidence_picture(images, maps, ["a", "b"])
    overlays = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    assert len(overlays) == 2
    for overlay, evidence in zip(overlays, maps, strict=True):
        low, high = overlay.get_clim()
        assert -low == high == pytest.approx(np.abs(maps).max())
        assert tuple(overlay.get_extent()) == (-0.5, 15.5, 15.5, -0.5)
        np.testing.assert_array_equal(overlay.get_array(), evidence)
    assert figure.axes[-1].get_ylabel() == "evidence for the first class"
