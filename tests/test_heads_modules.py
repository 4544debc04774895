"""The trained heads: published parameter counts, outputs against plain formulas, and what they refuse."""

import math

import pytest
import torch
from torch import nn

from repkit.heads.attention import AttentionHead
from repkit.heads.building import KINDS, build_head
from repkit.heads.difformer import DifFormer, grid_of_taps
from repkit.heads.linear import BatchNormLinear, LinearHead
from repkit.heads.mlp import MlpHead
from tests.tiny import randomise


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(head):
    return sum(one.numel() for one in head.parameters())


# --- published sizes


def test_attention_head_has_the_published_parameters():
    with torch.device("meta"):
        assert parameters(AttentionHead((1024, 16, 16), 1000)) == 27_786_216


def test_difformer_has_the_published_parameters():
    # Blocks 19, 24 and 30 of ADM at 256 pixels; only the first is smaller than the grid of 16 by 16.
    adm = {"19": (1024, 8, 8), "24": (1024, 16, 16), "30": (512, 64, 64)}
    shapes = {f"{block}@{t}": shape for t in (90, 150, 300) for block, shape in adm.items()}
    with torch.device("meta"):
        assert parameters(DifFormer(shapes, 1000)) == 31_802_344


# --- formulas


@pytest.mark.parametrize("side", [1, 2])
def test_linear_head_is_a_product_of_cell_means(side):
    head = randomise(LinearHead(3, 5, pool=side))
    maps = normal(4, 3, 6, 8)
    h, w = 6 // side, 8 // side
    cells = [maps[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w] for i in range(side) for j in range(side)]
    rows = torch.stack([cell.mean((2, 3)) for cell in cells], dim=2).reshape(4, -1)  # channel slowest
    expected = torch.einsum("nd,kd->nk", rows, head.linear.weight) + head.linear.bias
    torch.testing.assert_close(head(maps), expected)


def test_vectors_are_used_as_they_are():
    head = randomise(LinearHead(12, 5))
    rows = normal(4, 12)
    torch.testing.assert_close(head(rows), rows @ head.linear.weight.T + head.linear.bias)


def test_batch_norm_uses_the_batch_in_training_and_its_running_statistics_after():
    head = BatchNormLinear(6, 5)
    rows = 3 * normal(40, 6) + 2
    mean, biased, unbiased = rows.mean(0), rows.var(0, correction=0), rows.var(0)
    expected = head.linear((rows - mean) / (biased + 1e-6).sqrt())
    torch.testing.assert_close(head(rows), expected)
    running = 0.1 * mean, 0.9 + 0.1 * unbiased  # from 0 and 1, with momentum 0.1
    torch.testing.assert_close(head.eval()(rows), head.linear((rows - running[0]) / (running[1] + 1e-6).sqrt()))
    assert sorted(name for name, _ in head.named_parameters()) == ["linear.bias", "linear.weight"]


def test_mlp_is_relu_between_products():
    head = randomise(MlpHead(3, 5, hidden=(7, 6), pool=2))
    maps = normal(4, 3, 4, 4)
    x = maps.reshape(4, 3, 2, 2, 2, 2).mean((3, 5)).reshape(4, -1)
    first, second, last = (layer for layer in head.layers if isinstance(layer, nn.Linear))
    x = (x @ first.weight.T + first.bias).clamp(min=0)
    x = (x @ second.weight.T + second.bias).clamp(min=0)
    torch.testing.assert_close(head(maps), x @ last.weight.T + last.bias)


def layer_norm(x, norm, axes):
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def plain_tokens(tokens, maps):
    """Cell means, normalisation over the whole map, and a matrix for each cell."""
    (h, w), (n, c) = tokens.grid, maps.shape[:2]
    cells = maps.reshape(n, c, h, maps.shape[2] // h, w, maps.shape[3] // w).mean((3, 5))
    cells = layer_norm(cells, tokens.norm, (1, 2, 3))
    weight, bias = tokens.project.weight[:, :, 0, 0], tokens.project.bias
    return torch.einsum("nchw,dc->nhwd", cells, weight).reshape(n, h * w, -1) + bias


def plain_trunk(trunk, tokens):
    """Attention and perceptron written out, head by head."""
    x = torch.cat([trunk.cls.repeat(len(tokens), 1, 1), tokens], dim=1)
    for block in trunk.blocks:
        d = x.shape[2]
        e = d // block.heads
        q, k, v = (layer_norm(x, block.norm1, -1) @ part.T for part in block.qkv.weight.split(d))
        heads = []
        for first in range(0, d, e):
            part = slice(first, first + e)
            weights = (torch.einsum("nie,nje->nij", q[..., part], k[..., part]) / math.sqrt(e)).softmax(-1)
            heads.append(torch.einsum("nij,nje->nie", weights, v[..., part]))
        x = x + torch.cat(heads, dim=2) @ block.out.weight.T + block.out.bias
        up, down = block.mlp[0], block.mlp[2]
        hidden = layer_norm(x, block.norm2, -1) @ up.weight.T + up.bias
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + hidden @ down.weight.T + down.bias
    return x[:, 0]


def test_attention_head_is_the_formula():
    head = randomise(AttentionHead((3, 4, 8), 5, width=12, heads=3, side=4))
    maps = 2 * normal(4, 3, 4, 8) + 1
    summary = plain_trunk(head.trunk, plain_tokens(head.tokens, maps))
    torch.testing.assert_close(head(maps), summary @ head.linear.weight.T + head.linear.bias)


def test_difformer_is_the_formula():
    shapes = {"down.1@1": (3, 2, 2), "up.0@1": (4, 8, 8), "down.1@sigma=2": (3, 2, 2), "up.0@sigma=2": (4, 8, 8)}
    head = randomise(DifFormer(shapes, 5, width=12, heads=3, side=4))
    maps = {key: normal(6, *shape, seed=place) for place, (key, shape) in enumerate(shapes.items())}
    summaries = []
    for time in ("1", "sigma=2"):
        both = [
            plain_tokens(head.tokens[0], maps[f"down.1@{time}"]),
            plain_tokens(head.tokens[1], maps[f"up.0@{time}"]),
        ]
        assert [one.shape[1] for one in both] == [4, 16]  # a small map keeps its size
        summaries.append(plain_trunk(head.trunk, torch.cat(both, dim=1)))
    expected = torch.cat(summaries, dim=1) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(maps), expected)


def test_difformer_of_one_tap_is_the_attention_head():
    one = randomise(AttentionHead((3, 4, 4), 5, width=8))
    many = DifFormer({"mid@1": (3, 4, 4)}, 5, width=8)
    renamed = {name.replace("tokens.", "tokens.0."): value for name, value in one.state_dict().items()}
    many.load_state_dict(renamed)
    maps = normal(4, 3, 4, 4)
    torch.testing.assert_close(many({"mid@1": maps, "other@1": maps[:, :1]}), one(maps))


def test_batch_statistics_are_an_option():
    head = AttentionHead((3, 4, 4), 5, width=8, norm="batch")
    assert isinstance(head.tokens.norm, nn.BatchNorm2d)
    assert head(normal(4, 3, 4, 4)).shape == (4, 5)


def test_the_class_token_starts_at_zero_and_queries_have_no_bias():
    head = AttentionHead((3, 4, 4), 5, width=8)
    assert not head.trunk.cls.any()
    assert all(block.qkv.bias is None for block in head.trunk.blocks)


# --- taps


def test_taps_are_sorted_into_times_and_blocks():
    keys = ["mid@50", "up.0@50", "up.0@clean:1", "mid@clean:1"]
    assert grid_of_taps(keys) == [["mid@50", "up.0@50"], ["mid@clean:1", "up.0@clean:1"]]


def test_a_missing_tap_is_refused():
    with pytest.raises(ValueError, match="no up.0@100 among mid@50, up.0@50, mid@100; give every block at every time"):
        grid_of_taps(["mid@50", "up.0@50", "mid@100"])


def test_a_block_that_changes_shape_is_refused():
    with pytest.raises(ValueError, match="mid@1 and mid@2 differ in shape"):
        DifFormer({"mid@1": (3, 4, 4), "mid@2": (3, 2, 2)}, 5)


# --- refused


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (lambda: LinearHead(3, 5, pool=2), (4, 5, 6, 6), r"features \[5, 6, 6\] pooled 2x2 are 20 wide; .* takes 12"),
        (lambda: MlpHead(3, 5), (4, 2), r"features \[2\] pooled 1x1 are 2 wide; the head takes 3"),
        (lambda: AttentionHead((3, 4, 4), 5, width=8), (4, 3, 8, 8), r"maps are \[3, 8, 8\]; .* for \[3, 4, 4\]"),
    ],
)
def test_features_of_another_shape_are_refused(make, x, message):
    with pytest.raises(ValueError, match=message):
        make()(normal(*x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MlpHead(3, 5, hidden=()), r"hidden=\[\]; give at least one width"),
        (lambda: AttentionHead((3, 4, 4), 5, width=12), "width 12 does not divide into 8 heads"),
        (lambda: build_head("forest", {"": (3,)}, 5), "no head 'forest'; have linear, bn-linear, mlp, attention"),
        (lambda: build_head("attention", {"": (3,)}, 5), "attention needs maps"),
        (lambda: build_head("linear", {"a": (3,), "b": (3,)}, 5), "linear reads one tap; got a, b"),
    ],
)
def test_impossible_heads_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_named_head_reads_maps(kind):
    x = normal(4, 3, 4, 4)
    sizes, given = ({"mid@1": (3, 4, 4)}, {"mid@1": x}) if kind == "difformer" else ({"": (3, 4, 4)}, x)
    assert build_head(kind, sizes, 5, width=16)(given).shape == (4, 5)
