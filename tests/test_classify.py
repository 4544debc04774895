"""`repkit classify`: from images to posteriors and files, going on after a kill, replaying errors, and bad input."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from repkit import cli, shards, zoo
from repkit.datasets.fashion_mnist import CLASSES, write_folder
from repkit.listing import list_images
from repkit.tasks.classify import classify_images, fit_weights, replay_errors
from repkit.tasks.classnames import read_classes, read_prior
from repkit.tasks.measuring import Kept, measure_images, part_size
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.errortable import ErrorTable, replay
from repkit.zeroshot.racing import Racing
from repkit.zeroshot.strategies import Uniform
from repkit.zeroshot.weighttable import WeightTable
from tests import tiny_sd
from tests.export_cases import hashes, tiny_unet, write_image, write_images

ANIMALS = ("cat", "dog", "owl")


def check_refused(result: tuple[int, str, str], *words: str, code: int = 2) -> None:
    """Exit code, nothing on stdout, no traceback, and one last line from repkit that has all the words."""
    found, out, err = result
    assert (found, out) == (code, ""), err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("repkit: ") and all(word in last for word in words), last


def animals(strategy=None, **options) -> DiffusionClassifier:
    return DiffusionClassifier(tiny_unet(classes=ANIMALS), ANIMALS, strategy=strategy or Uniform(4), **options)


# --- the bundled models, end to end


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    root = tmp_path_factory.mktemp("clothes")
    write_folder(root, "test", 2)
    return root


@pytest.fixture(scope="module")
def fitted(clothes, tmp_path_factory):
    """A folder with weights fitted to 20 images, and their errors."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.raises(SystemExit) as stop:
        options = ["--evaluations", "2", "--fit", str(folder / "w.json"), "--errors", str(folder / "e.parquet")]
        cli.main(["classify", str(clothes), "-m", "mini-unet", *options])
    assert stop.value.code == 0
    return folder


def test_fit_leaves_weights_and_errors(fitted, clothes):
    assert sorted(path.name for path in fitted.iterdir()) == ["e.parquet", "w.json"]
    table, weights = ErrorTable.read(fitted / "e.parquet"), WeightTable.load(fitted / "w.json")
    assert len(table) == 20 and table.classes == CLASSES and not np.isnan(table.errors).any()
    assert table.info["labels"] == {row["id"]: row["label"] for row in list_images(clothes).to_pylist()}
    assert weights.name == "whitened" and weights.temperature > 0
    # the paired differences of each level, weighted, have one spread
    differences = weights.weights * (table.errors[..., 0] - table.errors[..., 0].mean(1, keepdims=True))
    np.testing.assert_allclose(differences.std((0, 1))[0], differences.std((0, 1))[1], rtol=1e-4)
    judge = DiffusionClassifier(zoo.load("mini-unet"), CLASSES, strategy=Uniform(2))
    paths = [Path(path) for path in list_images(clothes)["path"].to_pylist()[:3]]
    np.testing.assert_allclose(judge.errors(paths), table.errors[:3, ..., 0], rtol=1e-5)


def test_a_run_agrees_with_the_library_and_with_the_replay(fitted, clothes, repkit, tmp_path):
    images, out = clothes / "test" / "bag", tmp_path / "deep" / "results.parquet"
    options = ["--evaluations", "2", "--strategy", "uniform", "--weighting", fitted / "w.json"]
    code, printed, err = repkit(
        "classify", images, "-m", "mini-unet", *options, "-o", out, "--pictures", tmp_path / "pictures"
    )
    assert (code, printed) == (0, f"{out}\n")
    assert "The probabilities are calibrated (weighting whitened, temperature" in err
    assert [path.name for path in out.parent.iterdir()] == ["results.parquet"]
    assert (tmp_path / "pictures" / "posteriors.png").read_bytes().startswith(b"\x89PNG")
    rows = pq.read_table(out).to_pylist()
    weights = WeightTable.load(fitted / "w.json")
    judge = DiffusionClassifier(zoo.load("mini-unet"), CLASSES, strategy=Uniform(2), weighting=weights)
    posterior = judge.classify([Path(row["path"]) for row in rows])
    np.testing.assert_allclose([row["log_posterior"] for row in rows], posterior.log_posterior, atol=1e-3)
    assert [row["predicted"] for row in rows] == posterior.labels
    assert [row["probability"] for row in rows] == [math.exp(max(row["log_posterior"])) for row in rows]
    assert [row["evaluations"] for row in rows] == [20, 20]

    code, printed, _ = repkit("classify", "--replay", fitted / "e.parquet", *options[2:], "--json", "--top", "3")
    told = json.loads(printed)
    assert (code, told["images"], told["calibrated"], told["weighting"]) == (0, 20, True, "whitened")
    again = {row["id"]: row for row in told["results"]}
    for row in rows:
        assert again["test/bag/" + row["id"]]["predicted"] == row["predicted"]
        assert again["test/bag/" + row["id"]]["probability"] == pytest.approx(row["probability"], rel=1e-3)
        assert len(again["test/bag/" + row["id"]]["top"]) == 3


def test_replay_counts_what_racing_would_have_cost(fitted, repkit):
    code, printed, err = repkit("classify", "--replay", fitted / "e.parquet", "--delta", "0.2", "--weighting", "train")
    table = ErrorTable.read(fitted / "e.parquet")
    expected = replay(table, Racing(0.2, 2), np.ones(2))
    assert code == 0
    assert f"{expected.evaluations.mean():.1f} evaluations an image" in err
    lines = [line.split("\t") for line in printed.splitlines()]
    assert [line[0] for line in lines] == list(table.ids)
    right = np.mean([Path(name).parent.name == best.split()[0] for name, best in lines])
    assert f"accuracy {right:.2%} of 20 images" in err


def test_replay_fits_too(fitted, repkit, tmp_path):
    code, printed, _ = repkit("classify", "--replay", fitted / "e.parquet", "--fit", tmp_path / "w.json")
    assert (code, printed) == (0, f"{tmp_path / 'w.json'}\n")
    assert (tmp_path / "w.json").read_bytes() == (fitted / "w.json").read_bytes()


def test_replays_do_not_overwrite_other_results(fitted, repkit, tmp_path):
    out, again = (
        tmp_path / "out.parquet",
        ["classify", "--replay", fitted / "e.parquet", "-o", tmp_path / "out.parquet"],
    )
    assert repkit(*again)[:2] == (0, f"{out}\n")
    before = hashes(tmp_path)
    assert repkit(*again)[0] == 0
    check_refused(repkit(*again, "--temperature", "9"), "out.parquet was made with other settings", "temperature: 9")
    check_refused(repkit(*again[:-1], fitted / "e.parquet"), "--replay", "is also the file of --out")
    check_refused(repkit("classify", "--replay", out), "is no table of errors")
    assert hashes(tmp_path) == before
    table = ErrorTable.read(fitted / "e.parquet")
    table.errors[0] += 1
    with pytest.raises(ValueError, match="replay of: "):
        replay_errors(table, Racing(0.01, 2), out=out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--evaluations", "0"], ["0 evaluations"]),
        (["--temperature", "0"], ["temperature=0"]),
        (["--seed", "3", "--device", "cuda"], ["--seed, --device have no use with --replay; leave them out"]),
        (["--lora", "x"], ["--lora has no use"]),
        (["--part-size", "3", "--precision", "bfloat16", "--offline"], ["--part-size, --precision, --offline have"]),
        (["--fit", "w.json", "--strategy", "uniform"], ["--strategy has no use with --fit"]),
    ],
)
def test_replays_refuse_what_only_live_runs_take(options, words, fitted, repkit):
    check_refused(repkit("classify", "--replay", fitted / "e.parquet", *options), *words)


def test_mini_dit_prints_a_line_an_image(clothes, repkit):
    code, printed, err = repkit(
        "classify", clothes / "test" / "trouser", "-m", "mini-dit", "--classes", "trouser,bag", "--evaluations", "8"
    )
    assert code == 0
    assert [line.split()[:2] for line in printed.splitlines()] == [
        ["00002.png", "trouser"],
        ["00003.png", "trouser"],
    ]
    assert "not calibrated" in err and "accuracy" not in err


# --- going on after a kill


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Seven images of which two, one whole part of them, cannot be read."""
    folder = write_images(tmp_path_factory.mktemp("flat"), 7)
    (folder / "002.png").write_text("no image")
    (folder / "003.png").write_text("no image")
    return folder


def run_flat(flat: Path, out: Path, **options):
    files = {"out": out / "results.parquet", "errors": out / "errors.parquet"}
    return classify_images(animals(), list_images(flat), **files, own_part_size=2, **options)


@pytest.fixture(scope="module")
def undisturbed(flat, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    found = run_flat(flat, out)
    assert (found.rows.num_rows, found.failures.num_rows) == (5, 2)
    return hashes(out)


def test_what_is_left_is_results_failures_and_errors(undisturbed):
    assert set(undisturbed) == {"results.parquet", "results.failures.parquet", "errors.parquet"}


# settings, four parts of which three have errors, and three files at the end
@pytest.mark.parametrize("count", range(1, 12))
def test_killed_before_a_file_is_in_place(count, flat, undisturbed, tmp_path, monkeypatch):
    done, original = 0, os.replace

    def replace(*arguments):
        nonlocal done
        done += 1
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    child = os.fork()
    if not child:
        monkeypatch.setattr(shards.os, "replace", replace)
        run_flat(flat, tmp_path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    run_flat(flat, tmp_path)
    assert hashes(tmp_path) == undisturbed


def test_what_is_done_is_not_measured_again(flat, undisturbed, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(found):
        if found.rows.num_rows == 0:  # the second part
            raise Stop

    with pytest.raises(Stop):
        run_flat(flat, tmp_path, tell=stop)
    measured, seen, original = [], [], DiffusionClassifier.measure

    def measure(classifier, images, **options):
        measured.append(len(images))
        return original(classifier, images, **options)

    monkeypatch.setattr(DiffusionClassifier, "measure", measure)
    run_flat(flat, tmp_path, tell=lambda found: seen.append(found.rows.num_rows))
    assert (measured, seen) == ([2, 1], [2, 0, 2, 1])
    run_flat(flat, tmp_path)
    assert measured == [2, 1]
    assert hashes(tmp_path) == undisturbed


@pytest.mark.parametrize("count", [1, 4, 8])
def test_killed_while_the_parts_go(count, flat, undisturbed, tmp_path, monkeypatch):
    done, original = 0, Path.unlink

    def unlink(path, **options):
        nonlocal done
        done += 1
        if done == count:
            raise KeyboardInterrupt
        original(path, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", unlink)
        run_flat(flat, tmp_path)
    assert (tmp_path / "results.parquet.parts" / "settings.json").exists()
    run_flat(flat, tmp_path)
    assert hashes(tmp_path) == undisturbed and not (tmp_path / "results.parquet.parts").exists()


def test_other_settings_are_refused_by_name(flat, tmp_path):
    out, listing = tmp_path / "results.parquet", list_images(flat)
    classify_images(animals(), listing, out=out)
    before = hashes(tmp_path)
    for other, words in [
        (animals(seed=1), "seed: 1 here, 0 there"),
        (animals(Uniform(5)), "strategy.evaluations: 5 here, 4 there"),
        (animals(prior=[2, 1, 1]), "prior"),
        (animals(temperature=3.0), "temperature: 3.0 here, 1.0 there"),
        (animals(bias=[1.0, 0.0, 0.0]), "bias"),
        (animals(antithetic=True), "antithetic: True here, False there"),
        (animals(weighting="elbo"), "weighting: elbo here, train there"),
        (DiffusionClassifier(tiny_unet(classes=ANIMALS, weights_seed=1), ANIMALS, strategy=Uniform(4)), "weights_hash"),
    ]:
        with pytest.raises(ValueError, match=words):
            classify_images(other, listing, out=out)
    with pytest.raises(ValueError, match="images.count: 1 here, 7 there"):
        classify_images(animals(), listing.slice(0, 1), out=out)
    with pytest.raises(ValueError, match="its errors were not kept"):
        classify_images(animals(), listing, out=out, errors=tmp_path / "errors.parquet")
    assert hashes(tmp_path) == before


def test_finished_results_are_not_given_with_errors_of_another_run(flat, tmp_path):
    listing = list_images(flat)
    files = [{"out": tmp_path / f"{n}.parquet", "errors": tmp_path / f"{n}-errors.parquet"} for n in range(2)]
    for seed in range(2):
        classify_images(animals(seed=seed), listing, **files[seed])
    assert classify_images(animals(), listing, **files[0]).rows.num_rows == 5
    with pytest.raises(ValueError, match="1-errors.parquet is there and holds something else"):
        classify_images(animals(), listing, out=files[0]["out"], errors=files[1]["errors"])
    with pytest.raises(ValueError, match="--errors .* is also the file of --out"):
        classify_images(animals(), listing, out=tmp_path / "x.parquet", errors=tmp_path / "x.parquet")


def test_a_shortlist_has_to_say_what_it_is(flat, tmp_path):
    def listed(images):
        return np.zeros((len(images), 1), dtype=int)

    listing, out = list_images(flat).slice(0, 1), tmp_path / "out.parquet"
    with pytest.raises(ValueError, match="set its attribute `identity`"):
        classify_images(animals(shortlist=listed), listing, out=out)
    listed.identity = "always the first"  # type: ignore[attr-defined]
    classify_images(animals(shortlist=listed), listing, out=out)
    with pytest.raises(ValueError, match="shortlist: nothing here, always the first there"):
        classify_images(animals(), listing, out=out)


def test_progress_begins_before_the_work_with_what_an_earlier_run_did(flat, tmp_path, monkeypatch):
    listing, told = list_images(flat), []

    def stop(found):
        if found.rows["id"].to_pylist() == ["004.png", "005.png"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_flat(flat, tmp_path, tell=stop)
    measure = DiffusionClassifier.measure

    def measured(*arguments, **options):
        told.append("measure")
        return measure(*arguments, **options)

    monkeypatch.setattr(DiffusionClassifier, "measure", measured)
    run_flat(flat, tmp_path, progress=lambda done, total, *_: told.append((done, total)))
    assert (told[:2], told[-1]) == ([(6, 7), "measure"], (7, 7))
    told.clear()
    classify_images(animals(), listing, progress=lambda done, *_: told.append(done))
    assert told[0] == 0 and told[1] == "measure" and told[-1] == 7


def test_unfinished_work_of_other_settings_is_refused_and_kept(flat, tmp_path):
    out, listing = tmp_path / "results.parquet", list_images(flat)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classify_images(animals(), listing, out=out, tell=stop)
    before = hashes(tmp_path)
    assert len(before) == 3
    with pytest.raises(ValueError, match=r"results.parquet.parts was made with other settings \(seed: 1 here, 0 there"):
        classify_images(animals(seed=1), listing, out=out)
    assert hashes(tmp_path) == before


def test_files_of_others_are_left_alone(flat, tmp_path):
    listing = list_images(flat)
    pq.write_table(listing, tmp_path / "mine.parquet")
    (tmp_path / "results.parquet.parts").mkdir()
    (tmp_path / "results.parquet.parts" / "notes.txt").write_text("mine")
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="holds no classified images"):
        classify_images(animals(), listing, out=tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match="holds something else"):
        classify_images(animals(), listing, errors=tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match="no unfinished work"):
        classify_images(animals(), listing, out=tmp_path / "results.parquet")
    assert hashes(tmp_path) == before


def test_parts_measure_what_the_whole_does(flat):
    judge, listing = animals(Racing(0.01, 6)), list_images(flat)
    found = [one.table for one in measure_images(judge, listing, Kept(None, 3)) if one.table is not None]
    names = [name for name in listing["id"].to_pylist() if name not in ("002.png", "003.png")]
    assert [name for table in found for name in table.ids] == names
    whole = judge.measure([flat / name for name in names], ids=names)
    np.testing.assert_allclose(np.concatenate([table.errors for table in found]), whole.errors, rtol=1e-4)


def test_a_part_fills_batches():
    assert [part_size(animals(batch_size=size)) for size in (1, 12, 30, 1000)] == [2, 16, 40, 64]


# --- texts, classes and priors


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """A folder of a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("painter")
    tiny_sd.sd_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_model(painter):
    return zoo.load(painter)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    rows = ["a red dog, dog ,1", "a photo of a cat,cat,0", ' "a dog, running",dog, 1']
    path.write_text("\n".join(["prompt,classname,classidx", *rows]) + "\n")
    return path


def test_prompts_in_the_published_layout(painter, prompts, flat, repkit, text_model):
    code, printed, err = repkit(
        "classify", flat / "000.png", "-m", painter, "--classes", prompts, "--evaluations", "4",
        "--strategy", "uniform", "--mixture", "best", "--json",
    )  # fmt: skip
    told = json.loads(printed)
    assert code == 0, err
    assert (told["classes"], told["full_budget"], told["evaluations_per_image"]) == (["cat", "dog"], 12, 12)
    mapping = {"cat": ["a photo of a cat"], "dog": ["a red dog", "a dog, running"]}
    judge = DiffusionClassifier(text_model, mapping, strategy=Uniform(4), mixture="best")
    expected = judge.classify([flat / "000.png"])
    assert told["results"][0]["predicted"] == expected.labels[0]
    assert told["results"][0]["probability"] == pytest.approx(float(expected.probabilities.max()), rel=1e-3)
    errors = judge.errors([flat / "000.png"])[0].mean(1)
    odds = float(errors[1:].min() - errors[0])  # log p(cat) - log p(dog), by the best prompt of each
    assert float(expected.log_posterior[0, 0] - expected.log_posterior[0, 1]) == pytest.approx(odds, rel=1e-6)


def test_templates_and_names(painter, flat, repkit):
    code, printed, err = repkit(
        "classify", flat / "000.png", "-m", painter, "--classes", "cat,dog", "--template", "a photo of a {}",
        "--template", "a {}", "--strategy", "staged", "--keep", "2,1", "--samples", "2,4", "--top", "2",
    )  # fmt: skip
    assert code == 0, err
    name, *ranked = printed.rstrip("\n").split("\t")
    assert name == "000.png" and {one.split()[0] for one in ranked} == {"cat", "dog"}
    assert "2 classes, 4 prompts" in err


@pytest.mark.parametrize(
    ("content", "expected"),
    [("cat\n# a comment\n\n dog \n", ["cat", "dog"]), ("2\n0\n", [2, 0]), ("\ufeffowl\r\ncat\r\n", ["owl", "cat"])],
)
def test_class_files(content, expected, tmp_path):
    (tmp_path / "classes.txt").write_text(content, newline="")
    found = read_classes(str(tmp_path / "classes.txt"), tiny_unet(classes=ANIMALS))
    assert list(found) == expected and list(found.values()) == [[name] for name in expected]


def test_names_numbers_and_the_models_own_classes():
    backbone = tiny_unet(classes=ANIMALS)
    assert list(read_classes("owl, 0", backbone)) == ["owl", 0]
    assert list(read_classes(None, backbone)) == list(ANIMALS)


def test_numbers_are_texts_to_a_model_of_texts(text_model):
    assert list(read_classes("1,2", text_model)) == ["1", "2"]


def test_priors(tmp_path):
    (tmp_path / "prior.txt").write_text("# cat, dog\n3\n1.5\n")
    assert read_prior(str(tmp_path / "prior.txt")) == read_prior("3, 1.5") == [3, 1.5]
    assert read_prior(None) is None


# --- bad input, before any forward


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty"]),
        ("# nothing\n", ["is empty"]),
        ("cat\ndog\ncat\n", ["'cat' is twice", "line 1 and line 3"]),
        ("cat\n", ["only 'cat'", "two classes"]),
    ],
)
def test_bad_class_files(content, words, painter, flat, tmp_path, repkit):
    (tmp_path / "classes.txt").write_text(content)
    check_refused(repkit("classify", flat, "-m", painter, "--classes", tmp_path / "classes.txt"), *words)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["prompt,name", "a,b"], ["no column classidx, classname"]),
        (["prompt,classname,classidx"], ["is empty below its header"]),
        (["prompt,classname,classidx", "a,b,x", "c,d,1"], ["classidx 'x'", "give a number"]),
        (["prompt,classname,classidx", "a,b,0", "a,d,1"], ["'a' is twice", "line 2 and line 3"]),
        (["prompt,classname,classidx", "a,b,0", "c,d,0"], ["line 3: classidx 0 is 'd' here and 'b' before"]),
        (["prompt,classname,classidx", "a,b,0", "c,b,1"], ["line 3: 'b' has classidx 1 here and 0 before"]),
        (["prompt,classname,classidx", "a,b,0", "", "c, ,1"], ["line 4: no classname"]),
        (["prompt,classname,classidx", "a,b,0", "c,d"], ["line 3: 2 values for 3 columns"]),
        (["prompt,classname,classidx", "a dog, running,dog,0"], ["line 2: 4 values", "quote what has a comma"]),
        (["prompt,classname,classidx", "a,b,0"], ["only 'b'"]),
    ],
)
def test_bad_prompt_files(rows, words, tmp_path, text_model):
    (tmp_path / "prompts.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError) as refused:
        read_classes(str(tmp_path / "prompts.csv"), text_model)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["told texts", "give --classes"]),
        (["--classes", "cat"], ["only 'cat'", "two classes"]),
        (["--classes", "cat,dog,cat"], ["'cat' is twice", "place 1 and place 3"]),
        (["--classes", "cat,,dog"], ["nothing in place 2"]),
        (["--classes", "missing.txt"], ["missing.txt", "no such file"]),
        (["--classes", "cat,dog", "--template", "a photo"], ["has no {}"]),
        (["--classes", "cat,dog", "--template", "a {}", "--template", "a {}"], ["template 'a {}' is given twice"]),
        (["--classes", "cat,dog", "--prior", "1,2,3"], ["for 2 classes"]),
        (["--classes", "cat,dog", "--weighting", "magic"], ["no weighting 'magic'"]),
        (["--classes", "cat,dog", "--weighting", "missing.json"], ["missing.json"]),
        (["--classes", "cat,dog", "--temperature", "0"], ["temperature=0"]),
        (["--classes", "cat,dog", "--fit", "w.json", "--weighting", "train"], ["whitened or learned"]),
        (["--classes", "cat,dog", "--fit", "w.json"], ["no image has a label"]),
    ],
)
def test_bad_options_for_a_model(options, words, painter, flat, repkit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refused(repkit("classify", flat, "-m", painter, *options), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--evaluations", "0"], ["0 evaluations", "at least 2"]),
        (["--delta", "2"], ["delta=2"]),
        (["--strategy", "staged"], ["needs --keep and --samples"]),
        (["--strategy", "staged", "--keep", "5,x", "--samples", "1,2"], ["--keep 5,x", "whole numbers"]),
        (["--strategy", "staged", "--keep", "1", "--samples", "4", "--evaluations", "4"], ["--evaluations is not for"]),
        (["--strategy", "uniform", "--delta", "0.1"], ["--delta is not for --strategy uniform"]),
        (["--prior", "1,much"], ["--prior 1,much", "positive number"]),
        (["--prior", "1e308,1e308"], ["--prior 1e308,1e308", "finite sum"]),
        (["--prior", "1,nan"], ["--prior 1,nan", "positive number"]),
        (["--prior", "1,inf"], ["--prior 1,inf", "finite sum"]),
        (["--fit", "w.json", "--strategy", "racing", "--delta", "0.1"], ["--strategy, --delta have no use with --fit"]),
        (["--out", "a.parquet", "--errors", "./a.parquet"], ["--errors a.parquet is also the file of --out"]),
        (["--out", "a.parquet", "--errors", "a.failures.parquet"], ["the failures of --out"]),
        (["--out", "results.csv"], ["--out results.csv", ".parquet"]),
        (["--fit", "w.json", "--out", "a.parquet"], ["--out has no use with --fit"]),
        (["--replay", "e.parquet"], ["IMAGES, --model have no use with --replay"]),
    ],
)
def test_bad_options_for_any_model(options, words, flat, repkit):
    check_refused(repkit("classify", flat, "-m", "no-such-model", *options), *words)


def test_nothing_to_classify_or_to_do_it_with(flat, repkit):
    check_refused(repkit("classify", flat), "needs IMAGES and -m MODEL")
    check_refused(repkit("classify", flat, "-m", "timm:resnet18"), "denoises nothing")
    check_refused(repkit("classify", "--replay", "missing.parquet"), "missing.parquet: no such file")


def test_classes_that_the_model_does_not_have(flat, repkit):
    check_refused(repkit("classify", flat, "-m", "mini-unet", "--classes", "bag,cat"), "no class 'cat'")
    check_refused(repkit("classify", flat, "-m", "mini-unet", "--classes", "bag,11"), "no class 11")
    check_refused(repkit("classify", flat, "-m", "mini-unet", "--classes", "bag,8"), "'bag' and 8 are the same")
    check_refused(repkit("classify", flat, "-m", "mini-unet", "--classes", "8,08"), "'8' and '08' are both class 8")
    check_refused(repkit("classify", flat, "-m", "mini-unet", "--template", "a {}"), "--template", "told a class")


def test_unreadable_images_have_exit_codes_of_their_own(tmp_path, painter, repkit):
    (tmp_path / "bad.png").write_text("no image")
    told = ["-m", painter, "--classes", "cat,dog", "--evaluations", "2"]
    code, printed, err = repkit("classify", tmp_path, *told, "-o", tmp_path / "out.parquet")
    assert (code, pq.read_table(tmp_path / "out.parquet").num_rows) == (4, 0)
    assert "1 of 1 images failed" in err and "bad.png" in err and "probabilities" not in err
    assert pq.read_table(tmp_path / "out.failures.parquet")["path"].to_pylist() == [str(tmp_path / "bad.png")]
    write_image(tmp_path / "good.png", 0)
    code, printed, err = repkit("classify", tmp_path, *told, "--json")
    told = json.loads(printed)
    assert (code, told["images"], told["failed"], told["failures"][0]["path"]) == (3, 1, 1, str(tmp_path / "bad.png"))


def test_fit_weights_takes_labelled_rows_only(rng):
    labels = rng.integers(0, 3, 40)
    errors = rng.normal(size=(40, 3, 4, 3)) + 50
    errors[np.arange(40), labels] -= 1
    told = {"model": "m", "weights_hash": "h", "dtype": "float32"}
    names = tuple(str(row) for row in range(40))
    known = {name: ANIMALS[label] for name, label in zip(names[:30], labels, strict=False)}
    table = ErrorTable(
        ids=names,
        classes=ANIMALS,
        conditions=ANIMALS,
        owner=np.arange(3),
        levels=animals().levels,
        errors=errors,
        decided=np.ones(40, dtype=bool),
        info={**told, "labels": known | {"31": "a stranger"}},
    )
    fitted = fit_weights(table, "whitened")
    scores = torch.from_numpy(errors[:30, ..., 0] @ np.array(fitted.weights) / 4)
    grid = np.geomspace(0.05, 20, 4001)
    own = torch.from_numpy(labels[:30])
    losses = [float(torch.nn.functional.cross_entropy(-scores / value, own)) for value in grid]
    assert fitted.temperature == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)
    with pytest.raises(ValueError, match="no image has a label"):
        fit_weights(table[30:], "whitened")
