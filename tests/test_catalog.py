"""The catalog: every alias says what it must, and its configs make the network that they are said to make."""

import json
from functools import lru_cache

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline

from repkit import catalog, hub, zoo
from repkit.extractors import resolve
from repkit.schedule import Schedule
from repkit.taps import parse_taps
from tests import tiny

KEYS = {"name", "title", "hub", "mirrors", "licence", "gated", "size", "prediction", "parameters", "taps", "configs"}
MORE = {"like", "file", "denoiser", "clean_t", "note"}

# Millions, as their papers and cards have them.
PARAMETERS = {
    "sd15": 859.5, "sd21": 865.9, "sdxl": 2567, "ssd-1b": 1331, "dit-xl-2-256": 750, "pixart-alpha-512": 611,
    "sd3-medium": 2028, "sd35-medium": 2243, "sd35-large": 8057, "flux-dev": 11901, "adm-256-uncond": 552.8,
    "sit-xl-2": 675,
}  # fmt: skip

# Per cent of a forward's FLOPs spent when a block is reached, counted elsewhere for the same configs.
SHARES = [
    ("sd15", 512, {"mid": 33, "up.0": 36, "up.1": 55, "up.2": 75}),
    ("sd15", 768, {"mid": 34, "up.0": 36, "up.1": 52, "up.2": 71}),
    ("sd15", 960, {"up.1.attn.1": 45, "up.2.attn.1": 61, "up.3.attn.1": 89}),
    ("sdxl", 1024, {"mid": 43, "up.0": 79, "up.1": 95, "up.2": 100}),
    ("dit-xl-2-256", 256, {"block.7": 29, "block.13": 50, "block.20": 75}),
    ("pixart-alpha-512", 512, {"block.10": 39, "block.14": 54, "block.20": 75}),
    ("sd3-medium", 1024, {"block.8": 38, "block.11": 50, "block.17": 75}),
    ("flux-dev", 640, {"block.9": 18, "block.18": 33, "single.9": 51, "single.19": 68}),
]

outline = lru_cache(zoo.outline)  # one of each for all tests


@pytest.mark.parametrize("alias", catalog.aliases())
def test_an_alias_says_what_it_must(alias):
    entry = catalog.entry(alias)
    assert KEYS <= set(entry) <= KEYS | MORE and entry["name"] == alias
    assert (entry["hub"] is None) == ("file" in entry) and ("denoiser" in entry) == ("clean_t" in entry)
    assert all(one.count("/") == 1 for one in [entry["hub"] or "a/b", *entry["mirrors"]])
    assert entry["gated"] is None or entry["gated"] == f"https://huggingface.co/{entry['hub']}"
    assert entry["licence"] and isinstance(entry["size"], int)
    assert {"index", "scheduler"} < set(entry["configs"]) <= {"index", "scheduler", "unet", "transformer", "vae"}
    assert all({"task", "taps", "paper"} <= set(tap) <= {"task", "taps", "paper", "note"} for tap in entry["taps"])


@pytest.mark.parametrize("alias", catalog.aliases())
def test_the_configs_of_an_alias_make_its_network(alias):
    entry, backbone = catalog.entry(alias), outline(alias)
    parameters = list(backbone.model.parameters())
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert sum(parameter.numel() for parameter in parameters) == entry["parameters"]
    assert (backbone.size, backbone.schedule.prediction) == (entry["size"], entry["prediction"])
    assert catalog.prediction_of(entry["configs"]["scheduler"]) == entry["prediction"]
    groups = [group for row in entry["taps"] for group in row["taps"]]
    for tap in parse_taps(groups, list(backbone.points), model=alias) if groups else ():
        assert tap.time is not None and resolve(backbone, tap.time).t >= 0
        backbone.model.get_submodule(backbone.point(tap.block).path)
    (block,) = backbone.describe([next(iter(backbone.points))]).values()  # an early one, for time
    assert block.channels > 0 and backbone.size % block.stride == 0


@pytest.mark.parametrize("alias", PARAMETERS)
def test_parameters_are_the_published_ones(alias):
    assert catalog.entry(alias)["parameters"] / 1e6 == pytest.approx(PARAMETERS[alias], abs=0.6)


@pytest.mark.parametrize(("alias", "size", "shares"), SHARES, ids=lambda value: value if isinstance(value, str) else "")
def test_shares_of_flops(alias, size, shares):
    costs = outline(alias).costs(list(shares), size, size)
    assert {block: 100 * cost.flops for block, cost in costs.items()} == pytest.approx(shares, abs=2)


def test_costs_are_those_of_real_networks():
    backbone = tiny.dit()
    costs = backbone.costs(["block.0", "block.1.attn.q"], 8, 8)
    assert {block: (cost.shape, cost.bytes) for block, cost in costs.items()} == {
        "block.0": ((16, 2, 2), 256), "block.1.attn.q": ((16, 2, 2), 256)
    }  # fmt: skip
    assert {block: cost.flops for block, cost in costs.items()} == {block: backbone.flops[block] for block in costs}


def test_an_outline_has_the_blocks_of_the_folder(tmp_path):
    DiTPipeline(tiny.dit_model(), tiny.vae_model(), DDIMScheduler()).save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    backbone = zoo.outline(tmp_path)
    assert backbone.blocks == tiny.dit().blocks and backbone.flops == tiny.dit().flops
    assert backbone.name == tmp_path.name


def test_an_outline_at_another_size():
    backbone = zoo.outline("sd15", size=768)
    assert backbone.size == 768 and backbone.describe(["down.0"]) == outline("sd15").describe(["down.0"])
    assert backbone.shapes(["down.0"], 768, 768) == {"down.0": (320, 48, 48)}


def test_an_outline_at_a_size_that_does_not_fit():
    with pytest.raises(ValueError, match="dit-xl-2-256 takes 256x256 images only, not 512x512"):
        zoo.outline("dit-xl-2-256", size=512)


def test_a_hub_id_of_the_catalog_is_outlined_without_the_hub(monkeypatch):
    monkeypatch.setattr(hub, "fetch_files", None)
    assert zoo.outline("stabilityai/stable-diffusion-2-1").name == "sd21"


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "sd22"])
def test_an_outline_of_nothing_says_what_there_is(model):
    with pytest.raises(OSError, match=f"no model '{model}' here; bundled models: .*alias"):
        zoo.outline(model)


def test_gone_ids_are_mirrors_of_what_took_their_place():
    gone = ["runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-base"]
    assert [catalog.alias_of(one) for one in [*gone, "owner/name"]] == ["sd15", "sd21", "sd20-base", None]


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ValueError, match="no model 'sd22' in the catalog; near it: .*sd21"):
        catalog.describe("sd22")
    with pytest.raises(ValueError, match=r"no model 'zzz' in the catalog \(all of them: repkit models\)$"):
        catalog.describe("zzz")


@pytest.mark.parametrize("name", catalog.bundled())
def test_bundled_models_are_described_without_loading(name):
    told, backbone = catalog.describe(name), zoo.load(name)
    assert (told["size"], told["prediction"]) == (backbone.size, backbone.schedule.prediction)
    assert told["classes"] == len(backbone.class_names or []) and told["class"] == type(backbone.model).__name__


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_predictions_are_read_as_the_schedule_reads_them(prediction):
    config = {"_class_name": "DDIMScheduler", "prediction_type": prediction}
    assert catalog.prediction_of(config) == Schedule.from_diffusers(config).prediction
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert catalog.prediction_of(flow) == Schedule.from_diffusers(flow).prediction


def test_the_files_are_written_as_json_writes_them():
    for path in catalog.CONFIGS.glob("*.json"):
        assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=2, ensure_ascii=False) + "\n"


def test_an_outline_has_no_values():
    assert torch.empty(0, device=outline("sd15").device).is_meta
