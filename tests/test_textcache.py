import logging

import pytest
import torch

from repkit import zoo
from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Condition
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.strategies import Uniform
from repkit.zeroshot.textcache import TEXT, cache_texts
from tests import tiny, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3

PROMPTS = ["a cat", "two dogs", "an owl at night", "nothing"]
ROWS = torch.tensor([3, 0, 0, 2, 1, 3])
CACHED = {
    "sd": tiny_sd.sd_pipeline,
    "sd21": tiny_sd.sd21_pipeline,
    "sdxl": tiny_sd.sdxl_pipeline,
    "ssd": tiny_sd.ssd_pipeline,
    "pixart-alpha": tiny_pixart.alpha,
    "pixart-sigma": tiny_pixart.sigma,
}


def told(backbone: Backbone) -> Condition:
    return backbone.condition(PROMPTS, len(PROMPTS))


def noised(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(len(ROWS), 4, 8, 8, generator=generator)
    return x_t, torch.randint(0, 1000, (len(ROWS),), generator=generator)


@pytest.mark.parametrize("family", CACHED)
def test_a_looked_up_prompt_is_the_prompt(family: str) -> None:
    backbone = zoo.load(CACHED[family]())
    x_t, t = noised(backbone)
    standing_in, conditions = cache_texts(backbone, told(backbone))
    assert conditions.tensors[TEXT].dtype == torch.int64
    with torch.no_grad():
        expected = backbone.denoise(x_t, t, told(backbone)[ROWS])
        found = standing_in.denoise(x_t, t, conditions[ROWS])
        other = standing_in.denoise(x_t, t, conditions[ROWS.flip(0)])
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (other - expected).abs().max() > 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", ["sd", "pixart-alpha"])
def test_no_forward_projects_a_prompt_again_and_the_model_is_as_it_was(family: str) -> None:
    backbone = zoo.load(CACHED[family]())
    modules, weights = dict(backbone.model.named_modules()), backbone.weights_hash
    standing_in, conditions = cache_texts(backbone, told(backbone))
    ran: list[str] = []
    for path, module in modules.items():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    with torch.no_grad():
        standing_in.denoise(*noised(backbone), conditions[ROWS])
        assert not [path for path in ran if path.endswith(("attn2.to_k", "attn2.to_v", "caption_projection"))]
        backbone.denoise(*noised(backbone), told(backbone)[ROWS])
    assert [path for path in ran if path.endswith("attn2.to_k")]
    assert dict(backbone.model.named_modules()) == modules and backbone.weights_hash == weights


@pytest.mark.parametrize("pipeline", [tiny_sd3.pipeline, tiny_flux.flux_pipeline])
def test_joint_attention_is_left_alone(pipeline) -> None:
    backbone = zoo.load(pipeline())
    conditions = told(backbone)
    assert cache_texts(backbone, conditions) == (backbone, conditions)


def test_labels_and_layers_of_another_kind_are_left_alone() -> None:
    grey, sd = tiny.grey_unet(), zoo.load(tiny_sd.sd_pipeline())
    labels = grey.condition([0, 1], 2)
    assert cache_texts(grey, labels) == (grey, labels)

    class Processor(type(sd.model.mid_block.attentions[0].transformer_blocks[0].attn2.processor)):  # type: ignore[misc]
        """What may look at the text in its own way."""

    sd.model.mid_block.attentions[0].transformer_blocks[0].attn2.processor = Processor()
    conditions = told(sd)
    assert cache_texts(sd, conditions) == (sd, conditions)


def test_a_module_with_a_forward_of_its_own_is_left_alone() -> None:
    backbone = zoo.load(tiny_sd.sd_pipeline())
    conditions = told(backbone)
    block = backbone.model.mid_block
    block.forward = block.forward
    assert cache_texts(backbone, conditions) == (backbone, conditions)


def test_the_budget_is_the_size_of_the_tables(caplog: pytest.LogCaptureFixture) -> None:
    backbone = zoo.load(tiny_sd.sd_pipeline())
    conditions = told(backbone)
    standing_in, _ = cache_texts(backbone, conditions)
    tables = [table for module in standing_in.model.modules() if (table := getattr(module, "table", None)) is not None]
    size = sum(table.nbytes for table in tables)
    assert cache_texts(backbone, conditions, budget=size)[0] is not backbone
    with caplog.at_level(logging.INFO, "repkit"):
        assert cache_texts(backbone, conditions, budget=size - 1) == (backbone, conditions)
    assert f"take {size} bytes, more than {size - 1}" in caplog.text


@pytest.mark.parametrize("family", ["sd", "pixart-sigma"])
def test_a_classifier_scores_as_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = zoo.load(CACHED[family]())
    judge = DiffusionClassifier(backbone, PROMPTS, strategy=Uniform(4), weighting="train", batch_size=7)
    images = tiny.images(3)
    cached = judge.errors(images)
    monkeypatch.setattr("repkit.zeroshot.classifier.cache_texts", lambda *given: given)
    plain = judge.errors(images)
    torch.testing.assert_close(cached, plain, rtol=1e-6, atol=0)
