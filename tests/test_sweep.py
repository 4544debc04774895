"""Sweeps: how often the network runs, what may choose, numbers as from an export, and going on after a kill."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from repkit import cli, zoo
from repkit.backbones.unet import UNet
from repkit.datasets.fashion_mnist import CLASSES, write_folder
from repkit.dino import DinoExtractor
from repkit.exporting import export
from repkit.extractors import DiffusionExtractor
from repkit.heads.ridge import ALPHAS, fit_ridge
from repkit.images import Resize
from repkit.listing import list_images
from repkit.tasks import sweep_screen
from repkit.tasks.probe import probe_store, read_labels, split_rows
from repkit.tasks.resuming import claim
from repkit.tasks.seen_store import unwatched
from repkit.tasks.sweep import Rules, sweep
from repkit.tasks.sweep_cells import make_cells, split_levels
from repkit.tasks.sweep_latents import remember
from repkit.tasks.sweep_reading import Reader, Running, label
from repkit.tasks.sweep_report import words
from repkit.tasks.sweep_screen import Screened, held_bytes
from repkit.tasks.sweep_search import drawn, summary
from tests import tiny_sd, tiny_vit
from tests.export_cases import hashes, tiny_extractor, write_image

TRAIN, TEST, KINDS = 12, 4, 3  # images a class, and classes
SEEN, TESTED = TRAIN * KINDS, TEST * KINDS
TAPS = ["down.0,mid@10,100", "up.0@100"]
RULES = Rules(("mean", "2x2"), finalists=2, few_shot=(1, 5), seeds=2)
RUNNING = Running(batch_size=12, workers=0)


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    root = tmp_path_factory.mktemp("clothes")
    for split, count in (("train", TRAIN), ("test", TEST)):
        folder = write_folder(root / "all", split, count)
        (root / "some" / split).mkdir(parents=True)
        for name in CLASSES[:KINDS]:
            (folder / name).rename(root / "some" / split / name)
    return root / "some"


@pytest.fixture(scope="module")
def listing(clothes):
    return list_images(clothes)


@pytest.fixture(scope="module")
def extractor():
    return tiny_extractor(TAPS)


@pytest.fixture
def forwards(monkeypatch):
    """The network and the number of images of each forward that computes something."""
    counted: list[tuple[str, int]] = []
    predict = UNet.predict

    def counting(self, model, x_t, t, condition):
        if type(x_t) is Tensor:
            counted.append((self.name, len(x_t)))
        return predict(self, model, x_t, t, condition)

    monkeypatch.setattr(UNet, "predict", counting)
    return counted


@pytest.fixture(scope="module")
def done(listing, extractor, tmp_path_factory):
    """A sweep: its folder, its results and the rows of its table."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    results = sweep(listing, extractor, out, RULES, running=RUNNING)
    return out, results, pq.read_table(out / "cells.parquet").to_pylist()


def images(counted, name: str) -> int:
    return sum(count for network, count in counted if network == name)


def best_ridge(x, labels, splits) -> tuple[float, float]:
    """The best accuracy of an independent ridge on the validation rows, and the largest alpha that gives it."""
    train, held = splits.train, splits.validation
    z = (x - x[train].mean(0)) / x[train].std(0)
    target = 2 * np.eye(KINDS)[labels[train]] - 1
    scores = [
        (Ridge(alpha=alpha).fit(z[train], target).predict(z[held]).argmax(1) == labels[held]).mean() for alpha in ALPHAS
    ]
    return max(scores), max(alpha for alpha, score in zip(ALPHAS, scores, strict=True) if score == max(scores))


# --- how often the network runs


def test_one_forward_an_image_and_time_whatever_the_blocks(listing, extractor, tmp_path, forwards):
    results = sweep(listing, extractor, tmp_path / "out", Rules(("mean", "2x2"), finalists=1, seeds=2), running=RUNNING)
    # Two times to screen and one again for the finalist, its test, and all of it once more under other noise.
    once = 3 * SEEN + TESTED
    assert results["noise_seeds"]["seeds"] == [0, 1]
    assert images(forwards, "unet") == once + SEEN + TESTED
    assert images(forwards, "unet (random init)") == once


def test_an_extractor_a_level_whatever_it_is_called():
    extractor = tiny_extractor("mid,up.0@50", seed=3)
    logsnr = extractor.identity["taps"]["mid@50"]["logsnr"]
    found = split_levels(tiny_extractor(["mid,up.0@50,60", f"mid@logsnr={logsnr}", "mid@clean"]))
    keys = [["mid@50", "up.0@50", f"mid@logsnr={logsnr}"], ["mid@60", "up.0@60"], ["mid@clean"]]
    assert [list(one.blocks) for one in found] == keys
    assert split_levels(extractor)[0].identity == extractor.identity


# --- numbers


def test_accuracies_are_those_of_an_exported_store(listing, extractor, done, tmp_path):
    rows = done[2]
    labels = read_labels(listing["label"].to_pylist())[1]
    splits = split_rows(labels, listing["split"].to_pylist())
    networks = {"": extractor.backbone, "random_": zoo.random_control(extractor.backbone)}
    for prefix, backbone in networks.items():
        for pool in RULES.pools:
            folder = tmp_path / f"{prefix}{pool}"
            store = export(listing, DiffusionExtractor(backbone, TAPS), folder, pool=pool, batch_size=12)
            for row in rows:
                if row["pool"] == pool:
                    x = store.array(f"{row['block']}@{row['time']}").astype(np.float64)
                    score, alpha = best_ridge(x, labels, splits)
                    assert row[f"{prefix}validation"] == pytest.approx(score, abs=1e-9)
                    assert row[f"{prefix}alpha"] == pytest.approx(alpha)
                    assert (x.shape[1], 4 * x.shape[1]) == (row["dim"], row["bytes"])


def test_the_chosen_cell_is_tested_as_a_probe_of_its_store_would_be(listing, extractor, done, tmp_path):
    _, results, _ = done
    chosen, seeds = results["chosen"], results["noise_seeds"]
    for seed, found in zip(seeds["seeds"], seeds["accuracies"], strict=True):
        one = DiffusionExtractor(extractor.backbone, [chosen["key"]], seed=seed)
        store = export(listing, one, tmp_path / str(seed), pool=chosen["pool"], batch_size=12)
        report = probe_store(store, head=chosen["head"])
        assert found == report.test
        if seed == 0:
            assert results["test"]["test_interval_95"] == list(report.interval)
            assert results["test"]["chosen"][report.chosen.name] == report.chosen.value
            assert chosen["validation"] == max(report.chosen.scores)
    assert seeds["mean"] == pytest.approx(np.mean(seeds["accuracies"]))


def test_the_table_says_what_cells_are_and_cost(extractor, done):
    _, results, rows = done
    assert [(row["block"], row["time"]) for row in rows if row["pool"] == "mean"] == [
        tuple(key.split("@")) for key in extractor.taps
    ]
    assert [row["flops"] for row in rows] == [extractor.backbone.flops[row["block"]] for row in rows]
    for row in rows:
        assert row["logsnr"] == extractor.identity["taps"][f"{row['block']}@{row['time']}"]["logsnr"]
        assert row["channels"] == extractor.backbone.blocks[row["block"]].channels
    assert sum(row["logistic"] is not None for row in rows) == RULES.finalists
    finalists = [row for row in rows if row["logistic"] is not None]
    assert min(row["validation"] for row in finalists) >= max(row["validation"] for row in rows if row not in finalists)
    (chosen,) = (row for row in rows if row["chosen"])
    assert chosen in finalists
    assert results["chosen"]["validation"] == max(max(row["validation"], row["logistic"]) for row in finalists)


def test_moments_and_rows_give_the_same_probe(rng, monkeypatch):
    monkeypatch.setattr(sweep_screen, "ROWS", 16)
    labels = np.arange(200) % 3
    for dim in (4, 120):
        x = (rng.normal(size=(3, dim))[labels] + 3 * rng.normal(size=(200, dim))).astype(np.float32)
        one = Screened(dim, 150, 3)
        assert (one.gram is not None) == (dim == 4)
        for rows in np.split(np.arange(200), 20):
            one.add(x[rows[rows < 150]], labels[rows[rows < 150]], training=True)
            one.add(x[rows[rows >= 150]], labels[rows[rows >= 150]], training=False)
        probe, expected = one.fit(), fit_ridge(x[:150], labels[:150], validation=(x[150:], labels[150:]))
        assert probe.chosen == expected.chosen
        np.testing.assert_allclose(probe.weight, expected.weight, atol=1e-8)


def test_what_was_padded_is_left_out_as_in_an_export(tmp_path):
    for seed in range(20):
        write_image(tmp_path / "images" / "ab"[seed % 2] / f"{seed:02d}.png", seed)
    listing, extractor = list_images(tmp_path / "images"), tiny_extractor("mid@50", resize=Resize(16, "pad"))
    data = label(listing)
    gathered = Reader(data, RUNNING).gather(extractor, ["mid@50 mean"], np.arange(20), "")
    store = export(listing, extractor, tmp_path / "out", batch_size=12)
    np.testing.assert_array_equal(gathered.features["mid@50 mean"], store.array("mid@50"))
    assert gathered.rows.tolist() == [*range(20)]


def test_memory_is_the_smaller_of_moments_and_rows():
    assert held_bytes([10, 1000], train=100, validation=7) == 8 * 100 + 4 * 1000 * 100 + 4 * 7 * 1010


# --- what may choose


def test_test_images_do_not_choose(listing, extractor, tmp_path, monkeypatch):
    """One cell is best on test images and another on validation images: the second is taken."""
    labels = read_labels(listing["label"].to_pylist())[1]
    splits = split_rows(labels, listing["split"].to_pylist())
    random = np.random.default_rng(0)
    planted = {}
    for name, cell in make_cells(extractor, ["mean"]).items():
        x = np.eye(cell.dim)[labels] + 0.01 * random.normal(size=(len(labels), cell.dim))
        useless = splits.test if name == "mid@100 mean" else splits.validation
        x[useless] = random.normal(size=(len(useless), cell.dim))
        planted[name] = x.astype(np.float32)

    def pooled(self, one, pools, rows, what):
        assert list(pools) == ["mean"]
        yield rows, {f"{key} mean": planted[f"{key} mean"][rows] for key in one.blocks}

    monkeypatch.setattr(Reader, "pooled", pooled)
    results = sweep(listing, extractor, tmp_path / "out", Rules(finalists=2, seeds=1), running=RUNNING)
    assert (results["chosen"]["cell"], results["chosen"]["validation"]) == ("mid@100 mean", 1)
    assert results["test"]["test_accuracy"] < 0.7


def test_test_images_are_read_after_the_choice(listing, extractor, tmp_path, monkeypatch):
    test, order = set(np.flatnonzero(np.array(listing["split"].to_pylist()) == "test").tolist()), []
    pooled = Reader.pooled

    def watched(self, one, pools, rows, what):
        if what.startswith("trained"):
            order.append((len(one.blocks), bool(test & {*rows.tolist()})))
        return pooled(self, one, pools, rows, what)

    monkeypatch.setattr(Reader, "pooled", watched)
    sweep(listing, extractor, tmp_path / "out", Rules(finalists=1, seeds=1), running=RUNNING)
    assert order == [(2, False), (3, False), (1, False), (1, True)]


def test_few_shot_draws_so_many_of_each_class():
    labels, train = np.array([0, 1, 0, 1, 0, 1, 0, 1]), np.array([0, 1, 2, 3, 4, 5])
    draws = [drawn(labels, train, 2, draw).tolist() for draw in range(5)]
    assert all(sorted(labels[one].tolist()) == [0, 0, 1, 1] and {*one} <= {*range(6)} for one in draws)
    assert len({tuple(one) for one in draws}) > 1
    assert draws[3] == drawn(labels, train, 2, 3).tolist()


def test_spread_of_one_and_of_several():
    assert summary([0.5]) == {"accuracies": [0.5], "mean": 0.5, "deviation": None}
    assert summary([0.2, 0.4])["deviation"] == pytest.approx(0.02**0.5)


# --- what is said


def test_controls_are_always_told(done):
    out, results, _ = done
    told = words(pq.read_table(out / "cells.parquet"), results)
    random, pixels = (results["controls"][name]["test"]["test_accuracy"] for name in ("random", "pixels"))
    lines = {line.split("  ")[0]: line for line in told.splitlines()}
    assert f"{random:.1%} (" in lines["random weights"] and "chosen in the same way" in lines["random weights"]
    assert f"{pixels:.1%} (" in lines["raw pixels"]
    assert f"{results['test']['test_accuracy']:.1%} (" in lines["test accuracy"]
    assert [few["shots"] for few in results["few_shot"]] == [1, 5]
    starred = [line for line in told.splitlines() if "*" in line]
    assert len(starred) == 1 and starred[0].startswith(results["chosen"]["block"])
    assert " -" in next(line for line in told.splitlines() if line.startswith("up.0 "))  # not tapped at 10
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "results.json").read_text()) == results


# --- going on


class Killed(Exception):
    pass


def test_a_killed_sweep_goes_on_to_the_same_bytes(listing, extractor, done, tmp_path, forwards):
    out = tmp_path / "out"

    def deadly(what, unit):
        if what.startswith("trained, test"):
            raise Killed
        return unwatched(what, unit)

    with pytest.raises(Killed):
        sweep(listing, extractor, out, RULES, running=Running(12, 0, watch=deadly))
    kept = hashes(out)
    assert "part-trained-screen-001.json" in kept and "cells.parquet" not in kept
    forwards.clear()
    results = sweep(listing, extractor, out, RULES, running=RUNNING)
    # The chosen cell's features were in memory and are read again, then its test and the other noise.
    assert images(forwards, "unet") == 2 * (SEEN + TESTED)
    assert (out / "cells.parquet").read_bytes() == (done[0] / "cells.parquet").read_bytes()
    assert {key: value for key, value in results.items() if key != "seconds"} == {
        key: value for key, value in done[1].items() if key != "seconds"
    }
    assert {name: hashes(out)[name] for name in kept} == kept
    forwards.clear()
    assert sweep(listing, extractor, out, RULES, running=RUNNING) == results
    assert forwards == []


def test_more_shots_and_seeds_are_added_to_what_is_there(listing, extractor, done, forwards):
    out, before, _ = done
    cells = (out / "cells.parquet").read_bytes()
    more = sweep(listing, extractor, out, Rules(RULES.pools, 2, few_shot=(2,), seeds=3), running=RUNNING)
    assert [few["shots"] for few in more["few_shot"]] == [2] and len(more["noise_seeds"]["seeds"]) == 3
    assert more["noise_seeds"]["accuracies"][:2] == before["noise_seeds"]["accuracies"]
    assert images(forwards, "unet") == 2 * (SEEN + TESTED)
    assert (out / "cells.parquet").read_bytes() == cells


def test_a_folder_of_other_settings_is_refused(listing, extractor, done):
    before = hashes(done[0])
    with pytest.raises(ValueError, match="finalists: 1 here, 2 there"):
        sweep(listing, extractor, done[0], Rules(RULES.pools, 1), running=RUNNING)
    with pytest.raises(ValueError, match="seed: 1 here, 0 there"):
        sweep(listing, DiffusionExtractor(extractor.backbone, TAPS, seed=1), done[0], RULES, running=RUNNING)
    assert hashes(done[0]) == before


def test_of_many_differences_the_first_are_told(tmp_path):
    claim(tmp_path, {"taps": dict.fromkeys("abcdefgh", 1)}, "a sweep")
    (tmp_path / "part.json").write_text("{}")
    with pytest.raises(ValueError, match="has a sweep of something else; .*taps.d: nothing here, 1 there; and 4 more"):
        claim(tmp_path, {"taps": {}}, "a sweep")


# --- other networks


def test_a_vision_transformer_is_swept_over_blocks(listing, tmp_path):
    extractor = DinoExtractor(f"timm:{tiny_vit.save_vit(tmp_path / 'vit')}", ["block.*", "cls"])
    results = sweep(listing, extractor, tmp_path / "out", Rules(finalists=1), running=RUNNING)
    rows = pq.read_table(tmp_path / "out" / "cells.parquet").to_pylist()
    assert [(row["block"], row["time"], row["logsnr"]) for row in rows] == [
        (block, None, None) for block in ("block.0", "block.1", "cls")
    ]
    assert 0 < rows[0]["flops"] < rows[1]["flops"] <= rows[2]["flops"] == 1
    assert results["noise_seeds"] is None
    assert results["controls"]["random"]["chosen"]["block"] in ("block.0", "block.1", "cls")
    assert "*" in words(pq.read_table(tmp_path / "out" / "cells.parquet"), results)
    known_only_as_a_network = DinoExtractor(tiny_vit.vit(), ["block.1"])
    results = sweep(listing, known_only_as_a_network, tmp_path / "other", Rules(finalists=1), running=RUNNING)
    assert "random" not in results["controls"]
    assert "not known how" in words(pq.read_table(tmp_path / "other" / "cells.parquet"), results)


def test_no_noise_has_no_seeds(listing, tmp_path):
    results = sweep(listing, tiny_extractor("mid@clean"), tmp_path / "out", Rules(finalists=1), running=RUNNING)
    assert results["noise_seeds"] is None and results["chosen"]["logsnr"] is None


def test_an_autoencoder_sees_a_batch_once(monkeypatch, generator):
    backbone = zoo.load(tiny_sd.sd_pipeline())
    calls: list[int] = []
    encode = backbone.encode

    def counting(images: Tensor) -> Tensor:
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(backbone, "encode", counting)
    other = remember(backbone, limit=2 * 4 * 4 * 8 * 8)  # two latents
    one, two = (torch.rand(2, 3, 16, 16, generator=generator) for _ in range(2))
    expected = DiffusionExtractor(backbone, "mid@50")(one)["mid@50"]
    calls.clear()
    control = zoo.random_control(other)
    extractors = [DiffusionExtractor(other, "mid@50,60"), DiffusionExtractor(control, "mid@50")]
    calls.clear()
    found = [extract(one)["mid@50"] for extract in extractors]
    assert torch.equal(found[0], expected) and not torch.equal(found[1], expected)
    assert calls == [2]
    for _ in range(2):  # beyond the limit
        extractors[0](two)
    assert calls == [2, 2, 2]
    assert remember(zoo.load("mini-unet")).name == "mini-unet"


# --- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pools": ("3y",)}, "no pooling '3y'"),
        ({"pools": ("mean", "none")}, "poolings mean, none; give mean, max"),
        ({"pools": ("mean", "mean")}, "each once"),
        ({"pools": ()}, r"poolings \(none\)"),
        ({"few_shot": (25,)}, "few-shot 25, but class pullover has 10 training images"),
        ({"few_shot": (0,)}, "few-shot 0; give numbers"),
        ({"finalists": 0}, "finalists=0; give at least 1"),
        ({"seeds": 0}, "seeds=0; give at least 1"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, message, listing, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(listing, tiny_extractor(), tmp_path / "out", Rules(**options), running=RUNNING)
    assert not (tmp_path / "out").exists()


def test_labels_are_needed_and_stay_secret(listing, tmp_path):
    for seed in range(4):
        write_image(tmp_path / "flat" / f"{seed}.png", seed)
        write_image(tmp_path / "one" / "cat" / f"{seed}.png", seed)
    with pytest.raises(ValueError, match="4 of 4 images have no label"):
        sweep(list_images(tmp_path / "flat"), tiny_extractor(), tmp_path / "out")
    with pytest.raises(ValueError, match="all 4 images are of class cat; a sweep needs at least two"):
        sweep(list_images(tmp_path / "one"), tiny_extractor(), tmp_path / "out")
    with pytest.raises(ValueError, match="tells the network the label"):
        sweep(listing, tiny_extractor(), tmp_path / "out", cond="a {label}")


def test_the_command(clothes, tmp_path, capsys):
    (clothes / "train" / CLASSES[0] / "zz.png").write_text("no image")
    out = tmp_path / "out"
    command = [
        "sweep",
        str(clothes),
        "-m",
        "mini-unet",
        "-t",
        "mid@50",
        "-o",
        str(out),
        "--seeds",
        "1",
        "--finalists",
        "1",
    ]

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, *more])
        return stop.value.code, *capsys.readouterr()

    code, told, err = run("--few-shot", "x")
    assert (code, told) == (2, "") and "--few-shot 'x'; write whole numbers" in err
    code, told, err = run("--json")
    (clothes / "train" / CLASSES[0] / "zz.png").unlink()
    assert code == 3 and "1 of 49 images could not be read" in err and "1 cell at 1 time," in err
    results = json.loads(told)
    assert results["chosen"]["cell"] == "mid@50 mean" and len(results["failures"]) == 1
    assert results["test"]["split"]["train"] + results["test"]["split"]["validation"] == SEEN
