"""Training of heads: a plain loop gives the same weights, and so does a run that was killed or is shared out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from repkit import export, load
from repkit.recipes import image_data
from repkit.recipes.fit import main, parse
from repkit.recipes.probe import Probe
from repkit.store import FeatureStore
from repkit.tasks.building import build_extractor
from repkit.tasks.probe import read_labels, split_rows
from tests.fit_cases import CPU, clothes, curves, images, run, weights, write_recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return clothes(tmp_path_factory.mktemp("clothes"))


@pytest.fixture(scope="module")
def store(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("store") / "features"
    export(root, build_extractor("mini-unet", ["mid,up.0@50"]), out)
    return out


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Path:
    """A finished run of 8 steps that validates every third, not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    run(write_recipe(folder / "r.yaml", images(root), folder / "out"), "--trainer.val_check_interval=3")
    return folder / "out"


def stored(store: Path, **changes) -> dict:
    settings = {"store": str(store), "batch": 8, "epochs": 2, "seed": 1} | changes
    return {"class_path": "StoreData", "init_args": settings}


def test_a_checkpoint_holds_the_heads_alone_and_no_word_of_weights(whole):
    assert sorted(weights(whole)) == [f"heads.{n}.head.linear.{part}" for n in (0, 1) for part in ("bias", "weight")]
    saved = torch.load(whole / "last.ckpt", weights_only=True)
    assert set(saved["hyper_parameters"]) == {"head", "inputs", "optimising", "seed"}
    assert "datamodule_hyper_parameters" not in saved and "ImageData" not in saved


def test_a_run_leaves_results_curves_and_logs(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["steps"] == 8 and len(results["validation"]) == 2
    best = max(results["validation"], key=lambda one: one["accuracy"])
    assert results["chosen"] == best["head"]
    assert torch.load(whole / "last.ckpt", weights_only=True)["scored_at"] == 6  # and once more after the last step
    points = [line.split(",") for line in curves(whole).splitlines()[1:]]
    assert [int(step) for step, name, _ in points if name == "train_loss"] == list(range(1, 9))
    assert [int(step) for step, name, _ in points if name == "val_accuracy"] == [3, 6]
    assert (whole / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert list(whole.glob("tensorboard/version_0/events*"))


def test_the_model_is_in_eval_mode_frozen_and_unchanged_all_along(root, tmp_path):
    cli = parse([str(write_recipe(tmp_path / "r.yaml", images(root, epochs=1), tmp_path / "out")), *CPU])
    seen = []
    shown = cli.datamodule.on_after_batch_transfer

    def watched(batch, dataloader_idx):
        network = cli.datamodule.extractor.backbone.model
        seen.append((network.training, any(p.requires_grad for p in network.parameters())))
        return shown(batch, dataloader_idx)

    cli.datamodule.on_after_batch_transfer = watched
    cli.trainer.fit(cli.model, cli.datamodule)
    network = cli.datamodule.extractor.backbone.model
    assert len(seen) >= 5 and set(seen) == {(False, False)} and not network.training
    fresh = load("mini-unet").model
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), fresh.parameters(), strict=True))
    inside = {id(parameter) for parameter in cli.model.parameters()}
    assert not inside & {id(parameter) for parameter in network.parameters()}


def test_training_on_a_store_is_a_plain_loop(store, tmp_path):
    model = {"optimising": {"lrs": [0.02], "weight_decay": 0.01}, "seed": 5}
    recipe = write_recipe(tmp_path / "r.yaml", stored(store, taps=["mid@50"]), tmp_path / "out", model)
    found = run(recipe)
    opened = FeatureStore(store)
    _, labels = read_labels(opened.table["label"].to_pylist())
    splits = split_rows(labels, opened.table["split"].to_pylist(), 1)
    x, y = (torch.from_numpy(array) for array in (opened.array("mid@50"), labels))
    torch.manual_seed(5)
    layer = torch.nn.Linear(x.shape[1], 10)
    groups = [{"params": [layer.weight], "weight_decay": 0.01}, {"params": [layer.bias]}]
    sgd = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    n, steps = len(splits.train), 8
    orders = [np.random.default_rng([1, epoch]).permutation(n) for epoch in range(3)]
    for step in range(steps):
        rows = splits.train[np.concatenate(orders)[step * 8 : step * 8 + 8]]
        for group in sgd.param_groups:
            group["lr"] = 0.02 * (1 + np.cos(np.pi * step / steps)) / 2
        sgd.zero_grad()
        F.cross_entropy(layer(x[rows]), y[rows]).backward()
        sgd.step()
    saved = weights(tmp_path / "out")
    torch.testing.assert_close(saved["heads.0.head.linear.weight"], layer.weight.data, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        logits = layer(x[splits.test])
    truth = y[splits.test]
    assert found["test"]["test_accuracy"] == pytest.approx(float((logits.argmax(1) == truth).float().mean()), abs=1e-6)
    top5 = float(multiclass_accuracy(logits, truth, 10, top_k=5, average="micro"))
    assert found["test"]["test_accuracy_top5"] == pytest.approx(top5, abs=1e-6)
    assert found["test"]["test_loss"] == pytest.approx(float(F.cross_entropy(logits, truth)), rel=1e-4)


def test_heads_trained_together_are_those_trained_alone(store, tmp_path):
    both = write_recipe(tmp_path / "a.yaml", stored(store), tmp_path / "a", {"inputs": "each"})
    alone = write_recipe(tmp_path / "b.yaml", stored(store, taps=["up.0@50"]), tmp_path / "b", {})
    run(both)
    run(alone)
    together, single = weights(tmp_path / "a"), weights(tmp_path / "b")
    torch.testing.assert_close(together["heads.1.head.linear.weight"], single["heads.0.head.linear.weight"])


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = image_data.Drawn.__getitem__

    def crashing(self, place):
        if place[0] == step:
            raise RuntimeError("crash")
        return plain(self, place)

    monkeypatch.setattr(image_data.Drawn, "__getitem__", crashing)


@pytest.mark.parametrize("step", [3, 4, 5, 7])
def test_a_crashed_run_resumes_to_the_same_bits(step, root, whole, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path / "r.yaml", images(root), tmp_path / "out")
    options = ["--trainer.val_check_interval=3", "--checkpoint_every=1"]
    with monkeypatch.context() as patch:
        crash_at(step, patch)
        with pytest.raises(RuntimeError, match="crash"):
            run(recipe, *options)
    saved = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
    assert 0 < saved["global_step"] <= step
    run(recipe, *options)
    torch.testing.assert_close(weights(tmp_path / "out"), weights(whole), rtol=0, atol=0)
    assert curves(tmp_path / "out") == curves(whole)
    assert (tmp_path / "out" / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_a_finished_run_is_left_alone_and_another_recipe_is_refused(store, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", stored(store), tmp_path / "out")
    first, before = run(recipe), weights(tmp_path / "out")
    assert run(recipe) == first
    torch.testing.assert_close(weights(tmp_path / "out"), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="data.init_args.batch: 4 here, 8 there"):
        run(recipe, "--data.batch=4")


def test_early_stopping_ends_a_run_and_a_second_call_does_not_go_on(store, tmp_path):
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss", "patience": 1, "min_delta": 100.0}}
    recipe = write_recipe(
        tmp_path / "r.yaml", stored(store, epochs=50), tmp_path / "out", trainer={"callbacks": [stop]}
    )
    first = run(recipe)
    assert first["steps"] == 8  # the first validation sets the mark, the second misses it
    assert run(recipe)["steps"] == 8


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits(root, whole, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", images(root), tmp_path / "out")
    options = [*CPU, "--trainer.val_check_interval=3", "--checkpoint_every=1"]
    command = [sys.executable, "-m", "repkit.cli", "fit", str(recipe), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "out" / "last.ckpt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(recipe, *options[3:])
    torch.testing.assert_close(weights(tmp_path / "out"), weights(whole), rtol=0, atol=0)
    assert curves(tmp_path / "out") == curves(whole)


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    """Of 19 images to validate and test on the last one comes alone, and must count once."""
    root = clothes(tmp_path / "odd")
    next(root.glob("test/bag/*.png")).unlink()
    odd = images(root, validation="test", epochs=1)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    for devices in (1, 2):
        recipe = write_recipe(tmp_path / f"{devices}.yaml", odd, tmp_path / f"{devices}")
        shared = ["--trainer.devices=2", "--trainer.strategy=ddp"] if devices == 2 else []
        command = [sys.executable, "-m", "repkit.cli", "fit", str(recipe), *CPU, *shared]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    torch.testing.assert_close(weights(tmp_path / "1"), weights(tmp_path / "2"), rtol=1e-5, atol=1e-6)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in "12")
    assert one["test"] == pytest.approx(two["test"], abs=1e-6)
    assert one["validation"][0]["loss"] == pytest.approx(two["validation"][0]["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.name=clothes"], "no data set 'clothes'; have folder"),
        (["--data.batch=0"], "batch=0"),
        (["--model.inputs={a: [down.9@1]}"], "no features 'down.9@1'"),
        (["--trainer.max_epochs=3"], "trainer.max_epochs is fixed"),
        (["--model.head.kind=attention", "--data.extraction.taps=['mid,up.0@50']"], "attention reads one tap"),
    ],
)
def test_mistakes_are_told_in_one_line(options, words, root, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", images(root), tmp_path / "out")
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        run(recipe, *options)


def test_a_file_that_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="is no recipe"):
        main([str(tmp_path / "r.yaml")])
    (tmp_path / "r.yaml").write_text("recipe: soup\n")
    with pytest.raises(ValueError, match="have heads, knn, pixels"):
        main([str(tmp_path / "r.yaml")])
    with pytest.raises(ValueError, match="try: repkit pretrain --config"):
        main(["pretrain"])
    with pytest.raises(ValueError, match="no recipe; .* dinov2-knn, "):
        main([])


def test_a_folder_of_other_results_is_left_as_it_was(store, tmp_path):
    """The settings of what lies there decide whether it may go on."""
    recipe = write_recipe(tmp_path / "r.yaml", stored(store), tmp_path / "out")
    (tmp_path / "out").mkdir()
    for name in ("settings.json", "cells.parquet"):
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(ValueError, match="something else"):
        run(recipe)
    assert (tmp_path / "out" / "settings.json").read_text() == "{}"


def test_a_run_killed_before_its_first_checkpoint_starts_over(store, tmp_path):
    recipe, out = write_recipe(tmp_path / "r.yaml", stored(store), tmp_path / "out"), tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    for name in ("settings.json", "last.ckpt.tmp", "logs/metrics.csv"):
        (out / name).write_text("{}")
    assert run(recipe)["steps"] == 8


def test_the_command_prints_what_it_found(store, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", stored(store), tmp_path / "out")
    main([str(recipe), *CPU, "--trainer.enable_progress_bar=true"])
    told = capsys.readouterr()
    assert told.out.startswith("8 steps; best on validation: all, lr 0.0") and "test_accuracy " in told.out
    for line in ("train: 8/8, ", "validate: 2/2, ", "test: 3/3, "):  # batches of eight
        assert line in told.err, told.err


def test_samples_that_do_not_count_are_left_out():
    probe = Probe()
    probe.heads.append(torch.nn.Identity())
    logits = torch.eye(6)[[0, 1, 2, 3]]
    batch = {"features": logits, "label": torch.tensor([0, 1, 5, 3]), "index": torch.tensor([4, 0, 2, -1])}
    (found,) = probe.measures(batch).tolist()
    assert found[0] == 2 and found[3] == 3
    assert found[2] == pytest.approx(float(F.cross_entropy(logits[:3], batch["label"][:3], reduction="sum")))
