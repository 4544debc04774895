"""The page that says how to add a model: its code is run here, in its order."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from repkit import zoo
from repkit.extractors import DiffusionExtractor
from tests import tiny

PAGE = Path(__file__).parent.parent / "docs" / "ADD_A_MODEL.md"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The page's model, added as the page says, saved and loaded by its path; with the pipeline and its check."""
    family, line, tests, check = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    name = "repkit.backbones.auraflow"
    module = ModuleType(name)
    exec(compile(family, name, "exec"), module.__dict__)
    page = {"FAMILIES": dict(zoo.FAMILIES), "torch": torch}
    for block in (line, tests, check):
        exec(compile(block, str(PAGE), "exec"), page)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        patch.setattr(zoo, "FAMILIES", page["FAMILIES"])
        pipe = page["pipeline"]()
        folder = tmp_path_factory.mktemp("auraflow")
        pipe.save_pretrained(folder)
        yield zoo.load(folder), pipe, page["check"]


def test_the_page_adds_a_model_that_predicts_what_diffusers_predicts(loaded):
    backbone, pipe, check = loaded
    check(backbone, pipe)


def test_its_blocks_are_what_they_are_said_to_be(loaded):
    backbone, pipe, _ = loaded
    assert list(backbone.blocks) == ["block.0", "block.1", "single.0", "single.1"]
    features = DiffusionExtractor(backbone, "*.*@200", cond="a cat")(tiny.images(2, 8, 16))
    assert {value.shape for value in features.values()} == {(2, 16, 2, 4)}
    assert 0 < backbone.flops["block.0"] < backbone.flops["single.1"] < 1


def test_the_image_tokens_are_taken_not_the_text(loaded):
    backbone, pipe, _ = loaded
    seen = {}
    blocks = pipe.transformer.joint_transformer_blocks[0], pipe.transformer.single_transformer_blocks[1]
    for name, block in zip(("block.0", "single.1"), blocks, strict=True):
        block.register_forward_hook(lambda module, args, out, name=name: seen.setdefault(name, out))
    x_t = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    told = pipe.encode_prompt(["a cat"], do_classifier_free_guidance=False)[0]
    pipe.transformer(x_t, encoder_hidden_states=told, timestep=torch.tensor([0.1]))
    maps = backbone.activations(x_t, 100, backbone.condition("a cat", 1), ["block.0", "single.1"])
    torch.testing.assert_close(maps["block.0"].flatten(2).mT, seen["block.0"][1])
    text = 8 + 256  # registers and text come first
    torch.testing.assert_close(maps["single.1"].flatten(2).mT, seen["single.1"][:, text:])
