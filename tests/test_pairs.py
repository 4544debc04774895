"""Readers of pairs of images with points, on small trees in each published layout."""

import csv
import json
import struct
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from repkit.datasets.pairs import Pair, image_size, read_pairs, read_rows
from repkit.datasets.proposal_flow import read_pf_pascal, read_pf_willow
from repkit.datasets.spair import read_spair
from repkit.datasets.tss import dense_points, read_flow, read_tss
from repkit.images import decode


def picture(path: Path, size=(20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def write_csv(path: Path, names: list[str], rows: list[list[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


# --- people's own pairs

OWN = ["source", "target", "x1", "y1", "x2", "y2", "name"]
ROWS: list[list[object]] = [
    ["a.png", "b.png", 0, 0, 1.5, 2, "nose"],
    ["b.png", "a.png", 3, 4, 5, 6, ""],
    ["a.png", "b.png", 19, 9, 19.5, 29, "tail"],
]


@pytest.fixture
def own(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (20, 30))
    return tmp_path


def test_rows_of_the_same_images_are_one_pair(own):
    write_csv(own / "pairs.csv", OWN, ROWS)
    first, second = read_pairs(own)
    assert (first.id, first.source, first.target) == ("a.png>b.png", own / "a.png", own / "b.png")
    np.testing.assert_array_equal(first.source_points, [[0, 0], [19, 9]])
    np.testing.assert_array_equal(first.target_points, [[1.5, 2], [19.5, 29]])
    assert first.names == ("nose", "tail") and second.names == ()
    assert first.source_size == second.target_size == (20, 10) and first.target_size == (20, 30)
    assert first.category is None and first.target_box is None
    assert [pair.id for pair in read_pairs(own / "pairs.csv")] == [first.id, second.id]


def test_a_category_is_that_of_all_rows(own):
    names = [*OWN, "category"]
    write_csv(own / "pairs.csv", names, [[*row, "cat"] for row in ROWS])
    assert [pair.category for pair in read_pairs(own)] == ["cat", "cat"]
    write_csv(own / "pairs.csv", names, [[*row, kind] for row, kind in zip(ROWS, ["cat", "cat", "dog"], strict=True)])
    with pytest.raises(ValueError, match="pairs.csv, line 4: category 'dog', but 'cat' in line 2 for the same two"):
        read_pairs(own)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, -0.6, r"line 2: \(-0.6, 0\) lies outside .*a.png, which has 20x10 pixels"),
        (3, 9.6, r"line 2: \(0, 9.6\) lies outside .*a.png"),
        (4, 20, r"line 2: \(20, 2\) lies outside .*b.png, which has 20x30 pixels"),
        (5, "two", "line 2: 'two' is no number"),
        (5, "", "line 2: '' is no number"),
        (5, "nan", "line 2: 0, 0, 1.5, nan are not all finite"),
        (0, "", "line 2 names no source or no target"),
    ],
)
def test_a_wrong_cell_is_named_with_its_line(own, place, value, message):
    row = [value if index == place else cell for index, cell in enumerate(ROWS[0])]
    write_csv(own / "pairs.csv", OWN, [row, ROWS[1]])
    with pytest.raises(ValueError, match=f"pairs.csv, {message}"):
        read_pairs(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pairs.csv is empty"),
        ("source,target,x1,y1,x2,y2\n", "no pairs in .*pairs.csv"),
        ("source,target,x1,y1\n", "pairs.csv has the columns source, target, x1, y1; it lacks x2, y2"),
        ("source,target,x1,y1,x2,y2\na.png,b.png,1,2,3\n", "pairs.csv, line 2 has 5 cells, and the first line 6"),
        ('source,target,x1,y1,x2,y2\na.png,"b.png\n', "cannot read .*pairs.csv"),
    ],
)
def test_a_list_that_is_none(own, text, message):
    (own / "pairs.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(own)


def test_what_is_not_there_is_named(own):
    with pytest.raises(
        FileNotFoundError, match="no list of pairs .*pairs.csv; write one with a row a point and the co"
    ):
        read_pairs(own)
    with pytest.raises(FileNotFoundError, match="no list of points .*other.csv$"):
        read_rows(own / "other.csv", ["x", "y"], "points")
    rows = [["a.png", "b.png", 1, 1, 1, 1, ""], ["a.png", "lost.png", 1, 1, 1, 1, ""]]
    write_csv(own / "pairs.csv", OWN, rows)
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images of .*pairs.csv are not there: .*lost.png \(line 3\)$"):
        read_pairs(own)


def test_an_image_that_cannot_be_read_has_no_size(own):
    write_csv(own / "pairs.csv", OWN, [["a.png", "broken.png", 1, 1, 99, 99, ""]])
    (own / "broken.png").write_text("no image")
    [pair] = read_pairs(own)
    assert (pair.source_size, pair.target_size) == ((20, 10), None)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_the_size_is_that_of_the_upright_picture(tmp_path, ending, orientation):
    path = tmp_path / f"turned.{ending}"
    Image.new("RGB", (20, 10)).save(path, exif=exif(orientation))
    assert image_size(path) == decode(path).size == ((20, 10) if orientation == 1 else (10, 20))


@pytest.mark.parametrize("mode", ["RGB", "P", "1", "I;16"])
def test_a_png_that_tells_after_its_pixels_which_way_up_it_is(tmp_path, mode):
    path = tmp_path / "turned.png"
    Image.new(mode, (20, 10)).save(path)
    told = b"eXIf" + exif(8).tobytes()
    chunk = struct.pack(">I", len(told) - 4) + told + struct.pack(">I", crc32(told))
    content = path.read_bytes()
    path.write_bytes(content[:-12] + chunk + content[-12:])  # IEND has 12 bytes
    assert image_size(path) == decode(path).size == (10, 20)


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_the_size_of_a_truncated_file_is_that_of_its_header(tmp_path, ending):
    path = tmp_path / f"cut.{ending}"
    Image.effect_noise((200, 100), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="truncated"):
        decode(path)
    assert image_size(path) == (200, 100)


def test_a_pair_must_correspond():
    one, two = np.zeros((1, 2)), np.zeros((2, 2))
    for points, names, message in (
        ((one, two), ("a",), "1 source points, 2 target points, 1 names"),
        ((two, two), ("a",), "2 source points, 2 target points, 1 names"),
        ((one, one * np.nan), ("a",), "not finite"),
        ((two[:0], two[:0]), (), "no points"),
    ):
        with pytest.raises(ValueError, match=f"pair x has .*{message}"):
            Pair("x", Path("a"), Path("b"), *points, names)


# --- SPair-71k


def annotation(category="cat", **changes):
    return {
        "filename": "000001-one-two:cat",
        "src_imname": "one.jpg",
        "trg_imname": "two.jpg",
        "src_imsize": [20, 10, 3],
        "trg_imsize": [30, 10, 3],
        "src_bndbox": [1, 2, 18, 9],
        "trg_bndbox": [3, 2, 28, 9],
        "src_kps": [[2, 3], [4, 5]],
        "trg_kps": [[6, 7], [8, 9]],
        "kps_ids": ["0", "4"],
        "category": category,
        "mirror": 1,
        "viewpoint_variation": 0,
        **changes,
    }


@pytest.fixture
def spair(tmp_path):
    root = tmp_path / "SPair-71k"
    for category in ("cat", "cow"):
        picture(root / "JPEGImages" / category / "one.jpg")
        picture(root / "JPEGImages" / category / "two.jpg", (30, 10))
    for number, category in enumerate(["cow", "cat", "cat"], 1):
        path = root / f"PairAnnotation/test/{number:06d}-one-two:{category}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(annotation(category)))
    (root / "PairAnnotation/val").mkdir()
    return root


def test_spair(spair):
    pairs = read_spair(spair)
    assert [pair.id for pair in pairs] == ["000001-one-two:cow", "000002-one-two:cat", "000003-one-two:cat"]
    first = pairs[0]
    assert first.source == spair / "JPEGImages/cow/one.jpg" and first.target == spair / "JPEGImages/cow/two.jpg"
    np.testing.assert_array_equal(first.source_points, [[2, 3], [4, 5]])
    np.testing.assert_array_equal(first.target_points, [[6, 7], [8, 9]])
    assert first.names == ("0", "4") and first.mirrored
    assert (first.source_box, first.target_box) == ((1, 2, 18, 9), (3, 2, 28, 9))
    assert (first.source_size, first.target_size) == ((20, 10), (30, 10))
    assert [pair.id for pair in read_spair(spair.parent, categories=["cow"])] == [first.id]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"src_kps": [[1, 2]]}, "cat.json: pair .* has 1 source points, 2 target points, 2 names"),
        ({"src_kps": [1, 2]}, r"cat.json: points of shape \[2\]"),
        ({"trg_kps": [[1, 2], [None, 3]]}, "cat.json: pair .* not finite"),
        ({"trg_bndbox": [5, 5, 1, 9]}, r"cat.json: a box \[5, 5, 1, 9\]"),
        ({"trg_bndbox": [5, 5]}, "cat.json: not enough values"),
        ({"src_imsize": []}, "cat.json: list index out of range"),
    ],
)
def test_a_damaged_annotation_is_named(spair, changes, message):
    (spair / "PairAnnotation/test/000002-one-two:cat.json").write_text(json.dumps(annotation(**changes)))
    with pytest.raises(ValueError, match=message):
        read_spair(spair)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cat.json is no JSON"), ("[]", "lacks all"), ("{}", "lacks src_imname")]
)
def test_an_annotation_that_is_none(spair, text, message):
    (spair / "PairAnnotation/test/000002-one-two:cat.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_spair(spair)


def test_what_lacks_in_spair(spair):
    with pytest.raises(FileNotFoundError, match="no folder .*dev; have test, val"):
        read_spair(spair, "dev")
    with pytest.raises(FileNotFoundError, match="give the folder that SPair-71k.tar.gz was unpacked to"):
        read_spair(spair / "JPEGImages")
    with pytest.raises(ValueError, match="no category 'dog'; have cat, cow"):
        read_spair(spair, categories=["dog"])
    with pytest.raises(ValueError, match="no pairs in .*val"):
        read_spair(spair, "val")
    (spair / "JPEGImages/cat/two.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 images .* are not there: .*cat/two.jpg"):
        read_spair(spair)


# --- PF-Pascal

LISTED = ["source_image", "target_image", "class", "XA", "YA", "XB", "YB"]


def listed(*changes: tuple[int, object]) -> list[object]:
    folder = "PF-dataset-PASCAL/JPEGImages"
    row: list[object] = [f"{folder}/one.jpg", f"{folder}/two.jpg", 8, "1;2.5;", "3;4;", "5;6;", "7;8;"]
    return [dict(changes).get(index, cell) for index, cell in enumerate(row)]


@pytest.fixture
def pascal(tmp_path):
    root = tmp_path / "PF-dataset-PASCAL"
    for name, x in (("one", 1), ("two", 5)):
        picture(root / f"JPEGImages/{name}.jpg")
        (root / "Annotations/cat").mkdir(parents=True, exist_ok=True)
        points = np.array([[x, 3], [np.nan, np.nan] if name == "one" else [9, 9], [x + 1, 4], [np.nan, np.nan]])
        savemat(root / f"Annotations/cat/{name}.mat", {"kps": points, "bbox": np.array([[x, 2, x + 8, 9]])})
    write_csv(root / "test_pairs_pf_pascal.csv", LISTED, [listed()])
    return root


def test_pf_pascal(pascal):
    [pair] = read_pf_pascal(pascal.parent)
    assert (pair.source, pair.target) == (pascal / "JPEGImages/one.jpg", pascal / "JPEGImages/two.jpg")
    np.testing.assert_array_equal(pair.source_points, [[1, 3], [2.5, 4]])
    np.testing.assert_array_equal(pair.target_points, [[5, 7], [6, 8]])
    assert (pair.category, pair.names, pair.source_size) == ("cat", ("0", "1"), (20, 10))
    assert (pair.source_box, pair.target_box) == ((1, 2, 9, 9), (5, 2, 13, 9))
    (pascal / "Annotations/cat/two.mat").unlink()
    [pair] = read_pf_pascal(pascal)
    assert pair.source_box == (1, 2, 9, 9) and pair.target_box is None


def test_the_training_list_takes_its_points_from_the_annotations(pascal):
    names = [*LISTED[:3], "flip"]
    rows = [[*listed()[:3], 0], [*listed()[:3], 1]]
    write_csv(pascal.parent / "trn_pairs.csv", names, rows)
    [pair] = read_pf_pascal(pascal, "trn")
    np.testing.assert_array_equal(pair.source_points, [[1, 3], [2, 4]])
    np.testing.assert_array_equal(pair.target_points, [[5, 3], [6, 4]])
    assert pair.names == ("0", "2")
    (pascal / "Annotations/cat/two.mat").unlink()
    with pytest.raises(FileNotFoundError, match="line 2 has no points, and .*two.mat is not there"):
        read_pf_pascal(pascal, "trn")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (listed((2, 21)), "line 2: class 21; have 1 ... 20"),
        (listed((2, "cat")), "line 2: 'cat' is no number"),
        (listed((4, "3;4;5")), "line 2: 2, 3, 2, 2 values in XA, YA, XB, YB"),
        (listed((3, "1;x")), "line 2: 'x' is no number"),
        (listed((6, "")), "line 2: '' is no number"),
    ],
)
def test_a_wrong_line_of_pf_pascal(pascal, row, message):
    write_csv(pascal / "test_pairs_pf_pascal.csv", LISTED, [row])
    with pytest.raises(ValueError, match=message):
        read_pf_pascal(pascal)


def test_what_lacks_in_pf_pascal(pascal):
    with pytest.raises(FileNotFoundError, match="no list val_pairs_pf_pascal.csv or val_pairs.csv in"):
        read_pf_pascal(pascal, "val")
    with pytest.raises(ValueError, match="no split 'dev' of PF-Pascal; have trn, val, test"):
        read_pf_pascal(pascal, "dev")
    with pytest.raises(FileNotFoundError, match="give the folder PF-dataset-PASCAL"):
        read_pf_pascal(pascal / "Annotations")
    with pytest.raises(ValueError, match="no category 'dog'; have cat"):
        read_pf_pascal(pascal, categories=["dog"])
    (pascal / "Annotations/cat/one.mat").write_text("damaged")
    with pytest.raises(ValueError, match="cannot read kps and bbox of .*one.mat"):
        read_pf_pascal(pascal)


# --- PF-Willow


@pytest.fixture
def willow(tmp_path):
    root = tmp_path / "PF-dataset"
    rows = []
    for category in ("car(S)", "duck(S)"):
        names = [f"PF-dataset/{category}/{name}.png" for name in ("one", "two")]
        for name in names:
            picture(tmp_path / name, (60, 60))
        rows.append([*names, *range(40)])
    letters = [f"{axis}{side}{index}" for side in "AB" for axis in "XY" for index in range(1, 11)]
    write_csv(root / "test_pairs_pf.csv", ["imageA", "imageB", *letters], rows)
    return root


def test_pf_willow(willow):
    first, second = read_pf_willow(willow)
    assert first.source == willow / "car(S)/one.png" and (first.category, second.category) == ("car(S)", "duck(S)")
    np.testing.assert_array_equal(first.source_points, [[index, 10 + index] for index in range(10)])
    np.testing.assert_array_equal(first.target_points, [[20 + index, 30 + index] for index in range(10)])
    assert (first.source_box, first.target_box) == ((0, 10, 9, 19), (20, 30, 29, 39))
    assert [pair.id for pair in read_pf_willow(willow.parent, categories=["duck(S)"])] == [second.id]


def test_a_wrong_line_of_pf_willow(willow):
    write_csv(willow / "test_pairs_pf.csv", ["imageA", "imageB", "XA"], [["a", "b", 1]])
    with pytest.raises(ValueError, match="line 2 has 3 cells; it needs two images, then XA, YA, XB and YB of 10"):
        read_pf_willow(willow)


# --- TSS


def write_flow(path: Path, flow: np.ndarray) -> None:
    height, width = flow.shape[:2]
    path.write_bytes(struct.pack("<fii", 202021.25, width, height) + flow.astype("<f4").tobytes())


@pytest.fixture
def tss(tmp_path):
    for group, name, mark in (("FG3DCar", "001_005", "0"), ("PASCAL", "bike_01_03", "1\n")):
        folder = tmp_path / group / name
        picture(folder / "image1.png", (4, 3))
        picture(folder / "image2.png", (6, 3))
        (folder / "flip_gt.txt").write_text(mark)
        for number, width in ((1, 4), (2, 6)):
            flow = np.full((3, width, 2), 1e10)
            flow[1, 2], flow[2, 0] = (0.5, -1), (number, 0)
            write_flow(folder / f"flow{number}.flo", flow)
    return tmp_path


def test_tss(tss):
    pairs = read_tss(tss)
    assert [pair.id for pair in pairs] == [
        *("FG3DCar/001_005/1to2", "FG3DCar/001_005/2to1"),
        *("PASCAL/bike_01_03/1to2", "PASCAL/bike_01_03/2to1"),
    ]
    assert [pair.mirrored for pair in pairs] == [False, False, True, True]
    back = pairs[1]
    assert (back.source.name, back.target.name, back.target_size) == ("image2.png", "image1.png", (4, 3))
    assert len(back.source_points) == 0
    dense = dense_points(back)
    np.testing.assert_array_equal(dense.source_points, [[2, 1], [0, 2]])
    np.testing.assert_array_equal(dense.target_points, [[2.5, 0], [2, 2]])
    np.testing.assert_array_equal(dense_points(back, 2).source_points, [[0, 2]])
    assert {pair.category for pair in read_tss(tss, categories=["PASCAL"])} == {"PASCAL"}


def test_a_flow_file_says_what_is_wrong_with_it(tss):
    path = tss / "FG3DCar/001_005/flow1.flo"
    flow = read_flow(path)
    assert flow.shape == (3, 4, 2) and np.isfinite(flow).all(-1).sum() == 2
    pair = read_tss(tss)[0]
    with pytest.raises(ValueError, match=r"\(width, height\) \(4, 3\), and .*image1.png has \(5, 3\)"):
        dense_points(replace(pair, source_size=(5, 3)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="flow1.flo has 107 bytes, and 4x3 pixels take 108"):
        dense_points(pair)
    path.write_bytes(b"PIEH")
    with pytest.raises(ValueError, match="flow1.flo is no .flo file"):
        read_flow(path)


def test_what_lacks_in_tss(tss):
    with pytest.raises(FileNotFoundError, match="no folders in FG3DCar, JODS, PASCAL"):
        read_tss(tss / "PASCAL")
    (tss / "PASCAL/bike_01_03/flow2.flo").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 flows of .* are not there: .*flow2.flo"):
        read_tss(tss)


def test_only_pairs_with_a_flow_have_dense_points(spair):
    with pytest.raises(ValueError, match="has no flow; it has 2 points of its own"):
        dense_points(read_spair(spair)[0])
