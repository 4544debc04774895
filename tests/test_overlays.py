"""Overlays: LoRA merged by diffusers against B A by hand, denoisers swapped whole, and what does not fit refused."""

from fnmatch import fnmatch

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors.torch import load_file, save_file

from repkit import catalog, hub, zoo
from repkit.extractors import DiffusionExtractor
from repkit.overlays import merge_loras
from tests import families, tiny, tiny_flux, tiny_sd, tiny_sd3

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd"
    tiny_sd.sd_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def random(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def low_rank(weights, *layers, rank=2):
    """A and B of each layer."""
    shapes = {layer: weights[f"{layer}.weight"].shape for layer in layers}
    return {layer: (random(1, rank, width), random(2, height, rank)) for layer, (height, width) in shapes.items()}


def save_lora(path, pairs, prefix="unet."):
    named = {f"{prefix}{layer}.lora_A.weight": a for layer, (a, b) in pairs.items()}
    named |= {f"{prefix}{layer}.lora_B.weight": b for layer, (a, b) in pairs.items()}
    save_file(named, path)
    return path


def check_merged(backbone, base, expected):
    state = backbone.model.state_dict()
    assert state.keys() == base.keys()
    for name, weight in base.items():
        torch.testing.assert_close(state[name], expected.get(name, weight), rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_a_lora_is_added_to_the_weights(folder, base, tmp_path, prefix, scale):
    pairs = low_rank(base, LAYER, OTHER)
    path = save_lora(tmp_path / "lora.safetensors", pairs, prefix)
    backbone = zoo.load(folder, lora=path if scale == 1.0 else (path, scale))
    expected = {f"{layer}.weight": base[f"{layer}.weight"] + scale * b @ a for layer, (a, b) in pairs.items()}
    assert not torch.allclose(expected[f"{LAYER}.weight"], base[f"{LAYER}.weight"], atol=1e-2)
    check_merged(backbone, base, expected)
    assert backbone.provenance["lora"] == [(str(path.resolve()), scale)]


def test_alphas_of_kohyas_format_count(folder, base, tmp_path):
    (a, b) = low_rank(base, LAYER)[LAYER]
    name = f"lora_unet_{LAYER.replace('.', '_')}"
    path = tmp_path / "kohya.safetensors"
    save_file({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.0)}, path)
    backbone = zoo.load(folder, lora=[path])
    check_merged(backbone, base, {f"{LAYER}.weight": base[f"{LAYER}.weight"] + 1.0 / 2 * b @ a})


def test_several_loras_add_up(folder, base, tmp_path):
    first, second = low_rank(base, LAYER), low_rank(base, OTHER, LAYER, rank=3)
    files = [save_lora(tmp_path / "a.safetensors", first), save_lora(tmp_path / "b.safetensors", second)]
    backbone = zoo.load(folder, lora=[files[0], (str(files[1]), 0.5)])
    both = base[f"{LAYER}.weight"] + first[LAYER][1] @ first[LAYER][0] + 0.5 * second[LAYER][1] @ second[LAYER][0]
    other = base[f"{OTHER}.weight"] + 0.5 * second[OTHER][1] @ second[OTHER][0]
    check_merged(backbone, base, {f"{LAYER}.weight": both, f"{OTHER}.weight": other})


def test_what_is_for_text_encoders_is_left_out_and_said(folder, base, tmp_path, caplog):
    pairs = low_rank(base, LAYER)
    path = save_lora(tmp_path / "lora.safetensors", pairs)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    save_file(load_file(path) | {f"{layer}.lora_A.weight": random(5, 2, 8)}, path)
    backbone = zoo.load(folder, lora=path)
    check_merged(backbone, base, {f"{LAYER}.weight": base[f"{LAYER}.weight"] + pairs[LAYER][1] @ pairs[LAYER][0]})
    assert "1 weights for text encoders are left out" in caplog.text


@pytest.mark.parametrize("model", [tiny_sd3.transformer, tiny_flux.flux_model])
def test_transformers_take_loras_too(model, tmp_path):
    network, layer = model(), "transformer_blocks.0.attn.to_q"
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    (a, b) = low_rank(before, layer)[layer]
    merge_loras(network, save_lora(tmp_path / "lora.safetensors", {layer: (a, b)}, "transformer."))
    torch.testing.assert_close(network.state_dict()[f"{layer}.weight"], before[f"{layer}.weight"] + b @ a)
    assert network.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"down_blocks.7.attn.to_q": ((2, 8), (8, 2))}, "no LoRA of this UNet2DConditionModel"),
        ({LAYER: ((2, 8), (8, 2)), "mid_block.nowhere.to_q": ((2, 8), (8, 2))}, "1 of its 2 layers|Target"),
        ({LAYER: ((2, 9), (8, 2))}, "size mismatch|no LoRA of this"),
    ],
)  # fmt: skip
def test_a_lora_of_another_network(folder, tmp_path, layers, message):
    pairs = {layer: (random(0, *a), random(1, *b)) for layer, (a, b) in layers.items()}
    with pytest.raises(ValueError, match=message) as refused:
        zoo.load(folder, lora=save_lora(tmp_path / "lora.safetensors", pairs))
    assert "\n" not in str(refused.value) and "lora.safetensors" in str(refused.value)


def test_files_that_are_no_lora(folder, base, tmp_path):
    save_file({"unet.some": random(0, 2)}, tmp_path / "no.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "no.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match="no.safetensors is no LoRA of this UNet2DConditionModel"):
        zoo.load(folder, lora=tmp_path / "no.safetensors")
    with pytest.raises(OSError, match="cannot read .*cut.safetensors"):
        zoo.load(folder, lora=tmp_path / "cut.safetensors")
    (tmp_path / "lora.bin").touch()
    with pytest.raises(ValueError, match="lora.bin' is no .safetensors file"):
        zoo.load(folder, lora=tmp_path / "lora.bin")
    with pytest.raises(ValueError, match="no LoRA for a DiTTransformer2DModel .*; have UNet2DConditionModel, "):
        merge_loras(tiny.dit_model(), tmp_path / "no.safetensors")


def test_another_denoiser_takes_the_place(folder, tmp_path):
    other = tiny_sd.sd_unet(seed=5)
    save_file(other.state_dict(), tmp_path / "unet.safetensors")
    torch.save(other.state_dict(), tmp_path / "unet.pt")
    other.save_pretrained(tmp_path / "folder")
    for source in ("unet.safetensors", "unet.pt", "folder"):
        backbone = zoo.load(folder, denoiser=tmp_path / source, dtype=torch.float32)
        state = backbone.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items())
        assert backbone.provenance["denoiser"] == str((tmp_path / source).resolve())
        assert not any(parameter.requires_grad for parameter in backbone.model.parameters()) and backbone.clean_t == 0


def test_weights_of_another_network(folder, base, tmp_path):
    wrong = {name: tensor for name, tensor in base.items() if name != "conv_out.bias"} | {"more.weight": random(0, 2)}
    save_file(wrong | {"conv_in.bias": random(0, 3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="wrong.safetensors is not the weights of this") as refused:
        zoo.load(folder, denoiser=tmp_path / "wrong.safetensors")
    for words in ("lacks conv_out.bias (1 in all)", "foreign more.weight (1", "other shapes conv_in.bias (1"):
        assert words in str(refused.value)
    with pytest.raises(OSError, match="no file .*nowhere.safetensors"):
        zoo.load(folder, denoiser=tmp_path / "nowhere.safetensors")


def test_an_alias_swaps_its_denoiser_in_and_tells_it_its_time(folder, tmp_path, monkeypatch):
    other = tiny_sd.sd_unet(seed=5)
    save_file(other.state_dict(), tmp_path / "cleandift_sd15_unet.safetensors")
    ids = (catalog.entry("sd15")["hub"], *catalog.entry("sd15")["mirrors"])
    there = {ids: folder, ("CompVis/cleandift", "cleandift_sd15_unet.safetensors"): tmp_path}
    monkeypatch.setattr(hub, "fetch_pipeline", lambda ids, **options: there[tuple(ids)])
    monkeypatch.setattr(zoo, "fetch_files", lambda one, names, **options: there[one, *names])
    backbone = zoo.load("cleandift-sd15")
    assert backbone.clean_t == 261 and backbone.provenance == {"model": "cleandift-sd15", "revision": None}
    assert torch.equal(backbone.model.state_dict()["conv_in.weight"], other.state_dict()["conv_in.weight"])
    extract = DiffusionExtractor(backbone, "up.0@clean")
    assert extract.identity["taps"] == {"up.0@clean": {"t": 261.0, "clean": True}}


def test_another_autoencoder(tmp_path):
    DiTPipeline(tiny.dit_model(), tiny.vae_model(), DDIMScheduler()).save_pretrained(tmp_path / "dit")
    other = AutoencoderKL.from_config(tiny.vae_model().config, scaling_factor=0.3)
    tiny.randomise(other, 7).save_pretrained(tmp_path / "vae")
    backbone = zoo.load(tmp_path / "dit", vae=tmp_path / "vae", vae_dtype=torch.bfloat16)
    (vae,) = [network for name, network in backbone.networks.items() if name == "vae"]
    assert vae.config.scaling_factor == 0.3 and {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    whole = zoo.load(tmp_path / "dit", vae=tmp_path / "dit")  # a pipeline's folder: its autoencoder
    assert whole.weights_hash == zoo.load(tmp_path / "dit").weights_hash


def test_channels_last_moves_only_the_last_bits(folder):
    plain, last = zoo.load(folder), zoo.load(folder, channels_last=True)
    assert last.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    images = tiny.images(1, plain.size, plain.size)
    one, two = (next(iter(DiffusionExtractor(b, "up.0@100")(images).values())) for b in (plain, last))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * one.abs().max().item())
    assert plain.weights_hash == last.weights_hash and last.provenance["channels_last"] is True


@pytest.mark.parametrize(
    "options", [{"lora": "a.safetensors"}, {"denoiser": "a"}, {"vae": "a"}, {"channels_last": True}]
)
def test_a_pipeline_in_memory_is_not_changed(options):
    pipeline = DiTPipeline(tiny.dit_model(), tiny.vae_model(), DDIMScheduler())
    with pytest.raises(
        ValueError, match=f"{next(iter(options))}= given with a pipeline in memory, which stays as it is"
    ):
        zoo.load(pipeline, **options)


def test_options_of_files_are_refused_for_pipelines(folder, tmp_path):
    with pytest.raises(ValueError, match="extractor, config= given with a pipeline; leave it out"):
        zoo.load(folder, extractor=object(), config={})
    with pytest.raises(ValueError, match="denoiser= given with a file"):
        zoo.load(tmp_path / "x.pt", denoiser="a")


def test_a_random_control_of_a_text_model_keeps_its_prompts(folder):
    backbone = zoo.load(folder)
    control = zoo.random_control(backbone)
    images = tiny.images(1, backbone.size, backbone.size)
    one, two = (
        next(iter(DiffusionExtractor(b, "up.0@100", cond="a cat")(images).values())) for b in (backbone, control)
    )
    assert one.shape == two.shape and not torch.allclose(one, two)
    assert control.prompts.hash == backbone.prompts.hash and control.name.endswith("(random init)")


@pytest.mark.parametrize(
    ("model", "option"),
    [("owner/name", "lora"), ("owner/name", "vae"), ("owner/name", "denoiser"), ("sit.pt", "lora"), ("sit.pt", "vae")],
)
def test_what_is_missing_is_told_before_anything_is_loaded(tmp_path, monkeypatch, model, option):
    monkeypatch.setattr(hub, "fetch_pipeline", None)
    monkeypatch.setattr(zoo, "load_checkpoint", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sit.pt").touch()
    missing = tmp_path / "no.safetensors"
    with pytest.raises(OSError, match=f"no file .*no.safetensors.* for {option}="):
        zoo.load(model, **{option: [(missing, 0.5)] if option == "lora" else missing})


def test_a_missing_checkpoint_is_told_before_its_autoencoder_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "read_vae", None)
    with pytest.raises(OSError, match="no file .*sit.pt"):
        zoo.load(tmp_path / "sit.pt", vae=folder)


@pytest.mark.parametrize("missing", ["./vae", "vae", "a/b/vae", "owner/vae.pt"])
def test_what_is_no_hub_id_is_not_asked_for(missing, monkeypatch):
    monkeypatch.setattr(hub, "fetch_files", None)
    with pytest.raises(OSError, match=f"no file or folder '{missing}' for vae=; give its path, or owner/name"):
        hub.find_part("vae", missing, ["vae"])


@pytest.mark.parametrize("part", ["", "unet"])
def test_other_parts_are_pinned_on_the_hub_by_a_revision_of_their_own(folder, tmp_path, monkeypatch, part):
    other = tiny_sd.sd_unet(seed=5)
    other.save_pretrained(tmp_path / part)
    asked = []

    def download(hub_id, **options):
        asked.append((hub_id, options["revision"], options["local_files_only"]))
        names = ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model-00001-of-00002.safetensors"]
        taken = [any(fnmatch(f"{part}/{name}".strip("/"), one) for one in options["allow_patterns"]) for name in names]
        assert taken == [False, len(asked) == 1 or not part]  # the second call is for another part
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    backbone = zoo.load(folder, denoiser="owner/name@abc123", revision=None, offline=True)
    assert asked == [("owner/name", "abc123", True)]
    assert torch.equal(backbone.model.conv_in.weight, other.conv_in.weight)
    assert backbone.provenance["denoiser"] == "owner/name@abc123"
    hub.find_part("vae", "owner/name", ["vae"])
    assert asked[1] == ("owner/name", None, False)


LATENT = {"dit-vae": 4, "sd": 4, "sdxl": 4, "pixart-alpha": 4, "pixart-sigma": 4, "sd3": 16, "sd35": 16, "flux": 4}


@pytest.mark.parametrize("family", LATENT)
def test_an_autoencoder_of_other_channels_is_refused(family, tmp_path):
    config = {**tiny.vae_model().config, "latent_channels": 6}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    families.PIPELINES[family]().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"takes latents of {LATENT[family]} channels and the autoencoder makes 6; "):
        zoo.load(tmp_path / "model", vae=tmp_path / "vae")
