"""DinoExtractor against timm's own functions, on small random networks of every family."""

import json
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from repkit.dino import DinoExtractor
from repkit.images import Resize

WIDTH, HEADS, DEPTH = 48, 3, 3
# name -> (timm architecture, its patch, what else makes it small)
FAMILIES = {
    "dino": ("vit_small_patch8_224", 8, {}),
    "dinov2": ("vit_small_patch14_dinov2", 14, {}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", 14, {}),
    "dinov3": ("vit_small_patch16_dinov3", 16, {}),
    "dinov3-bias": ("vit_small_patch16_dinov3_qkvb", 16, {}),
    "eva02": ("eva02_tiny_patch14_224", 14, {}),
    "eva02-unfused": ("eva02_base_patch16_clip_224", 16, {}),
    "rope": ("vit_small_patch16_rope_mixed_224", 16, {}),
    "clip": ("vit_base_patch16_clip_224", 16, {}),
    "no-class-token": ("vit_base_patch16_siglip_224", 16, {}),
    "registers-only": ("vit_medium_patch16_reg4_gap_256", 16, {}),
    "qk-norm": ("vit_small_patch8_224", 8, {"qk_norm": True}),
    "distilled": ("deit_small_distilled_patch16_224", 16, {}),
}
SIDE = {8: 32, 14: 56, 16: 64}  # four patches a side


def build(family, **options):
    name, patch, extra = FAMILIES[family]
    torch.manual_seed(0)
    small = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "img_size": SIDE[patch], "num_classes": 0}
    model = timm.create_model(name, pretrained=False, **{**small, "dynamic_img_size": True, **extra, **options})
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, which would hide that they are left out
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def pictures(height, width, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def normalised(model, images):
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    return (images - mean) / std


def projections(attention, tokens):
    """q, k and v [b n c] as timm makes them before it splits the heads."""
    linear = nn.functional.linear
    if attention.qkv is None:
        return [getattr(attention, f"{name}_proj")(tokens) for name in "qkv"]
    weights = attention.qkv.weight.chunk(3)
    if getattr(attention, "q_bias", None) is None:
        biases = [None] * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    else:
        biases = [attention.q_bias, attention.k_bias, attention.v_bias]
    return [linear(tokens, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def dino():
    return build("dinov2-registers")


def side(model):
    return model.patch_embed.img_size[0]


@pytest.mark.parametrize("shape", [(1, 1), (1.5, 0.5)], ids=["square", "oblong"])
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "norm"])
def test_blocks_equal_forward_intermediates(model, norm, shape):
    images = pictures(*(int(side(model) * factor) for factor in shape))
    suffix = ".norm" if norm else ""
    features = DinoExtractor(model, f"block.*{suffix}")(images)
    expected = model.forward_intermediates(
        normalised(model, images), norm=norm, output_fmt="NCHW", intermediates_only=True
    )
    assert list(features) == [f"block.{index}{suffix}" for index in range(DEPTH)]
    assert all(torch.equal(features[f"block.{index}{suffix}"], expected[index]) for index in range(DEPTH))


def test_norm_and_cls_equal_forward_features(model):
    images = pictures(side(model), side(model))
    tokens = model.forward_features(normalised(model, images))
    patches = tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(DinoExtractor(model)(images)["norm"], patches)
    if model.cls_token is None:
        with pytest.raises(ValueError, match="no block 'cls' in VisionTransformer; have block.0, .*norm"):
            DinoExtractor(model, "cls")
    else:
        assert torch.equal(DinoExtractor(model, "cls")(images)["cls"], tokens[:, 0, :, None, None])


@pytest.mark.parametrize("index", [0, DEPTH - 1])
def test_facets_equal_the_attention_s_projections(model, index):
    images, seen = pictures(side(model), side(model)), []
    handle = model.blocks[index].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.forward_features(normalised(model, images))
    handle.remove()
    features = DinoExtractor(model, [f"block.{index}.{facet}" for facet in "qkv"])(images)
    expected = projections(model.blocks[index].attn, seen[0])
    for facet, tokens in zip("qkv", expected, strict=True):
        patches = tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(features[f"block.{index}.{facet}"], patches, rtol=1e-6, atol=1e-6)


def test_facets_give_back_the_attention():
    """softmax(q k') v, projected, is what the attention module returns: the facets are what attention works on."""
    attention = build("dino").blocks[0].attn
    tokens = torch.randn(2, 17, WIDTH, generator=torch.Generator().manual_seed(2))
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in projections(attention, tokens))
    weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(tokens), expected, rtol=1e-5, atol=1e-6)


def test_families_cover_each_kind_of_attention():
    kinds = {type(build(family).blocks[0].attn) for family in ("dino", "dinov3", "rope")}
    assert kinds == {Attention, EvaAttention, AttentionRope}
    assert build("eva02").blocks[0].attn.q_bias is not None  # a bias that no module call shows
    assert build("eva02-unfused").blocks[0].attn.qkv is None
    assert not isinstance(build("clip").norm_pre, nn.Identity)


@pytest.mark.skipif("num_kv_heads" not in signature(Eva).parameters, reason="this timm has no such heads")
def test_grouped_key_and_value_heads_are_narrower():
    model = build("rope", qkv_fused=False, num_kv_heads=1)
    images = pictures(side(model), side(model))
    extract = DinoExtractor(model, "block.0.q,block.0.k,block.0.v")
    assert [block.channels for block in extract.blocks.values()] == [WIDTH, WIDTH // HEADS, WIDTH // HEADS]
    assert [value.shape[1] for value in extract(images).values()] == [WIDTH, WIDTH // HEADS, WIDTH // HEADS]


def test_declared_shapes_equal_the_maps(model):
    taps = ["block.0,block.1.norm,block.2.*,norm", *(["cls"] if model.cls_token is not None else [])]
    size = (side(model), side(model) // 2)
    extract = DinoExtractor(model, taps, resize=Resize(size))
    features = extract([Image.new("RGB", (90, 70), (10, 200, 30))])
    assert features.size == size
    assert {key: tuple(value.shape[1:]) for key, value in features.items()} == extract.shapes
    patch = model.patch_embed.patch_size[0]
    for key, block in extract.blocks.items():
        assert block.channels == features[key].shape[1]
        assert block.stride == (size[0] if key == "cls" else patch)


def test_default_size_is_the_network_s():
    for family in ("dinov2", "dinov3"):
        name, *_ = FAMILIES[family]
        model = timm.create_model(name, pretrained=False, depth=1, embed_dim=12, num_heads=1, num_classes=0).eval()
        assert DinoExtractor(model).resize.shape == model.pretrained_cfg["input_size"][1:]


@pytest.mark.parametrize(("taps", "computed"), [("block.0", 1), ("block.1.norm", 2), ("block.1.k", 1), ("cls", DEPTH)])
def test_stops_at_the_last_tapped_block(dino, taps, computed):
    calls = []
    handles = [block.mlp.register_forward_hook(lambda *_: calls.append(1)) for block in dino.blocks]
    DinoExtractor(dino, taps)(pictures(56, 56))
    for handle in handles:
        handle.remove()
    assert len(calls) == computed


def test_model_is_left_as_it_was(dino):
    before = {name: value.clone() for name, value in dino.state_dict().items()}
    flags = [value.requires_grad for value in dino.parameters()]
    expected = dino(normalised(dino, pictures(56, 56)))
    DinoExtractor(dino, "block.1,block.1.q,norm")(pictures(56, 56))
    broken = dino.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        DinoExtractor(dino, "block.1,cls")(pictures(56, 56))
    broken.remove()
    assert torch.equal(dino(normalised(dino, pictures(56, 56))), expected)
    assert all(torch.equal(value, before[name]) for name, value in dino.state_dict().items())
    assert [value.requires_grad for value in dino.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dino.modules())


def test_batch_equals_one_by_one(model):
    images = pictures(side(model), side(model), count=5)
    extract = DinoExtractor(model, "block.*,block.1.*,norm")
    together, apart = extract(images), [extract(image[None]) for image in images]
    for key, value in together.items():
        single = torch.cat([features[key] for features in apart])
        assert (value - single).abs().max() <= 1e-5 * value.abs().max()


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_gradients_equal_plain_autograd(family):
    model = build(family)
    images = [pictures(side(model), side(model)).requires_grad_() for _ in range(2)]
    direction = torch.randn(2, WIDTH, 4, 4, generator=torch.Generator().manual_seed(3))
    features = DinoExtractor(model, "block.1.norm")(images[0], grad=True)["block.1.norm"]
    plain = model.forward_intermediates(
        normalised(model, images[1]), [1], norm=True, output_fmt="NCHW", intermediates_only=True
    )[0]
    (features * direction).sum().backward()
    (plain * direction).sum().backward()
    assert images[0].grad.abs().max() > 0
    assert torch.equal(images[0].grad, images[1].grad)
    assert not DinoExtractor(model)(images[0])["norm"].requires_grad


def test_files_pil_images_and_tensors_agree(dino, tmp_path, rng):
    pixels = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    extract = DinoExtractor(dino)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    from_file, from_pil, from_tensor = (
        extract(images)["norm"] for images in ([tmp_path / "a.png"], [Image.fromarray(pixels)], tensor)
    )
    assert torch.equal(from_file, from_pil)
    assert torch.equal(from_file, from_tensor)


def test_padding_is_masked(dino):
    features = DinoExtractor(dino, resize=Resize(56, "pad"))([Image.new("RGB", (60, 30))])
    assert features.mask is not None
    assert features.mask.sum() == 56 * 28


def test_identity_names_what_decides_the_values(dino):
    identity = DinoExtractor(dino, "norm,cls").identity
    assert json.loads(json.dumps(identity)) == identity
    assert set(identity) == {"extractor", "weights", "heads", "taps", "resize", "decoder", "normalisation", "dtype"}
    assert (identity["taps"], identity["dtype"]) == (["norm", "cls"], "float32")
    assert identity == DinoExtractor(build("dinov2-registers"), ["norm", "cls", "norm"]).identity
    other = build("dinov2-registers")
    other.blocks[0].mlp.fc1.bias.data[0] += 1e-6
    assert DinoExtractor(other).identity["weights"] != identity["weights"]
    other.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    assert DinoExtractor(other).identity["normalisation"] != identity["normalisation"]


def test_bfloat16_is_close_and_returned_as_float32(dino):
    half = build("dinov2-registers").to(torch.bfloat16)
    extract = DinoExtractor(half)
    features, exact = extract(pictures(56, 56))["norm"], DinoExtractor(dino)(pictures(56, 56))["norm"]
    assert features.dtype == torch.float32
    assert extract.identity["dtype"] == "bfloat16"
    assert torch.cosine_similarity(features.flatten(), exact.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ("block.9", r"no block 'block.9' in VisionTransformer; have block.0, .*norm, cls"),
        ("norm@261", r"'norm@261': VisionTransformer has named blocks only, no times \(@\)"),
        ("/blocks.0.mlp", r"no module paths"),
        ([], "no taps given"),
    ],
)
def test_unknown_taps_are_refused(dino, taps, message):
    with pytest.raises(ValueError, match=message):
        DinoExtractor(dino, taps)


def test_bad_sizes_are_refused_with_the_nearest(dino):
    with pytest.raises(ValueError, match="14x14, not 60x71; nearest: 56x70"):
        DinoExtractor(dino)(pictures(60, 71))
    with pytest.raises(ValueError, match="not 100x100; nearest: 98x98"):
        DinoExtractor(dino, resize=Resize(100))
    strict = DinoExtractor(build("dino", dynamic_img_size=False))
    assert strict(pictures(32, 32))["norm"].shape == (2, WIDTH, 4, 4)
    with pytest.raises(ValueError, match="takes 32x32 images only, not 40x40; .*dynamic_img_size"):
        strict(pictures(40, 40))


def test_conditions_are_refused(dino):
    with pytest.raises(ValueError, match="takes no condition"):
        DinoExtractor(dino)(pictures(56, 56), "a cat")


def test_training_mode_is_refused_and_left_alone():
    model = build("dino")
    extract = DinoExtractor(model)
    model.blocks[1].attn.train()
    with pytest.raises(ValueError, match="training mode.*eval"):
        extract(pictures(32, 32))
    with pytest.raises(ValueError, match="training mode.*eval"):
        DinoExtractor(model)
    assert model.blocks[1].attn.training


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="ResNet is no VisionTransformer or Eva"):
        DinoExtractor(timm.create_model("resnet10t", pretrained=False).eval())
    bare = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1, num_classes=0).eval()
    with pytest.raises(ValueError, match="set model.pretrained_cfg"):
        DinoExtractor(bare)


def save_folder(folder: Path, model) -> None:
    config = {
        "architecture": "vit_small_patch14_reg4_dinov2",
        "num_classes": 0,
        "num_features": WIDTH,
        "model_args": {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "img_size": 56},
        "pretrained_cfg": {"input_size": [3, 56, 56], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_local_folder_loads(dino, tmp_path, prefix):
    save_folder(tmp_path, dino)
    extract = DinoExtractor(f"{prefix}{tmp_path}", dtype=torch.float64)
    assert not any(value.requires_grad for value in extract.model.parameters())
    assert extract.identity["normalisation"] == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    assert extract.identity["dtype"] == "float64"
    assert extract.resize.shape == (56, 56)
    exact = DinoExtractor(str(tmp_path))
    assert exact.weights_hash == DinoExtractor(dino).weights_hash
    images = pictures(28, 70)
    expected = dino.forward_intermediates(normalised(exact.model, images), [1], intermediates_only=True)[0]
    assert torch.equal(DinoExtractor(str(tmp_path), "block.1")(images)["block.1"], expected)


def test_absent_weights_are_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # a developer's own may have them
    with pytest.raises(OSError, match="cannot get the weights of timm:vit_small_patch16_224.dino: .*HF_HOME") as error:
        DinoExtractor("timm:vit_small_patch16_224.dino")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_small_patch14_dinov22", "no model 'vit_small_patch14_dinov22' in timm.*close to it: .*dinov2"),
        ("vit_small_patch14_dinov2.nonsense", "cannot load .*nonsense"),
        ("resnet18", "resnet18 is no VisionTransformer"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        DinoExtractor(name)


def test_broken_folders_are_refused(dino, tmp_path):
    with pytest.raises(OSError, match="no model.safetensors"):
        DinoExtractor(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(OSError, match="Config file not found"):
        DinoExtractor(str(tmp_path))
    save_folder(tmp_path, dino)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="pickled weights are not read"):
        DinoExtractor(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(OSError, match="cannot get the weights"):
        DinoExtractor(str(tmp_path))
    save_file({"cls_token": torch.zeros(1, 1, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cannot load"):
        DinoExtractor(str(tmp_path))
