"""The pretraining recipe: the same as a plain loop, the same after a kill, and an export that diffusers reads."""

import csv
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file

from repkit.backbones.dit import DiT
from repkit.backbones.unet import UNet
from repkit.datasets.fashion_mnist import CLASSES, load
from repkit.images import Resize, to_tensor
from repkit.recipes import training_images
from repkit.recipes.mini_models import MINI_MODELS, build_network, mini_model, predict
from repkit.recipes.model_folder import export_model, read_weights, sample, write_losses
from repkit.recipes.pretrain import Denoiser, Options, lr_factor, parse_options, pretrain, target
from repkit.recipes.training_images import draw_batch, prepare_images
from repkit.zeroshot.weighttable import WeightTable
from repkit.zoo import EVIDENCE_WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "mini-unet": {"sample_size": 8, "block_out_channels": [8, 8, 8], "norm_num_groups": 4, "attention_head_dim": 4},
    "mini-dit": {"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2},
}
FIGURES = {"probe": {"trained": 0.871, "random": 0.82}, "zero-shot": 0.5}
models = pytest.mark.parametrize("model", list(TINY))


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 training images in the original format."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = load("train")
    write_idx(folder / "train-images-idx3-ubyte.gz", images[:24])
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels[:24].astype(np.uint8))
    return folder


def tiny(model: str, data: Path, out: Path) -> Options:
    options = Options(model, str(out), str(data), steps=4, batch=8, checkpoint_every=2, warmup=2)
    return replace(options, precision="32-true", seed=3, label_dropout=0.3, network=TINY[model])


@pytest.fixture
def options(model: str, data: Path, tmp_path: Path) -> Options:
    return tiny(model, data, tmp_path / "out")


@pytest.fixture(scope="module", params=list(TINY))
def run(request, data, tmp_path_factory) -> Options:
    """A finished run, not to be changed."""
    options = tiny(request.param, data, tmp_path_factory.mktemp(request.param))
    Path(options.out, "model").mkdir()
    Path(options.out, "model", "figures.json").write_text(json.dumps(FIGURES))
    assert pretrain(options) == Path(options.out, "model")
    return options


def copied(run: Options, tmp_path: Path) -> Options:
    return replace(run, out=str(shutil.copytree(run.out, tmp_path / "copy")))


def read_checkpoint(options: Options) -> dict:
    return torch.load(Path(options.out) / "last.ckpt", weights_only=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(a: Options, b: Options) -> None:
    first, second = read_checkpoint(a), read_checkpoint(b)
    assert first["global_step"] == second["global_step"] == a.steps
    torch.testing.assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(first["optimizer_states"], second["optimizer_states"], rtol=0, atol=0)
    assert (Path(a.out) / "loss.csv").read_bytes() == (Path(b.out) / "loss.csv").read_bytes()
    assert files(Path(a.out) / "model") == files(Path(b.out) / "model")


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def crashing(images, labels, at, **options):
        if at == step:
            raise RuntimeError("crash")
        return draw_batch(images, labels, at, **options)

    monkeypatch.setattr(training_images, "draw_batch", crashing)


def test_a_crashed_run_resumes_to_the_same_bits(run, tmp_path, monkeypatch):
    crashed = replace(run, out=str(tmp_path / "crashed"))
    with monkeypatch.context() as patch:
        crash_at(3, patch)
        with pytest.raises(RuntimeError, match="crash"):
            pretrain(crashed)
    assert read_checkpoint(crashed)["global_step"] == 2
    Path(crashed.out, "model").mkdir()
    shutil.copy(Path(run.out, "model", "figures.json"), Path(crashed.out, "model"))
    pretrain(crashed)
    assert_same_run(run, crashed)


def test_a_finished_run_is_left_alone_and_can_be_prolonged(run, tmp_path):
    again = copied(run, tmp_path)
    pretrain(again)
    assert files(Path(again.out)) == files(Path(run.out))
    pretrain(replace(again, steps=5))
    assert read_checkpoint(again)["global_step"] == 5
    assert len(read_checkpoint(again)["callbacks"]["Checkpoints"]["losses"]) == 5


@models
def test_class_noise_changes_the_weights_and_is_the_same_after_a_crash(options, tmp_path, monkeypatch):
    noisy = replace(options, cond_noise=1.0)
    pretrain(noisy)
    assert read_checkpoint(noisy)["hyper_parameters"]["cond_noise"] == 1.0
    crashed = replace(noisy, out=str(tmp_path / "crashed"))
    with monkeypatch.context() as patch:
        crash_at(3, patch)
        with pytest.raises(RuntimeError, match="crash"):
            pretrain(crashed)
    pretrain(crashed)
    assert_same_run(noisy, crashed)
    plain = replace(options, out=str(tmp_path / "plain"))
    pretrain(plain)
    name = next(name for name in read_checkpoint(plain)["state_dict"] if name.endswith("to_q.weight"))
    assert not torch.equal(*(read_checkpoint(run)["state_dict"][name] for run in (noisy, plain)))


@pytest.mark.slow  # compiles two networks
@pytest.mark.parametrize("model", ["mini-dit"])
def test_class_noise_is_in_a_network_compiled_after_one_without(options, tmp_path):
    runs = [replace(options, out=str(tmp_path / str(gamma)), cond_noise=gamma, compile=True) for gamma in (0.0, 1.0)]
    runs.append(replace(options, out=str(tmp_path / "eager"), cond_noise=1.0))
    for run in runs:
        pretrain(run)
    plain, noisy, eager = (read_checkpoint(run)["callbacks"]["Checkpoints"]["losses"] for run in runs)
    assert not torch.allclose(noisy, plain, rtol=1e-5)
    torch.testing.assert_close(noisy, eager, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mini-dit"])
def test_a_killed_process_resumes_to_the_same_bits(options, tmp_path):
    options = replace(options, steps=60, checkpoint_every=1)
    pretrain(options)
    killed = replace(options, out=str(tmp_path / "killed"))
    code = f"from repkit.recipes.pretrain import *; pretrain({killed!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (Path(killed.out) / "last.ckpt").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pretrain(killed)
    assert_same_run(options, killed)


def plain_step(model: str, network: torch.nn.Module, batch) -> torch.Tensor:
    """The loss, with diffusers' own noising and velocity."""
    if model == "mini-unet":
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        t = (batch.u * 1000).long()
        x_t, wanted = scheduler.add_noise(batch.x0, batch.eps, t), scheduler.get_velocity(batch.x0, batch.eps, t)
    else:
        t, u = batch.u * 1000, batch.u[:, None, None, None]
        x_t, wanted = (1 - u) * batch.x0 + u * batch.eps, batch.eps - batch.x0
    return (network(x_t, timestep=t, class_labels=batch.labels).sample - wanted).square().mean()


def test_training_is_a_plain_loop_with_a_running_mean(run):
    images, labels = (torch.from_numpy(array[:24]) for array in load("train"))
    images = prepare_images(images.numpy(), 8)
    network = build_network(run.model, run.network, seed=run.seed).eval()
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    averaged = [parameter.detach().clone() for parameter in network.parameters()]
    losses = []
    for step, lr in enumerate([4e-4, 8e-4, 8e-4, 8e-4]):  # the decay begins at step 3 with the factor 1
        optimizer.param_groups[0]["lr"] = lr
        loss = plain_step(run.model, network, draw_batch(images, labels, step, batch=8, label_dropout=0.3, seed=3))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9995, (2 + step) / (11 + step))
        averaged = [decay * a + (1 - decay) * p.detach() for a, p in zip(averaged, network.parameters(), strict=True)]
        losses.append(loss.item())
    saved = read_checkpoint(run)
    assert saved["callbacks"]["Checkpoints"]["losses"].tolist() == pytest.approx(losses, rel=1e-4)
    for (name, parameter), mean in zip(network.named_parameters(), averaged, strict=True):
        torch.testing.assert_close(saved["state_dict"][f"network.{name}"], parameter.data, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(saved["state_dict"][f"ema.{name}"], mean, rtol=1e-4, atol=2e-5)


def test_diffusers_reads_the_export_and_gives_the_averaged_networks_output(run, generator):
    folder, model = Path(run.out, "model"), mini_model(run.model)
    kind = {"unet": UNet2DModel, "transformer": DiTTransformer2DModel}[model.component]
    exported = kind.from_pretrained(folder / model.component, torch_dtype=torch.float32)
    stored = load_file(folder / model.component / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    network = build_network(run.model, run.network)
    network.load_state_dict(read_weights(Path(run.out) / "last.ckpt", run.model))
    x = torch.randn(5, 1, 8, 8, generator=generator)
    t, labels = torch.tensor([0, 3, 500, 900, 999]), torch.tensor([0, 1, 5, 9, 10])
    with torch.no_grad():
        expected, found = (predict(net.eval(), x, t, labels) for net in (network, exported))
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * expected.abs().max().item())


def test_the_folder_says_what_it_is(run):
    folder = Path(run.out, "model")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["id2label"] == {str(label): name for label, name in enumerate(CLASSES)}
    assert index["_class_name"] == {"mini-unet": "DDPMPipeline", "mini-dit": "DiTPipeline"}[run.model]
    card = (folder / "README.md").read_text()
    weights = next(folder.rglob("*.safetensors"))
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card
    assert "| images seen | 32 |" in card and "MIT licence" in card and "seed: 3" in card
    assert "| probe | trained 0.871, random 0.82 |" in card and "| zero-shot | 0.5 |" in card
    assert run.out not in card
    for name, size in (("samples.png", (160, 128)), ("loss.png", (720, 360))):
        with Image.open(folder / name) as picture:
            assert picture.size == size


def test_the_scheduler_in_the_folder_is_the_one_trained_with(run):
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "mini-unet": (DDPMScheduler, {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
        "mini-dit": (FlowMatchEulerDiscreteScheduler, {"shift": 1.0}),
    }
    kind, wanted = kinds[run.model]
    config = kind.from_pretrained(Path(run.out, "model", "scheduler")).config
    assert {name: config[name] for name in wanted} == wanted and config["num_train_timesteps"] == 1000


@pytest.mark.parametrize("source", ["model", "last.ckpt"])
def test_init_starts_from_the_weights_of_another_run(run, source):
    started = Denoiser(replace(run, init=str(Path(run.out) / source), seed=9))
    averaged = read_weights(Path(run.out) / "last.ckpt", run.model)
    for network in (started.network, started.ema):
        for name, weight in network.state_dict().items():
            expected = averaged[name].half().float() if source == "model" else averaged[name]
            assert torch.equal(weight, expected), name


def draws(count: int, *, batch: int = 8, label_dropout: float = 0.1, seed: int = 0):
    images, labels = torch.arange(24, dtype=torch.uint8)[:, None, None].repeat(1, 2, 2), torch.arange(24) % 10
    options = {"batch": batch, "label_dropout": label_dropout, "seed": seed}
    return labels, [draw_batch(images, labels, step, **options) for step in range(count)]


def rows_of(batch) -> torch.Tensor:
    return ((batch.x0[:, 0, 0, 0] + 1) * 127.5).round().long()


def test_an_epoch_sees_each_image_once_and_each_epoch_in_another_order():
    _, batches = draws(6)
    epochs = [torch.cat([rows_of(batch) for batch in part]) for part in (batches[:3], batches[3:])]
    assert all(epoch.sort().values.tolist() == list(range(24)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_the_share_of_dropped_labels_is_as_asked():
    labels, batches = draws(400, batch=24)
    dropped = torch.cat([batch.labels == 10 for batch in batches]).double()
    assert dropped.mean().item() == pytest.approx(0.1, abs=4 * (0.09 / len(dropped)) ** 0.5)
    for batch in batches:
        assert ((batch.labels == labels[rows_of(batch)]) | (batch.labels == 10)).all()


def test_noise_is_normal_and_times_are_stratified():
    _, batches = draws(200, batch=24)
    eps = torch.stack([batch.eps for batch in batches])
    assert eps.mean().abs() < 0.03 and (eps.std() - 1).abs() < 0.03
    for batch in batches:
        assert (batch.u * 24).floor().sort().values.tolist() == list(range(24))
        assert batch.u.min() >= 0 and batch.u.max() < 1


def test_a_step_is_a_function_of_seed_and_step():
    _, (first, second) = draws(2)
    _, (again, _) = draws(2)
    _, (other, _) = draws(2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.eps, second.eps) and not torch.equal(first.eps, other.eps)
    assert not torch.equal(rows_of(first), rows_of(other))


@models
def test_training_images_are_what_the_backbone_encodes(model):
    images = load("test")[0][:6]
    network = build_network(model)
    backbone = {"mini-unet": UNet, "mini-dit": DiT}[model](network, mini_model(model).schedule)
    resized = np.stack([Resize(32)(Image.fromarray(image).convert("RGB"))[0] for image in images])
    ours = prepare_images(images, 32)[:, None].float() / 127.5 - 1
    torch.testing.assert_close(ours, backbone.encode(to_tensor(resized)), rtol=0, atol=1e-6)


def test_the_target_of_v_is_diffusers_velocity(generator):
    x0, eps = torch.randn(2, 4, 1, 3, 3, generator=generator)
    t = torch.tensor([0, 10, 600, 999])
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    found = target(mini_model("mini-unet").schedule, x0, eps, t)
    torch.testing.assert_close(found, scheduler.get_velocity(x0, eps, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1), (50, 1), (75, 1), (80, 0.8), (90, 0.4), (99, 0.04), (100, 0.02)]
)
def test_the_learning_rate_rises_stays_and_falls(step, factor):
    assert lr_factor(step, Options(steps=100, warmup=10, decay=0.25)) == pytest.approx(factor)


class Oracle(torch.nn.Module):
    """The optimal denoiser of one image repeated for ever, in the model's own prediction."""

    def __init__(self, image: torch.Tensor, model: str) -> None:
        super().__init__()
        self.image, self.model, self.schedule = image, model, mini_model(model).schedule

    def forward(self, x_t, t, class_labels, return_dict):
        alpha, sigma = (c[:, None, None, None] for c in self.schedule.coefficients(t))
        eps = (x_t - alpha * self.image) / sigma
        return (eps - self.image if self.model == "mini-dit" else alpha * eps - sigma * self.image,)


@models
def test_the_sampler_finds_the_only_image_there_is(model, generator):
    image = torch.rand(1, 1, 4, 4, generator=generator) - 0.5
    found = sample(Oracle(image, model), mini_model(model).schedule, torch.zeros(3, dtype=torch.long), size=4, steps=20)
    torch.testing.assert_close(found, image.expand(3, 1, 4, 4), rtol=0, atol=1e-3)


def test_losses_are_written_as_means_of_100_steps(tmp_path):
    losses = torch.arange(250.0)
    write_losses(losses, tmp_path / "loss.csv")
    with (tmp_path / "loss.csv").open() as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    assert rows == [(100, 49.5), (200, 149.5), (250, 224.5)]


@pytest.mark.parametrize(
    ("file", "model", "parameters"),
    [("pretrain.yaml", "mini-unet", 2_736_353), ("pretrain-dit.yaml", "mini-dit", 2_818_448)],
)
def test_the_recipe_files_are_whole(file, model, parameters):
    options = parse_options(["--config", str(ROOT / "recipes" / file), "--steps", "7"])
    assert options.model == model and options.steps == 7 and options.batch == 64
    network = Denoiser(options).network
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_a_dit_block_begins_as_the_identity(generator):
    network = build_network("mini-dit", TINY["mini-dit"])
    tokens = torch.randn(2, 4, 8, generator=generator)
    for block in network.transformer_blocks:
        out = block(tokens, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([0, 10]))
        torch.testing.assert_close(out, tokens)


def test_building_a_network_leaves_the_random_numbers_alone():
    state = torch.get_rng_state()
    first, second, other = (build_network("mini-unet", TINY["mini-unet"], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.conv_in.weight, second.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mini-gan"}, "no model 'mini-gan'.*mini-unet, mini-dit"),
        ({"steps": 0}, "steps=0; give at least 1"),
        ({"label_dropout": 1.5}, "label_dropout=1.5 is a share"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Options(**changes)


@pytest.mark.parametrize("model", ["mini-unet"])
def test_what_cannot_be_trained_is_refused(options, tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        pretrain(replace(options, data=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="batch=25 of 24 images"):
        pretrain(replace(options, batch=25))
    with pytest.raises(FileNotFoundError, match="no unet/.*give a mini-unet folder or a checkpoint"):
        pretrain(replace(options, init=str(tmp_path)))


def test_another_run_in_the_folder_is_refused(run):
    with pytest.raises(ValueError, match=r"seed=3 \(now 4\).*another out"):
        pretrain(replace(run, seed=4))


def test_an_unknown_option_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        parse_options(["--stepz", "3"])
    assert error.value.code == 2 and "stepz" in capsys.readouterr().err


def test_every_mini_model_is_tested():
    assert list(TINY) == list(MINI_MODELS)


def test_exporting_again_takes_up_new_figures(run, tmp_path):
    checkpoint = Path(copied(run, tmp_path).out, "last.ckpt")
    (checkpoint.parent / "model" / "figures.json").write_text('{"probe": 0.9}')
    folder = export_model(checkpoint, checkpoint.parent / "model")
    before, after = files(Path(run.out, "model")), files(folder)
    assert "| probe | 0.9 |" in after["README.md"].decode()
    assert {name for name in before if before[name] != after[name]} == {"README.md", "figures.json"}


def test_exporting_other_weights_drops_the_weights_of_evidence(run, tmp_path):
    checkpoint = Path(copied(run, tmp_path).out, "last.ckpt")
    folder = checkpoint.parent / "model"
    told = {"model": run.model, "weights_hash": "", "dtype": "float32", "classes": CLASSES, "evaluations": 4}
    WeightTable("learned", "l2", (250.0, 750.0), (4.0, 1.0), **told).save(folder / EVIDENCE_WEIGHTS)
    assert (export_model(checkpoint, folder) / EVIDENCE_WEIGHTS).is_file()
    saved = torch.load(checkpoint, weights_only=True)
    name = next(name for name in saved["state_dict"] if name.startswith("ema."))
    saved["state_dict"][name] += 1
    torch.save(saved, checkpoint)
    assert not (export_model(checkpoint, folder) / EVIDENCE_WEIGHTS).exists()
