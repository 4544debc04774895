"""The parts of a recipe: which rows and which part of an image a step sees, and noise that belongs to a step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from repkit.recipes import reading
from repkit.recipes.class_noise import ClassNoise
from repkit.recipes.curves import curve_picture, curve_table
from repkit.recipes.extraction import Extraction, at_step
from repkit.recipes.feature_data import Lists
from repkit.recipes.mini_models import build_network, predict
from repkit.recipes.optimising import Optimising
from repkit.recipes.rows import StepRows, evaluation_rows
from repkit.recipes.views import View, Views
from tests import tiny


def first(rows: StepRows, count: int) -> list[list[tuple[int, int]]]:
    steps = iter(rows)
    return [next(steps) for _ in range(count)]


def test_steps_see_each_row_once_an_epoch_and_begin_anywhere():
    whole = first(StepRows(12, 4, 7), 9)
    for epoch in range(3):
        assert sorted(row for step in whole[3 * epoch : 3 * epoch + 3] for _, row in step) == list(range(12))
    assert [step[0][0] for step in whole] == list(range(9))
    assert first(StepRows(12, 4, 7, first=5), 4) == whole[5:]
    assert first(StepRows(12, 4, 8), 3) != whole[:3]


def test_processes_share_a_step_and_an_evaluation():
    whole = first(StepRows(12, 4, 7), 5)
    shares = [first(StepRows(12, 4, 7, rank=rank, world=2), 5) for rank in range(2)]
    for step, *parts in zip(whole, *shares, strict=True):
        assert sorted(step) == sorted(parts[0] + parts[1]) and len(parts[0]) == len(parts[1])
    rows = [evaluation_rows(7, rank=rank, world=3) for rank in range(3)]
    assert {len(one) for one in rows} == {3}
    assert sorted(row for one in rows for row, counts in one if counts) == list(range(7))
    with pytest.raises(ValueError, match="5 images does not divide among 2"):
        StepRows(12, 5, 0, world=2)


def test_lists_can_be_read_twice():
    lists = Lists([1, 2, 3], 2)
    assert list(lists) == list(lists) == [[1, 2], [3]] and len(lists) == 2


@pytest.fixture
def picture(rng) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))


def test_a_view_is_a_plain_resize_of_its_part(picture):
    found = View((5.0, 2.0, 25.0, 22.0), flip=True, pad=3).image(picture, (8, 8))
    padded = ImageOps.expand(picture, 3)
    expected = padded.resize((8, 8), Image.Resampling.BICUBIC, (5, 2, 25, 22)).transpose(0)
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_a_mask_is_seen_as_its_image_is():
    mask = np.arange(30 * 40).reshape(30, 40) % 7
    view = View((3.0, 1.0, 23.0, 21.0), flip=True)
    np.testing.assert_array_equal(view.mask(mask, (20, 20), 255), mask[1:21, 3:23][:, ::-1])
    assert (View((0.0, 0.0, 2.0, 2.0), pad=2).mask(mask, (2, 2), 255) == 255).all()


@pytest.mark.parametrize("crop", ["none", "resized", "scaled", "padded"])
def test_views_stay_inside_and_vary_as_they_should(crop, rng):
    views = Views(crop, flip=True, smallest=0.25, pad=4)
    seen = [views.training((40, 30), (16, 16), rng) for _ in range(200)]
    assert 60 < sum(view.flip for view in seen) < 140
    for view in seen:
        left, top, right, bottom = view.box
        assert 0 <= left < right <= 40 + 2 * view.pad and 0 <= top < bottom <= 30 + 2 * view.pad
        if crop != "resized":
            assert right - left == pytest.approx(bottom - top)
    areas = [(view.box[2] - view.box[0]) * (view.box[3] - view.box[1]) / (40 * 30) for view in seen]
    if crop == "resized":
        assert min(areas) >= 0.25 - 1e-9 and max(areas) > 0.6
    if crop == "scaled":
        assert min(areas) < 0.1 and max(areas) > 0.6
    if crop in ("none", "padded"):
        assert len(set(np.round(areas, 9))) == 1
    assert (len({view.box for view in seen}) > 1) == (crop != "none")


def test_padded_views_of_a_square_are_crops_by_whole_pixels(rng):
    corners = {Views("padded", pad=2).training((32, 32), (32, 32), rng).box[:2] for _ in range(400)}
    assert corners == {(float(x), float(y)) for x in range(5) for y in range(5)}


def test_evaluation_sees_the_centre():
    assert Views(centre=0.5).evaluation((40, 20), (8, 8)).box == (15, 5, 25, 15)
    with pytest.raises(ValueError, match="centre=0"):
        Views(centre=0.0)


@pytest.mark.parametrize("schedule", ["cosine", "poly", "constant"])
def test_a_rate_rises_then_falls(schedule):
    optimising = Optimising(schedule=schedule, warmup=0.1)
    shares = [optimising.share(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 11) and shares[9] == pytest.approx(10 / 11) and shares[10] == 1
    middle = {"cosine": 0.5, "poly": 0.5, "constant": 1}[schedule]
    assert shares[55] == pytest.approx(middle)
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))


def test_rates_scale_with_the_batch_and_only_matrices_decay():
    assert Optimising(lrs=[0.1, 0.2], per=256).rates(1024) == pytest.approx([0.4, 0.8])
    layer = torch.nn.Linear(2, 3)
    for name, kind in (("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW"), ("lars", "Lars")):
        optimizer = Optimising(name=name, weight_decay=0.5).optimizer([(0.3, layer)])
        assert type(optimizer).__name__ == kind
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.3, 0.5), (0.3, 0.0)]
    with pytest.raises(ValueError, match="lrs="):
        Optimising(lrs=[0.0])


def test_lars_moves_a_matrix_by_its_norm():
    """The step of a matrix is lr * 0.001 * |w| in the direction of the gradient, of a bias lr * gradient."""
    layer = torch.nn.Linear(4, 3)
    before, optimizer = (
        [p.detach().clone() for p in layer.parameters()],
        Optimising(name="lars").optimizer([(2.0, layer)]),
    )
    layer(torch.arange(4.0)).square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    optimizer.step()
    moved = [old - p.detach() for old, p in zip(before, layer.parameters(), strict=True)]
    wanted = 2.0 * 0.001 * before[0].norm() / gradients[0].norm() * gradients[0]
    torch.testing.assert_close(moved[0], wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved[1], 2.0 * gradients[1])


def test_noise_belongs_to_the_step_and_the_image():
    extractor = Extraction(taps=["mid@400"], seed=2).build("cpu")
    images = tiny.images(3, 32, 32)
    found = [at_step(extractor, step)(images)["mid@400"] for step in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-2)
    alone = at_step(extractor, 1)(images[2:])["mid@400"]
    torch.testing.assert_close(alone, found[2][2:], rtol=1e-4, atol=1e-5)
    assert extractor.seed == 2


def test_a_curve_is_a_table_and_a_picture(tmp_path):
    curves = {"train_loss": [(1, 2.0), (2, 1.5)], "val_accuracy": [(2, 0.25)]}
    assert curve_table(curves) == "step,measure,value\n1,train_loss,2\n2,train_loss,1.5\n2,val_accuracy,0.25\n"
    losses, shares = curve_picture(curves, "title").axes
    assert losses.lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.5]]
    assert shares.lines[0].get_label() == "val_accuracy"


SMALL = {
    "mini-unet": {"sample_size": 8, "block_out_channels": [8, 8, 8], "norm_num_groups": 4, "attention_head_dim": 4},
    "mini-dit": {"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2},
}


@pytest.mark.parametrize("model", list(SMALL))
def test_class_noise_is_added_to_the_embedding_and_nowhere_else(model, generator):
    network, plain = (tiny.randomise(build_network(model, SMALL[model])) for _ in range(2))
    noise = ClassNoise(network, 2.0)
    x, t, labels = torch.randn(4, 1, 8, 8, generator=generator), torch.full((4,), 30), torch.tensor([0, 3, 3, 10])
    assert torch.equal(predict(network, x, t, labels), predict(plain, x, t, labels))
    noise.draw(4, torch.Generator().manual_seed(1), torch.device("cpu"))
    assert noise.delta is not None
    tables = [one for one in plain.modules() if isinstance(one, torch.nn.Embedding)]
    for table in tables:  # a class of its own for every image, whose embedding has the noise in it
        table.weight = torch.nn.Parameter(table.weight[labels] + noise.delta)
    torch.testing.assert_close(predict(network, x, t, labels), predict(plain, x, t, torch.arange(4)))


def test_class_noise_has_the_published_size():
    noise = ClassNoise(build_network("mini-unet"), 3.0)
    noise.draw(500, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert noise.delta is not None and noise.delta.shape == (500, 128)
    assert float(noise.delta.std()) == pytest.approx(3 / 128**0.5, rel=0.02)
    assert abs(float(noise.delta.mean())) < 0.01


def test_a_recipe_is_a_file_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path(reading.__file__).parent
    for given in ("probe", "probe.yaml", "recipes/probe.yaml"):
        assert reading.with_config([given, "--out", "x"]) == ["--config", str(own / "probe.yaml"), "--out", "x"]
    Path("probe.yaml").write_text("{}")
    assert reading.find_recipe("probe.yaml") == Path("probe.yaml")  # one's own comes first
    for given in ("soup", "elsewhere/probe.yaml"):
        with pytest.raises(FileNotFoundError, match=f"no recipe {given}; .* probe, probe-store, "):
            reading.find_recipe(given)
    assert reading.with_config(["--steps", "3"]) == ["--steps", "3"]


def test_the_recipes_are_in_the_wheel():
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    assert '"repkit.recipes" = ["*.yaml"]' in text
