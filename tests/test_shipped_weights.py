"""The table of weights in a model folder: attached by load, used by default, and dropped with the weights it is of."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest

from repkit.catalog import folder_of
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.racing import Racing
from repkit.zeroshot.staged import Staged
from repkit.zeroshot.strategies import Uniform
from repkit.zeroshot.weighttable import WeightTable
from repkit.zoo import EVIDENCE_WEIGHTS, load, random_control


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model with a table of its own."""
    copied = tmp_path_factory.mktemp("models") / "mini-unet"
    shutil.copytree(folder_of("mini-unet"), copied)
    backbone = load(copied)
    table = WeightTable(
        name="whitened",
        loss="l2",
        t=(100.0, 900.0),
        weights=(2.0, 0.5),
        model=backbone.name,
        weights_hash=backbone.weights_hash,
        dtype="float32",
        classes=("1", "0"),
        evaluations=4,
        temperature=0.5,
    )
    table.save(copied / EVIDENCE_WEIGHTS)
    return copied


def judge_of(backbone, **options):
    return DiffusionClassifier(backbone, [0, 1], strategy=Uniform(4), **options)


def test_the_table_is_the_default(folder):
    judge = judge_of(load(folder))
    assert judge.rule.weighting == "whitened" and judge.rule.calibrated and judge.rule.temperature == 0.5
    t = judge.levels.t
    expected = np.exp(np.interp(t, [100, 900], np.log([2, 0.5])))
    np.testing.assert_allclose(judge.rule.weights, expected)
    assert judge_of(judge.backbone, loss="l1").rule.weighting == "train"
    assert judge_of(judge.backbone, weighting="elbo").rule.weighting == "elbo"


def test_its_temperature_calibrates_only_what_it_was_fitted_for(folder):
    backbone = load(folder)

    def rule(classes=(0, 1), strategy=None, **options):
        return DiffusionClassifier(backbone, classes, strategy=strategy or Uniform(4), **options).rule

    assert rule().calibrated and rule((1, 0)).calibrated and rule(strategy=Racing(0.01, 4)).calibrated
    others = [
        rule((0, 2)),
        rule((0, 1, 2)),
        rule(strategy=Uniform(8)),
        rule(strategy=Racing(0.01, 64)),
        rule(strategy=Staged((1,), (4,))),
        rule(shortlist=lambda images: np.zeros((len(images), 1), dtype=int)),
        rule({0: [0, 2], 1: [1, 3]}, mixture="best"),
    ]
    assert [(one.calibrated, one.temperature) for one in others] == [(False, 0.5)] * len(others)
    assert rule({0: [0, 2], 1: [1, 3]}).calibrated and rule(mixture="best").calibrated
    assert not rule(temperature=0.5).calibrated and not rule(weighting="elbo").calibrated


def test_the_bundled_tables_calibrate_their_models_own_classes():
    for name in ("mini-unet", "mini-dit"):
        backbone = load(name)
        judge = DiffusionClassifier(backbone, backbone.class_names)
        assert judge.rule.weighting == "learned" and judge.rule.calibrated


def test_another_loads_dtype_keeps_it(folder):
    import torch

    assert judge_of(load(folder, dtype=torch.bfloat16)).rule.weighting == "whitened"


def test_a_table_of_other_weights_is_left_out_by_default_and_refused_when_given(folder, caplog):
    backbone = load(folder)
    table = replace(WeightTable.load(folder / EVIDENCE_WEIGHTS), weights_hash="ab" * 32)
    with pytest.raises(ValueError, match="no use for the whitened table: it was fitted to mini-unet .*take 'train'"):
        judge_of(backbone, weighting=table)
    backbone.evidence_weights = {"format": 2, **vars(table)}
    with caplog.at_level(logging.WARNING, logger="repkit"):
        assert judge_of(backbone).rule.weighting == "train"
    assert "whitened weights that came with the model are not used" in caplog.text


def test_other_networks_come_without_it(folder):
    backbone = load(folder)
    assert random_control(backbone).evidence_weights is None
    swapped = load(folder, denoiser=folder / "unet")
    assert swapped.evidence_weights is None and judge_of(swapped).rule.weighting == "train"
