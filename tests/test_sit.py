"""SiT, REPA and DiT checkpoints against numbers of the original code and against closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from repkit.backbones.base import Block
from repkit.backbones.conditions import Condition
from repkit.backbones.sit import SiT, from_weights
from repkit.backbones.sit_transformer import SiTTransformer, sine_cosine_grid
from repkit.capture import Point
from repkit.extractors import DiffusionExtractor
from tests import tiny, tiny_sit

# The contract of every family, run here on the `backbone` below.
from tests.test_backbones import (  # noqa: F401
    test_declared_channels_and_strides_are_the_real_ones,
    test_denoise_predicts_the_latent_without_learned_variance,
    test_each_row_has_its_own_condition_and_time,
    test_flops_grow_as_blocks_are_reached,
    test_networks_are_frozen_and_in_eval_mode,
    test_stopping_at_any_block_gives_the_bits_of_the_full_run,
)

# Made by running models.py of willisma/SiT, models/sit.py of sihyun-yu/REPA (with timm's former default of a layer norm
# for qk_norm) and models_SVG.py of shiml20/SVG on the weights and inputs of tiny_sit.numbers, at TOLD and LABELS: the
# last block's tokens, the velocity, and eps by the repositories' own samplers (SiT's get_noise_from_velocity, REPA's
# -sigma * get_score_from_velocity). SVG: every 16th token, and every 3rd row and 5th column of the velocity.
REFERENCE = np.load(Path(__file__).parent / "data" / "sit_reference.npz")
TOLD, LABELS = torch.tensor([0.3, 0.85]), [1, None]  # the last label is the null class


@pytest.fixture(scope="module", params=["sit", "repa", "dit", "svg"])
def backbone(request):
    return getattr(tiny_sit, request.param)()


@pytest.fixture(scope="module")
def repa():
    return tiny_sit.repa()


def told_labels(backbone, *conds):
    """One condition a row, None among them."""
    return Condition({"labels": torch.cat([backbone.condition(cond, 1).tensors["labels"] for cond in conds])})


def like(case):
    """Our backbone, at native times, for a case of the reference."""
    if case == "svg":
        return tiny_sit.svg(), 1000 * (1 - TOLD), tiny_sit.numbers("x_t of SVG", 2, 4, 16, 16) * 4
    repa = case.startswith("repa")
    make = tiny_sit.repa_weights if repa else tiny_sit.sit_weights
    weights = make(out=8 if case == "sit-sigma" else 4, qk_norm=4 if case == "repa-qk" else 0)
    backbone = from_weights(weights, name="SiT-S-2", config=tiny_sit.CONFIG, vae=tiny.vae_model())
    return backbone, 1000 * (TOLD if repa else 1 - TOLD), tiny_sit.numbers("x_t", 2, 4, 6, 6) * 4


@pytest.mark.parametrize("case", ["sit", "sit-sigma", "repa", "repa-qk", "svg"])
def test_the_original_code_gives_the_same_numbers(case):
    backbone, t, x_t = like(case)
    condition = told_labels(backbone, *LABELS)
    flow = backbone.denoise(x_t, t, condition)
    tokens = backbone.activations(x_t, t, condition, ["block.1"])["block.1"].flatten(2).mT
    velocity = flow if case.startswith("repa") else -flow  # ours is noise - data
    if case == "svg":
        tokens, velocity = tokens[:, ::16], velocity[:, :, ::3, ::5]
    else:
        close(backbone.schedule.convert(flow, x_t, t, to="eps"), REFERENCE[f"{case}.eps"])
    close(tokens, REFERENCE[f"{case}.block"])
    close(velocity, REFERENCE[f"{case}.velocity"])


def close(ours, reference):
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_positions_are_those_of_the_original_code():
    np.testing.assert_allclose(sine_cosine_grid(3, 8)[0], REFERENCE["grid"], atol=1e-6)


class Linear(nn.Module):
    """velocity = slope * x_t + told, of which everything is known."""

    config = {"sample_size": 4, "patch_size": 2, "in_channels": 3, "labels": 4}

    def __init__(self, slope=1.0, flipped=False):
        super().__init__()
        self.slope, self.flipped = nn.Parameter(torch.tensor(slope)), flipped

    def forward(self, x_t, t, labels):
        told = 1 - t if self.flipped else t
        velocity = self.slope * x_t + told[:, None, None, None]
        return -velocity if self.flipped else velocity


@pytest.mark.parametrize("t", [0.0, 120.0, 500.0, 1000.0])
def test_x0_and_eps_follow_from_the_velocity(t):
    x_t, u = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), t / 1000
    repa, sit = SiT(Linear(), "repa"), SiT(Linear(), "sit")
    flow = repa.denoise(x_t, t, repa.condition(None, 2))
    # x_t = (1-u) x0 + u eps and velocity = eps - x0
    torch.testing.assert_close(repa.schedule.convert(flow, x_t, t, to="x0"), x_t - u * (x_t + u))
    torch.testing.assert_close(repa.schedule.convert(flow, x_t, t, to="eps"), x_t + (1 - u) * (x_t + u))
    flow = sit.denoise(x_t, t, sit.condition(None, 2))
    s = 1 - u  # x_t = s x0 + (1-s) eps and velocity = x0 - eps
    torch.testing.assert_close(sit.schedule.convert(flow, x_t, t, to="x0"), x_t + (1 - s) * (x_t + s))
    torch.testing.assert_close(sit.schedule.convert(flow, x_t, t, to="eps"), x_t - s * (x_t + s))


def test_one_function_in_both_directions_of_time_gives_one_x0():
    x_t, t = torch.randn(2, 3, 4, 4), torch.tensor([130.0, 700.0])
    repa, sit = SiT(Linear(0.7), "repa"), SiT(Linear(0.7, flipped=True), "sit")
    found = [one.schedule.convert(one.denoise(x_t, t, one.condition(0, 2)), x_t, t, to="x0") for one in (repa, sit)]
    torch.testing.assert_close(*found)
    assert repa.options != sit.options


def test_dit_is_told_steps_and_predicts_the_noise():
    backbone, x_t, t = tiny_sit.dit(), torch.randn(2, 4, 6, 6), torch.tensor([20, 700])
    told = backbone.model(x_t, t.float(), torch.tensor([2, 3]))
    assert torch.equal(backbone.denoise(x_t, t, told_labels(backbone, 2, None)), told[:, :4])
    assert backbone.schedule.identity == tiny.linear().identity


def test_latents_are_the_scaled_mode(repa):
    images = tiny.images(2, 12, 12)
    moments = repa.vae.quant_conv(repa.vae.encoder(images * 2 - 1))
    assert torch.equal(repa.encode(images), (moments[:, :4] - 0.1) * 0.7)
    assert repa.networks.keys() == {"denoiser", "vae"} and repa.options["latent"] == "mode"


def test_blocks_of_a_network(repa):
    assert repa.size == 12 and repa.multiple == 4 and repa.square
    inner = ["in", "in.adaln", "attn.q", "attn.k", "attn.v", "attn.out", "mlp"]
    assert all(repa.blocks[f"block.1.{name}"] == Block(12, 4) for name in inner)
    assert repa.blocks["block.1"] == Block(12, 4) and repa.blocks["block.1.attn.map"] == Block(9, 4)
    with pytest.raises(ValueError, match="last.pt takes 12x12 images only, not 12x16; resize them"):
        repa.check_size(12, 16)


def test_inner_taps_by_hand(repa):
    """All of block 1 from its input and the condition."""
    x_t, labels, t = torch.randn(2, 4, 6, 6), torch.tensor([0, 3]), torch.tensor([100.0, 900.0])
    names = [name for name in repa.points if name.startswith("block.1")]
    maps = repa.activations(x_t, t, told_labels(repa, 0, None), names)
    found = {name.removeprefix("block.1").removeprefix("."): m.flatten(2).mT for name, m in maps.items()}
    model, block = repa.model, repa.model.blocks[1]
    angles = t[:, None] / 1000 * 10000 ** (-torch.arange(128) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    hidden = nn.functional.silu(model.t_embedder.mlp[0](waves))
    condition = model.t_embedder.mlp[2](hidden) + model.y_embedder.embedding_table.weight[labels]
    modulation = block.adaLN_modulation[1](nn.functional.silu(condition))[:, None].split(12, -1)

    def modulated(tokens, shift, scale):
        centred = tokens - tokens.mean(-1, keepdim=True)
        return centred / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    adaln = modulated(found["in"], *modulation[:2])
    q, k, v = block.attn.qkv(adaln).split(12, -1)
    heads = [(q[..., at] @ k[..., at].mT / 2).softmax(-1) for at in (slice(0, 4), slice(4, 8), slice(8, 12))]
    out = block.attn.proj(torch.cat([weights @ v[..., 4 * i : 4 * i + 4] for i, weights in enumerate(heads)], -1))
    after = found["in"] + modulation[2] * out
    mlp = block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(modulated(after, *modulation[3:5])), approximate="tanh"))
    by_hand = {"in": found["in"], "in.adaln": adaln, "attn.q": q, "attn.k": k, "attn.v": v, "attn.map": sum(heads) / 3}
    by_hand |= {"attn.out": out, "mlp": mlp, "": after + modulation[5] * mlp}
    assert by_hand.keys() == found.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=name)


def test_conditions_and_the_null_class(repa):
    assert repa.condition([0, "owl"], 2).tensors["labels"].tolist() == [0, 2]
    assert repa.condition(None, 2).tensors["labels"].tolist() == [3, 3]
    four = from_weights(
        tiny_sit.sit_weights(3, 3), name="sit", config={"heads": 3, "classes": 4, "class_names": ["a", "b", "c", "d"]}
    )
    assert four.condition("d", 1).tensors["labels"].tolist() == [3]
    with pytest.raises(ValueError, match="sit needs a class and has no null class"):
        four.condition(None, 1)
    with pytest.raises(ValueError, match="5 classes in sit, which has 4 labels, the null class included"):
        from_weights(tiny_sit.sit_weights(3, 3), name="sit", config={"heads": 3, "classes": 5})


def test_a_batch_gives_what_each_image_gives():
    extract = DiffusionExtractor(tiny_sit.repa(), ["block.*@260", "block.0.in.adaln@clean"])
    images = tiny.images(3, 12, 12)
    together, alone = extract(images), [extract(images[row : row + 1]) for row in range(3)]
    for key, value in together.items():
        each = torch.cat([one[key] for one in alone])
        torch.testing.assert_close(value, each, rtol=0, atol=1e-5 * value.abs().max().item())


@pytest.mark.parametrize(
    ("name", "extra", "time"),
    [
        ("SiT-XL-2-256x256.pt", (), "sit"),
        ("DiT-XL-2-512x512", (), "dit"),
        ("my_sit_repa.pt", (), "repa"),
        ("SiT-XL-2-256x256.pt", ("projectors.0.0.weight",), "repa"),
        ("model", ("projectors.0.0.weight",), "repa"),
    ],
)
def test_weights_and_file_names_say_how_time_runs(name, extra, time):
    weights = tiny_sit.sit_weights(3, 3) | {key: torch.zeros(1) for key in extra}
    assert from_weights(weights, name=name, config={"heads": 3}).time == time
    assert from_weights(weights, name=name, config={"heads": 3, "time": "dit"}).time == "dit"


def test_the_first_checkpoints_of_repa_count_later_blocks_anew(repa):
    old = {key.replace("blocks.1.", "decoder_blocks.0."): value for key, value in tiny_sit.repa_weights().items()}
    again = from_weights(old, name="last.pt", config=tiny_sit.CONFIG, vae=tiny.vae_model())
    assert again.weights_hash == repa.weights_hash


def test_shapes_say_what_the_network_is():
    found = from_weights(tiny_sit.repa_weights(qk_norm=6), name="repa", vae=tiny.vae_model()).model.config
    size = {"sample_size": 6, "patch_size": 2, "in_channels": 4, "out_channels": 4}
    assert found == size | {"width": 12, "depth": 2, "heads": 2, "mlp_width": 48, "labels": 4, "qk_norm": True}


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_published_widths_say_their_heads(width, heads):
    with torch.device("meta"):
        model = SiTTransformer(4, 2, 3, 3, width, 1, 1, 4 * width, 11)
        weights = {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
    assert from_weights(weights, name="sit").model.config["heads"] == heads


def test_the_largest_network_has_as_many_weights_as_the_paper_says():
    with torch.device("meta"):
        model = SiTTransformer(32, 2, 4, 8, 1152, 28, 16, 4608, 1001)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 675


def without(*names):
    return {key: value for key, value in tiny_sit.sit_weights(3, 3).items() if not key.endswith(names)}


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        (without("blocks.1.mlp.fc2.bias"), {}, OSError, "lacks 1 weights of a SiT, blocks.1.mlp.fc2.bias first"),
        (without("pos_embed"), {}, OSError, "lacks pos_embed, which a SiT has; get it again"),
        (without() | {"blocks.0.attn.rope": torch.ones(1)}, {}, ValueError, "1 weights that no SiT has, blocks.0.attn"),
        (without() | {"blocks.1.attn.proj.bias": torch.ones(5)}, {}, ValueError, r"shape \[5\], not \[12\]"),
        (without(), {"heads": None}, ValueError, "12 wide, which no published SiT is; give --config heads="),
        (without(), {"time": "reflow"}, ValueError, "time=reflow given for a-sit; time takes one of repa, sit, dit"),
        (without(), {"heads": "three"}, ValueError, "heads=three .*heads takes a whole number of at least 1"),
        (without(), {"heads": 3.0}, ValueError, "heads=3.0 .*heads takes a whole number of at least 1"),
        (without(), {"class_names": "cat"}, ValueError, "class_names=cat .*class_names takes a list of texts"),
        (without(), {"class_names": [1]}, ValueError, r"class_names=\[1\] .*class_names takes a list of texts"),
        (without(), {"key": 5}, ValueError, "key=5 .*key takes a text"),
        (without(), {"std": "x"}, ValueError, "std=x .*std takes a number, or a list of them"),
        (without(), {"head": 3}, ValueError, "no config head for a-sit; have time, heads, classes"),
        (without(), {"mean": 0.0}, ValueError, "config mean is about an extractor's features; give extractor="),
        (tiny_sit.sit_weights(4), {}, ValueError, "a-sit works on latents of 4 channels; give vae="),
    ],
)
def test_checkpoints_that_are_refused(weights, options, error, message):
    with pytest.raises(error, match=message):
        from_weights(weights, name="a-sit", config={"heads": 3} | options)


def test_a_file_that_does_not_say_how_time_runs_is_refused():
    with pytest.raises(ValueError, match="nothing in 0400000.pt says how its time runs; give --config time=sit"):
        from_weights(without(), name="0400000.pt", config={"heads": 3})


def test_which_label_is_the_null_class_is_part_of_the_identity():
    given: list[dict[str, int]] = [{"classes": 2}, {}, {"classes": tiny_sit.LABELS - 1}]
    few, usual, said = (from_weights(without(), name="sit", config={"heads": 3} | one) for one in given)
    assert few.options["classes"] == 2 and usual.options == said.options == {"time": "sit"}
    assert few.condition(None, 1).tensors["labels"] != usual.condition(None, 1).tensors["labels"]


def test_an_autoencoder_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="sit takes latents of 3 channels, not 4; give another vae="):
        from_weights(without(), name="sit", config={"heads": 3}, vae=tiny.vae_model())


def test_a_network_of_the_same_config_has_fresh_weights(repa):
    fresh = SiTTransformer.from_config(repa.model.config)
    assert fresh.config == repa.model.config
    assert not any(torch.equal(fresh.state_dict()[name], value) for name, value in repa.model.state_dict().items())
    torch.testing.assert_close(fresh.pos_embed, sine_cosine_grid(3, 12))
    control = SiT(fresh.eval(), "repa", tiny.vae_model())
    maps = control.activations(torch.randn(1, 4, 6, 6), 500.0, control.condition(None, 1), ["block.0.in", "block.1"])
    assert not torch.allclose(maps["block.0.in"], maps["block.1"])


def test_half_precision_stays_near():
    exact, rough = tiny_sit.repa(), tiny_sit.repa()
    x_t = torch.randn(2, 4, 6, 6)
    rough.model.to(torch.bfloat16)
    flows = [one.denoise(x_t, 400.0, one.condition(0, 2)) for one in (exact, rough)]
    assert flows[1].dtype == torch.float32 and (flows[1] - flows[0]).norm() < 0.05 * flows[0].norm()


def test_points_of_a_block(repa):
    assert repa.points["block.1.in.adaln"] == Point("blocks.1.norm1")
    assert repa.points["block.0.in"] == Point("blocks.0", "input")
