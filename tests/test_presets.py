"""Presets: what they say exists, other models take their place, and what they find is what their parts find by hand."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from repkit import zoo
from repkit.catalog import aliases
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor
from repkit.features import identity_hash
from repkit.fusion import Fused, Part
from repkit.heads.pck import PROTOCOLS
from repkit.images import Resize
from repkit.matching.method import Method
from repkit.store import FeatureStore
from repkit.taps import parse_taps
from repkit.tasks.presetchoice import adapt
from repkit.tasks.presetdata import PRESETS, Preset, PresetPart, get_preset
from repkit.tasks.presets import build_correspondence, build_fused, make_correspondence
from tests import tiny_sd, tiny_vit
from tests.export_cases import write_image, write_images

TAPS = ["up.2.resnet.1@100", "up.1.resnet.1@100"]  # of mini-unet: 32 channels on 32x32 cells, 64 on 16x16
# The grids that the papers' code has for images of the preset's size.
GRIDS = {
    "dift": [48],
    "dift-adm": [32],
    "sd-dino": [60, 30, 15],
    "geoaware-zeroshot": [60, 30, 15],
    "cleandift": [48],
    "cleandift-dino": [60, 30, 15],
    "ditf": [40],
    "hyperfeatures-raw": [8] * 3 + [16] * 3 + [32] * 3 + [64] * 3,
    "sdxl-turbo-dino": [31],
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder of a tiny vision transformer with twelve blocks, as DINOv2-B has."""
    return tiny_vit.save_vit(tmp_path_factory.mktemp("models") / "vit", depth=12)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("models") / "sd"
    tiny_sd.sd_pipeline().save_pretrained(folder)
    return folder


def pictures(*sizes):
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
        for seed, (width, height) in enumerate(sizes)
    ]


# --- the data


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_names_exists(name):
    preset = get_preset(name)
    assert preset.name == name and preset.protocol in PROTOCOLS and preset.paper and preset.differs
    grids = []
    for part in preset.parts:
        if part.is_dino:
            assert timm.is_model(part.model.removeprefix("timm:")) and part.size % 14 == 0
            continue
        assert part.model in aliases()
        backbone = zoo.outline(part.model)
        backbone.check_size(part.size, part.size)
        blocks = [tap.block for tap in parse_taps(part.taps, list(backbone.points))]
        shapes = backbone.shapes(blocks, part.size, part.size)
        assert all(max(channels) < shapes[block][0] for block, channels in part.discard.items())
        assert all(shapes[block][1] == shapes[block][2] for block in blocks)
        grids += [shapes[block][1] for block in blocks]
    assert grids == GRIDS.get(name, [])


def test_a_preset_is_plain_data():
    for preset in PRESETS.values():
        again = json.loads(json.dumps(asdict(preset)))
        parts = [
            PresetPart(**{**part, "taps": tuple(part["taps"]), "loose": tuple(part["loose"])})
            for part in again["parts"]
        ]
        assert [replace(part, discard={}) for part in parts] == [replace(part, discard={}) for part in preset.parts]
        assert Method(**again["method"]) == preset.method
        assert all("\n" not in line and not line.endswith(".") for line in preset.differs)


def test_an_unknown_preset_is_told_what_exists():
    with pytest.raises(ValueError, match="no preset 'dit'; have dift, dift-adm, sd-dino"):
        get_preset("dit")


# --- other models


def test_another_model_drops_what_belonged_to_the_old_one():
    (part,) = adapt(get_preset("ditf"), model="sd35-medium").parts
    assert (part.model, part.discard, part.taps) == ("sd35-medium", {}, ("single.9.in.adaln@260",))
    assert set(part.loose) == {"taps", "size", "cond"}
    (part,) = adapt(get_preset("ditf"), model="sd35-medium", taps=["block.9.in.adaln@260"], size=512, prompt="x").parts
    assert (part.taps, part.size, part.cond, part.loose) == (("block.9.in.adaln@260",), 512, "x", ())


def test_the_same_model_keeps_everything():
    ditf, sd_dino = get_preset("ditf"), get_preset("sd-dino")
    assert adapt(ditf, model="flux-dev") == ditf and adapt(sd_dino, dino="vit_base_patch14_dinov2") == sd_dino
    (part,) = adapt(ditf, taps=["single.9.in.adaln@100", "single.5.in.adaln@100"]).parts
    assert part.discard == {"single.9.in.adaln": (154, 1446)}
    (part,) = adapt(ditf, taps=["single.5.in.adaln@100"]).parts
    assert part.discard == {}


def test_settings_go_to_the_parts_that_they_are_for():
    first, second = adapt(
        get_preset("sd-dino"), size=480, policy="squash", prompt="a {label}", draws=3, weights=[1, 0.5]
    ).parts
    assert (first.size, first.cond, first.draws, first.weight, first.loose) == (480, "a {label}", 3, 1, ())
    assert (second.size, second.cond, second.draws, second.weight, second.loose) == (420, None, 1, 0.5, ("size",))
    assert first.policy == second.policy == "squash"
    (only,) = adapt(get_preset("dino"), dino="vit_small_patch16_dinov3", taps=["norm"], size=512).parts
    assert (only.model, only.taps, only.size) == ("timm:vit_small_patch16_dinov3", ("norm",), 512)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dino", {"model": "sd15"}, "-m sd15 with preset dino, which has no diffusion model"),
        ("dino", {"prompt": "a cat"}, "--prompt a cat with preset dino, which has no diffusion model"),
        ("dino", {"draws": 2}, "--draws 2 with preset dino"),
        ("dift", {"dino": "vit_small_patch16_dinov3"}, "--dino vit_small_.* with preset dift, which has no DINO model"),
        ("sd-dino", {"model": "timm:vit"}, "-m timm:vit with preset sd-dino: .* for DINO give --dino"),
        ("sd-dino", {"weights": [1.0]}, "1 weight for the 2 parts of sd-dino; give one for each"),
        ("dift", {"weights": [1.0, 2]}, "2 weights for the 1 part of dift; give one for each"),
        ("sd-dino", {"weights": [0, 0]}, "--weights 0,0; give 0 or more, and one above 0"),
        ("sd-dino", {"weights": [1, -1.5]}, "--weights 1,-1.5; give 0 or more"),
        ("dift", {"dino_taps": ["block.3"]}, "--dino-taps block.3 with preset dift, which has no DINO model"),
        ("dino", {"taps": ["norm"], "dino_taps": ["cls"]}, "-t and --dino-taps for the one model of dino; give one"),
        ("dift", {"prompt": "a {thing}"}, r"--prompt 'a \{thing\}' has a field \{thing\}.*write \{label\}"),
        ("dift", {"prompt": "a {label"}, r"--prompt 'a \{label' is no template .*write \{label\}"),
    ],
)
def test_what_a_preset_has_no_part_for_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        adapt(get_preset(name), **changes)


def test_taps_of_dino_go_to_its_part(vit):
    first, second = adapt(get_preset("sd-dino"), taps=TAPS, dino_taps=["block.9", "norm"]).parts
    assert (first.taps, second.taps) == (tuple(TAPS), ("block.9", "norm"))
    (only,) = adapt(get_preset("dino"), dino_taps=["block.9"]).parts
    assert only.taps == ("block.9",)
    used, built = make_correspondence(None, "mini-unet", TAPS, str(vit), dino_taps=["block.3"])
    assert [part.taps for part in used.parts] == [tuple(TAPS), ("block.3",)]
    assert [part.chosen for part in built.parts] == [TAPS, ["block.3"]]


def test_a_block_that_another_dino_lacks_is_told_with_its_option(tmp_path):
    short = str(tiny_vit.save_vit(tmp_path / "vit", depth=3))
    with pytest.raises(ValueError, match=r"block\.11.*the preset's taps are block\.11, give others with --dino-taps"):
        make_correspondence("sd-dino", "mini-unet", TAPS, short, size=32)
    with pytest.raises(ValueError, match=r"the preset's taps are block\.11, give others with -t"):
        make_correspondence("dino", dino=short, size=32)
    _, built = make_correspondence("sd-dino", "mini-unet", TAPS, short, size=32, dino_taps=["block.2"])
    assert built.parts[1].chosen == ["block.2"]


def test_sizes_that_were_not_asked_for_are_the_nearest(vit):
    used, built = make_correspondence("sd-dino", "mini-dit", ["block.3@100"], str(vit))  # mini-dit takes 32 only
    assert [part.size for part in used.parts] == [32, 840] and built.resize == Resize(840, "pad")
    used, _ = make_correspondence("sd-dino", "mini-unet", TAPS, str(vit), size=36)
    assert [part.size for part in used.parts] == [36, 32]  # 31.5, of patches of 4
    used, built = make_correspondence(None, "mini-unet", TAPS, str(vit))
    assert [part.size for part in used.parts] == [32, 16] and built.resize == Resize(32, "squash")


def test_a_tap_that_the_other_model_lacks_is_told():
    with pytest.raises(ValueError, match=r"'up\.2\.attn\.1'.* up\.0.*the preset's taps are .*give others with -t"):
        make_correspondence("sd-dino", "mini-unet")
    with pytest.raises(ValueError, match=r"no model; give --preset \(dift, .*\), or -m MODEL with -t TAPS"):
        make_correspondence(taps=TAPS)
    with pytest.raises(ValueError, match="no taps for mini-unet; give -t"):
        make_correspondence(model="mini-unet")


# --- what they find


def test_sd_dino_is_its_parts_by_hand(vit):
    """Wide images fill the middle rows of the padded square, whose pixels are the cells of the finest grid."""
    one, other = pictures((32, 16), (32, 16))
    _, built = make_correspondence("sd-dino", "mini-unet", TAPS, str(vit), size=32)
    x, y = torch.meshgrid(torch.arange(32), torch.arange(16), indexing="xy")
    points = torch.stack([x, y], -1).reshape(-1, 2).double()
    first, second = built.see([one, other])
    found = built.match(first, second, points)

    square = Resize(32, "pad")
    diffusion = DiffusionExtractor(zoo.load("mini-unet"), TAPS, resize=square, noise="shared")([one, other])
    small = DinoExtractor(str(vit), "block.11", resize=Resize(28, "pad"))([one, other])
    grown = []
    for maps in diffusion.values():  # fewer channels than 256: the components turn the centred vectors, and no more
        centred = maps.double() - maps.double().mean((0, 2, 3), keepdim=True)
        grown.append(F.interpolate(centred, (32, 32), mode="bilinear"))
    joined = [torch.cat(grown, 1), F.interpolate(small["block.11"].double(), (32, 32), mode="bilinear")]
    units = [F.normalize(maps, dim=1)[:, :, 8:24].flatten(2) for maps in joined]
    cosines = sum(part[0].T @ part[1] for part in units) / 2
    assert torch.allclose(found.scores.double(), cosines.max(1).values, atol=1e-5)
    best = cosines.argmax(1)
    assert torch.allclose(found.points.double(), torch.stack([best % 32, best // 32], 1).double(), atol=1e-4)


def test_components_beyond_the_channels_are_the_channels():
    parts = (PresetPart("mini-unet", tuple(TAPS), 32, pca=40),)
    _, built = build_correspondence(Preset("x", "", parts, Method(), "dift", ()))
    assert built.fuse(*built.see(pictures((32, 32), (32, 32))))[0].values.shape == (32 + 40, 32, 32)
    _, small = build_correspondence(Preset("x", "", (replace(parts[0], size=8),), Method(), "dift", ()))
    fused = small.fuse(*small.see(pictures((8, 8), (8, 8))))[0]
    assert len(fused.values) == 32 + 2 * 4 * 4  # as many as there are cells on the smaller grid


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_with_small_models(name, vit):
    parts = get_preset(name).parts
    dino = str(vit) if any(part.is_dino for part in parts) else None
    taps = ["norm"] if dino and len(parts) == 1 else [TAPS[1].replace("100", "clean")]
    model = None if len(parts) == 1 and dino else "mini-unet"
    used, built = make_correspondence(name, model, taps, dino, size=32)
    assert used.method == get_preset(name).method and built.flip == used.flip
    assert all(part.cond is None for part in used.parts)  # mini-unet reads no texts
    images = pictures((24, 16), (16, 20))
    points = torch.tensor([[3.0, 4.0], [20.0, 12.0]])
    first, second = built.see(images, "cat")
    found = built.match(first, second, points)
    assert found.points.shape == (2, 2) and found.scores.isfinite().all()
    assert (found.points >= -0.5).all() and (found.points <= torch.tensor([15.5, 19.5])).all()


def test_prompts_reach_a_model_that_reads_texts(texts):
    used, built = make_correspondence("dift", str(texts), ["up.0@261"], size=16, draws=2)
    assert used.parts[0].cond == "a photo of a {label}" and used.parts[0].loose == ()
    image = pictures((16, 16))
    (seen,) = built.see(image, "cat")
    extract = DiffusionExtractor(zoo.load(texts), "up.0@261", resize=Resize(16, "squash"), draws=2)
    assert torch.equal(seen.maps[0][0], extract(image, "a photo of a cat")["up.0@261"][0])
    assert not torch.equal(seen.maps[0][0], extract(image, "a photo of a dog")["up.0@261"][0])


def test_discarded_channels_and_options_of_the_load_reach_the_extractor():
    part = PresetPart("mini-dit", ("block.1.in.adaln@100",), discard={"block.1.in.adaln": (2, 5)}, draws=2)
    used, built = build_correspondence(Preset("x", "", (part,), Method(), "dift", ()), seed=7, noise="shared")
    identity = built.parts[0].extractor.identity
    assert (identity["discard"], identity["draws"]) == ({"block.1.in.adaln@100": [2, 5]}, 2)
    assert (identity["seed"], identity["noise"], used.parts[0].noise) == (7, "shared", "shared")


def test_options_of_diffusion_models_are_refused_by_a_vision_transformer_alone(vit):
    with pytest.raises(ValueError, match="lora given for timm:"):
        make_correspondence("dino", dino=str(vit), size=32, lora=[("x.safetensors", 1.0)])


def test_an_export_fuses_the_parts_without_components(vit):
    chosen = adapt(get_preset("sd-dino"), model="mini-unet", taps=TAPS, dino=str(vit), size=32, weights=[2, 1])
    _, fused = build_fused(chosen)
    resize = Resize(32, "pad")
    parts = [
        Part(DiffusionExtractor(zoo.load("mini-unet"), TAPS, resize=resize, noise="shared"), 2),
        Part(DinoExtractor(str(vit), "block.11", resize=Resize(28, "pad"))),
    ]
    assert identity_hash(fused.identity) == identity_hash(Fused(parts).identity)


# --- the command line


def test_presets_are_listed(repkit):
    code, out, _ = repkit("presets")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[: len(PRESETS)]] == list(PRESETS)
    code, out, _ = repkit("presets", "--json")
    assert [one["name"] for one in json.loads(out)["presets"]] == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_printed_in_full(repkit, name):
    preset = get_preset(name)
    code, out, _ = repkit("presets", name)
    assert code == 0
    for said in (preset.paper, preset.protocol, *preset.differs, *(tap for part in preset.parts for tap in part.taps)):
        assert str(said) in out
    for part in preset.parts:
        assert part.model in out and f"{part.size} px" in out and (part.cond or "") in out
    code, out, _ = repkit("presets", name, "--json")
    assert json.loads(out) == json.loads(json.dumps(asdict(preset)))


def test_a_fused_store_is_searched(repkit, vit, tmp_path):
    images, out, index = write_images(tmp_path / "images", 4), tmp_path / "out", tmp_path / "index"
    chosen = ["--preset", "sd-dino", "-m", "mini-unet", "-t", TAPS[1], "--dino", vit, "--size", 32]
    code, _, err = repkit("extract", images, *chosen, "-o", out)
    assert code == 0 and "mini-unet at 32 px + timm:" in err and "keeps all channels" in err
    assert FeatureStore(out).keys == ("fused",) and FeatureStore(out).array("fused").shape == (4, 64 + 12)
    assert repkit("index", out, "-o", index)[0] == 0
    code, found, _ = repkit("search", index, images / "002.png", "--json")
    best = json.loads(found)["hits"][0]
    assert (code, best["id"]) == (0, "002.png") and best["score"] == pytest.approx(1, abs=1e-5)


def test_a_prompt_for_all_is_told_again_in_a_search(repkit, texts, tmp_path):
    images, out, index = write_images(tmp_path / "images", 2), tmp_path / "out", tmp_path / "index"
    chosen = ["--preset", "dift", "-m", texts, "-t", "up.0@261", "--size", 16, "--draws", 1]
    code, _, err = repkit("extract", images, *chosen, "-o", tmp_path / "untold")
    assert code == 0 and "dift tells its network 'a photo of a {label}'; give that as --prompt" in err
    code, _, err = repkit("extract", images, *chosen, "-o", out, "--prompt", "a cat")
    assert code == 0 and "--prompt" not in err
    told, untold = (FeatureStore(one).array("fused") for one in (out, tmp_path / "untold"))
    assert not np.allclose(told, untold)
    repkit("index", out, "-o", index)
    code, found, _ = repkit("search", index, images / "001.png", "--json")
    best = json.loads(found)["hits"][0]
    assert (code, best["id"]) == (0, "001.png") and best["score"] == pytest.approx(1, abs=1e-5)


def test_a_dino_beside_a_model_is_fused_without_a_preset(repkit, vit, tmp_path):
    write_image(tmp_path / "images" / "a.png", 0)
    arguments = ["-m", "mini-unet", "-t", "mid@50", "--dino", vit, "-o", tmp_path / "out", "--pool", "none"]
    assert repkit("extract", tmp_path / "images", *arguments)[0] == 0
    store = FeatureStore(tmp_path / "out")
    assert store.identity["extractor"]["resize"]["policy"] == "crop" and store.array("fused").shape == (1, 140, 8, 8)


def test_an_export_without_a_model_is_told(repkit, tmp_path):
    write_image(tmp_path / "a.png", 0)
    code, _, err = repkit("extract", tmp_path, "-o", tmp_path / "out")
    assert code == 2 and "no model; give -m MODEL with -t TAPS, or --preset NAME" in err
    code, _, err = repkit("extract", tmp_path, "--preset", "nope", "-o", tmp_path / "out")
    assert code == 2 and "no preset 'nope'; have dift" in err


def test_taps_of_dino_are_given_in_an_export(repkit, vit, tmp_path):
    write_image(tmp_path / "images" / "a.png", 0)
    out = ["-m", "mini-unet", "-t", "mid@50", "-o", tmp_path / "out", "--dino-taps", "block.3", "--dino-taps", "norm"]
    code, _, err = repkit("extract", tmp_path / "images", *out)
    assert code == 2 and "--dino-taps without --dino or --preset" in err
    assert repkit("extract", tmp_path / "images", *out, "--dino", vit)[0] == 0
    assert FeatureStore(tmp_path / "out").identity["extractor"]["parts"][1]["keys"] == ["block.3", "norm"]
