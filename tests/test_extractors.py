import os
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from repkit.datasets import fashion_mnist
from repkit.exporting import export
from repkit.extractors import DiffusionExtractor
from repkit.features import identity_differences
from repkit.images import Resize, digest, to_uint8
from repkit.noise import SHARED, batch_noise
from repkit.zoo import load
from tests import tiny, tiny_sd

TAPS = ["mid,up.0.resnet.0@10,261", "down.1@clean"]
KEYS = ["mid@10", "up.0.resnet.0@10", "mid@261", "up.0.resnet.0@261", "down.1@clean"]
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


@pytest.fixture(scope="module")
def backbone():
    return tiny.unet()


@pytest.fixture(scope="module")
def dit():
    return tiny.dit()


def level(t):
    return float(ALPHAS_CUMPROD[t] ** 0.5), float((1 - ALPHAS_CUMPROD[t]) ** 0.5)


def eps_of(images, shape, t, seed=0, draw=0):
    digests = [digest(image) for image in to_uint8(images)]
    return batch_noise(shape, seed=seed, digests=digests, t=t, draw=draw)


def hooked(model, path, *args, **kwargs):
    """The output of a module in an ordinary forward with an ordinary hook."""
    taken = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: taken.append(output))
    with torch.no_grad():
        model(*args, return_dict=False, **kwargs)
    handle.remove()
    return taken[0]


def assert_near(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_unet_features_equal_a_plain_forward(backbone):
    images, t = tiny.images(), 261
    eps = eps_of(images, (3, 16, 16), t)
    alpha, sigma = (torch.tensor(value, dtype=torch.float32) for value in level(t))
    found = DiffusionExtractor(backbone, f"up.0.resnet.0@{t}")(images)["up.0.resnet.0@261"]
    x_t = alpha * (images * 2 - 1) + sigma * eps
    assert torch.equal(found, hooked(backbone.model, "up_blocks.0.resnets.0", x_t, torch.full((3,), t)))
    by_diffusers = DDPMScheduler().add_noise(images * 2 - 1, eps, torch.full((3,), t))
    assert_near(found, hooked(backbone.model, "up_blocks.0.resnets.0", by_diffusers, torch.full((3,), t)))


def test_class_conditional_features_equal_a_plain_forward():
    backbone, images, t = tiny.grey_unet(), tiny.images(), 50
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True) * 2 - 1
    x_t = DDPMScheduler().add_noise(luma, eps_of(images, (1, 16, 16), t), torch.full((3,), t))
    for cond, labels in ((["owl", "cat", "dog"], [2, 0, 1]), (None, [3, 3, 3]), (1, [1, 1, 1])):
        expected = hooked(backbone.model, "mid_block", x_t, t, class_labels=torch.tensor(labels))
        assert_near(DiffusionExtractor(backbone, "mid@50", cond=cond)(images)["mid@50"], expected)


@pytest.mark.parametrize("family", ["dit", "pixel-dit"])
def test_transformer_features_equal_a_plain_forward(family):
    backbone: Any = tiny.OURS[family]()
    images, t = tiny.images(3, 8, 8), 700
    x0 = images * 2 - 1
    if family == "dit":
        x0 = (backbone.vae.quant_conv(backbone.vae.encoder(x0))[:, :4] - 0.1) * 0.7
    x_t = DDPMScheduler().add_noise(x0, eps_of(images, x0.shape[1:], t), torch.full((3,), t))
    told = {"timestep": torch.full((3,), t), "class_labels": torch.full((3,), 3)}
    features = DiffusionExtractor(backbone, f"block.1,block.1.in.adaln@{t}")(images)
    for key, path in (("block.1@700", "transformer_blocks.1"), ("block.1.in.adaln@700", "transformer_blocks.1.norm1")):
        raw = hooked(backbone.model, path, x_t, **told)
        tokens = raw[0] if isinstance(raw, tuple) else raw
        side = x0.shape[-1] // 2
        assert_near(features[key], tokens.transpose(1, 2).reshape(3, -1, side, side))


def test_the_modulated_input_is_what_attention_receives(dit):
    images = tiny.images(2, 8, 8)
    seen = []
    attention = dit.model.transformer_blocks[1].attn1
    handle = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = DiffusionExtractor(dit, "block.1.in.adaln,block.1.attn.out@100")(images)["block.1.in.adaln@100"]
    handle.remove()
    received = seen[-1]  # the last: shapes were found out before
    assert torch.equal(found.flatten(2).transpose(1, 2), received)


def test_clean_taps_have_no_noise(backbone):
    images = tiny.images()
    features = DiffusionExtractor(backbone, "mid@clean,clean:7,7", draws=3)(images)
    for key, t in (("mid@clean", 0), ("mid@clean:7", 7)):
        assert torch.equal(features[key], hooked(backbone.model, "mid_block", images * 2 - 1, torch.full((3,), t)))
    assert not torch.allclose(features["mid@7"], features["mid@clean:7"])


@pytest.mark.parametrize("time", ["clean:1.5", "clean:1000", "clean:-1", "1000", "sigma=2", "logsnr=40"])
def test_times_out_of_range_are_refused(backbone, time):
    with pytest.raises(ValueError, match="schedule"):
        DiffusionExtractor(backbone, f"mid@{time}")


@pytest.mark.parametrize("sigma", [0.02, 0.26, 0.5, 0.9, 0.999])
def test_sigma_and_logsnr_take_the_nearest_step(backbone, sigma):
    table = np.log(ALPHAS_CUMPROD) - np.log1p(-ALPHAS_CUMPROD)
    logsnr = np.log(1 - sigma**2) - 2 * np.log(sigma)
    nearest = float(np.abs(table - logsnr).argmin())
    extract = DiffusionExtractor(backbone, [f"mid@sigma={sigma}", f"mid@logsnr={logsnr}"])
    assert {level.t for level in extract.levels.values()} == {nearest}
    resolved = extract.identity["taps"][f"mid@sigma={sigma}"]
    assert resolved["t"] == nearest and resolved["logsnr"] == pytest.approx(table[int(nearest)], abs=1e-4)


def test_edm_has_no_training_steps():
    backbone, images = tiny.edm_unet(), tiny.images()
    with pytest.raises(ValueError, match=r"no training timesteps, so no time 261; write sigma=\.\.\. instead"):
        DiffusionExtractor(backbone, "mid@261")
    found = DiffusionExtractor(backbone, "mid@sigma=0.5")(images)["mid@sigma=0.5"]
    x_t = images * 2 - 1 + 0.5 * eps_of(images, (3, 16, 16), 0.5)
    told = torch.full((3,), np.log(0.5) / 4, dtype=torch.float32)
    assert_near(found, hooked(backbone.model, "mid_block", x_t / 0.5**0.5, told))


def test_draws_are_averaged(backbone):
    images = tiny.images()
    singles = []
    for draw in range(3):
        alpha, sigma = level(261)
        x_t = alpha * (images * 2 - 1) + sigma * eps_of(images, (3, 16, 16), 261, seed=4, draw=draw)
        singles.append(hooked(backbone.model, "mid_block", x_t, torch.full((3,), 261)))
    found = DiffusionExtractor(backbone, "mid@261", draws=3, seed=4)(images)["mid@261"]
    assert_near(found, torch.stack(singles).mean(0))


def test_shared_noise_is_the_same_for_all(backbone):
    images, (alpha, sigma) = tiny.images(), level(261)
    eps = batch_noise((3, 16, 16), seed=0, digests=[SHARED], t=261, draw=0)
    expected = hooked(backbone.model, "mid_block", alpha * (images * 2 - 1) + sigma * eps, torch.full((3,), 261))
    assert_near(DiffusionExtractor(backbone, "mid@261", noise="shared")(images)["mid@261"], expected)


def test_fresh_noise_differs_from_call_to_call(backbone):
    images, extract = tiny.images(), DiffusionExtractor(backbone, "mid@261", noise="fresh")
    assert not torch.allclose(extract(images)["mid@261"], extract(images)["mid@261"])
    torch.manual_seed(0)
    first = extract(images)["mid@261"]
    torch.manual_seed(0)
    assert torch.equal(extract(images)["mid@261"], first)


def test_another_seed_gives_other_features(backbone):
    one, other = (DiffusionExtractor(backbone, "mid@261", seed=seed)(tiny.images())["mid@261"] for seed in (0, 1))
    assert not torch.allclose(one, other)


def test_a_condition_of_the_call_overrides():
    extract, images = DiffusionExtractor(tiny.grey_unet(), "mid@50", cond="cat"), tiny.images()
    expected = DiffusionExtractor(extract.backbone, "mid@50", cond="owl")(images)["mid@50"]
    assert torch.equal(extract(images, cond="owl")["mid@50"], expected)
    assert torch.equal(extract(images, cond=[2, 2, 2])["mid@50"], expected)
    assert not torch.allclose(extract(images)["mid@50"], expected)
    with pytest.raises(ValueError, match="2 conditions for 3 images"):
        extract(images, cond=["cat", "owl"])


def test_keys_are_declared_and_in_order(backbone):
    extract = DiffusionExtractor(backbone, TAPS)
    features = extract(tiny.images())
    assert list(features) == list(extract.blocks) == list(extract.shapes) == KEYS
    assert {key: tuple(value.shape[1:]) for key, value in features.items()} == extract.shapes
    assert features.size == (16, 16) and features.mask is None and features.identity == extract.identity


def test_one_forward_for_each_time_and_draw(backbone):
    calls = []
    handle = backbone.model.conv_in.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    extract = DiffusionExtractor(backbone, [*TAPS, "mid@sigma=0.2"], draws=2)
    calls.clear()
    extract(tiny.images())
    handle.remove()
    assert calls == [3] * (2 + 2 + 2 + 1)


@pytest.mark.parametrize("family", ["unet", "dit"])
@pytest.mark.parametrize("batch", [1, 7])
def test_batches_do_not_matter(family, batch):
    backbone = tiny.OURS[family]()
    images = tiny.images(64, backbone.size, backbone.size)
    extract = DiffusionExtractor(backbone, "mid,up.1@100" if family == "unet" else "block.1@100")
    whole = extract(images)
    parts = [extract(images[start : start + batch]) for start in range(0, 64, batch)]
    backwards = extract(images.flip(0))
    for key, value in whole.items():
        assert_near(torch.cat([part[key] for part in parts]), value)
        assert_near(backwards[key].flip(0), value)


def test_threads_do_not_matter(backbone):
    extract = DiffusionExtractor(backbone, TAPS)
    one = extract(tiny.images())
    torch.set_num_threads(2)
    try:
        two = extract(tiny.images())
    finally:
        torch.set_num_threads(1)
    for key in KEYS:
        assert_near(two[key], one[key])


def test_another_process_gets_the_same(tmp_path):
    code = (
        "import sys, json, numpy, torch; torch.set_num_threads(1)\n"
        "from tests import tiny; from repkit.extractors import DiffusionExtractor\n"
        "extract = DiffusionExtractor(tiny.grey_unet(), 'mid@261', cond='owl')\n"
        "numpy.save(sys.argv[1], extract(tiny.images())['mid@261'].numpy()); print(json.dumps(extract.identity))\n"
    )
    extract = DiffusionExtractor(tiny.grey_unet(), "mid@261", cond="owl")
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "features.npy")]
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert_near(torch.from_numpy(np.load(tmp_path / "features.npy")), extract(tiny.images())["mid@261"])
    assert eval(found.stdout, {"null": None, "true": True, "false": False}) == extract.identity


@pytest.mark.parametrize("policy", ["crop", "squash", "pad"])
def test_paths_pictures_and_tensors_are_one(backbone, tmp_path, rng, policy):
    picture = Image.fromarray(rng.integers(0, 256, (23, 31, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    resize = Resize(16, policy)
    extract = DiffusionExtractor(backbone, "mid@100", resize=resize)
    pixels, mask = resize(picture)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    expected = extract(tensor)["mid@100"]
    for given in ([picture], [tmp_path / "a.png"], [str(tmp_path / "a.png")]):
        features = extract(given)
        assert torch.equal(features["mid@100"], expected)
        assert (features.mask is None) if mask is None else np.array_equal(features.mask[0], mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_tensors_of_other_precision_are_taken(dtype):
    extract = DiffusionExtractor(tiny.grey_unet(), "mid@100")
    found, expected = extract(tiny.images().to(dtype))["mid@100"], extract(tiny.images())["mid@100"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_sizes_that_do_not_fit_are_refused(backbone, dit):
    with pytest.raises(ValueError, match="multiples of 2, not 15x16; nearest: 16x16"):
        DiffusionExtractor(backbone, "mid@1")(tiny.images(1, 15, 16))
    with pytest.raises(ValueError, match="dit takes 8x8 images only, not 16x16"):
        DiffusionExtractor(dit, "block.0@1")(tiny.images())
    assert DiffusionExtractor(backbone, "mid@1")(tiny.images(1, 12, 20))["mid@1"].shape == (1, 16, 6, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images given"),
        (torch.rand(0, 3, 16, 16), "images of shape .0, 3, 16, 16.*; give float tensors"),
        (255 * torch.rand(1, 3, 16, 16), r"images range from .*; scale them to \[0, 1\]"),
        (torch.full((1, 3, 16, 16), torch.nan), r"scale them to \[0, 1\]"),
    ],
)
def test_bad_images_are_refused(backbone, images, message):
    with pytest.raises(ValueError, match=message):
        DiffusionExtractor(backbone, "mid@1")(images)


@pytest.mark.parametrize("images", ["a.png", Image.new("RGB", (16, 16))])
def test_one_image_is_no_list_of_images(backbone, images):
    with pytest.raises(TypeError):
        DiffusionExtractor(backbone, "mid@1")(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws=0; give a whole number of at least 1"),
        ({"cond": 2}, "unet is unconditional"),
        ({"taps": "nope@1"}, "no block 'nope' in unet; have down.0"),
        ({"taps": "mid"}, "has no time"),
        ({"taps": "/mid@1"}, "no module 'mid': UNet2DModel has conv_in"),
        ({"taps": "/up_blocks@1"}, "up_blocks did not run in this forward"),
    ],
)
def test_bad_options_are_refused_at_once(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionExtractor(backbone, **{"taps": "mid@1"} | options)


def test_gradients_reach_the_images(backbone):
    images = tiny.images().requires_grad_()
    extract = DiffusionExtractor(backbone, "mid@261")
    assert not extract(images)["mid@261"].requires_grad
    extract(images, grad=True)["mid@261"].square().sum().backward()
    plain = tiny.images().requires_grad_()
    alpha, sigma = (torch.tensor(value, dtype=torch.float32) for value in level(261))
    x_t = alpha * (plain * 2 - 1) + sigma * eps_of(plain, (3, 16, 16), 261)
    taken = []
    handle = backbone.model.mid_block.register_forward_hook(lambda module, args, output: taken.append(output))
    backbone.model(x_t, 261)
    handle.remove()
    taken[0].square().sum().backward()
    assert plain.grad.abs().max() > 0 and torch.equal(images.grad, plain.grad)


def test_overflow_names_the_tap_unless_told_not_to():
    backbone = tiny.unet()
    backbone.model.mid_block.resnets[1].conv2.bias.fill_(torch.inf)
    extract = DiffusionExtractor(backbone, "down.0,mid@261")
    with pytest.raises(FloatingPointError, match="^mid@261 is not finite in 3 of 3 images"):
        extract(tiny.images())
    features = extract(tiny.images(), check=False)
    assert features["down.0@261"].isfinite().all() and not features["mid@261"].isfinite().all()


def test_what_decides_values_is_in_the_identity(backbone):
    base = DiffusionExtractor(backbone, "mid@261").identity
    assert base["noise_version"] == 1 and base["dtype"] == "float32" and base["weights"] == backbone.weights_hash
    changes = [{"seed": 1}, {"draws": 2}, {"noise": "shared"}, {"resize": Resize(32)}, {"resize": Resize(16, "pad")}]
    changes += [{"taps": "mid@262"}, {"taps": "mid@clean"}]
    others = [DiffusionExtractor(backbone, **{"taps": "mid@261"} | change).identity for change in changes]
    others.append(DiffusionExtractor(tiny.unet(seed=1), "mid@261").identity)
    assert all(other != base for other in others)
    assert DiffusionExtractor(tiny.unet(), "mid@261").identity == base


def test_a_condition_of_one_call_is_in_the_identity_of_its_features():
    extract, images = DiffusionExtractor(tiny.grey_unet(), "mid@50", cond=1), tiny.images()
    assert extract(images).identity == extract.identity and extract.identity["cond"] == 1
    assert extract(images, "owl").identity == {**extract.identity, "cond": "owl"}
    assert extract(images, ("owl", 0, 1)).identity["cond"] == ["owl", 0, 1]


def test_identity_follows_weights_that_change_and_tensors_of_another_size():
    extract, images = DiffusionExtractor(tiny.unet(), "mid@50"), tiny.images()
    before = extract(images).identity
    with torch.no_grad():
        extract.backbone.model.conv_in.weight.mul_(2)
    changed = extract(images).identity
    assert before["weights"] != changed["weights"] and {**before, "weights": 0} == {**changed, "weights": 0}
    assert extract(tiny.images(2, 32, 16)).identity["resize"] == {"size": [32, 16], "policy": "as given"}


def test_autocast_around_a_call_changes_nothing_and_training_mode_is_refused():
    extract, images = DiffusionExtractor(tiny.unet(), "mid@50"), tiny.images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extract(images)["mid@50"]
    assert torch.equal(inside, extract(images)["mid@50"])
    extract.backbone.model.train()
    with pytest.raises(ValueError, match="training mode"):
        extract(images)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"seed": 2**63}, ValueError),
        ({"seed": 1.5}, Exception),
        ({"draws": 0}, ValueError),
        ({"resize": 64}, Exception),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(backbone, wrong, error):
    with pytest.raises(error, match="give|violates|Type"):
        DiffusionExtractor(backbone, "mid@50", **wrong)


def test_the_identity_holds_all_that_decides_values(dit):
    keys = "extractor weights schedule taps resize decoder classes cond draws seed noise noise_version dtype".split()
    assert set(DiffusionExtractor(tiny.unet(), "mid@50").identity) == set(keys)
    assert set(DiffusionExtractor(dit, "block.0@50").identity) == {*keys, "latent"}


def test_the_order_of_class_names_is_in_the_identity():
    one, other = tiny.grey_unet(), tiny.grey_unet()
    other.class_names = list(reversed(other.class_names))
    identities = [DiffusionExtractor(backbone, "mid@50", cond="owl").identity for backbone in (one, other)]
    assert identity_differences(*identities)[0].startswith("classes:") and len(identity_differences(*identities)) == 1


@pytest.mark.parametrize("noise", ["image", "shared", "fresh"])
def test_images_out_of_range_are_refused_whatever_the_noise(backbone, noise):
    with pytest.raises(ValueError, match=r"scale them to \[0, 1\]"):
        DiffusionExtractor(backbone, "mid@50", noise=noise)(tiny.images() * 255)


def test_a_model_loaded_in_inference_mode_works():
    with torch.inference_mode():
        assert torch.isfinite(DiffusionExtractor(tiny.unet(), "mid@50")(tiny.images())["mid@50"]).all()


def test_any_part_in_training_mode_is_refused():
    backbone = tiny.unet()
    backbone.model.mid_block.train()
    with pytest.raises(ValueError, match="training mode"):
        DiffusionExtractor(backbone, "mid@50")(tiny.images())


def switches():
    """Where torch keeps whether float32 may be rounded to TF32."""
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    names = ("fp32_precision", "fp32_precision") if new else ("allow_tf32", "allow_tf32")
    cudnn: Any = torch.backends.cudnn
    owners = (torch.backends.cuda.matmul, cudnn.conv if new else cudnn)
    return list(zip(owners, names, strict=True)), ("tf32" if new else True), ("ieee" if new else False)


def test_no_product_is_rounded_to_tf32_and_the_switches_come_back():
    where, on, off = switches()
    before = [getattr(owner, name) for owner, name in where]
    backbone, seen = tiny.unet(), []
    extract = DiffusionExtractor(backbone, "mid@50")
    handle = backbone.model.conv_in.register_forward_hook(
        lambda *_: seen.append([getattr(owner, name) for owner, name in where])
    )
    try:
        for owner, name in where:
            setattr(owner, name, on)
        extract(tiny.images())
        with pytest.raises(ValueError, match="2 conditions"):
            DiffusionExtractor(tiny.grey_unet(), "mid@50")(tiny.images(), cond=["cat", "dog"])
        assert seen[-1] == [off, off] and [getattr(owner, name) for owner, name in where] == [on, on]
    finally:
        handle.remove()
        for (owner, name), value in zip(where, before, strict=True):
            setattr(owner, name, value)


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_channels_last_changes_nothing_but_the_speed(family):
    plain, last = tiny.OURS[family](), tiny.OURS[family]()
    for network in last.networks.values():
        network.to(memory_format=torch.channels_last)
    taps = "down.0,mid,up.1,skip.1@100" if family == "unet" else "block.0,block.1.in.adaln,/pos_embed.proj@100"
    images = tiny.images(3, plain.size, plain.size)
    expected = DiffusionExtractor(plain, taps)(images)
    for key, found in DiffusionExtractor(last, taps)(images).items():
        assert_near(found, expected[key])
        assert found.is_contiguous() and expected[key].is_contiguous()


def test_an_overflow_of_float16_has_a_remedy_that_works():
    def features(dtype):
        backbone = tiny.unet()
        last = backbone.model.mid_block.resnets[1]
        last.conv2.weight.mul_(1e4)  # which float16 still holds
        last.norm2.weight.mul_(1e3)
        torch.nn.Module.to(backbone.model, dtype)
        return DiffusionExtractor(backbone, "down.0,mid@261")(tiny.images())

    with pytest.raises(FloatingPointError, match="^mid@261 is not finite.*dtype=torch.bfloat16 or torch.float32"):
        features(torch.float16)
    assert features(torch.bfloat16)["mid@261"].abs().max() > 65504


def test_an_overflow_of_the_autoencoder_has_a_remedy_that_works():
    backbone = tiny.dit()
    backbone.vae.encoder.conv_out.weight.mul_(1e4)  # which float16 still holds
    backbone.vae.encoder.conv_norm_out.weight.mul_(1e3)
    backbone.vae.half()
    extract = DiffusionExtractor(backbone, "block.0@261")
    with pytest.raises(FloatingPointError, match="^the latents are not finite in 2 of 2.*vae_dtype=torch.float32"):
        extract(tiny.images(2, 8, 8))
    backbone.vae.float()
    assert extract(tiny.images(2, 8, 8))["block.0@261"].isfinite().all()


def test_weights_that_are_damaged_are_not_blamed_on_the_dtype():
    backbone = tiny.unet()
    backbone.model.conv_in.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="float32 has the range for it, so the weights may be damaged"):
        DiffusionExtractor(backbone, "mid@261")(tiny.images())


@pytest.mark.parametrize(("model", "taps"), [("mini-unet", "mid,up.1@100"), ("mini-dit", "block.4@100")])
def test_bfloat16_features_point_where_float32_ones_do(model, taps):
    exact, rough = (load(model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    images = [Image.fromarray(image).convert("RGB") for image in fashion_mnist.load("test")[0][:4]]
    expected = DiffusionExtractor(exact, taps)(images)
    for key, found in DiffusionExtractor(rough, taps)(images).items():
        assert found.dtype == torch.float32
        assert torch.cosine_similarity(found.flatten(1), expected[key].flatten(1)).min() > 0.99


def test_shapes_are_found_out_once():
    backbone, calls = tiny.unet(), []
    handle = backbone.model.conv_in.register_forward_hook(lambda *_: calls.append(1))
    extract = DiffusionExtractor(backbone, "mid@50")
    handle.remove()
    assert extract.shapes == {"mid@50": (16, 8, 8)} and len(calls) == 1


def test_discarded_channels_are_zero_before_the_norm(dit):
    images, channels = tiny.images(2, 8, 8), [3, 11]
    block = dit.model.transformer_blocks[1]

    def zeroed(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[..., channels] = 0
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    plain = DiffusionExtractor(dit, "block.1.in.adaln,block.1@50,100")
    before = plain(images)
    handle = block.register_forward_pre_hook(zeroed, with_kwargs=True)
    expected = plain(images)
    handle.remove()
    options = [{"block.1.in.adaln": channels}, {"block.1.in.adaln@100": channels[::-1]}]
    both, one = (DiffusionExtractor(dit, "block.1.in.adaln,block.1@50,100", discard=given) for given in options)
    for time in (50, 100):
        key = f"block.1.in.adaln@{time}"
        assert torch.equal(both(images)[key], expected[key]) and not torch.allclose(expected[key], before[key])
        assert torch.equal(one(images)[key], (expected if time == 100 else before)[key])
        assert torch.equal(both(images)[f"block.1@{time}"], before[f"block.1@{time}"])
    assert both.identity["discard"] == {f"block.1.in.adaln@{time}": channels for time in (50, 100)}
    assert "discard" not in plain.identity


@pytest.mark.parametrize(
    ("discard", "message"),
    [
        ({"block.0.in.adaln": [1]}, "no tap 'block.0.in.adaln' to discard channels of; have block.1.in.adaln@50"),
        ({"block.1": [1]}, "channels are discarded before a block's own norm"),
        ({"block.1.in.adaln": [16]}, "no channel 16 in block.1.in.adaln@50 to discard; have 0 ... 15"),
    ],
)
def test_what_cannot_be_discarded_is_refused(dit, discard, message):
    with pytest.raises(ValueError, match=message):
        DiffusionExtractor(dit, "block.1.in.adaln,block.1@50", discard=discard)


def test_planted_massive_channels_are_reported():
    backbone = tiny.dit()
    backbone.model.transformer_blocks[0].ff.net[2].bias[5] = 1e4
    extract = DiffusionExtractor(backbone, "block.0.in.adaln,block.1.in.adaln,block.1@50")
    found = extract.massive(tiny.images(2, 8, 8))
    assert found == {"block.0.in.adaln@50": [], "block.1.in.adaln@50": [5]}
    with pytest.raises(ValueError, match="add such a tap"):
        DiffusionExtractor(backbone, "block.1@50").massive(tiny.images(2, 8, 8))


def test_learned_prompts_need_no_text_encoder(tmp_path):
    folder = tmp_path / "sd"
    tiny_sd.sd_pipeline().save_pretrained(folder)
    extract, images = DiffusionExtractor(load(folder), "mid@100"), tiny.images(2)
    identity, expected = extract.identity, extract(images, ["cat", "a dog"])
    extract.learn(["cat", ["a dog", "cat"], None])
    assert extract.backbone.prompts.free() == 0  # nothing is left to be freed
    shutil.rmtree(folder / "text_encoder")
    assert torch.equal(extract(images, ["cat", "a dog"])["mid@100"], expected["mid@100"])
    assert extract.identity == identity
    with pytest.raises(OSError, match="text_encoder"):
        extract(images, "an owl")


def test_an_export_without_prompts_frees_the_text_encoders_too(tmp_path):
    folder, photos = tmp_path / "sd", tmp_path / "photos"
    tiny_sd.sd_pipeline().save_pretrained(folder)
    photos.mkdir()
    Image.new("RGB", (16, 16), "red").save(photos / "a.png")
    extract = DiffusionExtractor(load(folder), "mid@100")
    assert export(photos, extract, tmp_path / "features", workers=0).array("mid@100").shape[0] == 1
    assert extract.backbone.prompts.free() == 0  # nothing is left to be freed


def test_trimming_and_exports_free_the_text_encoders(tmp_path):
    folder, photos = tmp_path / "sd", tmp_path / "photos"
    tiny_sd.sd_pipeline().save_pretrained(folder)
    photos.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), name == "a" and "red" or "blue").save(photos / f"{name}.png")
    extract = DiffusionExtractor(load(folder), "mid@100", cond="cat", trim=True)
    assert extract.backbone.prompts.free() == 0
    export(photos, extract, tmp_path / "features", cond="image {id}", workers=0)
    assert extract.backbone.prompts.free() == 0
    DiffusionExtractor(extract.backbone, "mid@100", cond="dog")
    assert extract.backbone.prompts.free() > 0
