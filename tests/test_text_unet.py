import json
import logging
import shutil
from copy import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch import Tensor

from repkit import zoo
from repkit.backbones.base import Block
from repkit.backbones.text_unet import TextUNet
from repkit.capture import capture
from repkit.extractors import DiffusionExtractor
from repkit.images import digest, to_uint8
from repkit.noise import batch_noise
from repkit.schedule import Schedule
from tests import tiny, tiny_sd
from tests.tiny_texts import clip_tokenizer

PIPELINES = {
    "sd": tiny_sd.sd_pipeline,
    "sd21": tiny_sd.sd21_pipeline,
    "sdxl": tiny_sd.sdxl_pipeline,
    "ssd": tiny_sd.ssd_pipeline,
}
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
PROMPTS = ["a cat", "A photo of a dog's tail!", ""]
HEIGHT, WIDTH = 18, 26  # latents of 9 x 13: odd, not square


@pytest.fixture(scope="module", params=PIPELINES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipelines():
    return {name: make() for name, make in PIPELINES.items()}


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in pipelines}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: zoo.load(folder) for name, folder in folders.items()}


@pytest.fixture
def pipeline(pipelines, kind):
    return pipelines[kind]


@pytest.fixture
def backbone(loaded, kind):
    return loaded[kind]


def latents_of(pipeline, images):
    with torch.no_grad():
        mode = pipeline.vae.encode(images * 2 - 1).latent_dist.mode()
    return (mode - 0.1) * 0.7  # of tiny.vae_model


def noised(x0, eps, t):
    alpha, sigma = ALPHAS_CUMPROD[t] ** 0.5, (1 - ALPHAS_CUMPROD[t]) ** 0.5
    return (x0.double() * alpha + eps.double() * sigma).float()


def encoded(pipeline, prompt):
    """What the pipeline itself makes of one prompt: hidden states, and SDXL's pooled vector."""
    with torch.no_grad():
        found = pipeline.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return {"encoder_hidden_states": found[0]} | ({"text_embeds": found[2]} if len(found) == 4 else {})


def told(pipeline, prompts, height, width):
    """The arguments of the network for these prompts, one an image of height x width."""
    each = [encoded(pipeline, prompt) for prompt in prompts]
    rows: dict[str, Any] = {name: torch.cat([row[name] for row in each]) for name in each[0]}
    if "text_embeds" not in rows:
        return rows
    size = (height, width)
    ids = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, pipeline.text_encoder_2.config.projection_dim)
    added = {"text_embeds": rows.pop("text_embeds"), "time_ids": ids.repeat(len(prompts), 1)}
    return rows | {"added_cond_kwargs": added}


def run(unet, x_t, t, arguments, *paths):
    """The prediction of an ordinary forward, and what ordinary hooks saw of the modules at `paths`."""
    seen: dict[str, Tensor] = {}

    def keep(path):
        return lambda module, args, output: seen.update({path: output[0] if isinstance(output, tuple) else output})

    handles = [unet.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        prediction = unet(x_t, t, return_dict=False, **arguments)[0]
    for handle in handles:
        handle.remove()
    return prediction, seen


def normal(shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PATHS = {
    "down.0": "down_blocks.0",
    "mid": "mid_block",
    "up.0.resnet.1": "up_blocks.0.resnets.1",
    "up.1.resnet.0.conv2": "up_blocks.1.resnets.0.conv2",
    "up.0": "up_blocks.0",
    "skip.0": "conv_in",
}


def test_a_folder_gives_what_the_modules_give_when_called_by_hand(pipeline, backbone):
    images, t = tiny.images(3, HEIGHT, WIDTH), 261
    x0, eps = latents_of(pipeline, images), normal((3, 4, 9, 13))
    assert torch.equal(backbone.encode(images), x0)
    x_t = noised(x0, eps, t)
    torch.testing.assert_close(backbone.schedule.add_noise(x0, eps, t), x_t)
    prediction, seen = run(pipeline.unet, x_t, t, told(pipeline, PROMPTS, HEIGHT, WIDTH), *PATHS.values())
    condition = backbone.condition(PROMPTS, 3)
    assert torch.equal(backbone.denoise(x_t, t, condition), prediction)
    maps = backbone.activations(x_t, t, condition, list(PATHS))
    assert all(torch.equal(maps[name], seen[path]) for name, path in PATHS.items())


def test_eps_and_x0_follow_from_the_prediction(kind, backbone):
    t, x_t, prediction = 600, normal((2, 4, 8, 8)), normal((2, 4, 8, 8), 4)
    alpha, sigma = ALPHAS_CUMPROD[t] ** 0.5, (1 - ALPHAS_CUMPROD[t]) ** 0.5
    v = kind == "sd21"
    x0 = alpha * x_t - sigma * prediction if v else (x_t - sigma * prediction) / alpha
    eps = alpha * prediction + sigma * x_t if v else prediction
    for to, expected in (("x0", x0), ("eps", eps)):
        torch.testing.assert_close(backbone.schedule.convert(prediction, x_t, t, to=to), expected, rtol=1e-4, atol=1e-5)


def test_features_of_an_extractor(pipeline, backbone):
    images, t = tiny.images(2, HEIGHT, WIDTH), 101
    eps = batch_noise((4, 9, 13), seed=0, digests=[digest(image) for image in to_uint8(images)], t=t, draw=0)
    x_t = noised(latents_of(pipeline, images), eps, t)
    _, seen = run(pipeline.unet, x_t, t, told(pipeline, ["a cat"] * 2, HEIGHT, WIDTH), "up_blocks.0")
    found = DiffusionExtractor(backbone, f"up.0@{t}", cond="a cat")(images)[f"up.0@{t}"]
    assert (found - seen["up_blocks.0"]).abs().max() <= 1e-5 * found.abs().max()


def test_sizes_and_blocks(kind, backbone):
    assert (backbone.size, backbone.multiple, backbone.clean_t) == (16, 2, 0)
    assert backbone.describe(["mid", "up.1"]) == {"mid": Block(16, 4), "up.1": Block(8, 2)}
    assert ("mid.attn.0" in backbone.points) == (kind != "ssd")
    deep = {"sd": (1, 1), "sd21": (1, 1), "sdxl": (2, 2), "ssd": (2, 1)}[kind]
    stage = 1 if kind.startswith("sd2") or kind == "sd" else 0
    depths = [sum(f"up.{stage}.attn.{layer}.block.{n}.ff" in backbone.points for n in range(9)) for layer in (0, 1)]
    assert tuple(depths) == deep


def test_declared_blocks_are_the_real_ones_and_stopping_keeps_every_bit(backbone):
    x_t, condition = normal((2, 4, 9, 13)), backbone.condition(PROMPTS[:2], 2)
    points, times = list(backbone.points.values()), torch.tensor([40, 900])
    full = capture(backbone.model, points, lambda m: backbone.predict(m, x_t, times, condition), stop=False)
    maps = {name: backbone.fold(point, full[point], x_t) for name, point in backbone.points.items()}
    assert backbone.shapes(list(maps), HEIGHT, WIDTH) == {name: tuple(m.shape[1:]) for name, m in maps.items()}
    for name, expected in list(maps.items())[::4]:
        assert torch.equal(backbone.activations(x_t, times, condition, [name])[name], expected), name


def test_a_batch_is_its_rows(backbone):
    images, names = tiny.images(3, HEIGHT, WIDTH), ["mid", "up.1"]
    x0 = backbone.encode(images)
    together = backbone.activations(x0, 50, backbone.condition(PROMPTS, 3), names)
    for row, prompt in enumerate(PROMPTS):
        x0 = backbone.encode(images[row : row + 1])
        alone = backbone.activations(x0, 50, backbone.condition(prompt, 1), names)
        for name in names:
            assert (together[name][row] - alone[name][0]).abs().max() <= 1e-5 * together[name].abs().max()


def test_every_prompt_says_something_else(backbone):
    x0 = backbone.encode(tiny.images(1)).expand(3, -1, -1, -1)
    maps = backbone.activations(x0, 50, backbone.condition(PROMPTS, 3), ["up.1"])["up.1"]
    near = 1e-3 * maps.abs().max()
    assert all((maps[a] - maps[b]).abs().max() > near for a, b in [(0, 1), (0, 2), (1, 2)])


def test_prompts_are_encoded_as_by_the_pipeline(pipeline, backbone, caplog):
    long = "cat " * 100
    for prompt in [*PROMPTS, long]:
        with caplog.at_level(logging.WARNING, "repkit"):
            found = backbone.condition(prompt, 2).tensors
        expected = encoded(pipeline, prompt)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name].expand_as(found[name])) for name in found)
        assert {name: tuple(tensor.shape[1:]) for name, tensor in found.items()} == backbone.prompts.shapes
    warned = {record.getMessage()[:35] for record in caplog.records if record.name == "repkit"}
    assert warned == {"a prompt of 102 tokens is cut to 77"}


def test_the_null_prompt_is_the_unconditional_one_of_guidance(kind, pipeline, backbone):
    with torch.no_grad():
        found = pipeline.encode_prompt("a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    null, empty = backbone.condition(None, 1).tensors, backbone.condition("", 1).tensors
    assert torch.equal(null["encoder_hidden_states"], found[1])
    if kind in ("sd", "sd21"):
        assert torch.equal(null["encoder_hidden_states"], empty["encoder_hidden_states"])
    else:
        assert torch.equal(null["text_embeds"], found[3])
        assert not null["text_embeds"].any() and empty["text_embeds"].all()
        assert not null["encoder_hidden_states"].any() and empty["encoder_hidden_states"].all()


def test_an_sdxl_whose_null_prompt_is_the_empty_text(folders, tmp_path):
    pipeline = tiny_sd.sdxl_pipeline(force_zeros_for_empty_prompt=False)
    zeros, empty = zoo.load(folders["sdxl"], prompt_cache=tmp_path), zoo.load(pipeline, prompt_cache=tmp_path)
    assert not zeros.condition(None, 1).tensors["text_embeds"].any()
    null, said = empty.condition(None, 1).tensors, empty.condition("", 1).tensors
    assert all(torch.equal(null[name], said[name]) for name in said)  # though the cache knows the other's zeros
    assert zeros.options != empty.options


def test_zeros_are_the_null_prompt_of_an_sdxl_that_does_not_say(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "old")
    index = json.loads((folder / "model_index.json").read_text())
    assert index.pop("force_zeros_for_empty_prompt") is True
    (folder / "model_index.json").write_text(json.dumps(index))
    assert StableDiffusionXLPipeline.from_pretrained(folder).config.force_zeros_for_empty_prompt
    assert not zoo.load(folder).condition(None, 1).tensors["text_embeds"].any()


@pytest.mark.parametrize("kind", ["sdxl", "ssd"])
def test_time_ids_are_the_size_in_pixels(kind, pipelines, loaded):
    backbone, x_t = loaded[kind], normal((2, 4, 9, 13))
    arguments = told(pipelines[kind], PROMPTS[:2], HEIGHT, WIDTH)
    assert arguments["added_cond_kwargs"]["time_ids"].tolist() == [[18, 26, 0, 0, 18, 26]] * 2
    found = backbone.denoise(x_t, 50, backbone.condition(PROMPTS[:2], 2))
    assert torch.equal(found, run(pipelines[kind].unet, x_t, 50, arguments)[0])
    for wrong in ([26, 18, 0, 0, 26, 18], [9, 13, 0, 0, 9, 13], [0] * 6):
        arguments["added_cond_kwargs"]["time_ids"] = torch.tensor([wrong] * 2).float()
        assert not torch.allclose(found, run(pipelines[kind].unet, x_t, 50, arguments)[0], rtol=1e-3)


def test_a_pipeline_in_memory_is_the_same_model_as_its_folder(pipeline, backbone):
    memory = DiffusionExtractor(zoo.load(pipeline), "mid@50", cond="a cat")
    folder = DiffusionExtractor(backbone, "mid@50", cond="a cat")
    assert memory.identity == folder.identity
    assert memory.identity["text"] == folder.identity["text"] != "none"


def test_other_text_encoders_are_another_identity(loaded):
    encoder = tiny_sd.clip_encoder(12, seed=9)
    others = [zoo.load(tiny_sd.sd_pipeline(**parts)) for parts in (
        {"text_encoder": encoder}, {"tokenizer": clip_tokenizer(length=20)})]  # fmt: skip
    assert len({backbone.prompts.hash for backbone in [loaded["sd"], *others]}) == 3


def test_text_encoders_are_freed_and_what_was_encoded_stays(kind, folders):
    backbone = zoo.load(folders[kind])
    assert backbone.prompts.free() == 0
    extract = DiffusionExtractor(backbone, "mid@50", cond="a cat")
    images = tiny.images(1)
    before = extract(images)["mid@50"]
    encoders = backbone.prompts.texts.open()
    weights = [p for name, part in encoders.items() if name.startswith("text_encoder") for p in part.parameters()]
    assert backbone.prompts.free() == sum(p.numel() * 4 for p in weights) > 0
    assert torch.equal(extract(images)["mid@50"], before)


def test_a_prompt_cache_spares_the_text_encoders(kind, folders, tmp_path, monkeypatch):
    def features():
        backbone = zoo.load(folders[kind], prompt_cache=tmp_path / "cache")
        found = DiffusionExtractor(backbone, "mid@50", cond="a cat")(tiny.images(1))
        return found["mid@50"], found.identity

    def refuse(*args, **kwargs):
        raise AssertionError("a text encoder was opened")

    value, identity = features()
    for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", refuse)
    again, same = features()
    assert torch.equal(again, value) and same == identity
    with pytest.raises(OSError, match="a text encoder was opened"):
        zoo.load(folders[kind], prompt_cache=tmp_path / "cache").condition("a dog", 1)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder_2"])
def test_a_folder_that_lacks_a_text_part_says_so_at_the_first_text(part, folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "broken")
    shutil.rmtree(folder / part)
    backbone = zoo.load(folder)
    assert backbone.describe(["mid"]) == {"mid": Block(16, 4)}  # shapes need no text
    with pytest.raises(OSError, match=f"no {part} in .*broken; without it no prompt can be encoded"):
        backbone.condition("a cat", 1)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer_2"])
def test_a_pipeline_saved_without_a_text_part(part):
    backbone = zoo.load(tiny_sd.sdxl_pipeline(**{part: None}))
    with pytest.raises(ValueError, match=f"StableDiffusionXLPipeline came without {part}, so no prompt"):
        backbone.condition("a cat", 1)


def test_a_pipeline_without_any_text_encoder():
    backbone = zoo.load(tiny_sd.sd_pipeline(text_encoder=None, tokenizer=None))
    with pytest.raises(ValueError, match="came without text encoders, so no prompt can be encoded"):
        DiffusionExtractor(backbone, "mid@50")


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (3, "sd is told a text, not the class 3; give cond= a prompt"),
        (["a cat", 1], "not the class 1"),
        (["a cat"], "1 prompts for 2 images; give one for all or one for each"),
    ],
)
def test_conditions_that_are_no_prompts(loaded, cond, message):
    with pytest.raises(ValueError, match=message):
        loaded["sd"].condition(cond, 2)


def text_unet(schedule=None, **options):
    return TextUNet(tiny_sd.sd_unet(**options), schedule or Schedule.from_betas("scaled_linear"), tiny.vae_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 9}, "takes latents of 9 channels and the autoencoder makes 4; .* as for inpainting"),
        ({"in_channels": 7, "num_class_embeds": 10}, "told more than a text .num_class_embeds=10."),
        ({"num_class_embeds": 10}, "told more than a text .num_class_embeds=10."),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"encoder_hid_dim": 6, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj'"),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, "addition_embed_type='text'"),
        ({"sample_size": None}, "the config of text-unet has no sample_size"),
    ],
)
def test_networks_that_are_told_more_than_a_text_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        text_unet(**options)


def test_schedules_and_pipelines_that_are_refused():
    with pytest.raises(ValueError, match="schedule of kind 'edm'"):
        zoo.load(tiny_sd.sdxl_pipeline(scheduler=EDMEulerScheduler()))
    with pytest.raises(ValueError, match="has no vae"):
        TextUNet(tiny_sd.sd_unet(), tiny.linear(), None)
    parts = tiny_sd.sdxl_pipeline().components | {"requires_aesthetics_score": True}
    with pytest.raises(ValueError, match="StableDiffusionXLImg2ImgPipeline is an SDXL refiner"):
        zoo.load(StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False))


def test_a_learned_variance_is_dropped():
    backbone, x_t = text_unet(out_channels=8), normal((1, 4, 8, 8))
    condition = backbone.blank_condition(1)
    whole, _ = run(backbone.model, x_t, 5, condition.tensors)
    assert whole.shape[1] == 8 and torch.equal(backbone.denoise(x_t, 5, condition), whole[:, :4])


def test_a_guidance_distilled_network_is_told_no_guidance():
    backbone, x_t = text_unet(time_cond_proj_dim=6), normal((1, 4, 8, 8))
    condition = backbone.blank_condition(1)
    expected, _ = run(backbone.model, x_t, 5, {**condition.tensors, "timestep_cond": None})
    assert torch.equal(backbone.denoise(x_t, 5, condition), expected)


def test_a_network_without_middle():
    backbone = text_unet(mid_block_type=None)
    assert not any(name.startswith("mid") for name in backbone.points)
    assert backbone.describe(["down.1", "up.0"]) == {"down.1": Block(16, 4), "up.0": Block(16, 2)}


def test_clean_images_are_told_the_declared_time(pipelines, loaded):
    """CleanDIFT: its U-Net sees latents without noise and is told t = 261."""
    backbone, pipeline, images = copy(loaded["sd21"]), pipelines["sd21"], tiny.images(2)
    backbone.clean_t = 261
    found = DiffusionExtractor(backbone, "up.0@clean", cond="a photo of a cat")(images)
    arguments = told(pipeline, ["a photo of a cat"] * 2, 16, 16)
    x0 = latents_of(pipeline, images)
    assert torch.equal(found["up.0@clean"], run(pipeline.unet, x0, 261, arguments, "up_blocks.0")[1]["up_blocks.0"])
    assert not torch.allclose(
        found["up.0@clean"], run(pipeline.unet, x0, 0, arguments, "up_blocks.0")[1]["up_blocks.0"]
    )


@pytest.fixture(scope="module")
def deep():
    """Four stages, as in SD 1.5, to which the papers' numbers refer."""
    return text_unet(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def called(backbone, shape, *names):
    """Maps of the named blocks, and the arguments of one ordinary forward on the same input."""
    x_t, condition = normal((1, 4, *shape)), backbone.blank_condition(1)
    return backbone.activations(x_t, 261, condition, names), (x_t, 261, dict(condition.tensors))


@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (18, 20), (9, 13)])
def test_up_blocks_are_those_of_dift(deep, shape):
    """DIFT's up_ft_index i, at latents that are and are not multiples of the network's 8."""
    names = {f"up.{index}": f"up_blocks.{index}" for index in range(4)}
    _, seen = run(deep.model, *called(deep, shape, "skip.0")[1], *names.values())
    for name, path in names.items():  # each alone, and so stopped
        assert torch.equal(called(deep, shape, name)[0][name], seen[path])


def test_strides_of_up_blocks(deep):
    """As published for DIFT, divided by 4: the autoencoder here halves where Stable Diffusion's divides by 8."""
    found = deep.describe([f"up.{index}" for index in range(4)])
    assert list(found.values()) == [Block(16, 8), Block(16, 4), Block(16, 2), Block(8, 2)]


def test_conv2_is_the_residual_of_diffusion_hyperfeatures(deep):
    """Its features are hidden states before the shortcut is added: the layer's output minus its shortcut."""
    names = {f"up.{i}.resnet.{j}": f"up_blocks.{i}.resnets.{j}.conv_shortcut" for i in range(4) for j in range(3)}
    maps, arguments = called(deep, (9, 13), *names, *(f"{name}.conv2" for name in names))
    _, shortcuts = run(deep.model, *arguments, *names.values())
    for name, path in names.items():
        torch.testing.assert_close(maps[name] - shortcuts[path], maps[f"{name}.conv2"], rtol=1e-4, atol=1e-5)


def test_blocks_of_sd_dino_are_the_inputs_of_the_next_layer_before_the_skip(deep):
    """It stores what enters output blocks 5, 8 and 11 beside the skip."""
    taps = ["up.0.resnet.1", "up.1.attn.1", "up.2.attn.1"]
    maps, arguments = called(deep, (9, 13), *taps)
    entering = []
    handles = [
        deep.model.up_blocks[stage].resnets[2].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        for stage in range(3)
    ]
    run(deep.model, *arguments)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(maps[tap], whole[:, :16]) for tap, whole in zip(taps, entering, strict=True))


def test_a_folder_is_read_by_diffusers_too(folders):
    """The tiny pipelines are real ones."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"], local_files_only=True)
    assert torch.equal(
        encoded(pipeline, "a cat")["text_embeds"], zoo.load(pipeline).condition("a cat", 1).tensors["text_embeds"]
    )


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder"])
def test_an_empty_folder_is_no_text_part(tmp_path, part):
    tiny_sd.sd_pipeline().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / part)
    (tmp_path / part).mkdir()
    with pytest.raises(OSError, match=f"no {part} in .*; without it no prompt can be encoded; get the whole model"):
        zoo.load(tmp_path).condition("a cat", 1)
