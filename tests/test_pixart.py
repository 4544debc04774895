import io
import json
import shutil

import pytest
import sentencepiece
import torch
from einops import rearrange
from torch import nn

from repkit import zoo
from repkit.backbones.base import Block
from repkit.extractors import DiffusionExtractor
from repkit.noise import SHARED, batch_noise
from tests import tiny, tiny_pixart
from tests.recording import arguments, record

TEXTS = ["A photo of a cat", "two owls ", ""]
SIZE = (20, 12)  # neither square nor the default


@pytest.fixture(scope="module")
def pipelines():
    return {"alpha": tiny_pixart.alpha(), "sigma": tiny_pixart.sigma()}


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    root = tmp_path_factory.mktemp("pixart")
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module", params=["alpha", "sigma"])
def both(request, pipelines, folders):
    return pipelines[request.param], zoo.load(folders / request.param)


@pytest.fixture(scope="module")
def alpha(pipelines, folders):
    return pipelines["alpha"], zoo.load(folders / "alpha")


def encoded(pipeline, text):
    return pipeline.encode_prompt(text, do_classifier_free_guidance=False)[:2]


def latents(pipeline, images):
    return pipeline.vae.encode(images * 2 - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor


def added(pipeline, count, height, width):
    """Pixels and their ratio, where the network has places for them."""
    if not pipeline.transformer.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    size, ratio = torch.tensor([[float(height), float(width)]]), torch.tensor([[height / width]])
    return {"resolution": size.repeat(count, 1), "aspect_ratio": ratio.repeat(count, 1)}


def predict(pipeline, x_t, t, texts, size):
    """The transformer called by hand."""
    states, masks = (torch.cat(rows) for rows in zip(*(encoded(pipeline, text) for text in texts), strict=True))
    return pipeline.transformer(
        x_t,
        encoder_hidden_states=states,
        encoder_attention_mask=masks,
        timestep=t,
        added_cond_kwargs=added(pipeline, len(x_t), *size),
        return_dict=False,
    )[0]


def test_a_prompt_says_what_diffusers_makes_of_it(both):
    pipeline, backbone = both
    tokens = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}[type(pipeline).__name__]
    condition = backbone.condition(TEXTS, 3).tensors
    for row, text in enumerate(TEXTS):
        states, mask = encoded(pipeline, text)
        assert states.shape == (1, tokens, 10)
        torch.testing.assert_close(condition["encoder_hidden_states"][row], states[0])
        assert torch.equal(condition["encoder_attention_mask"][row], mask[0])
    assert condition["encoder_attention_mask"][2].sum() == 1  # an empty prompt is its end alone
    null = backbone.condition(None, 1).tensors
    assert all(torch.equal(null[name], tensor[2:]) for name, tensor in condition.items())


def test_a_pipeline_in_memory_has_its_own_text_length(pipelines):
    for name, tokens in (("alpha", 120), ("sigma", 300)):
        assert zoo.load(pipelines[name]).condition("a cat", 1).tensors["encoder_hidden_states"].shape[1] == tokens


def test_features_by_hand(both):
    pipeline, backbone = both
    images, t = tiny.images(3, *SIZE), 261
    x0 = latents(pipeline, images)
    eps = batch_noise(x0.shape[1:], seed=7, digests=[SHARED] * 3, t=t, draw=0)
    x_t = pipeline.scheduler.add_noise(x0, eps, torch.tensor([t]))
    seen = record(pipeline.transformer, lambda: predict(pipeline, x_t, torch.tensor([t] * 3), TEXTS, SIZE))
    expected = rearrange(seen["transformer_blocks.1", "output"], "b (h w) c -> b c h w", h=5, w=3)
    features = DiffusionExtractor(backbone, "block.1@261", seed=7, noise="shared")(images, TEXTS)
    torch.testing.assert_close(backbone.encode(images), x0)
    torch.testing.assert_close(backbone.schedule.add_noise(x0, eps, t), x_t)
    torch.testing.assert_close(features["block.1@261"], expected)


def test_predictions_by_hand(both):
    pipeline, backbone = both
    x_t, t = torch.randn(2, 4, 10, 6, generator=torch.Generator().manual_seed(0)), 400
    eps = predict(pipeline, x_t, torch.tensor([t, t]), TEXTS[:2], SIZE)[:, :4]
    ours = backbone.denoise(x_t, t, backbone.condition(TEXTS[:2], 2))
    x0 = pipeline.scheduler.step(eps, t, x_t).pred_original_sample
    torch.testing.assert_close(ours, eps)
    torch.testing.assert_close(backbone.schedule.convert(ours, x_t, t, to="x0"), x0)


@pytest.mark.parametrize("build", [tiny_pixart.alpha, tiny_pixart.sigma])
def test_the_pipeline_calls_the_network_as_we_do(build):
    """At 128 the alpha pipeline tells the size, and a config that leaves it open means so."""
    options = {"sample_size": 128} | ({"use_additional_conditions": None} if build is tiny_pixart.alpha else {})
    pipeline = build(**options)
    backbone = zoo.load(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 24, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    args, told, output = arguments(
        pipeline.transformer,
        lambda: pipeline(TEXTS[0], use_resolution_binning=False, clean_caption=False, **call),
    )
    assert (told["added_cond_kwargs"]["resolution"] is not None) == (build is tiny_pixart.alpha)
    ours = backbone.denoise(args[0], told["timestep"], backbone.condition(TEXTS[0], 1))
    assert torch.equal(ours, output[0][:, :4])


def norm(tokens):
    return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def mean_map(q, k, bias=0):
    """softmax(q k^T / sqrt d), the mean over two heads."""
    q, k = (rearrange(tokens, "b n (heads d) -> b heads n d", heads=2) for tokens in (q, k))
    return (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1).mean(1)


def block_by_hand(model, index, hidden, modulation, text, bias):
    """One block's activations from its formula: AdaLN with the block's own table, cross-attention without a norm."""
    block = model.transformer_blocks[index]
    table = block.scale_shift_table[None] + modulation.reshape(len(hidden), 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)
    found = {"in": hidden, "in.adaln": norm(hidden) * (1 + scale[:, None]) + shift[:, None]}
    found |= {f"attn.{part}": getattr(block.attn1, f"to_{part}")(found["in.adaln"]) for part in "qkv"}
    found["attn.map"] = mean_map(found["attn.q"], found["attn.k"])
    found["attn.out"] = block.attn1(found["in.adaln"])
    hidden = hidden + gate[:, None] * found["attn.out"]
    found["cross.q"] = block.attn2.to_q(hidden)
    found["cross.map"] = mean_map(found["cross.q"], block.attn2.to_k(text), bias[:, None])
    found["cross.out"] = block.attn2(hidden, encoder_hidden_states=text, attention_mask=bias)
    hidden = hidden + found["cross.out"]
    found["mlp"] = block.ff(norm(hidden) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])
    found = {f"block.{index}.{name}": value for name, value in found.items()}
    return found | {f"block.{index}": hidden + gate_mlp[:, None] * found[f"block.{index}.mlp"]}


def test_every_tap_is_what_its_name_says(both):
    pipeline, backbone = both
    model, x_t = pipeline.transformer, latents(pipeline, tiny.images(2, *SIZE))
    states, masks = (torch.cat(rows) for rows in zip(*(encoded(pipeline, text) for text in TEXTS[:2]), strict=True))
    bias = ((1 - masks.float()) * -10000)[:, None]
    sizes = added(pipeline, 2, *SIZE)
    modulation = model.adaln_single(torch.tensor([50, 50]), sizes, batch_size=2, hidden_dtype=x_t.dtype)[0]
    hidden, text = model.pos_embed(x_t), model.caption_projection(states)
    expected = {}
    for index in range(2):
        expected |= block_by_hand(model, index, hidden, modulation, text, bias)
        hidden = expected[f"block.{index}"]
    maps = backbone.activations(x_t, 50, backbone.condition(TEXTS[:2], 2), list(backbone.points))
    assert maps.keys() == expected.keys() == backbone.blocks.keys()
    by_hand = {name: rearrange(tokens, "b (h w) c -> b c h w", h=5, w=3) for name, tokens in expected.items()}
    torch.testing.assert_close(maps, by_hand)
    channels = {name: {"attn.map": 16, "cross.map": len(states[0])}.get(name[8:], 12) for name in maps}
    assert backbone.blocks == {name: Block(count, 4) for name, count in channels.items()}


def test_stopping_gives_the_bits_of_the_full_run(alpha):
    _, backbone = alpha
    x_t, condition = backbone.encode(tiny.images(2, *SIZE)), backbone.condition(TEXTS[:2], 2)
    seen = record(backbone.model, lambda: backbone.denoise(x_t, 100, condition))
    modules = {name: point for name, point in backbone.points.items() if point.side != "attention"}
    for name, point in modules.items():
        full = backbone.fold(point, seen[point.path, point.side], x_t)
        assert torch.equal(backbone.activations(x_t, 100, condition, [name])[name], full)


def test_a_batch_equals_its_images_one_by_one(both):
    _, backbone = both
    images, key = tiny.images(3, *SIZE), "block.1@300"
    extract = DiffusionExtractor(backbone, key)
    together = extract(images, TEXTS)[key]
    alone = torch.cat([extract(images[row : row + 1], TEXTS[row])[key] for row in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * together.abs().max().item())
    other = extract(images, TEXTS[0])[key]
    assert torch.equal(other[0], together[0]) and not torch.allclose(other[1], together[1], rtol=1e-3)


def test_sizes_that_do_not_fit_name_the_nearest(alpha):
    with pytest.raises(ValueError, match="alpha takes sides that are multiples of 4, not 18x13; nearest: 16x12"):
        DiffusionExtractor(alpha[1], "block.0@10")(tiny.images(1, 18, 13))


def test_without_its_text_encoder_a_prompt_is_an_error(tmp_path):
    pipeline = tiny_pixart.sigma()
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="PixArtSigmaPipeline came without text_encoder, so no prompt can be encoded"):
        zoo.load(pipeline).condition("a cat", 1)
    pipeline.save_pretrained(tmp_path)
    backbone = zoo.load(tmp_path)
    assert backbone.blocks["block.1"] == Block(12, 4)
    with pytest.raises(ValueError, match="came without text encoders"):
        backbone.condition("a cat", 1)


def test_half_precision_stays_near(alpha, folders):
    _, exact = alpha
    rough = zoo.load(folders / "alpha", dtype=torch.bfloat16)
    key, images = "block.1@100", tiny.images(2, *SIZE)
    expected = DiffusionExtractor(exact, key, cond="a cat")(images)[key]
    found = DiffusionExtractor(rough, key, cond="a cat")(images)[key]
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_tokenizer_may_be_a_sentencepiece_model_alone(folders, tmp_path):
    """As in the published folders."""
    folder = shutil.copytree(folders / "alpha", tmp_path / "alpha")
    written = io.BytesIO()
    texts = iter(["a photo of a cat", "two small owls in the park", "the red car and the blue car"] * 5)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=written,
        vocab_size=30,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(written.getvalue())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0, "model_max_length": 120}))
    ids = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).encode("a small cat")
    condition = zoo.load(folder).condition("a small cat", 1).tensors
    told = tiny_pixart.alpha().text_encoder(torch.tensor([[*ids, 1]])).last_hidden_state
    assert condition["encoder_attention_mask"].sum() == len(ids) + 1
    torch.testing.assert_close(condition["encoder_hidden_states"][:, : len(ids) + 1], told)
