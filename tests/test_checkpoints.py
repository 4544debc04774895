import argparse

import pytest
import torch
from safetensors.torch import save_file

from repkit.checkpoints import load_checkpoint, read_checkpoint
from repkit.extractors import DiffusionExtractor
from tests import tiny, tiny_adm

RUN = {"image_size": 16, "num_head_channels": 16, "use_new_attention_order": False, "noise_schedule": "linear"}


@pytest.fixture(scope="module")
def weights():
    return tiny_adm.adm_model().state_dict()


class Payload:
    """What a pickle could bring along."""


def equal(found, weights):
    return found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_a_file_gives_the_features_of_the_network_in_memory(tmp_path, weights, suffix):
    path = tmp_path / f"mine.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    backbone = load_checkpoint(str(path), config=RUN)
    ours, theirs = (DiffusionExtractor(one, "up.0@50")(tiny.images(2)) for one in (backbone, tiny_adm.adm()))
    assert torch.equal(ours["up.0@50"], theirs["up.0@50"])
    assert backbone.weights_hash == tiny_adm.adm().weights_hash
    assert backbone.name == "mine" and backbone.provenance == {"model": str(path), "revision": None}
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_device_dtype_and_name(tmp_path, weights):
    path = tmp_path / "mine.pt"
    torch.save({key: tensor.half() for key, tensor in weights.items()}, path)  # published files may be halves
    assert load_checkpoint(path, config=RUN).dtype == torch.float32
    backbone = load_checkpoint(path, config=RUN, dtype=torch.bfloat16, device="cpu", name="yours")
    assert backbone.dtype == torch.bfloat16 and backbone.name == "yours"
    backbone.check_frozen()


def test_the_file_may_go_once_it_is_loaded(tmp_path, weights):
    path = tmp_path / "mine.pt"
    torch.save(weights, path)
    backbone = load_checkpoint(path, config=RUN)
    path.write_bytes(b"")
    assert equal(backbone.model.state_dict(), weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda good, bad: good,
        lambda good, bad: {"state_dict": good},
        lambda good, bad: {"model": bad, "ema": good, "opt": {"step": torch.ones(1)}, "steps": 400},
        lambda good, bad: {"args": argparse.Namespace(lr=1e-4), "model": {"state_dict": good}, "epoch": 3},
        lambda good, bad: {f"module.{key}": tensor for key, tensor in good.items()} | {"step": 7},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_where_training_scripts_put_them(tmp_path, weights, wrap, zipped):
    bad = {key: tensor + 1 for key, tensor in weights.items()}
    torch.save(wrap(weights, bad), tmp_path / "mine.pt", _use_new_zipfile_serialization=zipped)
    assert equal(read_checkpoint(tmp_path / "mine.pt"), weights)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_never_unpickled(tmp_path, weights, zipped):
    torch.save({"model": weights, "trainer": Payload()}, tmp_path / "mine.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(OSError, match="mine.pt holds Python objects, and reading those can run code; .*state_dict"):
        read_checkpoint(tmp_path / "mine.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "legacy.pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_cut_short_is_an_os_error_of_one_line(tmp_path, weights, suffix, share):
    path = tmp_path / f"mine.{suffix}"
    if suffix == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=suffix == "pt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(OSError, match=r"cannot read .*mine.*the file is not whole") as refused:
        load_checkpoint(path, config=RUN)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_of_something_else_is_an_os_error(tmp_path, suffix):
    path = tmp_path / f"page.{suffix}"
    path.write_text("<html>404, not found</html>" * 100)
    with pytest.raises(OSError, match="cannot read .*page.*no checkpoint|not whole"):
        read_checkpoint(path)


def test_a_file_of_other_bytes_is_not_told_as_a_number(tmp_path):
    (tmp_path / "mine.pt").write_bytes(b"hello")
    with pytest.raises(OSError, match=r"cannot read .*mine.pt: [A-Za-z]+; the file is not whole"):
        read_checkpoint(tmp_path / "mine.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "holds a list and no named weights"),
        ({"epoch": 3, "lr": 0.1}, r"holds no weights \(it has epoch, lr\)"),
        ({}, r"holds no weights \(it has nothing\)"),
    ],
)
def test_a_file_without_weights_is_an_os_error(tmp_path, content, message):
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(OSError, match=message):
        load_checkpoint(tmp_path / "mine.pt")


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"no file .*none.pt; give a checkpoint \(.pt, .pth, .safetensors\)"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(OSError, match="no file"):
        load_checkpoint(tmp_path)


def test_another_family_is_a_value_error(tmp_path):
    save_file(tiny.unet_model().state_dict(), tmp_path / "diffusers.safetensors")
    with pytest.raises(ValueError, match=r"diffusers.safetensors is of no family .*\(ADM\), SiT and REPA"):
        load_checkpoint(tmp_path / "diffusers.safetensors", config=RUN)


def test_weights_that_are_missing_are_an_os_error(tmp_path, weights):
    torch.save({key: value for key, value in weights.items() if "output_blocks.2" not in key}, tmp_path / "mine.pt")
    with pytest.raises(OSError, match="mine lacks .* weights of an ADM, output_blocks.2.0.* first; get it again"):
        load_checkpoint(tmp_path / "mine.pt", config=RUN)


def test_what_weights_do_not_tell_is_asked_for(tmp_path, weights):
    torch.save(weights, tmp_path / "256x256_diffusion_uncond.pt")  # the name of a network of other widths
    with pytest.raises(ValueError, match="weights of 256x256_diffusion_uncond do not tell .* in config="):
        load_checkpoint(tmp_path / "256x256_diffusion_uncond.pt")
