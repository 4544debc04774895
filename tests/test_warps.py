"""Known deformations: what the pictures show lies where the points say, by maps written again by hand."""

import numpy as np
import pytest
from PIL import Image
from scipy.interpolate import RBFInterpolator

from repkit.datasets.pairs import read_pairs
from repkit.datasets.warps import KINDS, Warp, apply_homography, four_point_homography, thin_plate, write_warps
from repkit.images import decode

SIZE = (48, 36)


def smooth(size=SIZE):
    """A picture whose colours tell the place, smoothly: red grows with x, green with y."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return np.stack([40 + 4 * x, 40 + 5 * y, 128 + 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_deformed_picture_has_at_each_true_point_the_colour_of_its_origin(kind, tmp_path):
    folder = write_warps([Image.fromarray(smooth())], tmp_path, kinds=[kind], repeats=2)
    pairs = read_pairs(folder)
    assert [pair.category for pair in pairs] == [kind, kind]
    for pair in pairs:
        shown = np.asarray(Image.open(pair.target)).astype(float)
        assert 20 <= len(pair.source_points) <= 100
        for (x1, y1), (x2, y2) in zip(pair.source_points, pair.target_points, strict=True):
            assert x2 == int(x2) and y2 == int(y2)
            np.testing.assert_allclose(shown[int(y2), int(x2)], [40 + 4 * x1, 40 + 5 * y1, 128], atol=1.01)


def test_the_identity_is_the_picture_and_a_flip_its_mirror_image(tmp_path):
    write_warps([Image.fromarray(smooth())], tmp_path, kinds=["identity", "flip"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "000-identity-0.png")), smooth())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "000-flip-0.png")), smooth()[:, ::-1])


def test_a_homography_goes_through_its_four_points_and_keeps_lines_straight():
    corners = np.array([[0.0, 0], [10, 0], [10, 8], [0, 8]])
    images = np.array([[1.0, 1], [9, 2], [8, 7], [0, 6]])
    matrix = four_point_homography(corners, images)
    np.testing.assert_allclose(apply_homography(matrix, corners), images, atol=1e-9)
    line = apply_homography(matrix, np.array([[1.0, 1], [3, 2], [9, 5]]))
    (ax, ay), (bx, by) = line[1] - line[0], line[2] - line[0]
    assert abs(ax * by - ay * bx) < 1e-9


def test_a_thin_plate_spline_bends_least_through_its_controls():
    """Its energy is below that of another smooth interpolant of the same points."""
    warp = thin_plate((64, 64), np.random.default_rng(3))
    steps = np.linspace(0, 1, 4) * 64 - 0.5
    controls = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    other = Warp((64, 64), RBFInterpolator(controls, warp.backward(controls), kernel="gaussian", epsilon=0.03))

    def energy(one):
        x, y = np.meshgrid(np.arange(0, 64, 1.0), np.arange(0, 64, 1.0))
        field = one.backward(np.stack([x.ravel(), y.ravel()], 1)).reshape(64, 64, 2)
        dxx, dyy = np.diff(field, 2, axis=1)[1:-1], np.diff(field, 2, axis=0)[:, 1:-1]
        dxy = np.diff(np.diff(field, axis=0), axis=1)[:-1, :-1]
        return (dxx**2).sum() + 2 * (dxy**2).sum() + (dyy**2).sum()

    assert energy(warp) < energy(other)


def test_equal_arguments_give_equal_files_and_another_seed_others(tmp_path):
    picture = Image.fromarray(smooth())
    folders = [write_warps([picture, picture], tmp_path / str(n), seed=seed) for n, seed in enumerate((0, 0, 1))]
    contents = [{path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in folders]
    assert contents[0] == contents[1] and contents[0] != contents[2]
    assert contents[0]["000-crop-0.png"] != contents[0]["001-crop-0.png"]
    assert len(contents[0]) == 2 * (1 + len(KINDS)) + 1


def test_the_order_of_kinds_and_the_choice_of_some_change_none(tmp_path):
    picture = Image.fromarray(smooth())
    all_of = write_warps([picture], tmp_path / "all")
    some = write_warps([picture], tmp_path / "some", kinds=["crop", "homography"])
    for name in ("000-crop-0.png", "000-homography-0.png"):
        assert (all_of / name).read_bytes() == (some / name).read_bytes()


def test_large_pictures_are_shrunk_to_the_size_asked_for(tmp_path):
    write_warps([Image.fromarray(smooth((80, 60)))], tmp_path, kinds=["crop"], size=40)
    assert decode(tmp_path / "000.png").size == decode(tmp_path / "000-crop-0.png").size == (40, 30)


@pytest.mark.parametrize(
    ("images", "kinds", "told"), [([], ["crop"], "0 images"), (["a.png"], ["spin"], "'spin'; have")]
)
def test_what_cannot_be_warped_is_told(tmp_path, images, kinds, told):
    with pytest.raises(ValueError, match=told):
        write_warps(images, tmp_path, kinds=kinds)
