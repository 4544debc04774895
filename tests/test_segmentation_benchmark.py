"""The benchmark of segmentation runs, and what it writes is a page of finite figures."""

import math
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from repkit.datasets.fashion_mnist import load
from tests.test_benchmarks import BENCHMARKS, figures

SMALL = "--models mini-unet --images 1 --masks 1 --seeds 1 --choosing 1 --steps 2 --size 16".split()


@pytest.mark.slow
def test_segmentation_writes_finite_figures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    page = tmp_path / "page.md"
    import_module("segmentation").main([*SMALL, "--page", str(page)])
    found = figures(page, "Segmentation")
    assert len(found) == 2 * (4 + 6 + 6) and all(math.isfinite(value) and 0 <= value <= 100 for value in found)


def test_pictures_and_masks_are_those_of_the_clothes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = import_module("segmentation")
    script.write_kinds(tmp_path / "kinds", 12)
    read = lambda name: np.asarray(Image.open(tmp_path / name))  # noqa: E731
    pictures, labels = load("test")
    second = np.flatnonzero(labels == 1)[1]  # the twelfth picture
    assert np.array_equal(read("kinds/images/0011.png"), pictures[second])
    assert np.array_equal(read("kinds/masks/0011.png"), np.where(pictures[second] > 0, 2, 0))
    for name in ("placed", "again"):
        script.write_placed(tmp_path / name, 2)
    assert np.array_equal(read("placed/images/0001.png"), read("again/images/0001.png"))
    inside = read("placed/masks/0001.png") > 0
    assert 0.05 < inside.mean() < 0.8 and read("placed/images/0001.png").shape == (64, 64)
