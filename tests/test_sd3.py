import pytest
import torch
from einops import rearrange
from torch import nn

from repkit import zoo
from repkit.backbones.base import Block
from repkit.extractors import DiffusionExtractor
from repkit.noise import SHARED, batch_noise
from tests import tiny, tiny_sd3
from tests.recording import arguments, record

TEXTS = ["a photo of a cat", "Two owls", ""]
SIZE = (20, 12)  # neither square nor the default
BUILDS = {"sd3": {}, "sd35-medium": tiny_sd3.MEDIUM, "without-t5": {"with_t5": False}}


@pytest.fixture(scope="module")
def pipelines():
    return {name: tiny_sd3.pipeline(**options) for name, options in BUILDS.items()}


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def sd3(pipelines, folders):
    return pipelines["sd3"], zoo.load(folders / "sd3")


@pytest.fixture(scope="module", params=["sd3", "sd35-medium"])
def both(request, pipelines, folders):
    return pipelines[request.param], zoo.load(folders / request.param)


def encoded(pipeline, text):
    """Tokens and pooled vector."""
    tokens, pooled = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)[::2]
    # In place of a missing T5, older diffusers put 77 zeros, not as many as there are tokens of T5.
    return nn.functional.pad(tokens, (0, 0, 0, 77 + 256 - tokens.shape[1])), pooled


def latents(pipeline, images):
    config = pipeline.vae.config
    return (pipeline.vae.encode(images * 2 - 1).latent_dist.mode() - config.shift_factor) * config.scaling_factor


def told(pipeline, texts):
    tokens, pooled = (torch.cat(rows) for rows in zip(*(encoded(pipeline, text) for text in texts), strict=True))
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


@pytest.mark.parametrize("name", ["sd3", "without-t5"])
def test_a_prompt_says_what_diffusers_makes_of_it(pipelines, folders, name):
    backbone = zoo.load(folders / name)
    condition = backbone.condition(TEXTS, 3).tensors
    for row, text in enumerate(TEXTS):
        tokens, pooled = encoded(pipelines[name], text)
        assert tokens.shape == (1, 77 + 256, 24) and bool(tokens[:, 77:].any()) == (name == "sd3")
        torch.testing.assert_close(condition["encoder_hidden_states"][row], tokens[0])
        torch.testing.assert_close(condition["pooled_projections"][row], pooled[0])
    null = backbone.condition(None, 1).tensors
    assert all(torch.equal(null[key], tensor[2:]) for key, tensor in condition.items())


def test_features_by_hand(sd3):
    pipeline, backbone = sd3
    images, t = tiny.images(3, *SIZE), 260
    x0 = latents(pipeline, images)
    eps = batch_noise(x0.shape[1:], seed=7, digests=[SHARED] * 3, t=t, draw=0)
    x_t = 0.74 * x0 + 0.26 * eps
    times = torch.tensor([260.0] * 3)
    seen = record(pipeline.transformer, lambda: pipeline.transformer(x_t, timestep=times, **told(pipeline, TEXTS)))
    expected = rearrange(seen["transformer_blocks.1", "output"][1], "b (h w) c -> b c h w", h=5, w=3)
    assert x0.shape == (3, 16, 10, 6)
    torch.testing.assert_close(backbone.encode(images), x0)
    for tap in ("block.1@260", "block.1@sigma=0.26"):
        features = DiffusionExtractor(backbone, tap, seed=7, noise="shared")(images, TEXTS)
        torch.testing.assert_close(next(iter(features.values())), expected)


def test_noise_is_what_the_scheduler_adds(sd3):
    """At times of its own, which the pipeline's shift has moved."""
    pipeline, backbone = sd3
    x0, eps = torch.randn(2, 1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in pipeline.scheduler.timesteps[[0, 300, 999]]:
        x_t = pipeline.scheduler.scale_noise(x0, t[None], eps)
        torch.testing.assert_close(backbone.schedule.add_noise(x0, eps, t), x_t)


def test_predictions_by_hand(both):
    pipeline, backbone = both
    x_t, t = torch.randn(2, 16, 10, 6, generator=torch.Generator().manual_seed(0)), 400.0
    flow = pipeline.transformer(x_t, timestep=torch.tensor([t, t]), **told(pipeline, TEXTS[:2])).sample
    ours = backbone.denoise(x_t, t, backbone.condition(TEXTS[:2], 2))
    torch.testing.assert_close(ours, flow)
    torch.testing.assert_close(backbone.schedule.convert(ours, x_t, t, to="x0"), x_t - 0.4 * flow)
    torch.testing.assert_close(backbone.schedule.convert(ours, x_t, t, to="eps"), x_t + 0.6 * flow)


@pytest.mark.parametrize("name", ["sd3", "sd35-medium"])
def test_the_pipeline_calls_the_network_as_we_do(pipelines, name):
    pipeline = pipelines[name]
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 20, "width": 12, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    _, given, output = arguments(pipeline.transformer, lambda: pipeline(TEXTS[0], **call))
    backbone = zoo.load(pipeline)
    ours = backbone.denoise(given["hidden_states"], given["timestep"], backbone.condition(TEXTS[0], 1))
    assert torch.equal(ours, output[0])


def norm(tokens):
    return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def heads(tokens, normed):
    """Two of them, normed as 3.5 does."""
    split = rearrange(tokens, "b n (heads d) -> b heads n d", heads=2)
    return split if normed is None else split * (split.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * normed.weight


def mean_map(attention, tokens, text=None):
    """How image queries look at image keys and, after them, at text keys: softmax(q k^T / sqrt d) over both."""
    keys = [heads(attention.to_k(tokens), attention.norm_k)]
    if text is not None:
        keys.append(heads(attention.add_k_proj(text), attention.norm_added_k))
    q = heads(attention.to_q(tokens), attention.norm_q)
    return (q @ torch.cat(keys, dim=2).mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)


def block_by_hand(block, hidden, text, temb):
    """The image's activations in one joint block, from the formula of its modulation."""
    modulation = block.norm1.linear(nn.functional.silu(temb))[:, None]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = modulation.chunk(9 if block.attn2 else 6, dim=-1)
    modulated = norm(hidden) * (1 + scale) + shift
    about = block.norm1_context(text, temb) if block.context_pre_only else block.norm1_context(text, emb=temb)[0]
    found = {"in": hidden, "in.adaln": modulated}
    found |= {f"attn.{part}": getattr(block.attn, f"to_{part}")(modulated) for part in "qkv"}
    weights = mean_map(block.attn, modulated, about)
    found |= {"attn.map": weights[..., : hidden.shape[1]], "attn.text.map": weights[..., hidden.shape[1] :]}
    found["attn.out"] = block.attn(modulated, about)[0]
    hidden = hidden + gate * found["attn.out"]
    if second:
        modulated = norm(found["in"]) * (1 + second[1]) + second[0]
        found |= {f"attn2.{part}": getattr(block.attn2, f"to_{part}")(modulated) for part in "qkv"}
        found["attn2.map"] = mean_map(block.attn2, modulated)
        found["attn2.out"] = block.attn2(modulated)
        hidden = hidden + second[2] * found["attn2.out"]
    found["mlp"] = block.ff(norm(hidden) * (1 + scale_mlp) + shift_mlp)
    return found | {"": hidden + gate_mlp * found["mlp"]}


def test_every_tap_is_what_its_name_says(both):
    pipeline, backbone = both
    model, x_t = pipeline.transformer, latents(pipeline, tiny.images(2, *SIZE))
    condition = told(pipeline, TEXTS[:2])
    hidden, text = model.pos_embed(x_t), model.context_embedder(condition["encoder_hidden_states"])
    temb = model.time_text_embed(torch.tensor([50.0, 50.0]), condition["pooled_projections"])
    expected = {}
    for index, block in enumerate(model.transformer_blocks):
        found = block_by_hand(block, hidden, text, temb)
        expected |= {f"block.{index}.{name}".removesuffix("."): tokens for name, tokens in found.items()}
        text, hidden = block(hidden, text, temb)[0], found[""]
    maps = backbone.activations(x_t, 50, backbone.condition(TEXTS[:2], 2), list(backbone.points))
    assert maps.keys() == expected.keys() == backbone.blocks.keys()
    by_hand = {name: rearrange(tokens, "b (h w) c -> b c h w", h=5, w=3) for name, tokens in expected.items()}
    torch.testing.assert_close(maps, by_hand)
    channels = {"attn.map": 16, "attn2.map": 16, "attn.text.map": 77 + 256}
    assert backbone.blocks == {name: Block(channels.get(name[8:], 8), 4) for name in maps}


def test_stopping_gives_the_bits_of_the_full_run(both):
    _, backbone = both
    x_t, condition = backbone.encode(tiny.images(2, *SIZE)), backbone.condition(TEXTS[:2], 2)
    seen = record(backbone.model, lambda: backbone.denoise(x_t, 100, condition))
    modules = {name: point for name, point in backbone.points.items() if point.side != "attention"}
    for name, point in modules.items():
        full = backbone.fold(point, seen[point.path, point.side], x_t)
        assert torch.equal(backbone.activations(x_t, 100, condition, [name])[name], full)
    for index in range(3):
        attended = seen[f"transformer_blocks.{index}.attn", "input"]
        taken = backbone.activations(x_t, 100, condition, [f"block.{index}.in.adaln"])
        assert torch.equal(next(iter(taken.values())).flatten(2).mT, attended)


def test_a_batch_equals_its_images_one_by_one(both):
    _, backbone = both
    images, key = tiny.images(3, *SIZE), "block.2@300"
    extract = DiffusionExtractor(backbone, key)
    together = extract(images, TEXTS)[key]
    alone = torch.cat([extract(images[row : row + 1], TEXTS[row])[key] for row in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * together.abs().max().item())
    other = extract(images, TEXTS[0])[key]
    assert torch.equal(other[0], together[0]) and not torch.allclose(other[1], together[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((18, 13), "sd3 takes sides that are multiples of 4, not 18x13; nearest: 16x12"),
        ((16, 44), "sd3 takes sides that are multiples of 4 up to 40, not 16x44; resize them"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(sd3, size, message):
    with pytest.raises(ValueError, match=message):
        DiffusionExtractor(sd3[1], "block.0@10")(tiny.images(1, *size))


def test_the_largest_size_is_taken(sd3):
    features = DiffusionExtractor(sd3[1], "block.0@10")(tiny.images(1, 40, 8))
    assert features["block.0@10"].shape == (1, 8, 10, 2)


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer_2", "tokenizer_3"])
def test_a_missing_part_is_named(missing):
    pipeline = tiny_sd3.pipeline()
    setattr(pipeline, missing, None)
    with pytest.raises(ValueError, match=f"came without {missing}, so no prompt can be encoded"):
        zoo.load(pipeline).condition("a cat", 1)


def test_without_t5_is_another_model(pipelines):
    hashes = {zoo.load(pipelines[name]).prompts.hash for name in ("sd3", "without-t5")}
    assert len(hashes) == 2


def test_half_precision_stays_near(sd3, folders):
    _, exact = sd3
    rough = zoo.load(folders / "sd3", dtype=torch.bfloat16)
    key, images = "block.1@100", tiny.images(2, *SIZE)
    expected = DiffusionExtractor(exact, key, cond="a cat")(images)[key]
    found = DiffusionExtractor(rough, key, cond="a cat")(images)[key]
    assert (found - expected).norm() < 0.05 * expected.norm()
