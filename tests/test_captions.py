"""Readers of compositional benchmarks, on small trees in each published layout."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from repkit.datasets.captions import Example, read_captions
from repkit.datasets.selfbench import read_selfbench
from repkit.datasets.winoground import read_winoground
from repkit.images import decode

OBJECTS = ["bench", "cat", "dog"]
MANY = ["cattle", *(f"thing{n:02d}" for n in range(58)), "bench", "cat"]
COLORS = ["red", "green", "blue"]
NUMBERS = ["one", "two", "three"]
PLACES = ["left of", "right of", "above", "below"]


def write_picture(path: Path, seed: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


# --- Example


@pytest.mark.parametrize(
    ("images", "captions", "right"),
    [
        (1, 1, (0,)),  # nothing to choose
        (0, 2, ()),
        (1, 0, (0,)),
        (1, 2, (2,)),
        (1, 2, (-1,)),
        (1, 2, (None,)),
        (2, 2, (0,)),
        (2, 2, (1, 1)),
    ],
)
def test_an_example_must_have_a_choice_and_an_answer(images, captions, right):
    with pytest.raises(ValueError, match=f"example x has {images} images, {captions} captions"):
        Example("x", (b"",) * images, ("a",) * captions, right)


@pytest.mark.parametrize(("images", "captions", "right"), [(1, 2, (1,)), (2, 2, (1, 0)), (3, 1, (None, 0, None))])
def test_an_example_can_ask_either_way(images, captions, right):
    assert Example("x", (b"",) * images, ("a", "b")[:captions], right).right == right


def test_captions_that_are_the_same_cannot_be_told_apart():
    with pytest.raises(ValueError, match="example x has the caption 'a' more than once; give each once"):
        Example("x", (b"",), ("a", "b", "a"), (1,))


# --- lists


def test_a_list_of_choices(tmp_path):
    for name in ("a.png", "deep/b.png"):
        write_picture(tmp_path / name)
    rows = [
        {"id": "007", "image": "a.png", "caption_0": 'a "cat", left', "caption_1": "NA", "right": "1", "tag": "place"},
        {"image": "deep/b.png", "caption_0": "null\nand void", "caption_1": "b", "caption_2": "c", "caption_10": "k"},
    ]
    first, second = read_captions(write_csv(tmp_path / "list.csv", rows))
    assert first == Example("007", (tmp_path / "a.png",), ('a "cat", left', "NA"), (1,), ("place",))
    assert second == Example("1", (tmp_path / "deep/b.png",), ("null\nand void", "b", "c", "k"), (0,))


def test_a_list_of_pairs_keeps_their_order_and_distractors(tmp_path):
    for name in "abcde":
        write_picture(tmp_path / f"{name}.png")
    rows = [
        {"pair": "p", "image": "b.png", "caption": "one", "tag": "swap"},
        {"pair": "q", "image": "c.png", "caption": ""},
        {"pair": "p", "image": "a.png", "caption": "two", "tag": "swap"},
        {"pair": "q", "image": "d.png", "caption": "three"},
        {"pair": "q", "image": "e.png", "caption": ""},
    ]
    p, q = read_captions(write_csv(tmp_path / "list.csv", rows))
    assert p == Example("p", (tmp_path / "b.png", tmp_path / "a.png"), ("one", "two"), (0, 1), ("swap",))
    assert q == Example("q", tuple(tmp_path / f"{name}.png" for name in "cde"), ("three",), (None, 0, None))


def test_parquet_holds_captions_in_a_list_and_images_as_bytes(tmp_path):
    content = write_picture(tmp_path / "a.png")
    rows = [
        {"image": {"bytes": content, "path": "x.png"}, "captions": ["a", "b"], "right": 1, "id": 3},
        {"image": {"bytes": None, "path": "a.png"}, "captions": ["c", "d", "e"], "right": None, "id": 4},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    assert read_captions(tmp_path / "list.parquet") == [
        Example("3", (content,), ("a", "b"), (1,)),
        Example("4", (tmp_path / "a.png",), ("c", "d", "e"), (0,)),
    ]
    pq.write_table(
        pa.Table.from_pylist([{"image": content, "caption_0": "a", "caption_1": "b"}]), tmp_path / "b.parquet"
    )
    assert read_captions(str(tmp_path / "b.parquet")) == [Example("0", (content,), ("a", "b"), (0,))]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows; it needs image"),
        ([{"path": "a.png", "caption_0": "a"}], "has the columns path, caption_0; it needs image"),
        ([{"image": "a.png", "right": 0}], "has the columns image, right; it needs image with caption_0, caption_1"),
        ([{"image": "a.png", "pair": 1, "caption_0": "a"}], "image, pair, caption_0; it needs .* pair and caption"),
        (
            [{"image": "a.png", "caption_0": "a", "caption_1": "a"}],
            "row 1: example 0 has the caption 'a' more than once",
        ),
        ([{"image": "a.png", "pair": "p", "caption": "a"}] * 2, "pair p: example p has the caption 'a' more than once"),
        ([{"image": "", "caption_0": "a", "caption_1": "b"}], "row 1: no image in ''"),
        ([{"image": "a.png", "caption_0": "a", "caption_1": ""}], "row 1: example 0 has 1 images, 1 captions"),
        ([{"image": "a.png", "caption_0": "", "caption_1": "b"}], "row 1: a caption is missing before the last"),
        ([{"image": "a.png", "caption_0": "a", "caption_1": "b", "right": "b"}], "row 1: invalid literal"),
        ([{"image": "a.png", "caption_0": "a", "caption_1": "b", "right": 2}], "row 1: .*right=.2."),
        ([{"image": "a.png", "caption_0": "a", "caption_1": "b", "id": 1}] * 2, "1 ids occur more than once.*: 1"),
        ([{"image": "a.png", "pair": "", "caption": "a"}], "row 1 has no pair"),
        ([{"image": "a.png", "pair": "p", "caption": "a"}], "pair p: example p has 1 images"),
    ],
)
def test_a_bad_list_names_its_row(tmp_path, rows, message):
    write_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        read_captions(write_csv(tmp_path / "list.csv", rows))


def test_examples_may_share_captions_and_images(tmp_path):
    write_picture(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption_0": "a", "caption_1": "b"}] * 2
    first, second = read_captions(write_csv(tmp_path / "list.csv", rows))
    assert (first.id, second.id) == ("0", "1") and first.captions == second.captions


def test_lists_that_cannot_be_read_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no list"):
        read_captions(tmp_path / "none.csv")
    for name, content in {"a.txt": b"x", "b.parquet": b"x", "c.csv": b"image\n\xff"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_captions(tmp_path / name)
    rows = [{"image": f"{n}.png", "caption_0": "a", "caption_1": "b"} for n in range(5)]
    write_picture(tmp_path / "0.png")
    with pytest.raises(FileNotFoundError, match="4 of 5 images .* are not there: .*1.png"):
        read_captions(write_csv(tmp_path / "list.csv", rows))


# --- Winoground


def winoground_rows() -> list[dict[str, object]]:
    tags = [("Object", "", 1, "Noun"), ("Relation", "Morpheme-Level", 2, "Verb"), ("Both", "Series", 1, "Noun, Verb")]
    return [
        {
            "id": n,
            "image_0": f"ex_{n}_img_0",
            "image_1": f"ex_{n}_img_1",
            "caption_0": f"some plants surrounding bulb {n}",
            "caption_1": f"a bulb surrounding some plants {n}",
            "tag": tag,
            "secondary_tag": secondary,
            "num_main_preds": predicates,
            "collapsed_tag": collapsed,
        }
        for n, (collapsed, secondary, predicates, tag) in enumerate(tags)
    ]


def write_winoground(root: Path) -> Path:
    """As the hub has it: examples.jsonl names images without their suffix; images.zip is unpacked."""
    for n in range(3):
        for image in range(2):
            write_picture(root / "data" / "images" / f"ex_{n}_img_{image}.png", 2 * n + image)
    lines = "\n".join(json.dumps(row) for row in winoground_rows())
    (root / "data" / "examples.jsonl").write_text(lines + "\n")
    return root


def test_winoground_as_published(tmp_path):
    root = write_winoground(tmp_path)
    examples = read_winoground(root)
    assert examples == read_winoground(root / "data")
    images = tuple(root / "data" / "images" / f"ex_1_img_{n}.png" for n in range(2))
    captions = ("some plants surrounding bulb 1", "a bulb surrounding some plants 1")
    assert examples[1] == Example("1", images, captions, (0, 1), ("Relation", "Morpheme-Level", "2 main predicates"))
    assert [example.tags for example in examples][::2] == [
        ("Object", "1 main predicate"),
        ("Both", "Series", "1 main predicate"),
    ]
    assert read_winoground(root, fine=True)[2].tags == ("Both", "Series", "1 main predicate", "Noun, Verb")


def test_winoground_as_parquet(tmp_path):
    root = write_winoground(tmp_path / "published")
    rows = winoground_rows()
    for row in rows:
        for name in ("image_0", "image_1"):
            content = (root / "data" / "images" / f"{row[name]}.png").read_bytes()
            row[name] = {"bytes": content, "path": f"{row[name]}.png"}
    (tmp_path / "data").mkdir()
    for first, last in ((0, 2), (2, 3)):
        pq.write_table(pa.Table.from_pylist(rows[first:last]), tmp_path / "data" / f"test-{first}.parquet")
    found = read_winoground(tmp_path)
    for example, published in zip(found, read_winoground(root), strict=True):
        assert (example.id, example.captions, example.tags) == (published.id, published.captions, published.tags)
        pixels = [[decode(image).tobytes() for image in one.images] for one in (example, published)]
        assert pixels[0] == pixels[1]
    assert len(read_winoground(tmp_path / "data" / "test-0.parquet")) == 2


def test_bad_winoground_trees_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Winoground in .*facebook/winoground"):
        read_winoground(tmp_path)
    root = write_winoground(tmp_path)
    lines = (root / "data" / "examples.jsonl").read_text()
    (root / "data" / "images" / "ex_2_img_1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 6 images .*ex_2_img_1.png"):
        read_winoground(root)
    (root / "data" / "images").rename(root / "elsewhere")
    (root / "data" / "images.zip").touch()
    with pytest.raises(FileNotFoundError, match="unpack images.zip"):
        read_winoground(root)
    (root / "elsewhere").rename(root / "data" / "images")
    for damage, message in (
        (lines.replace("caption_1", "caption_2"), "lacks caption_1"),
        (lines + "{", "line 4 is no"),
    ):
        (root / "data" / "examples.jsonl").write_text(damage)
        with pytest.raises(ValueError, match=message):
            read_winoground(root)


# --- Self-Bench


def zero_shot_prompts(objects: list[str]) -> dict[str, object]:
    """Every candidate of every task, built as GenEval writes its prompts."""
    pairs = [(a, b) for a in objects for b in objects]

    def nested(write):
        return {a: {b: write(a, b) for b in objects} for a in objects}

    return {
        "photo": {
            "single_object": [f"a photo of a {a}" for a in objects],
            "two_object": [f"a photo of a {a} and a {b}" for a, b in pairs],
            "counting": {a: [f"a photo of {number} {a}s" for number in NUMBERS] for a in objects},
            "colors": {a: [f"a photo of a {color} {a}" for color in COLORS] for a in objects},
            "position": nested(lambda a, b: [f"a photo of a {a} {place} a {b}" for place in PLACES]),
            "color_attr": nested(lambda a, b: [f"a photo of a {c} {a} and a {d} {b}" for c in COLORS for d in COLORS]),
        }
    }


PROMPTS = {
    "single_object": ("a photo of a cat", ["cat"]),
    "two_object": ("a photo of a bench and a cat", ["bench", "cat"]),
    "colors": ("a photo of a blue cat", ["cat"]),
    "color_attr": ("a photo of a red bench and a green cat", ["bench", "cat"]),
    "position": ("a photo of a cat above a bench", ["bench", "cat"]),  # the one it is relative to comes first
    "counting": ("a photo of two cats", ["cat"]),
}


def write_selfbench(
    root: Path, generator: str = "stable-diffusion-v1-5", samples: int = 2, objects: list[str] = OBJECTS
) -> Path:
    for number, (task, (prompt, classes)) in enumerate(PROMPTS.items()):
        folder = root / "9.0" / generator / f"{number:05d}"
        for sample in range(samples):
            write_picture(folder / "samples" / f"{sample:05d}.png", 10 * number + sample)
        told = {"tag": task, "include": [{"class": name, "count": 1} for name in classes], "prompt": prompt}
        (folder / "metadata.jsonl").write_text(json.dumps(told))
    (root / "prompts").mkdir(exist_ok=True)
    (root / "prompts" / "zero_shot_prompts.json").write_text(json.dumps(zero_shot_prompts(objects)))
    return root


def write_labels(path: Path, labels: dict[str, object]) -> None:
    """Entries by sample; a list is what several annotators said, a string what the only one did."""
    path.parent.mkdir(exist_ok=True)
    entries = []
    for name, said in labels.items():
        entry = {"sample_path": f"/cluster/outputs/9.0/stable-diffusion-v1-5/{name}", "original_prompt": "", "tag": ""}
        many = {"labels": [{"annotator": n, "label": one} for n, one in enumerate(said)]}
        entries.append(entry | ({"human_label": said} if isinstance(said, str) else many))
    path.write_text(json.dumps(entries))


def test_selfbench_gives_each_task_its_candidates(tmp_path):
    examples = read_selfbench(write_selfbench(tmp_path))
    assert [example.id for example in examples[:2]] == ["00000/samples/00000.png", "00000/samples/00001.png"]
    assert len(examples) == 12 and all(len(example.images) == 1 for example in examples)
    by_task = {example.tags[0]: example for example in examples}
    assert {task: len(example.captions) for task, example in by_task.items()} == {
        "single_object": 3,
        "two_object": 5,
        "colors": 3,
        "color_attr": 9,
        "position": 4,
        "counting": 3,
    }
    for task, (prompt, _) in PROMPTS.items():
        assert by_task[task].captions[by_task[task].right[0]] == prompt
    assert by_task["position"].captions == tuple(f"a photo of a cat {place} a bench" for place in PLACES)
    assert by_task["colors"].captions == tuple(f"a photo of a {color} cat" for color in COLORS)


def test_two_objects_are_told_from_those_that_share_one(tmp_path):
    examples = read_selfbench(write_selfbench(tmp_path, objects=MANY))
    captions = next(example.captions for example in examples if example.tags == ("two_object",))
    others = set(captions) - {"a photo of a bench and a cat"}
    same_first = {caption for caption in others if caption.startswith("a photo of a bench and ")}
    same_second = {caption for caption in others if caption.endswith(" and a cat")}
    assert len(same_first) == len(same_second) == 50 and same_first | same_second == others
    # in the list's order: its first fifty, of those with the first object without any that has "cat" in it
    assert same_first == {f"a photo of a bench and a {name}" for name in MANY[1:51]}
    assert same_second == {f"a photo of a {name} and a cat" for name in MANY[:50]}


def test_correct_images_are_those_on_which_the_annotators_agree(tmp_path):
    root = write_selfbench(tmp_path)
    labels = {
        "00000/samples/00000.png": ["original_good", "original_good"],
        "00000/samples/00001.png": ["original_good", "original_bad"],
        "00001/samples/00000.png": "original_good",
        "00001/samples/00001.png": "original_bad",
        "00002/samples/00000.png": [],
    }
    write_labels(root / "filter" / "SD-1.5-CFG=9.json", labels)
    kept = [example.id for example in read_selfbench(root, correct=True)]
    assert kept == ["00000/samples/00000.png", "00001/samples/00000.png"]


def test_one_good_label_is_enough_where_not_all_labelled_all(tmp_path):
    root = write_selfbench(tmp_path, "stable-diffusion-3-medium-diffusers")
    labels = {"00000/samples/00000.png": ["unlabelled", "original_good"], "00000/samples/00001.png": ["unlabelled"]}
    write_labels(root / "filter" / "SD-3-m-CFG=9.json", labels)
    assert [example.id for example in read_selfbench(root, correct=True)] == ["00000/samples/00000.png"]


def test_the_generator_is_chosen_where_there_are_several(tmp_path):
    images = write_selfbench(tmp_path / "images", samples=1)
    write_selfbench(tmp_path / "images", "FLUX.1-dev", samples=1)
    with pytest.raises(ValueError, match="several .* generator .*choose one of FLUX.1-dev, stable-diffusion-v1-5"):
        read_selfbench(images)
    with pytest.raises(ValueError, match="no 'sd' of the kind generator"):
        read_selfbench(images, generator="sd")
    with pytest.raises(ValueError, match="no '3.0' of the kind guidance scale.*choose one of 9.0"):
        read_selfbench(images, cfg="3.0")
    (images / "prompts").rename(tmp_path / "prompts")  # the published archive has them beside the images
    examples = read_selfbench(images, generator="FLUX.1-dev", cfg="9.0")
    assert len(examples) == 6 and "FLUX.1-dev" in str(examples[0].images[0])


def test_bad_selfbench_trees_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no guidance scale in .*published"):
        read_selfbench(tmp_path)
    root = write_selfbench(tmp_path)
    with pytest.raises(FileNotFoundError, match="no filter/SD-1.5-CFG=9.json"):
        read_selfbench(root, correct=True)
    write_labels(root / "filter" / "SD-1.5-CFG=9.json", {})
    with pytest.raises(ValueError, match="no example"):
        read_selfbench(root, correct=True)
    (root / "filter" / "SD-1.5-CFG=9.json").write_text('[{"sample_path": "x"}]')
    with pytest.raises(ValueError, match="an entry has no 'human_label'"):
        read_selfbench(root, correct=True)
    told = root / "9.0" / "stable-diffusion-v1-5" / "00002" / "metadata.jsonl"
    for damage, message in (("{", "is damaged"), ('{"tag": "colors"}', "do not go together .*'prompt'")):
        told.write_text(damage)
        with pytest.raises(ValueError, match=message):
            read_selfbench(root)
    told.write_text(json.dumps({"tag": "colors", "prompt": "a photo of a mauve cat", "include": [{"class": "cat"}]}))
    with pytest.raises(ValueError, match="do not go together"):
        read_selfbench(root)
    (root / "prompts" / "zero_shot_prompts.json").unlink()
    with pytest.raises(FileNotFoundError, match="no prompts/zero_shot_prompts.json"):
        read_selfbench(root)
