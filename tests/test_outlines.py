"""Outlines of checkpoint files: the blocks of the whole network, from names and shapes alone."""

import pytest
import torch
from safetensors.torch import save_file

from repkit import zoo
from repkit.checkpoints import read_checkpoint
from tests import tiny, tiny_adm, tiny_sit


@pytest.mark.parametrize("name", ["sit.pt", "old.pt", "sit.safetensors"])
def test_names_and_shapes_are_read_without_values(tmp_path, name):
    weights, path = tiny_sit.sit_weights(), tmp_path / name
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"ema": weights}, path, _use_new_zipfile_serialization=name != "old.pt")
    found, whole = read_checkpoint(path, values=False), read_checkpoint(path)
    assert all(tensor.is_meta for tensor in found.values()) and not any(tensor.is_meta for tensor in whole.values())
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in whole.items()}


@pytest.mark.parametrize("kind", ["sit", "repa"])
def test_a_file_is_outlined_with_its_autoencoder(tmp_path, kind):
    weights = tiny_sit.repa_weights() if kind == "repa" else tiny_sit.sit_weights()
    torch.save(weights, tmp_path / "mine.pt")
    tiny.vae_model().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    backbone = zoo.outline(tmp_path / "mine.pt", vae=tmp_path / "vae", config={"heads": 3})
    assert {p.device.type for network in backbone.networks.values() for p in network.parameters()} == {"meta"}
    whole = tiny_sit.repa()
    assert (backbone.blocks, backbone.size) == (whole.blocks, whole.size) and backbone.flops == whole.flops


def test_without_one_it_is_that_of_stable_diffusion(tmp_path, caplog):
    torch.save(tiny_sit.sit_weights(), tmp_path / "mine.pt")
    backbone = zoo.outline(tmp_path / "mine.pt", config={"heads": 3})
    assert (backbone.size, backbone.blocks["block.1"].stride) == (6 * 8, 2 * 8)
    assert "mine does not tell its autoencoder; sizes and strides are as with that of Stable Diffusion" in caplog.text


def test_adms_are_outlined_too(tmp_path):
    model = tiny_adm.adm_model()
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    told = {"image_size": 16, "num_head_channels": 16, "use_new_attention_order": False, "noise_schedule": "linear"}
    backbone = zoo.outline(tmp_path / "mine.pt", config=told)
    assert backbone.blocks == tiny_adm.adm().blocks and all(p.is_meta for p in backbone.model.parameters())


def test_pixels_need_none(tmp_path, caplog):
    torch.save(tiny_sit.sit_weights(3, 6), tmp_path / "SiT.pt")
    assert zoo.outline(tmp_path / "SiT.pt", config={"heads": 3}).blocks == tiny_sit.sit().blocks
    assert caplog.text == ""


def test_latents_of_another_kind_are_told(tmp_path):
    torch.save(tiny_sit.svg_weights(7), tmp_path / "svg.pt")
    with pytest.raises(ValueError, match="svg works on latents of 7 channels, and no weight tells how many pixels"):
        zoo.outline(tmp_path / "svg.pt")


def test_widths_that_nobody_published_need_their_heads(tmp_path):
    torch.save(tiny_sit.sit_weights(), tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="mine is 12 wide, which no published SiT is; give --config heads=NUMBER"):
        zoo.outline(tmp_path / "mine.pt")


def test_heads_must_divide_the_width(tmp_path):
    torch.save(tiny_sit.sit_weights(), tmp_path / "mine.pt")
    with pytest.raises(
        ValueError, match="heads=5 does not divide the width of mine, 12; give one of 1, 2, 3, 4, 6, 12"
    ):
        zoo.outline(tmp_path / "mine.pt", config={"heads": 5})


def test_options_of_files_are_for_files(tmp_path):
    with pytest.raises(ValueError, match="vae= given with a pipeline"):
        zoo.outline("sd15", vae=tmp_path)
