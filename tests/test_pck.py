"""PCK: cases worked out by hand that tell the protocols apart, and each published loop written out on random pairs."""

import numpy as np
import pytest

from repkit.heads.pck import PROTOCOLS, Protocol, box_length, pck
from repkit.images import Resize


def score(predicted, true, lengths, protocol, **options):
    options = {"alphas": (0.1,), "sizes": [(840, 840)] * len(true)} | options
    predicted, true = ([np.array(points) for points in pairs] for pairs in (predicted, true))
    return pck(predicted, true, lengths, protocol=protocol, **options)


@pytest.mark.parametrize(("protocol", "right"), [("dift", True), ("spair", True), ("sd-dino", False)])
@pytest.mark.parametrize("length", [30, 50, 70, 110])  # 0.1 times these is not always a tenth of them
def test_an_error_equal_to_the_threshold(protocol, right, length):
    found = score([[[10.0, 10 + length / 10]]], [[[10.0, 10.0]]], [length], protocol)
    assert found.correct[0].tolist() == [[right]]


def test_the_half_pixel_of_geoaware_turns_an_error_just_inside_out():
    found, true = [[[109.7, 100.0]]], [[[100.0, 100.0]]]
    # In an image of 840 pixels nothing is scaled: 9.7 px for sd-dino, |(10.2, 0.5)| for GeoAware, of 10 allowed.
    assert score(found, true, [100], "sd-dino").correct[0].all()
    assert not score(found, true, [100], "geoaware").correct[0].any()
    assert score([[[90.0, 100.0]]], true, [100], "geoaware").correct[0].all()  # |(-9.5, 0.5)|


def test_the_corner_of_a_pixel_taken_for_its_centre_matters_where_images_are_enlarged():
    # 210 -> 840: the error of 2.4 px is 9.6, to which 0.5 * 4 - 0.5 is added; allowed are 10.
    case = [[[52.4, 50.0]]], [[[50.0, 50.0]]], [25]
    assert not score(*case, "sd-dino", sizes=[(210, 100)]).correct[0].any()
    assert score(*case, "dift", sizes=[(210, 100)]).correct[0].all()
    assert score([[[47.6, 50.0]]], case[1], [25], "sd-dino", sizes=[(210, 100)]).correct[0].all()


def test_images_points_categories_and_pairs_are_averaged_each_in_its_way():
    # Pairs: cat 1/1, cat 0/3, dog 1/2.
    near, far = [0.0, 0.0], [99.0, 0.0]
    predicted = [[near], [far] * 3, [near, far]]
    true = [np.zeros((len(points), 2)) for points in predicted]
    found = score(predicted, true, [10] * 3, "spair", categories=["cat", "cat", "dog"], alphas=(0.1, 20))
    expected = {"image": 1 / 2, "point": 2 / 6, "category": (1 / 4 + 1 / 2) / 2, "pairs": (2 / 4 + 1 / 2) / 3}
    assert {name: values[0] for name, values in found.averages.items()} == pytest.approx(expected)
    assert all(values[1] == 1 for values in found.averages.values())
    assert found.categories["cat"]["image"][0] == 0.5 and found.categories["cat"]["point"][0] == 0.25
    assert [hits.shape for hits in found.correct] == [(1, 2), (3, 2), (2, 2)]


def test_box_and_image_thresholds_differ():
    case = [[[30.0, 0.0]]], [[[0.0, 0.0]]]
    assert box_length((10, 20, 110, 60)) == 100
    assert not score(*case, [box_length((10, 20, 110, 60))], "dift").correct[0].any()
    assert score(*case, [max(500, 375)], "dift").correct[0].all()


def random_pairs(rng):
    sizes = [(500, 375), (333, 500), (400, 400), (281, 500)]
    true = [np.floor(rng.uniform(0, 280, (n, 2))) for n in (3, 8, 5, 4)]
    boxes = [(10.0, 20.0, 250.0, 180.0), (5.0, 5.0, 200.0, 300.0), (0.0, 0.0, 150.0, 120.0), (50.0, 9.0, 99.0, 200.0)]
    return sizes, true, boxes, ["cow", "cow", "bus", "cow"]


def test_dift_is_its_published_loop_on_whole_pixels(rng):
    sizes, true, boxes, names = random_pairs(rng)
    predicted = [np.rint(points + rng.normal(0, 20, points.shape)) for points in true]
    right = [
        [((px - x) ** 2 + (py - y) ** 2) ** 0.5 / max(b[3] - b[1], b[2] - b[0]) <= 0.1 for (px, py), (x, y) in rows]
        for rows, b in zip(
            (list(zip(p, t, strict=True)) for p, t in zip(predicted, true, strict=True)), boxes, strict=True
        )
    ]
    found = score(predicted, true, [box_length(box) for box in boxes], "dift", categories=names)
    assert found.averages["image"][0] == pytest.approx(np.mean([np.mean(row) for row in right]))
    assert found.averages["point"][0] == pytest.approx(np.mean(sum(right, [])))


@pytest.mark.parametrize(("protocol", "centre"), [("sd-dino", 6.5), ("geoaware", 7.0)])
def test_the_patch_protocols_are_their_published_loops_in_padded_frames(rng, protocol, centre):
    sizes, true, boxes, names = random_pairs(rng)
    hits, predicted = [], []
    for (width, height), points, box in zip(sizes, true, boxes, strict=True):
        scale = 840 / max(width, height)
        pad = [(840 - int(np.around(side * scale))) // 2 for side in (width, height)]
        frame = points * scale + pad
        cells = np.clip(np.floor((frame + rng.normal(0, 45, points.shape)) / 14), 0, 59)
        error = np.linalg.norm(14 * cells + centre - frame, axis=1)
        hits.append(error < 0.1 * max(box[3] - box[1], box[2] - box[0]) * scale)
        # What repkit gives for the same cells: their centres, brought back through its own resize.
        resize = Resize(840, "pad")
        (x0, y0), (x1, y1) = (resize.points(np.array(p, float), (width, height)) for p in ([0, 0], [1, 1]))
        predicted.append((14 * cells + 6.5 - [x0, y0]) / [x1 - x0, y1 - y0])
    lengths = [box_length(box) for box in boxes]
    found = score(predicted, true, lengths, protocol, categories=names, sizes=sizes)
    assert 0.2 < np.concatenate(hits).mean() < 0.8
    assert [list(a[:, 0]) for a in found.correct] == [list(b) for b in hits]
    cow = np.mean(np.concatenate([hits[0], hits[1], hits[3]]))
    assert found.averages["category"][0] == pytest.approx((cow + hits[2].mean()) / 2)
    assert found.averages["pairs"][0] == pytest.approx((3 * cow + hits[2].mean()) / 4)
    assert set(PROTOCOLS[protocol].averages) <= set(found.averages)


def test_a_protocol_can_be_put_together():
    found = score([[[1.0, 0.0]]], [[[0.0, 0.0]]], [10], Protocol(False, ("point",)), alphas=(0.1, 0.2))
    assert found.correct[0].tolist() == [[False, True]] and found.alphas == (0.1, 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "pck"}, "no PCK protocol 'pck'; have dift, sd-dino, geoaware, spair"),
        ({"predicted": [], "true": [], "lengths": []}, "at least one pair"),
        ({"lengths": [10, 10]}, r"lists of \[1, 2\] pairs"),
        ({"categories": ["a", "b"]}, r"lists of \[1, 2\] pairs"),
        ({"protocol": "geoaware"}, "frame of 840 pixels needs the images' sizes"),
        ({"true": [np.zeros((1, 2))]}, r"pair 0: points \(2, 2\) predicted, \(1, 2\) true"),
        ({"true": [np.zeros((0, 2))], "predicted": [np.zeros((0, 2))]}, "pair 0: points"),
        ({"lengths": [0.0]}, "pair 0: length 0"),
        ({"true": [np.full((2, 2), np.nan)]}, "not finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, message):
    case = {"predicted": [np.zeros((2, 2))], "true": [np.zeros((2, 2))], "lengths": [10.0], "protocol": "dift"} | change
    with pytest.raises(ValueError, match=message):
        pck(case.pop("predicted"), case.pop("true"), case.pop("lengths"), **case)


def test_an_empty_box_is_refused():
    with pytest.raises(ValueError, match="left < right"):
        box_length((10, 10, 10, 10))
