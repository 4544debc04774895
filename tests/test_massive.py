"""Massive channels: planted and found; discarded as LayerNorm and modulation written out by hand give it."""

from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from torch import nn

from repkit.capture import Point, capture
from repkit.massive import call_points, discarded, massive_channels
from tests import tiny, tiny_flux

CHANNELS = [3, 11]


def maps(channels=16):
    return torch.randn(2, channels, 4, 6, generator=torch.Generator().manual_seed(0))


def test_planted_channels_are_found():
    x = maps()
    assert massive_channels(x) == []
    x[:, 11] *= 50
    x[:, 3] -= 100
    assert massive_channels(x) == [3, 11] and massive_channels(x.half()) == [3, 11]
    assert massive_channels(x, ratio=60) == [3]


def test_the_mean_over_images_and_places_decides_and_not_the_peak():
    x = maps()
    x[0, 5, 0, 0] = 300  # mean 300/48 and the noise's 0.8
    assert massive_channels(x, ratio=10) == []
    assert massive_channels(x, ratio=5) == [5]


def test_a_map_of_zeros_has_none():
    assert massive_channels(torch.zeros(1, 4, 2, 2)) == []


def sd3() -> Any:
    """SD3.5-medium's two kinds of block: with a second attention, of the image alone, and without."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    )
    return tiny.randomise(model)


def pixart() -> Any:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        use_additional_conditions=False,
    )
    return tiny.randomise(model)


def runs() -> dict[str, tuple[Any, Any, str, Point]]:
    """For each kind of block: a network, how to call it, the block's path, and where in it its in.adaln lies."""
    generator = torch.Generator().manual_seed(1)
    x, text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 12), (10,)))
    t = torch.tensor([100, 700])
    flux = {
        "pooled_projections": pooled,
        "encoder_hidden_states": text,
        "guidance": torch.full((2,), 3.5),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.arange(48.0).reshape(16, 3),
    }
    joint = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t}
    labels = torch.tensor([0, 2])
    norm, fluxes = Point("norm1"), tiny_flux.flux_model()
    return {
        "dit": (
            tiny.dit_model(sample_size=8),
            lambda m: m(x, timestep=t, class_labels=labels),
            "transformer_blocks.1",
            norm,
        ),
        "sd3": (sd3(), lambda m: m(x, **joint), "transformer_blocks.1", norm),
        "sd3-dual": (sd3(), lambda m: m(x, **joint), "transformer_blocks.0", norm),
        "flux": (fluxes, lambda m: m(tokens(x), timestep=t / 1000, **flux), "transformer_blocks.1", norm),
        "flux-single": (
            fluxes,
            lambda m: m(tokens(x), timestep=t / 1000, **flux),
            "single_transformer_blocks.1",
            Point("norm"),
        ),
        "pixart": (
            pixart(),
            lambda m: m(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs={}),
            "transformer_blocks.1",
            Point("attn1", "input"),
        ),
    }


def tokens(x):
    return x.reshape(2, 16, 16)


@pytest.fixture(scope="module", params=["dit", "sd3", "sd3-dual", "flux", "flux-single", "pixart"])
def case(request):
    return request.param, *runs()[request.param]


def modulated_by_hand(name: str, block: Any, hidden: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
    """LayerNorm without weights, then (1 + scale) h + shift, with the block's own scale and shift."""
    if name == "pixart":
        shift, scale = (block.scale_shift_table[None] + kwargs["timestep"].reshape(2, 6, -1))[:, :2].chunk(2, dim=1)
    else:
        norm = block.norm if name == "flux-single" else block.norm1
        if name == "dit":
            told = norm.emb(kwargs["timestep"], kwargs["class_labels"], hidden_dtype=hidden.dtype)
        else:
            told = kwargs["temb"]
        shift, scale = norm.linear(nn.functional.silu(told))[:, None].split(hidden.shape[-1], dim=-1)[:2]
    mean, spread = hidden.mean(-1, keepdim=True), hidden.var(-1, keepdim=True, unbiased=False)
    return (hidden - mean) / (spread + 1e-6).sqrt() * (1 + scale) + shift


def taken(model, run, path, tap):
    """The block's call, and what its tap gives in the whole run, by plain hooks."""
    found: dict[str, Any] = {}
    block = model.get_submodule(path)
    inner = block.get_submodule(tap.path)

    def enter(module, args, kwargs):
        found["call"] = (module, args, kwargs)

    def at_tap(module, args, kwargs, output):
        found["tap"] = (args or (kwargs["hidden_states"],))[0] if tap.side == "input" else output

    handles = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        inner.register_forward_hook(at_tap, with_kwargs=True),
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return found["call"], found["tap"]


def first(raw):
    return raw[0] if isinstance(raw, tuple) else raw


def test_discarding_nothing_gives_the_tap_itself(case):
    _, model, run, path, tap = case
    call, whole = taken(model, run, path, tap)
    assert torch.equal(first(discarded(call, [], tap)), first(whole))


def test_discarded_channels_are_zero_before_norm_and_modulation(case):
    name, model, run, path, tap = case
    call, whole = taken(model, run, path, tap)
    block, args, kwargs = call
    hidden = (args[0] if args else kwargs["hidden_states"]).clone()
    hidden[..., CHANNELS] = 0
    found = first(discarded(call, CHANNELS, tap))[:, -16:]  # the image's tokens
    torch.testing.assert_close(found, modulated_by_hand(name, block, hidden, args, kwargs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, first(whole)[:, -16:], rtol=1e-2)


def test_the_call_is_left_as_it_was(case):
    _, model, run, path, tap = case
    call, whole = taken(model, run, path, tap)
    discarded(call, CHANNELS, tap)
    assert not model._forward_hooks and torch.equal(first(taken(model, run, path, tap)[1]), first(whole))
    assert torch.equal(first(discarded(call, [], tap)), first(whole))


def test_an_overflow_in_a_discarded_channel_is_gone():
    model, run, path, tap = runs()["dit"]
    (block, args, kwargs), _ = taken(model, run, path, tap)
    hidden = args[0].clone()
    hidden[..., 3] = torch.inf
    assert not first(discarded((block, (hidden, *args[1:]), kwargs), [], tap)).isfinite().any()
    assert first(discarded((block, (hidden, *args[1:]), kwargs), [3], tap)).isfinite().all()


@pytest.mark.parametrize("channel", [-1, 16])
def test_channels_that_are_not_there_are_refused(channel):
    call, _ = taken(*runs()["dit"])
    with pytest.raises(ValueError, match=f"no channel {channel} to discard; have 0 ... 15"):
        discarded(call, [3, channel], Point("norm1"))


def test_points_of_a_backbone_lead_to_the_call_and_the_tap():
    flux = tiny_flux.flux()
    outer, inner = call_points(flux.points, "single.1.in.adaln")
    assert (outer, inner) == (Point("single_transformer_blocks.1", "call"), Point("norm"))
    x_t, condition = torch.randn(1, 4, 8, 12), flux.blank_condition(1)
    points = [outer, flux.points["single.1.in.adaln"]]
    t = torch.full((1,), 260.0)
    raw = capture(flux.model, points, lambda model: flux.predict(model, x_t, t, condition))
    assert torch.equal(discarded(raw[outer], [], inner)[0], raw[points[1]][0])
    folded = flux.fold(points[1], discarded(raw[outer], CHANNELS, inner), x_t)
    assert folded.shape == (1, 16, 4, 6) and not torch.allclose(folded, flux.fold(points[1], raw[points[1]], x_t))


@pytest.mark.parametrize("block", ["single.1", "single.1.in", "single.9.in.adaln"])
def test_only_adaln_taps_can_discard(block):
    with pytest.raises(ValueError, match=f"not at '{block}'; have block.0.in.adaln, .*single.1.in.adaln"):
        call_points(tiny_flux.flux().points, block)


def test_models_without_adaln_taps_say_so():
    with pytest.raises(ValueError, match="have none in this model"):
        call_points(tiny.unet().points, "mid")
