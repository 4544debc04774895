from math import cos, pi
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from repkit import zoo
from repkit.backbones.adm import from_parts, from_weights
from repkit.backbones.adm_config import PUBLISHED, infer_config, told_config
from repkit.backbones.adm_unet import ADMUNet
from repkit.backbones.base import Block
from repkit.backbones.parts import Parts
from repkit.capture import Point, capture
from repkit.extractors import DiffusionExtractor
from tests import tiny, tiny_adm

REFERENCE = Path(__file__).parent / "data" / "adm.npz"
RUN = {"image_size": 16, "use_new_attention_order": False, "noise_schedule": "linear", "num_head_channels": 16}

# guided-diffusion's README, as arguments of ours.
IMAGENET = {"attention_strides": (8, 16, 32), "num_res_blocks": 2, "num_head_channels": 64, "model_channels": 256}
ADM_256 = {**IMAGENET, "image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4)}
ADM_512 = {**IMAGENET, "image_size": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_strides": (16, 32, 64)}
ADM_128 = {
    **{key: value for key, value in IMAGENET.items() if key != "num_head_channels"},
    "image_size": 128,
    "channel_mult": (1, 1, 2, 3, 4),
    "attention_strides": (4, 8, 16),
    "num_heads": 4,
}
ADM_64 = {
    "image_size": 64,
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "num_res_blocks": 3,
    "attention_strides": (2, 4, 8),
    "num_head_channels": 64,
    "use_new_attention_order": True,
}


@pytest.fixture(scope="module", params=tiny_adm.VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(variant):
    return tiny_adm.adm(variant)


@pytest.fixture(scope="module", params=["unconditional", "shift-conv", "fixed-variance-plain"])  # the three samplers
def sampler(request):
    return tiny_adm.adm(request.param)


@pytest.fixture(scope="module")
def plain():
    return tiny_adm.adm()


def on_meta(**config):
    with torch.device("meta"):
        return ADMUNet(**config)


def given(backbone, rows=2, height=16, width=24):
    x0 = backbone.encode(tiny.images(rows, height, width))
    return x0, backbone.condition(None if backbone.model.config["num_classes"] is None else 2, rows)


def test_outputs_are_those_of_the_original_code(variant, backbone):
    reference = {key.split("/")[1]: values for key, values in np.load(REFERENCE).items() if key.startswith(variant)}
    inputs = tiny_adm.inputs(variant)
    prediction = reference.pop("prediction")
    points = [Point(path) for path in reference]
    taken = capture(backbone.model, points, lambda model: model(**inputs), stop=False)
    for path, values in reference.items():
        np.testing.assert_allclose(tiny_adm.sample(taken[Point(path)]), values, rtol=0, atol=1e-5)
    found = backbone.model(**inputs)[:, :, ::3, ::3]
    np.testing.assert_allclose(found, prediction, rtol=0, atol=1e-5)
    blocks = len(backbone.model.input_blocks) + 1 + len(backbone.model.output_blocks)
    assert len(reference) == blocks and np.abs(prediction).max() > 1


def test_declared_blocks_are_the_real_ones(sampler):
    x0, condition = given(sampler)
    maps = sampler.activations(x0, 10, condition, list(sampler.points))
    assert sampler.shapes(list(maps), 16, 24) == {name: tuple(m.shape[1:]) for name, m in maps.items()}
    assert all(m.isfinite().all() for m in maps.values())
    assert set(sampler.blocks) == set(sampler.points)


def test_stopping_at_any_block_gives_the_bits_of_the_full_run(sampler):
    x0, condition = given(sampler, 1, 8, 16)
    points = list(sampler.points.values())
    times = torch.tensor([100])
    raw = capture(sampler.model, points, lambda m: sampler.predict(m, x0, times, condition), stop=False)
    for name, point in sampler.points.items():
        stopped = sampler.activations(x0, 100, condition, [name])[name]
        assert torch.equal(stopped, sampler.fold(point, raw[point], x0)), name


def test_a_batch_is_its_rows(sampler):
    conds = None if sampler.model.config["num_classes"] is None else [0, 4, 2]
    x0, names = sampler.encode(tiny.images(3)), ["mid", "up.1", "up.0.resnet.0"]
    t = torch.tensor([1, 50, 900])
    together = sampler.activations(x0, t, sampler.condition(conds, 3), names)
    for row in range(3):
        condition = sampler.condition(conds and conds[row], 1)
        alone = sampler.activations(x0[row : row + 1], t[row], condition, names)
        for name, whole in together.items():
            torch.testing.assert_close(alone[name][0], whole[row], rtol=0, atol=1e-5 * whole.abs().max().item())


def test_a_learned_variance_is_dropped(backbone):
    x0, condition = given(backbone)
    whole = backbone.model(x0, torch.tensor([7, 7]), **condition.tensors)
    assert whole.shape[1] == backbone.model.config["out_channels"]
    assert torch.equal(backbone.denoise(x0, 7, condition), whole[:, :3])


def test_blocks_of_the_imagenet_network_are_numbered_as_in_papers():
    # Sizes and channels after each block, as a table of the 37 blocks gives them.
    sides = [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3 + [8] * 6
    sides += [16] * 3 + [32] * 3 + [64] * 3 + [128] * 3 + [256] * 4
    channels = [256] * 7 + [512] * 6 + [1024] * 12 + [512] * 6 + [256] * 6
    backbone = from_parts(Parts("adm", {"unet": on_meta(**ADM_256)}, tiny.linear()))
    points = {number: backbone.points[f"b{number}"] for number in range(1, 38)}
    assert "b38" not in backbone.points
    x, t = torch.zeros(1, 3, 256, 256, device="meta"), torch.zeros(1, device="meta", dtype=torch.long)
    found = capture(backbone.model, list(points.values()), lambda model: model(x, t))
    shapes = [tuple(found[points[number]].shape[1:]) for number in points]
    assert shapes == [(c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert [points[1].path, points[18].path, points[19].path] == ["input_blocks.0", "input_blocks.17", "middle_block"]
    assert [points[20].path, points[24].path, points[37].path] == [f"output_blocks.{k}" for k in (0, 4, 17)]


@pytest.mark.parametrize(
    ("file", "config", "millions"),
    [
        ("64x64_diffusion", ADM_64 | {"num_classes": 1000}, 296),
        ("128x128_diffusion", ADM_128 | {"num_classes": 1000}, 422),
        ("256x256_diffusion", ADM_256 | {"num_classes": 1000}, 554),
        ("256x256_diffusion_uncond", ADM_256, 553),
        ("512x512_diffusion", ADM_512 | {"num_classes": 1000}, 559),
    ],
)
def test_published_files_are_known_by_name_and_weights(file, config, millions):
    weights = on_meta(**config).state_dict()
    assert round(sum(tensor.numel() for tensor in weights.values()) / 1e6) == millions  # the sizes of the paper
    inferred = infer_config(weights, file)
    told = told_config(file, inferred, None)
    assert told.pop("noise_schedule") == ("cosine" if file.startswith("64") else "linear")
    assert on_meta(**inferred, **told).config == on_meta(**config).config


def test_names_are_those_of_every_u_net_and_of_papers(plain):
    x0, condition = given(plain)
    maps = plain.activations(x0, 10, condition, list(plain.points))
    same: list[tuple[str, ...]] = [
        ("skip.0", "input_blocks.0", "b1"),
        ("down.0", "input_blocks.2", "skip.2"),
        ("mid", "middle_block", "b5"),
    ]
    same += [("down.1", "down.1.attn.0", "input_blocks.3", "b4"), ("mid", "mid.resnet.1", "b5")]
    same += [("up.0.attn.0", "output_blocks.0", "b6"), ("up.0", "output_blocks.1", "b7"), ("up.1", "b9")]
    assert all(torch.equal(maps[one], maps[other]) for one, *others in same for other in others)
    assert plain.blocks["up.0"] == Block(64, 1) and plain.blocks["mid"] == plain.blocks["up.0.attn.1"] == Block(64, 2)
    assert not torch.equal(maps["up.1"], maps["up.1.resnet.0"])
    assert f"skip.{len(plain.model.input_blocks)}" not in plain.points and "up.2" not in plain.points


def test_the_second_convolution_is_what_the_shortcut_is_added_to(backbone):
    x0, condition = given(backbone)
    names = ["skip.0", "down.0.resnet.0.conv2", "down.0.resnet.0"]
    shortcut, inner, outer = backbone.activations(x0, 10, condition, names).values()
    torch.testing.assert_close(shortcut + inner, outer, rtol=0, atol=1e-6)


def test_queries_keys_and_values_by_hand(backbone):
    x0, condition = given(backbone)
    q, k, v, probability, out, after = (
        backbone.activations(x0, 10, condition, [f"mid.attn.0{part}"])[f"mid.attn.0{part}"]
        for part in (".self.q", ".self.k", ".self.v", ".self.map", ".self.out", "")
    )
    config = backbone.model.config
    heads = config.get("num_heads") or q.shape[1] // config["num_head_channels"]
    q, k, v = (rearrange(one, "b (head c) h w -> b head (h w) c", head=heads) for one in (q, k, v))
    weight = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    torch.testing.assert_close(rearrange(probability, "b k h w -> b (h w) k"), weight.mean(1), rtol=0, atol=1e-6)
    projection = backbone.model.middle_block[1].proj_out
    tokens = projection(rearrange(weight @ v, "b head n c -> b (head c) n"))
    torch.testing.assert_close(rearrange(out, "b c h w -> b c (h w)"), tokens, rtol=0, atol=1e-5)
    before = backbone.activations(x0, 10, condition, ["mid.resnet.0"])["mid.resnet.0"]
    torch.testing.assert_close(before + out, after, rtol=0, atol=1e-5)


def test_an_extractor_takes_papers_blocks(plain):
    images = tiny.images(2)
    features = DiffusionExtractor(plain, "b8,output_blocks.2@261", noise="shared")(images)
    assert torch.equal(features["b8@261"], features["output_blocks.2@261"])
    # The first block sees nothing but x_t, from which sqrt(1 - alpha) eps can be told.
    first = plain.model.input_blocks[0][0]
    x_t = plain.schedule.add_noise(images * 2 - 1, torch.ones_like(images), 261)
    alpha = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:262]))
    torch.testing.assert_close(x_t, (images * 2 - 1) * alpha**0.5 + (1 - alpha) ** 0.5)
    assert torch.equal(plain.activations(x_t, 261, plain.condition(None, 2), ["b1"])["b1"], first(x_t))


def test_classes_are_labels_without_a_null_class():
    backbone = tiny_adm.adm("shift-conv")
    x0 = backbone.encode(tiny.images(1))
    zero, four = (backbone.denoise(x0, 10, backbone.condition(label, 1)) for label in (0, 4))
    assert not torch.allclose(zero, four)
    with pytest.raises(ValueError, match="shift-conv needs a class and has no null class.*below 5"):
        backbone.condition(None, 1)
    with pytest.raises(ValueError, match="no class 5 in shift-conv; have 0 ... 4"):
        backbone.condition(5, 1)


def test_an_unconditional_network_refuses_a_class(plain):
    with pytest.raises(ValueError, match="unconditional is unconditional; leave cond out instead of giving 3"):
        plain.condition(3, 1)


def test_sizes_are_multiples_of_the_deepest_stride():
    with pytest.raises(ValueError, match="multiples of 4, not 18x16; nearest: 16x16"):
        tiny_adm.adm("fixed-variance-plain").check_size(18, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    backbone = tiny_adm.adm("classes-new-order")
    x0, condition = given(backbone)
    exact = backbone.activations(x0, 10, condition, ["up.0"])["up.0"]
    backbone.model.to(dtype)
    rough = backbone.activations(x0, 10, condition, ["up.0"])["up.0"]
    assert rough.dtype == dtype and (rough.float() - exact).norm() < 0.03 * exact.norm()


def test_a_control_has_fresh_weights_of_the_same_shape(plain):
    control = zoo.random_control(plain)
    assert control.blocks == plain.blocks and control.model.config == plain.model.config
    assert control.weights_hash != plain.weights_hash


def test_the_config_is_part_of_the_hash():
    legacy, new = (tiny_adm.adm_model() for _ in range(2))
    new.config = {**new.config, "use_new_attention_order": True}
    assert tiny_adm.adm().weights_hash == from_parts(Parts("x", {"unet": legacy}, tiny.linear())).weights_hash
    assert tiny_adm.adm().weights_hash != from_parts(Parts("x", {"unet": new}, tiny.linear())).weights_hash


def test_a_config_is_read_off_the_weights(variant, backbone):
    inferred = infer_config(backbone.model.state_dict(), variant)
    assert inferred.items() <= backbone.model.config.items()
    told = {"image_size", "num_heads", "num_head_channels", "use_new_attention_order"}
    assert set(inferred) | told == set(backbone.model.config)


def test_weights_and_config_make_the_same_backbone():
    original = tiny_adm.adm("classes-new-order")
    config = RUN | {"use_new_attention_order": True, "noise_schedule": "cosine", "num_heads": None}
    backbone = from_weights(original.model.state_dict(), name="mine", config=config)
    x0, condition = given(original)
    assert torch.equal(backbone.denoise(x0, 5, condition), original.denoise(x0, 5, condition))
    assert backbone.name == "mine" and backbone.size == 16
    backbone.check_frozen()
    wave = [cos((step / 1000 + 0.008) / 1.008 * pi / 2) ** 2 for step in range(1001)]
    np.testing.assert_allclose(backbone.schedule.alphas_cumprod[:999], np.array(wave[1:1000]) / wave[0], rtol=1e-9)


def test_another_number_of_steps_ends_at_the_same_noise():
    weights = tiny_adm.adm_model().state_dict()
    long = from_weights(weights, name="mine", config=RUN | {"diffusion_steps": 4000})
    betas = np.linspace(0.25e-4, 0.005, 4000)
    np.testing.assert_allclose(long.schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("mine", None, "weights of mine do not tell how its network was run, and it is none of 64x64_diffusion"),
        ("ffhq", None, "weights of ffhq do not tell"),  # the published file is another network
        ("mine", {"image_size": 16}, "use_new_attention_order=false .* --config KEY=VALUE"),
        ("mine", RUN | {"num_heads": 2}, "num_head_channels=64 .or num_heads=4."),
        ("mine", RUN | {"model_channels": 32}, "no config model_channels for mine; have image_size.*tell the rest"),
        ("mine", RUN | {"noise_schedule": "warped"}, "noise_schedule=warped .*takes one of linear, cosine"),
        (
            "mine",
            RUN | {"use_new_attention_order": "maybe"},
            "order=maybe .*use_new_attention_order takes true or false",
        ),
        ("mine", RUN | {"use_new_attention_order": 1}, "order=1 .* takes true or false"),
        ("mine", RUN | {"image_size": "banana"}, "image_size=banana given for mine; image_size takes a whole number"),
        ("mine", RUN | {"num_heads": True, "num_head_channels": None}, "num_heads=true .*takes a whole number"),
        ("mine", RUN | {"diffusion_steps": 0}, "diffusion_steps=0 .*takes a whole number of at least 1"),
        ("mine", RUN | {"num_head_channels": 24}, "64 channels in 2 heads .*num_head_channels=24.*divided"),
    ],
)
def test_a_config_that_does_not_do_is_a_value_error(plain, name, config, message):
    with pytest.raises(ValueError, match=message):
        from_weights(plain.model.state_dict(), name=name, config=config)


def test_what_is_given_comes_before_what_is_published():
    inferred = infer_config(on_meta(**ADM_256).state_dict(), "ffhq")
    told = told_config("ffhq", inferred, {"num_heads": 4, "image_size": 128})
    assert (told["num_heads"], told["image_size"], told["noise_schedule"]) == (4, 128, "linear")
    assert "num_head_channels" not in told and PUBLISHED["ffhq"]["num_head_channels"] == 64


def test_weights_that_are_not_all_there_are_refused(plain):
    weights = plain.model.state_dict()
    needed = [key for key in weights if key.endswith((".in_layers.2.weight", ".qkv.weight", "0.weight"))]
    for key in [*needed, *list(weights)[::9]]:
        # Without its attention's first weight a level seems to have none, and the others are too many.
        with pytest.raises((OSError, ValueError), match="get it again"):
            from_weights({name: value for name, value in weights.items() if name != key}, name="mine", config=RUN)


def test_weights_of_other_networks_are_value_errors(plain):
    weights = plain.model.state_dict()
    with pytest.raises(
        ValueError, match="mine has 1 weights that do not fit the rest, input_blocks.1.1.norm.weight first"
    ):
        from_weights(weights | {"input_blocks.1.1.norm.weight": torch.ones(1)}, name="mine", config=RUN)
    with pytest.raises(ValueError, match=r"middle_block.1.qkv.bias of mine is \(3,\), and \(192,\) in an ADM"):
        from_weights(weights | {"middle_block.1.qkv.bias": torch.ones(3)}, name="mine", config=RUN)
    with pytest.raises(ValueError, match="mine takes 6 channels; have networks of images, not upsamplers"):
        from_weights(weights | {"input_blocks.0.0.weight": torch.ones(32, 6, 3, 3)}, name="mine", config=RUN)
    with pytest.raises(ValueError, match="mine works on pixels; leave out vae="):
        from_weights(weights, name="mine", config=RUN, vae="a folder")
