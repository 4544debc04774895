"""Matches, heat maps and flow of textures whose correspondence is known; pictures; the command line."""

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from repkit.cli.match import png_bytes
from repkit.cli.pairing import pairing
from repkit.datasets.tss import flow_bytes, read_flow
from repkit.matching.method import Method
from repkit.tasks.alignment import Framed, align
from repkit.tasks.match import find, heat, mutual_points, pixel_flow, read_points
from repkit.tasks.match_pictures import color_wheel, flow_colors, match_picture, pulled, side_by_side
from tests.patches import CELL, by_patches, texture

CENTRES = torch.tensor([[21.5, 29.5], [41.5, 25.5], [29.5, 45.5]])  # of cells


def shifted(dx: int = 12, dy: int = -8) -> tuple[Image.Image, Image.Image]:
    """Two views of a texture; what is at p in the first is at p + (dx, dy) in the second."""
    whole = texture(128, 128)
    return whole.crop((32, 32, 96, 96)), whole.crop((32 - dx, 32 - dy, 96 - dx, 96 - dy))


def aligned(one: Image.Image, other: Image.Image, **options: Any) -> tuple[Framed, Framed]:
    correspondence = by_patches(**options)
    return align(correspondence, *correspondence.see([one, other]))


# --- points


@pytest.mark.parametrize("choice", ["cell", "pixel", "window", "kernel"])
def test_a_shifted_texture_is_found(choice):
    found = find(*aligned(*shifted(), method=Method(choice)), CENTRES)
    for match, point in zip(found, CENTRES, strict=True):
        assert match.point == tuple(point.tolist())
        assert match.place == pytest.approx((float(point[0]) + 12, float(point[1]) - 8), abs=0.6)
        assert match.mutual and match.round_trip <= CELL / 2
        assert match.score > 0.9 and match.ratio < 0.5


@pytest.mark.parametrize("policy", ["squash", "pad"])
def test_points_are_in_pixels_of_the_images_themselves(policy):
    """The second picture is the first one 3 times as large: the networks see the same."""
    one = texture(48, 64)
    other = one.resize((192, 144), Image.Resampling.NEAREST)
    points = torch.tensor([[9.5, 17.5], [45.5, 33.5]])
    size = (48, 64) if policy == "squash" else 64
    found = find(*aligned(one, other, size=size, policy=policy), points)
    for match, point in zip(found, points, strict=True):
        assert match.place == pytest.approx(tuple(((point + 0.5) * 3 - 0.5).tolist()), abs=0.01)
        assert match.mutual and match.round_trip < 0.01


def test_places_are_the_best_ones_apart_with_their_scores():
    one, other = aligned(*shifted())
    match = find(one, other, CENTRES[:1], k=4)[0]
    cosines = brute_cosines(one.map.values, other.map.values, 7, 5)  # the cell of (21.5, 29.5)
    expected = []
    for _ in range(4):
        y, x = np.unravel_index(cosines.argmax(), cosines.shape)
        expected.append((CELL * x + 1.5, CELL * y + 1.5, cosines[y, x]))
        near_y, near_x = np.ogrid[:16, :16]
        cosines[np.hypot(near_y - y, near_x - x) < 2] = -np.inf
    np.testing.assert_allclose(match.places, expected, atol=1e-5)
    first, second = (np.sqrt(max(0, 2 - 2 * place[2])) for place in expected[:2])
    assert match.ratio == pytest.approx(first / second, abs=1e-3)
    assert match.places[0][:2] == match.place


def brute_cosines(source, target, row, column):
    query, cells = source[:, row, column].double().numpy(), target.double().numpy()
    return np.einsum("c,chw->hw", query, cells) / np.linalg.norm(query) / np.linalg.norm(cells, axis=0)


def test_a_mirror_image_is_matched_as_one():
    one = texture(64, 64)
    other = one.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    source, target = aligned(one, other, flip=True)
    assert source.mirrored and not target.mirrored
    for match in find(source, target, CENTRES):
        assert match.place == (63 - match.point[0], match.point[1])
        assert match.mutual and match.round_trip == 0
    assert not aligned(one, one, flip=True)[0].mirrored


def test_mutual_points_are_cells_seen_in_both():
    one, other = aligned(*shifted())
    points = mutual_points(one, other, 1000)
    found = find(one, other, points)
    assert all(match.mutual for match in found)
    true = [match for match in found if match.score > 0.999]
    assert len(true) == (16 - 3) * (16 - 2)  # the cells that both show
    assert {match.place for match in true} == {(x + 12, y - 8) for x, y in (match.point for match in true)}
    assert [match.score for match in found] == sorted((match.score for match in found), reverse=True)


def test_few_mutual_points_are_the_best_ones_that_are_spread():
    one = texture(64, 64)
    same = aligned(one, one)
    points = mutual_points(*same, 16)
    assert torch.cdist(points, points).fill_diagonal_(torch.inf).min() >= 2.5 * CELL  # 16 of 16x16 cells, all alike
    assert points.min() < 16 and points.max(0).values.min() > 48
    assert mutual_points(*same, 16).tolist() == points.tolist()
    assert [len(mutual_points(*same, most)) for most in (1, 7, 255, 256, 900)] == [1, 7, 255, 256, 256]
    pair = aligned(*shifted())
    every, few = mutual_points(*pair, 1000).tolist(), mutual_points(*pair, 9).tolist()
    assert few[0] == every[0] and few == [point for point in every if point in few] and few != every[:9]


def test_a_point_outside_is_named():
    with pytest.raises(ValueError, match=r"point 1 at \(64, 3\) is outside the image of 64x64 pixels"):
        find(*aligned(*shifted()), torch.tensor([[1.0, 2], [64, 3]]))


# --- heat maps and flow


@pytest.mark.parametrize("policy", ["squash", "pad"])
def test_the_heat_map_peaks_at_the_match(policy):
    one, other = shifted()
    other = other.crop((0, 0, 64, 48))
    size = (48, 64) if policy == "squash" else 64
    one = one.crop((0, 0, 64, 48))
    source, target = aligned(one, other, size=size, policy=policy)
    maps = heat(source, target, CENTRES[:2], (48, 64))
    for scores, match in zip(maps, find(source, target, CENTRES[:2]), strict=True):
        y, x = np.unravel_index(int(scores.argmax()), (48, 64))
        assert np.abs(np.array([x, y]) - match.place).max() <= 0.5
    small = heat(source, target, CENTRES[:2], (12, 16))  # a pixel a cell
    cosines = brute_cosines(source.map.values, target.map.values, *((9, 5) if policy == "pad" else (7, 5)))
    np.testing.assert_allclose(small[0], cosines[2:14] if policy == "pad" else cosines, atol=1e-5)


def test_flow_of_a_shift_is_the_shift():
    one, other = shifted()
    flow = pixel_flow(*aligned(one, other))
    inside = flow[12:60, 4:48]  # the cells around are seen in both
    assert inside.sub(torch.tensor([12.0, -8.0])).abs().max() < 1e-3
    back = np.asarray(pulled(other, flow))
    assert (back[12:60, 4:48] == np.asarray(one)[12:60, 4:48]).all()


def test_flow_of_an_image_onto_itself_is_nothing():
    one = texture(40, 64)
    for options in ({"size": (40, 64)}, {"policy": "pad"}, {"size": (40, 64), "flip": True}):
        assert pixel_flow(*aligned(one, one, **options)).abs().max() < 1e-4


def test_flow_of_a_mirror_image_leads_to_the_other_side():
    one = texture(64, 64)
    flow = pixel_flow(*aligned(one, one.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flip=True))
    x = torch.arange(64.0)
    torch.testing.assert_close(flow, torch.stack([63 - 2 * x, 0 * x], -1).expand(64, 64, 2), atol=1e-3, rtol=0)


def test_the_median_takes_away_what_stands_alone():
    one, other = shifted(0, 0)
    spoiled = np.array(other)
    spoiled[24:28, 32:36] = 255 - spoiled[24:28, 32:36]  # a cell that is found elsewhere
    source, target = aligned(one, Image.fromarray(spoiled))
    assert pixel_flow(source, target)[24:28, 32:36].abs().max() > 1
    assert pixel_flow(source, target, smooth=1).abs().max() == 0


def test_only_the_mask_has_a_say():
    """The left half moved by 8, the right half is something else."""
    whole = texture(64, 72)
    one, other = np.array(whole.crop((8, 0, 72, 64))), np.array(whole.crop((0, 0, 64, 64)))
    other[:, 32:] = np.asarray(texture(64, 32, seed=5))
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, :24] = True
    source, target = aligned(Image.fromarray(one), Image.fromarray(other))
    flow = pixel_flow(source.within(mask), target)
    assert flow[:, :24].sub(torch.tensor([8.0, 0.0])).abs().max() < 1e-3


@pytest.mark.parametrize("mask", [torch.zeros(64, 64, dtype=torch.bool), torch.ones(64, 32, dtype=torch.bool)])
def test_masks_that_do_not_fit_are_refused(mask):
    with pytest.raises(ValueError, match="for an image of 64x64; give one of its size that is not empty"):
        aligned(*shifted())[0].within(mask)


def test_a_flow_file_is_read_as_it_was_written(tmp_path, rng):
    flow = rng.normal(0, 20, (5, 7, 2)).astype(np.float32)
    flow[2, 3] = np.nan
    (tmp_path / "a.flo").write_bytes(flow_bytes(flow))
    np.testing.assert_array_equal(read_flow(tmp_path / "a.flo"), flow)
    content = (tmp_path / "a.flo").read_bytes()
    assert content[:4] == b"PIEH" and len(content) == 12 + 5 * 7 * 8  # as Middlebury's readers check it
    assert np.frombuffer(content, "<i4", 2, 4).tolist() == [7, 5]


# --- pictures


@pytest.mark.parametrize(
    ("degrees", "rgb"),
    [(0, (255, 0, 0)), (60, (255, 255, 0)), (120, (0, 255, 0)), (180, (0, 255, 255)), (240, (0, 0, 255))],
)
def test_directions_are_hues(degrees, rgb):
    angle = np.radians(degrees)
    flow = 3 * torch.tensor([[[np.cos(angle), np.sin(angle)]]])
    np.testing.assert_allclose(flow_colors(flow, 3.0)[0, 0], rgb, atol=1)
    half = flow_colors(flow, 6.0)[0, 0]
    np.testing.assert_allclose(half, (np.array(rgb) + 255) / 2, atol=1)  # half the length: half way to white
    np.testing.assert_array_equal(flow_colors(2 * flow, 3.0), flow_colors(flow, 3.0))


def test_what_stays_is_white_and_the_wheel_shows_its_directions():
    assert (flow_colors(torch.zeros(2, 3, 2), 1.0) == 255).all() and (
        flow_colors(torch.zeros(1, 1, 2), 0.0) == 255
    ).all()
    wheel = color_wheel(101)
    red, half_cyan = wheel[50, 100], wheel[50, 25]  # rightmost, and half way to the left
    np.testing.assert_allclose([red, half_cyan], [(255, 0, 0), (127.5, 255, 255)], atol=1)
    np.testing.assert_allclose(wheel[100, 50], flow_colors(torch.tensor([[[0.0, 7]]]), 7.0)[0, 0], atol=1)  # down
    assert (wheel[0, 0] == 255).all()


def test_pictures_stand_side_by_side_at_one_height():
    red, blue = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (10, 40), (0, 0, 255))
    canvas, scales = side_by_side(red, blue, 20)
    assert (canvas.size, scales) == ((40 + 12 + 5, 20), (2.0, 0.5))
    assert canvas.getpixel((39, 19)) == (255, 0, 0) and canvas.getpixel((52, 0)) == (0, 0, 255)
    assert canvas.getpixel((45, 10)) == (255, 255, 255)


def test_pictures_are_the_same_each_time():
    one, other = shifted()
    source, target = aligned(one, other)
    found, heats = find(source, target, CENTRES), heat(source, target, CENTRES, (32, 32))
    figures = [match_picture(one, other, found, heats) for _ in range(2)]
    assert png_bytes(figures[0]) == png_bytes(figures[1])
    assert [len(figure.axes) for figure in figures] == [4, 4]  # the pair, and a heat map for each point


# --- the command line


@pytest.fixture
def pair(tmp_path):
    """A picture and the same picture twice as large."""
    one = texture(32, 32)
    one.save(tmp_path / "a.png")
    one.resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "b.png")
    return tmp_path / "a.png", tmp_path / "b.png"


MINI = ["-m", "mini-unet", "-t", "up.1@50"]


def test_points_are_found_from_the_command_line(repkit, pair, tmp_path):
    (tmp_path / "p.csv").write_text("x,y\n5,9\n20,14\n")
    out, table = tmp_path / "deep" / "m.png", tmp_path / "m.parquet"
    given = ["--points", tmp_path / "p.csv", *MINI, "-o", out, "--table", table]
    code, stdout, err = repkit("match", pair[0], pair[0], *given, "--json")
    assert (code, err) == (0, "mini-unet: up.1@50; 32 px, squash, 1 draw\n")
    report = json.loads(stdout)
    for match, (x, y) in zip(report["matches"], ((5, 9), (20, 14)), strict=True):
        assert abs(match["to_x"] - x) <= 1 and abs(match["to_y"] - y) <= 1  # cells of 2 pixels
        assert match["mutual"] and match["score"] > 0.9 and len(match["places"]) == 3
    rows = pq.read_table(table).to_pylist()
    assert rows == [{key: value for key, value in match.items() if key != "places"} for match in report["matches"]]
    with Image.open(out) as picture:
        assert picture.format == "PNG"
    first = out.read_bytes()
    code, stdout, _ = repkit("match", pair[0], pair[0], *given)
    assert code == 0 and stdout.splitlines()[-1] == str(out) and "mutual" in stdout
    assert out.read_bytes() == first


def test_a_point_on_the_command_line_and_a_label(repkit, pair, tmp_path):
    given = [*MINI, "--prompt", "{label}", "-o", tmp_path / "m.png", "--json"]
    plain = repkit("match", *pair, "--point", "5,9", *given)
    assert plain[0] == 0 and "no --label" in plain[2]
    told = repkit("match", *pair, "--point", "5,9", *given, "--label", "bag")
    assert told[0] == 0 and told[2].count("\n") == 1 < plain[2].count("\n")
    scores = [json.loads(out)["matches"][0]["score"] for _, out, _ in (plain, told)]
    assert scores[0] != scores[1]


def test_a_label_that_nothing_is_told_of_is_mentioned(capsys):
    pairing(model="mini-unet", taps=["mid@50"], label="bag").correspondence()
    assert "--label bag is not used: no part of own" in capsys.readouterr().err


def test_without_points_mutual_cells_are_shown(repkit, pair, tmp_path):
    table = tmp_path / "m.csv"
    code, out, _ = repkit("match", *pair, *MINI, "-o", tmp_path / "m.png", "--most", 4, "--json", "--table", table)
    assert code == 0 and [match["mutual"] for match in json.loads(out)["matches"]] == [True] * 4
    assert table.read_text().splitlines()[0].replace('"', "") == "x,y,to_x,to_y,score,ratio,round_trip,mutual"
    assert len(table.read_text().splitlines()) == 5


def test_dense_writes_a_picture_and_a_flow(repkit, pair, tmp_path):
    code, out, _ = repkit("match", pair[0], pair[0], *MINI, "--dense", "-o", tmp_path / "f.png", "--json")
    report = json.loads(out)
    flow = read_flow(tmp_path / "f.flo")
    assert code == 0 and report["flow"] == str(tmp_path / "f.flo") and flow.shape == (32, 32, 2)
    assert report["longest"] == pytest.approx(np.linalg.norm(flow, axis=-1).max(), abs=1e-4)
    assert np.abs(flow).max() < 1e-3  # onto itself


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--point", "5,40"], ["--point: point 0 at (5, 40) is outside the image of 32x32"]),
        (["--point", "5"], ["--point '5' is no point"]),
        (["--point", "5,x"], ["--point 5,x: 'x' is no number"]),
        (["--point", "5,9", "--dense"], ["--dense is about all pixels"]),
        (["--point", "5,9", "--table", "a.txt"], ["ends in .txt"]),
        (["--weights", "a"], ["--weights a: give numbers"]),
        (["--points", "no.csv"], ["no list of points no.csv"]),
        (["--preset", "no"], ["no preset 'no'"]),
        (["--weights", "0"], ["--weights 0; give 0 or more, and one above 0"]),
        (["--prompt", "a {thing}"], ["--prompt 'a {thing}'", "write {label}"]),
        (["--prompt", "a {"], ["--prompt 'a {'", "write {label}"]),
        (["-o", "y.jpg"], ["--out y.jpg ends in .jpg; give the name of a .png file"]),
        (["-o", "y.flo", "--dense"], ["--out y.flo ends in .flo"]),
        (["-o", "w.csv", "--table", "w.csv"], ["--out w.csv ends in .csv"]),
        (["--points", "w.csv", "--table", "./w.csv"], ["--table w.csv is the list of points"]),
    ],
)
def test_mistakes_are_one_line(given, words, repkit, pair, tmp_path):
    code, out, err = repkit("match", *pair, *MINI, "-o", tmp_path / "m.png", *given)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / "m.png").exists()


def test_the_images_are_not_written_over(repkit, pair):
    before = pair[1].read_bytes()
    code, _, err = repkit("match", *pair, "-m", "no-such-model", "-o", pair[1])
    assert code == 2 and "b.png is one of the files to read" in err and pair[1].read_bytes() == before


def test_an_image_that_is_none_and_no_model_are_mistakes(repkit, pair, tmp_path):
    (tmp_path / "c.png").write_text("no image")
    code, _, err = repkit("match", pair[0], tmp_path / "c.png", *MINI)
    assert code == 2 and "c.png" in err
    code, _, err = repkit("match", *pair, "--point", "5,9")
    assert code == 2 and "--preset" in err and "-m" in err


def test_a_list_of_points_names_its_lines(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("x,y\n1,2\n3,z\n")
    with pytest.raises(ValueError, match=r"p.csv, line 3: 'z' is no number"):
        read_points(path)
    path.write_text("x,y\n")
    with pytest.raises(ValueError, match="has no points"):
        read_points(path)
