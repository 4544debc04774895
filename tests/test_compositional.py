"""Matching images with captions: scores against truth tables, errors against a plain loop, and a Gaussian oracle."""

import json
from io import BytesIO
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from repkit import cli, zoo
from repkit.datasets.captions import Example
from repkit.heads.pair_scores import chance, evidence, matched, picks_right
from repkit.images import digest, to_uint8
from repkit.noise import noise_like
from repkit.tasks.caption_scores import SCORES, score_captions
from repkit.tasks.compositional import evaluate_captions, report
from repkit.tasks.judging import Judge, distinct_conditions
from tests import tiny, tiny_sit
from tests.oracles import class_means, gaussian_backbone, gaussian_images
from tests.test_captions import write_picture, write_selfbench, write_winoground
from tests.tiny_sd import sd_pipeline

VARIANCE = 0.01
MEANS = class_means(4, spread=0.1)
NAMES = ["class 0", "class 1", "class 2", "class 3"]


def png(pixels: np.ndarray) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def gaussian_pngs(labels: list[int], seed: int = 0, variance: float = VARIANCE) -> list[bytes]:
    return [png(image) for image in to_uint8(gaussian_images(MEANS, variance, torch.tensor(labels), seed=seed))]


def judge(evaluations: int = 4, **options) -> Judge:
    return Judge(gaussian_backbone("eps", MEANS, VARIANCE), evaluations, **options)


def count_forwards(one: Judge) -> list[int]:
    """Rows of each forward from now on."""
    rows: list[int] = []
    one.backbone.model.register_forward_hook(lambda module, args, out: rows.append(len(args[0])), with_kwargs=False)
    return rows


def examples() -> list[Example]:
    """Two pairs and one image with three captions."""
    first, second, third, fourth, alone = gaussian_pngs([0, 1, 2, 3, 1])
    return [
        Example("pair 0", (first, second), ("class 0", "class 1"), (0, 1), ("near", "even")),
        Example("alone", (alone,), ("class 0", "class 3", "class 1"), (2,), ("far",)),
        Example("pair 1", (third, fourth), ("class 3", "class 2"), (1, 0), ("far", "odd")),
    ]


# --- scores


def test_all_orders_and_ties_of_four_scores_follow_the_definition():
    seen = set()
    for c0_i0, c1_i0, c0_i1, c1_i1 in product(range(4), repeat=4):
        text = c0_i0 > c1_i0 and c1_i1 > c0_i1
        image = c0_i0 > c0_i1 and c1_i1 > c1_i0
        expected = {"text": text, "image": image, "group": text and image}
        scores = np.array([[c0_i0, c1_i0], [c0_i1, c1_i1]], dtype=float)
        assert matched(scores, (0, 1)) == expected
        assert matched(scores[:, ::-1], (1, 0)) == expected  # captions in the other order
        assert matched(scores[::-1], (1, 0)) == expected  # images in the other order
        seen.add(tuple(np.unique([c0_i0, c1_i0, c0_i1, c1_i1], return_inverse=True)[1].tolist()))
    assert len(seen) == 75  # the weak orders of four things


@pytest.mark.parametrize(
    ("scores", "text", "image"),
    [
        ([[2, 1], [1, 2]], True, True),
        ([[2, 1], [2, 3]], True, False),  # the second image fits both captions better or as well
        ([[2, 2], [1, 3]], False, True),  # a tie fails
        ([[1, 2], [0, 3]], False, True),
        ([[1, 0], [3, 4]], True, False),
        ([[0, 0], [0, 0]], False, False),
        ([[0, 1], [1, 0]], False, False),
    ],
)
def test_a_table_made_by_hand(scores, text, image):
    found = matched(np.array(scores, dtype=float), (0, 1))
    assert found == {"text": text, "image": image, "group": text and image}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_of_many_must_beat_all_others(count):
    for scores in product(range(count), repeat=count):
        for right in range(count):
            others = [score for place, score in enumerate(scores) if place != right]
            row, answer = np.array([scores], dtype=float), np.array([right])
            assert picks_right(row, answer).tolist() == [scores[right] > max(others)]
            assert matched(row, (right,)) == {"text": scores[right] > max(others)}
            only = tuple(0 if place == right else None for place in range(count))
            assert matched(row.T, only) == {"image": scores[right] > max(others)}


@pytest.mark.parametrize(
    ("images", "captions", "right"),
    [(1, 2, (0,)), (1, 5, (3,)), (4, 1, (None, 0, None, None)), (2, 2, (0, 1)), (3, 2, (1, None, 0)), (2, 3, (2, 0))],
)
def test_chance_is_what_all_orders_give_on_average(images, captions, right):
    outcomes = [
        matched(np.array(order, dtype=float).reshape(images, captions), right)
        for order in permutations(range(images * captions))
    ]
    expected = {name: np.mean([outcome[name] for outcome in outcomes]) for name in outcomes[0]}
    found = chance(images, captions, sum(place is not None for place in right))
    if (images, captions) != (2, 2):
        expected.pop("group", None)
    assert found == pytest.approx(expected)


def test_evidence_takes_off_what_an_image_has_without_a_caption():
    errors = np.array([[1.0, 2.0], [10.0, 9.0]])
    np.testing.assert_array_equal(evidence(errors), [[-1, -2], [-10, -9]])
    np.testing.assert_array_equal(evidence(errors, np.array([3.0, 12.0])), [[2, 1], [2, 3]])


# --- errors


@pytest.fixture(scope="module")
def pipeline():
    return sd_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-sd"
    pipeline.save_pretrained(path)
    return path


@torch.no_grad()
def test_errors_equal_a_plain_loop_over_diffusers_modules(pipeline, folder):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    captions = ["a cat on a dog", "a dog on a cat"]
    found = Judge(zoo.load(folder), 5, seed=3, batch_size=4).errors(png(pixels), captions, null=True)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    config = pipeline.vae.config
    x0 = (pipeline.vae.encode(image).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    for error, text in zip(found, [*captions, ""], strict=True):
        tokens = pipeline.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        states = pipeline.text_encoder(tokens)[0]
        losses = []
        for t in (100, 300, 500, 700, 900):
            eps = noise_like(x0.shape[1:], seed=3, digest=digest(pixels), t=t, draw=0)[None]
            kept = pipeline.scheduler.alphas_cumprod[t]
            guess = pipeline.unet(kept.sqrt() * x0 + (1 - kept).sqrt() * eps, t, states).sample
            losses.append(((eps - guess) ** 2).sum().item())
        assert error == pytest.approx(np.mean(losses), rel=1e-4)


def test_captions_that_are_the_same_to_the_network_tie(folder):
    backbone = zoo.load(folder)
    long = "x" * 100
    _, place = distinct_conditions(backbone, ["a cat", f"{long} cat", "a cat", f"{long} dog", "", None])
    assert place == [0, 1, 0, 1, 2, 2]  # cut at 77 tokens; Stable Diffusion's null prompt is the empty one
    content = png(np.zeros((16, 16, 3), np.uint8))
    errors = Judge(backbone, 2).errors(content, ["a cat", "a dog", "a cat"], null=False)
    assert errors[0] == errors[2] != errors[1] and len(errors) == 3
    assert matched(evidence(errors[None]), (0,)) == {"text": False}


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_batching_does_not_matter(batch_size):
    content = gaussian_pngs([2])[0]
    reference = judge().errors(content, NAMES, True)
    np.testing.assert_allclose(judge(batch_size=batch_size).errors(content, NAMES, True), reference, rtol=1e-6)


def test_other_losses_and_weightings_are_other_errors():
    content = gaussian_pngs([2])[0]
    given = [{}, {"loss": "l1"}, {"loss": "huber"}, {"weighting": "elbo"}, {"seed": 1}]
    found = {judge(**options).errors(content, NAMES, False)[0] for options in given}
    assert len(found) == len(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": 0}, "give at least 1"),
        ({"batch_size": 0}, "give at least 1"),
        ({"loss": "l3"}, "no loss 'l3'; have l2, l1, huber"),
        ({"weighting": "best"}, "no weighting 'best'"),
    ],
)
def test_bad_settings_are_told_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        judge(**options)


# --- the oracle: images of one class each, but some lie far from every class


def log_densities(pixels: np.ndarray) -> torch.Tensor:
    """log p(image | class), up to a constant."""
    x0 = torch.from_numpy(pixels).double().permute(0, 3, 1, 2) / 127.5 - 1
    return -((x0[:, None] - MEANS.double()) ** 2).flatten(2).sum(2) / (2 * VARIANCE)


def at_distance(label: int, distance: float, seed: int) -> np.ndarray:
    """An image that far from its class's mean, across all that tells the classes apart."""
    noise = torch.randn(48, generator=torch.Generator().manual_seed(seed))
    basis, _ = torch.linalg.qr(MEANS.flatten(1).T)
    noise = noise - basis @ (basis.T @ noise)
    x0 = MEANS[label] + distance * (noise / noise.norm()).reshape(MEANS[label].shape)
    return to_uint8(((x0 + 1) / 2)[None].clamp(0, 1))[0]


def test_images_are_told_apart_only_when_their_own_likelihood_is_taken_off():
    one = judge(16, weighting="elbo")
    for seed, (a, b) in enumerate(permutations(range(4), 2)):
        pixels = np.stack([at_distance(a, 0.2, seed), at_distance(b, 1.6, 100 + seed)])
        density = log_densities(pixels)
        own = density.logsumexp(1, keepdim=True)  # the even mixture, which the null prompt stands for
        assert all(matched((density - own)[:, [a, b]].numpy(), (0, 1)).values())
        # the likely image has the higher density under both captions
        assert not matched(density[:, [a, b]].numpy(), (0, 1))["image"]
        found = np.stack([one.errors(png(image), [NAMES[a], NAMES[b]], null=True) for image in pixels])
        assert matched(evidence(found[:, :2], found[:, 2]), (0, 1)) == {"text": True, "image": True, "group": True}
        assert matched(evidence(found[:, :2]), (0, 1)) == {"text": True, "image": False, "group": False}


# --- runs


def test_a_run_writes_every_score(tmp_path):
    found = evaluate_captions(examples(), judge(16), tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / SCORES)
    assert table.num_rows == 4 + 3 + 4
    rows = table.to_pylist()
    assert rows[4]["id"] == "alone" and rows[4]["null_error"] is None and rows[4]["tags"] == ["far"]
    assert [row["right"] for row in rows] == [bool(int(one)) for one in "10010010110"]
    content = examples()[2].images[1]
    np.testing.assert_array_equal(
        [row["error"] for row in rows[9:]] + [rows[9]["null_error"]],
        judge(16).errors(content, ["class 3", "class 2"], True),
    )
    assert {tag: {name: share.n for name, share in of.items()} for tag, of in found.shares.items()} == {
        "near": {"text": 1, "image": 1, "group": 1},
        "even": {"text": 1, "image": 1, "group": 1},
        "far": {"text": 2, "image": 1, "group": 1},
        "odd": {"text": 1, "image": 1, "group": 1},
        "all": {"text": 3, "image": 2, "group": 2},
    }
    assert all(share.score == 1 for of in found.shares.values() for share in of.values())
    assert found.shares["far"]["text"].chance == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert found.shares["all"]["group"].chance == pytest.approx(1 / 6)
    assert not found.means and not found.failures


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    evaluate_captions(examples(), judge(), tmp_path / "whole")

    def stop(done: int, total: int, failed: int, words: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_captions(examples(), judge(), tmp_path / "out", progress=stop)
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 3
    (tmp_path / "out" / "part-000003.parquet.part").write_bytes(b"half")  # a kill in the middle of a write
    again, told = judge(), []
    rows = count_forwards(again)
    evaluate_captions(examples(), again, tmp_path / "out", progress=lambda *counts: told.append(counts))
    assert sum(rows) == 4 * (3 + 3)  # two images, each with two captions and none, at four levels
    assert told == [(3, 5, 0, ""), (4, 5, 0, ""), (5, 5, 0, "")]
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    rows.clear()
    first = evaluate_captions(examples(), again, tmp_path / "out")
    assert not rows and first == evaluate_captions(examples(), judge(), tmp_path / "whole")


def test_scores_of_something_else_are_not_mixed_in(tmp_path):
    evaluate_captions(examples(), judge(), tmp_path / "out")
    for other, asked, what in (
        (judge(5), examples(), "evaluations: 5 here, 4 there"),
        (judge(seed=1), examples(), "seed: 1 here, 0 there"),
        (judge(), examples()[:2], "examples: "),
    ):
        with pytest.raises(ValueError, match=f"scores of something else; choose another folder .*{what}"):
            evaluate_captions(asked, other, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").touch()
    with pytest.raises(ValueError, match="has files that are no scores"):
        evaluate_captions(examples(), judge(), tmp_path / "mine")


def test_an_image_that_cannot_be_read_is_left_out_and_tried_again(tmp_path, caplog):
    path = tmp_path / "a.png"
    path.write_bytes(b"no image")
    first, *others = examples()
    asked = [Example("broken", (path, first.images[1]), first.captions, (0, 1)), *others]
    found = evaluate_captions(asked, judge(), tmp_path / "out")
    assert list(found.failures) == ["image 0 of broken"] and "a.png" in found.failures["image 0 of broken"]
    assert found.shares["all"]["text"].n == 2
    path.write_bytes(first.images[0])
    again = judge()
    rows = count_forwards(again)
    found = evaluate_captions(asked, again, tmp_path / "out")
    assert sum(rows) == 4 * 3 and found.shares["all"]["text"].n == 3 and not found.failures
    whole = evaluate_captions(asked, judge(), tmp_path / "whole")
    assert (tmp_path / "out" / SCORES).read_bytes() == (tmp_path / "whole" / SCORES).read_bytes()
    assert found == whole


def test_captions_the_network_cannot_be_told_stop_the_run(tmp_path):
    asked = [Example("x", tuple(gaussian_pngs([0])), ("a cat", "a dog"), (0,))]
    with pytest.raises(ValueError, match="no class 'a cat'"):
        evaluate_captions(asked, judge(), tmp_path / "out")


def test_the_mean_over_tags_weighs_tasks_alike(tmp_path):
    pictures = gaussian_pngs([0, 1, 2])
    asked = [
        Example(f"{n}", (picture,), ("class 0", "class 1", "class 2"), (right,), (tag,))
        for n, (picture, right, tag) in enumerate(zip(pictures, (0, 1, 0), "xxy", strict=True))
    ]
    found = evaluate_captions(asked, judge(16), tmp_path / "out")
    assert [found.shares[tag]["text"].correct for tag in ("x", "y", "all")] == [2, 0, 2]
    assert found.means == {"text": 0.5}
    table = score_captions(asked, judge(16), tmp_path / "out").table
    assert report(asked, table, {}) == found


# --- the command


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", *map(str, arguments)])
    return stop.value.code, *capsys.readouterr()


def test_winoground_from_the_command_line(folder, tmp_path, capsys):
    root, out = write_winoground(tmp_path / "winoground"), tmp_path / "out"
    options = [root, "-m", folder, "-o", out, "--evaluations", 3]
    code, printed, told = run(capsys, "winoground", *options)
    lines = printed.splitlines()
    assert code == 0 and "3 examples with 6 images" in told and "6/6" in told
    assert (
        lines[0].split()
        == "n text 95 % interval chance n image 95 % interval chance n group 95 % interval chance".split()
    )
    assert [line[:16].strip() for line in lines[1:8]] == [
        "Object",
        "1 main predicate",
        "Relation",
        "Morpheme-Level",
        "2 main predicate",
        "Both",
        "Series",
    ]
    assert lines[8].startswith("all") and "25.00%" in lines[8] and lines[8].endswith("16.67%")
    assert lines[-1] == f"every score: {out / SCORES}"
    rows = pq.read_table(out / SCORES).to_pylist()
    code, printed, _ = run(capsys, "winoground", *options, "--json")
    found = json.loads(printed)
    assert code == 0 and found["benchmark"] == "winoground" and found["evaluations"] == 3
    by_id = [rows[first : first + 4] for first in range(0, 12, 4)]
    truths = []
    for a, b, c, d in by_id:
        first, second = a["error"] < b["error"], d["error"] < c["error"]
        truths.append(first and second)
    assert found["scores"]["all"]["text"] | {"interval": None} == {
        "n": 3,
        "correct": sum(truths),
        "score": sum(truths) / 3,
        "interval": None,
        "chance": 0.25,
    }


def test_selfbench_and_lists_from_the_command_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_selfbench(tmp_path / "selfbench", samples=1)
    code, printed, _ = run(capsys, "selfbench", root, "-m", folder, "--evaluations", 1)
    lines = printed.splitlines()
    assert code == 0 and [line.split()[0] for line in lines[1:8]] == [
        *("single_object", "two_object", "colors", "color_attr", "position", "counting", "all")
    ]
    assert lines[8].startswith("mean of tags") and Path("selfbench-tiny-sd", SCORES).is_file()
    assert lines[5].split()[-1] == "25.00%"  # position: four places
    write_picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    Path("list.csv").write_text("image,caption_0,caption_1\na.png,a cat,a dog\nb.png,a cat,a dog\n")
    code, printed, told = run(capsys, "captions", "list.csv", "-m", folder, "--evaluations", 1, "--json")
    found = json.loads(printed)
    assert code == 3 and found["scores"]["all"]["text"]["n"] == 1 and "1 of 2 images failed" in told
    Path("list.csv").write_text("image,caption_0,caption_1\nb.png,a cat,a dog\n")
    code, _, told = run(capsys, "captions", "list.csv", "-m", folder, "--evaluations", 1, "-o", "none")
    assert code == 4 and "b.png" in told


def test_each_score_has_its_own_n_and_options_of_load_are_passed_on(tmp_path, capsys):
    torch.save(tiny_sit.sit_weights(), tmp_path / "mine.pt")
    tiny.vae_model().save_pretrained(tmp_path / "vae")
    for n in range(4):
        write_picture(tmp_path / f"{n}.png", n)
    (tmp_path / "list.csv").write_text("pair,image,caption\np,0.png,cat\np,1.png,dog\nq,2.png,cat\nq,3.png,\n")
    told = ["captions", tmp_path / "list.csv", "-m", tmp_path / "mine.pt", "--evaluations", 1, "-o", tmp_path / "out"]
    told += ["--vae", tmp_path / "vae", "--config", "heads=3", "--config", 'class_names=["cat", "dog"]']
    code, printed, _ = run(capsys, *told, "--config", "time=sit")
    # of each score: n, share, its interval ("a to b"), chance
    row = next(line.split() for line in printed.splitlines() if line.startswith("all"))
    starts = [place for place, word in enumerate(row) if "%" not in word and word not in ("all", "to")]
    assert code == 0 and [row[place] for place in starts] == ["1", "2", "1"]
    code, _, err = run(capsys, *told, "--config", "time=sit", "--config", "time=repa")
    assert code == 2 and "--config time is given twice" in err.splitlines()[-1]
    code, _, err = run(capsys, *told, "--config", "time=sit", "--lora", tmp_path / "none.safetensors:0.5")
    assert code == 2 and "none.safetensors" in err.splitlines()[-1]
    code, _, err = run(capsys, *told, "--config", "time=sit", "--denoiser", tmp_path / "mine.pt")
    assert code == 2 and "denoiser= given with a file" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["winoground", "{root}", "--correct"], "No such option: --correct"),
        (["captions", "{root}", "--fine"], "No such option: --fine"),
        (["winoground", "{root}"], "no Winoground in"),
        (["selfbench", "{root}"], "no guidance scale in"),
        (["captions", "{root}"], "no list"),
        (["coco", "{root}"], "No such command 'coco'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, words):
    code, out, told = run(capsys, *(one.format(root=tmp_path) for one in arguments), "-m", "mini-unet")
    assert (code, out) == (2, "") and words in told.splitlines()[-1]
