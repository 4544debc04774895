import hashlib
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import nn

from repkit.backbones.base import Backbone, Block, grid_of
from repkit.backbones.conditions import Condition
from repkit.backbones.dit import DiT
from repkit.backbones.hashing import hash_weights
from repkit.backbones.prompts import TextEncoders
from repkit.backbones.unet import UNet
from repkit.capture import Point, capture
from repkit.schedule import Schedule
from tests import families, tiny


@pytest.fixture(scope="module", params=[*families.BUILT, *families.PIPELINES])
def backbone(request):
    return families.build(request.param)


@pytest.fixture(scope="module")
def grey():
    return tiny.grey_unet()


@pytest.fixture(scope="module")
def dit():
    return tiny.dit()


def inputs(backbone, rows, height, width):
    conds = each_another(backbone, rows)
    return backbone.encode(tiny.images(rows, height, width)), backbone.condition(conds, rows)


def each_another(backbone, rows):
    """One for each row, each another where the network is told anything at all."""
    if backbone.prompts is not None:
        return ["a cat", "two dogs", "an owl"][:rows]
    try:
        backbone.condition(0, 1)
    except ValueError:
        return None  # unconditional
    return list(range(rows))


def odd_sizes(backbone):
    """Not square, and for U-Nets an odd number of cells at some stage."""
    side = 5 * backbone.multiple
    return (backbone.size, backbone.size) if backbone.square else (side, side + 2 * backbone.multiple)


def full_maps(backbone, x_t, t, condition):
    """Every named block of one whole forward."""
    times = torch.full((len(x_t),), t)
    points = list(backbone.points.values())
    raw = capture(backbone.model, points, lambda m: backbone.predict(m, x_t, times, condition), stop=False)
    return {name: backbone.fold(point, raw[point], x_t) for name, point in backbone.points.items()}


def test_declared_channels_and_strides_are_the_real_ones(backbone):
    x0, condition = inputs(backbone, 2, backbone.size, backbone.size)
    maps = backbone.activations(x0, 10, condition, list(backbone.points))
    assert maps.keys() == backbone.blocks.keys() == backbone.points.keys()
    found = {name: Block(m.shape[1], backbone.size // m.shape[2]) for name, m in maps.items()}
    assert found == backbone.blocks
    assert all(m.shape[0] == 2 and m.shape[2] == m.shape[3] and m.isfinite().all() for m in maps.values())
    assert not any(m.requires_grad for m in maps.values())


def test_declared_shapes_hold_at_other_sizes(backbone):
    height, width = odd_sizes(backbone)
    x0, condition = inputs(backbone, 1, height, width)
    maps = backbone.activations(x0, 10, condition, list(backbone.points))
    assert backbone.shapes(list(maps), height, width) == {name: tuple(m.shape[1:]) for name, m in maps.items()}


def test_stopping_at_any_block_gives_the_bits_of_the_full_run(backbone):
    x0, condition = inputs(backbone, 2, *odd_sizes(backbone))
    full = full_maps(backbone, x0, 100, condition)
    stopped = {name: backbone.activations(x0, 100, condition, [name])[name] for name in backbone.points}
    assert all(torch.equal(stopped[name], full[name]) for name in full)
    assert len({tuple(m.flatten()[:8].tolist()) for m in full.values()}) > len(full) // 2  # they are not all one thing


def test_shapes_and_conditions_are_known_before_any_text_is_encoded(backbone, monkeypatch):
    said = backbone.condition(each_another(backbone, 2), 2)
    monkeypatch.setattr(TextEncoders, "open", None)
    assert backbone.shapes([list(backbone.points)[0]], *odd_sizes(backbone))
    blank = backbone.blank_condition(2)
    assert {k: v.shape for k, v in blank.tensors.items()} == {k: v.shape for k, v in said.tensors.items()}


def test_flops_grow_as_blocks_are_reached(backbone):
    x0, condition = inputs(backbone, 1, backbone.size, backbone.size)
    order: dict[Point, None] = {}
    capture(
        backbone.model,
        list(backbone.points.values()),
        lambda m: backbone.predict(m, x0, torch.full((1,), 10), condition),
        stop=False,
        taken_at=lambda point: order.setdefault(point),
    )
    reached = {point: backbone.flops[name] for name, point in backbone.points.items()}
    shares = [reached[point] for point in order]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.5 < shares[-1] <= 1


def test_each_row_has_its_own_condition_and_time(backbone):
    conds = each_another(backbone, 3)
    x0 = backbone.encode(tiny.images(3, backbone.size, backbone.size))
    t, name = torch.tensor([1, 50, 900]), list(backbone.points)[-1]
    together = backbone.activations(x0, t, backbone.condition(conds, 3), [name])[name]
    conditions = [backbone.condition(conds and [conds[row]], 1) for row in range(3)]
    alone = [backbone.activations(x0[row : row + 1], t[row], conditions[row], [name])[name] for row in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5 * together.abs().max().item())
    assert not torch.allclose(together, backbone.activations(x0, t.flip(0), backbone.condition(conds, 3), [name])[name])


def test_denoise_predicts_the_latent_without_learned_variance(backbone):
    x0, condition = inputs(backbone, 2, backbone.size, backbone.size)
    prediction = backbone.denoise(x0, 10, condition)
    assert prediction.shape == x0.shape and prediction.dtype == torch.float32 and not prediction.requires_grad


def test_networks_are_frozen_and_in_eval_mode(backbone):
    for network in backbone.networks.values():
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


class TwoConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.second = nn.Conv2d(4, 6, 1)
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        return self.last(self.second(self.first(x)))


class Convolutions(Backbone):
    name, size, multiple, schedule = "convolutions", 8, 2, Schedule.flow()

    def __init__(self):
        self.model = TwoConvolutions()

    def encode(self, images):
        return images

    def condition(self, cond, batch):
        return Condition({})

    def predict(self, model, x_t, t, condition):
        return model(x_t)

    @cached_property
    def points(self):
        return {"last": Point("last"), "second": Point("second"), "first": Point("first")}


def test_flops_by_hand():
    first, second, last = (2 * 16 * cells for cells in (3 * 4 * 9, 4 * 6, 6 * 3 * 9))  # on a 4x4 grid
    total = first + second + last
    assert Convolutions().flops == pytest.approx(
        {"first": first / total, "second": (first + second) / total, "last": 1.0}
    )


def test_pixels_become_minus_one_to_one():
    x0 = tiny.unet().encode(torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]))
    assert x0.shape == (2, 3, 16, 16) and (x0[0] == -1).all() and (x0[1] == 1).all()


def test_one_channel_sees_luma(grey):
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, 0.3, 0.3]])
    x0 = grey.encode(colors[:, :, None, None].expand(-1, -1, 16, 16))
    np.testing.assert_allclose(x0[:, 0, 0, 0], 2 * np.array([0.299, 0.587, 0.114, 0.3]) - 1, atol=1e-6)


def test_other_channel_counts_are_refused():
    with pytest.raises(ValueError, match="4 channels is not supported; have 1 .* and 3"):
        tiny.unet(in_channels=4).encode(tiny.images())


def test_latents_are_the_shifted_and_scaled_mode(dit):
    images = tiny.images(2, 8, 8)
    moments = dit.vae.quant_conv(dit.vae.encoder(images * 2 - 1))
    assert torch.equal(dit.encode(images), (moments[:, :4] - 0.1) * 0.7)


def test_a_sampled_latent_differs_from_the_mode(dit):
    sampled = DiT(dit.model, dit.schedule, dit.vae, latent="sample")
    assert not torch.allclose(sampled.encode(tiny.images(1, 8, 8)), dit.encode(tiny.images(1, 8, 8)))
    assert sampled.options != dit.options


@pytest.mark.parametrize(
    ("cond", "labels"),
    [(None, [3, 3, 3]), (1, [1, 1, 1]), ("owl", [2, 2, 2]), (["dog", 0, "owl"], [1, 0, 2]), ([2, 1, 0], [2, 1, 0])],
)
def test_conditions(grey, dit, cond, labels):
    for backbone in (grey, dit):
        assert backbone.condition(cond, 3).tensors["class_labels"].tolist() == labels


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ("bird", "no class 'bird' in .*; have cat, dog, owl"),
        (3, "no class 3 in .*; have 0 ... 2"),
        (-1, "no class -1"),
        (["cat", "dog"], "2 conditions for 3 images; give one for all or one for each"),
    ],
)
def test_conditions_that_are_refused(grey, dit, cond, message):
    for backbone in (grey, dit):
        with pytest.raises(ValueError, match=message):
            backbone.condition(cond, 3)


def test_a_network_without_null_class_needs_one_named():
    backbone = UNet(tiny.unet_model(num_class_embeds=3), tiny.linear())
    assert backbone.condition(2, 1).tensors["class_labels"].tolist() == [2]
    with pytest.raises(ValueError, match="needs a class and has no null class; give cond=, an index below 3"):
        backbone.condition(None, 1)
    with pytest.raises(ValueError, match="no class 'cat' in unet; have no names, only indices 0 ... 2"):
        backbone.condition("cat", 1)
    assert backbone.blocks["mid"] == Block(16, 2)


def test_an_unconditional_network_refuses_a_condition():
    with pytest.raises(ValueError, match="unet is unconditional; leave cond out instead of giving 3"):
        tiny.unet().condition(3, 1)


def test_many_names_are_not_all_listed():
    names = [f"class number {index}" for index in range(1000)]
    backbone = DiT(tiny.dit_model(num_embeds_ada_norm=1000), tiny.linear(), class_names=names)
    with pytest.raises(ValueError, match="no class 'class numbr 77' in dit; have 1000 names, near it: .*77") as refused:
        backbone.condition("class numbr 77", 1)
    assert len(str(refused.value)) < 250


def test_conditions_are_indexed_by_rows(grey):
    assert grey.condition([0, 1, 2], 3)[1:].tensors["class_labels"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("unet", (17, 30), "unet takes sides that are multiples of 2, not 17x30; nearest: 16x30"),
        ("unet", (1, 8), "nearest: 2x8"),
        ("dit", (16, 8), "dit takes 8x8 images only, not 16x8; resize them"),
        ("sd3", (6, 8), "takes sides that are multiples of 4, not 6x8; nearest: 8x8"),
    ],
)
def test_sizes_that_do_not_fit_name_the_nearest(family, size, message):
    with pytest.raises(ValueError, match=message):
        families.build(family).check_size(*size)


@pytest.mark.parametrize("names", [["nope"], ["mid", "up.*"], ["mid,up.0"]])
def test_blocks_that_are_not_one_name_are_value_errors(names):
    with pytest.raises(ValueError, match="no block 'nope' in unet; have down.0|is not one block"):
        tiny.unet().describe(names)


def test_module_paths_are_blocks_too():
    backbone = tiny.unet()
    assert backbone.describe(["/up_blocks.0.resnets.0.conv2"]) == {"/up_blocks.0.resnets.0.conv2": Block(16, 2)}
    with pytest.raises(ValueError, match="no module 'up_blocks.5'"):
        backbone.describe(["/up_blocks.5"])
    with pytest.raises(ValueError, match=r"an activation of shape \(1, 32\) is neither a map"):
        backbone.describe(["/time_embedding"])


@pytest.mark.parametrize("family", ["unet", "skip", "resnet", "sd", "sdxl"])
def test_skips_are_what_the_down_path_hands_over(family):
    backbone = families.build(family)
    x0, condition = inputs(backbone, 1, backbone.size, backbone.size)
    residuals = [backbone.activations(x0, 5, condition, ["/conv_in"])["/conv_in"]]
    for index in range(len(backbone.model.down_blocks)):
        point = Point(f"down_blocks.{index}")
        raw = capture(backbone.model, [point], lambda m: backbone.predict(m, x0, torch.tensor([5]), condition))
        residuals += raw[point][1]
    names = [f"skip.{index}" for index in range(len(residuals))]
    maps = backbone.activations(x0, 5, condition, names)
    assert f"skip.{len(residuals)}" not in backbone.points
    assert all(torch.equal(maps[name], residual) for name, residual in zip(names, residuals, strict=True))


def test_an_edm_network_gets_scaled_input_and_log_sigma():
    backbone, x_t, sigma = tiny.edm_unet(), torch.randn(1, 3, 16, 16), 0.7
    c_noise = torch.tensor([np.log(sigma) / 4], dtype=torch.float32)
    told = backbone.model(x_t / (sigma**2 + 0.25) ** 0.5, c_noise, return_dict=False)[0]
    torch.testing.assert_close(backbone.denoise(x_t, sigma, backbone.condition(None, 1)), told)


def test_a_config_without_size_is_refused():
    with pytest.raises(ValueError, match="config of unet has no sample_size"):
        tiny.unet(sample_size=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["unet", "grey", "dit"])
def test_half_precision_stays_near(family, dtype):
    backbone = families.build(family)
    x0, condition = inputs(backbone, 2, backbone.size, backbone.size)
    name = "mid" if "mid" in backbone.points else "block.1"
    exact, prediction = backbone.activations(x0, 10, condition, [name])[name], backbone.denoise(x0, 10, condition)
    for network in backbone.networks.values():
        network.to(dtype)
    x0 = backbone.encode(tiny.images(2, backbone.size, backbone.size))
    rough = backbone.activations(x0, 10, condition, [name])[name].float()
    assert x0.dtype == torch.float32 and rough.isfinite().all()
    assert (rough - exact).norm() < 0.05 * exact.norm()
    assert backbone.denoise(x0, 10, condition).dtype == prediction.dtype == torch.float32


def test_the_hash_of_weights_by_hand():
    model = nn.Linear(2, 1)
    digest = hashlib.sha256(b"net:{}:")
    for name, shape in (("bias", "(1,)"), ("weight", "(1, 2)")):
        digest.update(f"{name}:torch.float32:{shape}:".encode())
        digest.update(model.state_dict()[name].numpy().tobytes())
    assert hash_weights({"net": model}) == digest.hexdigest()


def test_weights_and_dtypes_change_the_hash(dit):
    networks = {"denoiser": tiny.dit_model(), "vae": tiny.vae_model()}
    hashes = {hash_weights(networks)}
    assert hashes == {dit.weights_hash}
    tensors = [tensor for network in networks.values() for tensor in network.state_dict().values()]
    for tensor in tensors[::5]:
        tensor.view(-1)[-1:] += 1
        hashes.add(hash_weights(networks))
    assert len(hashes) == 1 + len(tensors[::5])
    assert hash_weights({"denoiser": tiny.dit_model(norm_eps=1e-3), "vae": tiny.vae_model()}) not in hashes
    assert hash_weights({"denoiser": tiny.dit_model().bfloat16(), "vae": tiny.vae_model()}) not in hashes


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [(64, (8, 8), (8, 8)), (16, (8, 8), (4, 4)), (24, (8, 12), (4, 6)), (12, (5, 7), (3, 4)), (1, (8, 8), (1, 1))],
)
def test_tokens_find_their_grid(tokens, size, grid):
    assert grid_of(tokens, *size) == grid


def test_tokens_that_make_no_grid_are_refused():
    with pytest.raises(ValueError, match="17 tokens do not lie on a grid over a 8x8 latent"):
        grid_of(17, 8, 8)
