from functools import partial

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import apply_rotary_emb
from einops import rearrange
from torch import nn
from torch.nn.functional import interpolate, scaled_dot_product_attention
from transformers import ByT5Tokenizer

from repkit.attention import Attended, aggregate, attention_map, fold_map, joint_map, word_groups, word_maps
from repkit.capture import Point, capture
from repkit.extractors import DiffusionExtractor
from repkit.zoo import load
from tests import tiny, tiny_pixart, tiny_sd3
from tests.tiny_flux import flux_model
from tests.tiny_sd import sd_pipeline, sd_unet
from tests.tiny_t5 import t5_tokenizer
from tests.tiny_texts import clip_tokenizer

T = torch.tensor([100, 500])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0]])
GRID = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0))  # FLUX's, 2x3 tokens
RUNS = {
    "unet": (tiny.unet_model, lambda m: m(normal(2, 3, 16, 12), T)),
    "sd": (sd_unet, lambda m: m(normal(2, 4, 8, 6), T, normal(2, 5, 12))),
    "dit": (tiny.dit_model, lambda m: m(normal(2, 4, 4, 4), T, torch.tensor([0, 2]))),
    "pixart": (
        partial(tiny_pixart.transformer, use_additional_conditions=False),
        lambda m: m(normal(2, 4, 8, 6), normal(2, 5, 10), T, encoder_attention_mask=MASK),
    ),
    "sd3": (
        partial(tiny_sd3.transformer, qk_norm="rms_norm"),
        lambda m: m(normal(2, 16, 8, 6), normal(2, 5, 24), normal(2, 14), T),
    ),
    "flux": (
        partial(flux_model, guidance_embeds=False),
        lambda m: m(normal(2, 6, 16), normal(2, 5, 12), normal(2, 10), T / 1000, GRID, torch.zeros(5, 3)),
    ),
}
LAYERS = [  # model, attention, its queries' grid
    ("unet", "mid_block.attentions.0", (8, 6)),
    ("unet", "up_blocks.0.attentions.1", (8, 6)),
    ("sd", "down_blocks.0.attentions.0.transformer_blocks.0.attn1", (8, 6)),
    ("sd", "mid_block.attentions.0.transformer_blocks.0.attn1", (4, 3)),
    ("sd", "up_blocks.1.attentions.1.transformer_blocks.0.attn2", (8, 6)),
    ("dit", "transformer_blocks.1.attn1", (2, 2)),
    ("pixart", "transformer_blocks.0.attn1", (4, 3)),
    ("pixart", "transformer_blocks.1.attn2", (4, 3)),
]
JOINT = [  # model, attention, grid, whether text comes first
    ("sd3", "transformer_blocks.0.attn", (4, 3), False),
    ("flux", "transformer_blocks.0.attn", (2, 3), True),
    ("flux", "single_transformer_blocks.0.attn", (2, 3), True),
]


def build(name):
    """A model whose attention is far from uniform, which small random weights alone would make it."""
    make, run = RUNS[name]
    model = make()
    for where, parameter in model.named_parameters():
        if any(part in where for part in ("to_q", "to_k", "add_q", "add_k", "norm_q", "norm_k", "norm_added")):
            parameter.mul_(100 if name in ("unet", "sd") else 10)
    return model, run


def outputs(model, names, run):
    """What modules return in an ordinary forward of the model itself, by plain hooks."""
    found = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: found.update({name: out}))
        for name in names
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    return [found[name] for name in names]


def split(tokens, heads):
    return rearrange(tokens, "b n (heads d) -> b heads n d", heads=heads)


def softmax_map(q, k, bias=0.0):
    return ((q @ k.mT) / q.shape[-1] ** 0.5 + bias).softmax(-1).mean(1)


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def raw_map(model, path, run):
    point = Point(path, "attention")
    return capture(model, [point], run)[point]


@pytest.mark.parametrize(("name", "path", "grid"), LAYERS)
def test_a_map_is_the_softmax_of_queries_and_keys(name, path, grid):
    model, run = build(name)
    layer = model.get_submodule(path)
    q, k = (split(out, layer.heads) for out in outputs(model, [f"{path}.to_q", f"{path}.to_k"], run))
    hidden = torch.log(MASK)[:, None, None] if (name, path[-5:]) == ("pixart", "attn2") else 0.0
    found = fold_map(attention_map(raw_map(model, path, run)), *grid)
    expected = rearrange(softmax_map(q, k, hidden), "b (h w) k -> b k h w", h=grid[0])
    assert found.shape == (2, k.shape[2], *grid) and layer.heads > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(2, *grid))
    assert found.std(1).max() > 0.01


def sd3_joint(model, path, run):
    layer = model.get_submodule(path)
    names = [f"{path}.{name}" for name in ("to_q", "to_k", "add_q_proj", "add_k_proj")]
    q, k, text_q, text_k = (split(out, layer.heads) for out in outputs(model, names, run))
    q, text_q = rms(q, layer.norm_q), rms(text_q, layer.norm_added_q)
    k, text_k = rms(k, layer.norm_k), rms(text_k, layer.norm_added_k)
    return softmax_map(torch.cat([q, text_q], 2), torch.cat([k, text_k], 2))[:, :12]


def flux_joint(model, path, run):
    layer, parts = model.get_submodule(path), [("to_q", "to_k", "norm_q", "norm_k")]
    if "single" not in path:  # there the projections are of text and image together
        parts.insert(0, ("add_q_proj", "add_k_proj", "norm_added_q", "norm_added_k"))
    q, k = [], []
    for to_q, to_k, norm_q, norm_k in parts:
        both = outputs(model, [f"{path}.{to_q}", f"{path}.{to_k}"], run)
        q.append(rms(split(both[0], layer.heads), layer.get_submodule(norm_q)))
        k.append(rms(split(both[1], layer.heads), layer.get_submodule(norm_k)))
    places = model.pos_embed(torch.cat([torch.zeros(5, 3), GRID]))
    rotated = (apply_rotary_emb(torch.cat(part, 2), places) for part in (q, k))
    return softmax_map(*rotated)[:, 5:]


@pytest.mark.parametrize(("name", "path", "grid", "text_first"), JOINT)
def test_joint_maps_are_image_queries_on_either_part(name, path, grid, text_first):
    model, run = build(name)
    expected = {"sd3": sd3_joint, "flux": flux_joint}[name](model, path, run)
    raw = raw_map(model, path, run)
    image, text = (joint_map(raw, part, *grid, text_first=text_first) for part in ("image", "text"))
    count = grid[0] * grid[1]
    assert image.shape == (2, count, *grid) and text.shape == (2, 5, *grid)
    together = torch.cat([text, image] if text_first else [image, text], 1)
    torch.testing.assert_close(together.flatten(2).mT, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together.sum(1), torch.ones(2, *grid))
    assert together.std(1).max() > 0.01


@pytest.mark.parametrize(("name", "path"), [layer[:2] for layer in (*LAYERS[::2], *JOINT)])
def test_what_follows_is_bit_equal_and_nothing_stays(name, path):
    model, run = build(name)
    plain = run(model)[0]
    layer = model.get_submodule(path)
    processor, attributes = layer.processor, dict(vars(layer))
    (out,) = outputs(model, [path], run)
    points = [Point(path, "attention"), Point(path), Point(path, "attention", "text")]
    ends = []
    found = capture(model, points, lambda m: ends.append(run(m)), stop=False)
    assert torch.equal(ends[0][0], plain)
    first = (lambda value: value[0]) if isinstance(out, tuple) else (lambda value: value)
    assert torch.equal(first(found[points[1]]), first(out))
    assert layer.processor is processor and dict(vars(layer)) == attributes
    stopped = capture(model, points[:1], run)[points[0]]
    assert torch.equal(stopped.q, found[points[0]].q) and torch.equal(stopped.k, found[points[2]].k)


def test_gradients_equal_those_of_the_explicit_attention():
    model, _ = build("sd")
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    mine, plain = (normal(2, 4, 8, 6).requires_grad_() for _ in range(2))
    text, weights = normal(2, 5, 12), normal(2, 12, 5, seed=1)
    (attention_map(raw_map(model, path, lambda m: m(mine, T, text))) * weights).sum().backward()
    q, k = outputs(model, [f"{path}.to_q", f"{path}.to_k"], lambda m: m(plain, T, text))
    heads = model.get_submodule(path).heads
    (softmax_map(split(q, heads), split(k, heads)) * weights).sum().backward()
    assert plain.grad.abs().max() > 0
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-4 * plain.grad.abs().max().item())


def test_maps_of_a_half_precision_network_are_float32():
    model, path = tiny.dit_model().to(torch.bfloat16), "transformer_blocks.0.attn1"

    def run(model):
        return model(normal(2, 4, 4, 4).bfloat16(), T, torch.tensor([0, 2]))

    q, k = (split(out, 2).float() for out in outputs(model, [f"{path}.to_q", f"{path}.to_k"], run))
    found = attention_map(raw_map(model, path, run))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, softmax_map(q, k), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "per head", "causal", "grouped", "scaled"])
def test_a_map_explains_what_torch_computes(kind):
    q, k, v = normal(2, 4, 6, 8), normal(2, 4, 5, 8, seed=1), torch.eye(5).expand(2, 4, 5, 5)
    told = {
        "none": {},
        "boolean": {"attn_mask": torch.tensor([[True, True, False, True, False]])},
        "additive": {"attn_mask": normal(2, 1, 6, 5)},
        "per head": {"attn_mask": normal(4, 6, 5)},
        "causal": {"is_causal": True},
        "grouped": {"enable_gqa": True},
        "scaled": {"scale": 0.7},
    }[kind]
    if kind == "grouped":
        k, v = k[:, :2], v[:, :2]
    attended = Attended(q, k, told.get("attn_mask"), told.get("scale", 8**-0.5), told.get("is_causal", False))
    expected = scaled_dot_product_attention(q, k, v, **told).mean(1)  # values that are one-hot return the weights
    torch.testing.assert_close(attention_map(attended), expected)
    part = attention_map(attended, slice(1, 4), slice(2, None))
    torch.testing.assert_close(part, expected[:, 1:4, 2:])


class Native(nn.Module):
    """An attention with neither processor nor keyword arguments, twice in one call."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=2)
        once = scaled_dot_product_attention(q, k, v)
        return rearrange(scaled_dot_product_attention(once, k, v), "b heads n d -> b n (heads d)")


def test_a_module_without_a_processor_gives_its_first_attention():
    model, x = tiny.randomise(nn.Sequential(nn.Linear(4, 4), Native())), normal(2, 6, 4)
    q, k, _ = (split(part, 2) for part in model[1].qkv(model[0](x)).chunk(3, -1))
    raw = raw_map(model, "1", lambda m: m(x))
    torch.testing.assert_close(attention_map(raw), softmax_map(q, k))


def test_another_kind_of_attention_is_unsupported():
    model, run = build("sd")
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    model.get_submodule(path).set_processor(AttnProcessor())
    with pytest.raises(ValueError, match=f"no attention map of {path}: unsupported"):
        raw_map(model, path, run)
    with pytest.raises(ValueError, match="no attention map of conv_in: unsupported"):
        raw_map(model, "conv_in", run)


def test_queries_of_other_ranks_are_unsupported():
    class Flat(nn.Module):
        def forward(self, x):
            return scaled_dot_product_attention(x, x, x)

    with pytest.raises(ValueError, match=r"queries of shape \(2, 6, 4\) is unsupported"):
        raw_map(nn.Sequential(Flat()), "0", lambda m: m(normal(2, 6, 4)))


def test_words_of_a_prompt_in_clip():
    # One token a character but for "cat"; the first token is the start of the text.
    tokenizer = clip_tokenizer()
    groups = word_groups(tokenizer, "a Cat, a dog's cat-o")
    assert groups == {"a": [1, 4], "Cat": [2], "dog's": [5, 6, 7, 8, 9], "cat-o": [10, 11, 12]}
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a Cat, a dog's cat-o").input_ids)
    assert pieces[2] == "cat</w>" and pieces[3] == ",</w>"
    assert word_groups(tokenizer, "a Cat, a dog's", length=6) == {"a": [1, 4], "Cat": [2]}
    assert word_groups(tokenizer, "a cat", first=77) == {"a": [78], "cat": [79]}
    assert word_groups(tokenizer, "") == {}


def test_words_of_a_prompt_in_t5():
    # One token a letter, and one for the start of a word; nothing before the first.
    tokenizer = t5_tokenizer()
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("an owl, two").input_ids)
    groups = word_groups(tokenizer, "an owl, two")
    said = {word: "".join(pieces[place] for place in places).strip("▁") for word, places in groups.items()}
    assert said == {"an": "an", "owl": "owl", "two": "two"}


def test_words_by_a_tokenizer_without_offsets():
    tokenizer = ByT5Tokenizer()  # one token a byte
    assert not tokenizer.is_fast
    assert word_groups(tokenizer, "an owl, An") == {"an": [0, 1], "owl": [3, 4, 5], "An": [8, 9]}


def test_a_words_map_is_the_mean_over_its_tokens():
    maps = normal(2, 5, 3, 4)
    found = word_maps(maps, [[1], [2, 4]])
    assert torch.equal(found[:, 0], maps[:, 1])
    torch.testing.assert_close(found[:, 1], (maps[:, 2] + maps[:, 4]) / 2)
    for places in ([], [5], [-1]):
        with pytest.raises(ValueError, match=r"of maps of 5 tokens; give at least one"):
            word_maps(maps, [[0], places])


def test_layers_are_averaged_on_one_grid():
    coarse, fine = normal(1, 2, 4, 4).bfloat16(), normal(1, 2, 8, 8, seed=1)
    found = aggregate([coarse, fine], (8, 8))
    torch.testing.assert_close(found, (interpolate(coarse.float(), (8, 8), mode="bilinear") + fine) / 2)
    constant = aggregate([torch.full((1, 2, 4, 4), 0.25), torch.full((1, 2, 16, 16), 0.75)], (6, 10))
    torch.testing.assert_close(constant, torch.full((1, 2, 6, 10), 0.5))
    with pytest.raises(ValueError, match="give maps of the same tokens"):
        aggregate([coarse, fine[:, :1]], (8, 8))


def test_the_map_of_a_word_from_an_extractor():
    pipeline, prompt = sd_pipeline(), "a cat sat"
    blocks = [f"{stage}.block.0.cross.map" for stage in ("down.0.attn.0", "mid.attn.0")]
    extract = DiffusionExtractor(load(pipeline), [f"{','.join(blocks)}@50"], cond=prompt)
    features = extract(tiny.images(2, 16, 16))
    assert {key: extract.blocks[key].channels for key in features} == {f"{block}@50": 77 for block in blocks}
    groups = word_groups(pipeline.tokenizer, prompt)
    maps = aggregate([word_maps(features[key], list(groups.values())) for key in features], (8, 8))
    assert list(groups) == ["a", "cat", "sat"] and maps.shape == (2, 3, 8, 8)
    cat = [features[key][:, 2:3] for key in features]  # after the start of the text and "a"
    torch.testing.assert_close(maps[:, 1:2], (cat[0] + interpolate(cat[1], (8, 8), mode="bilinear")) / 2)
    assert not torch.allclose(maps[:, 1], maps[:, 2], rtol=1e-4)
