import logging

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from repkit.extractors import DiffusionExtractor
from repkit.trimming import trim
from repkit.zoo import load
from tests import tiny, tiny_adm, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sit


def loaded(backbone):
    """As if it had come from a folder."""
    backbone.provenance = {"model": "somewhere"}
    return backbone


def unread_bytes(network, forward):
    """Those of the parameters that `forward`, which returns a tensor, leaves without a gradient."""
    network.requires_grad_(True)
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(forward().sum(), parameters, allow_unused=True)
    network.requires_grad_(False)
    return sum(one.nbytes for one, gradient in zip(parameters, gradients, strict=True) if gradient is None)


def hooked(module, run):
    taken = []
    handle = module.register_forward_hook(lambda module, args, output: taken.append(output))
    run()
    handle.remove()
    return taken[0][0] if isinstance(taken[0], tuple) else taken[0]


@pytest.mark.parametrize(("tap", "path"), [("down.0", "down_blocks.0"), ("mid", "mid_block"), ("up.0", "up_blocks.0")])
def test_a_trimmed_unet_gives_the_same_and_frees_what_no_gradient_reaches(tap, path):
    whole, backbone, images = tiny.unet(), loaded(tiny.unet()), tiny.images()
    expected = DiffusionExtractor(whole, f"{tap}@100")
    extract = DiffusionExtractor(backbone, f"{tap}@100", trim=True)
    assert torch.equal(extract(images)[f"{tap}@100"], expected(images)[f"{tap}@100"])
    assert extract.identity == expected.identity and extract.shapes == expected.shapes
    model = whole.model
    unread = unread_bytes(model, lambda: hooked(model.get_submodule(path), lambda: model(images, 10)))
    assert backbone.trimmed == unread > 0
    kept = sum(one.nbytes for one in backbone.model.parameters() if not one.is_meta)
    assert kept + unread == sum(one.nbytes for one in model.parameters())


def test_the_decoder_goes_too():
    whole, backbone, images = tiny.dit(), loaded(tiny.dit()), tiny.images(2, 8, 8)
    taps = "block.0.in.adaln@clean,50"
    found = DiffusionExtractor(backbone, taps, trim=True)(images)
    for key, expected in DiffusionExtractor(whole, taps)(images).items():
        assert torch.equal(found[key], expected)
    assert all(one.is_meta for one in backbone.vae.decoder.parameters())
    assert not any(one.is_meta for one in backbone.vae.encoder.parameters())
    blocks = backbone.model.transformer_blocks
    assert all(one.is_meta for one in blocks[1].parameters()) and all(one.is_meta for one in blocks[0].ff.parameters())


@pytest.mark.parametrize(
    ("build", "tap"),
    [
        (tiny_adm.adm, "mid"),
        (tiny_sit.svg, "block.0"),
        (lambda: load(tiny_pixart.alpha()), "block.0"),  # its root has a weight of its own, which only the tail reads
        (lambda: load(tiny_sd.sdxl_pipeline()), "mid"),
        (lambda: load(tiny_sd3.pipeline(with_t5=False)), "block.0.attn.map"),
        (lambda: load(tiny_flux.flux_pipeline()), "single.0.in.adaln"),
    ],
    ids=["adm", "svg", "pixart", "sdxl", "sd3", "flux"],
)
def test_every_family_gives_the_same_from_what_is_left(build, tap):
    backbone = build()
    images = tiny.images(2, backbone.size, backbone.size)
    expected = DiffusionExtractor(backbone, f"{tap}@100")
    whole, place = expected(images), (backbone.device, backbone.dtype)
    extract = DiffusionExtractor(loaded(backbone), f"{tap}@100", trim=True)
    found = extract(images)
    assert torch.equal(found[f"{tap}@100"], whole[f"{tap}@100"]) and found.identity == whole.identity
    assert backbone.trimmed > 0 and (backbone.device, backbone.dtype) == place
    assert all(any(not one.is_meta for one in network.parameters()) for network in backbone.networks.values())


def test_what_needs_more_is_refused_and_what_is_left_works():
    backbone, images = loaded(tiny.unet()), tiny.images()
    expected = DiffusionExtractor(tiny.unet(), "down.0,down.1.resnet.0@50")(images)
    DiffusionExtractor(backbone, "mid@100", trim=True)
    found = DiffusionExtractor(backbone, "down.0,down.1.resnet.0@50")(images)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    message = "unet was trimmed to mid and has no weights for more; load it again"
    with pytest.raises(ValueError, match=message):
        DiffusionExtractor(backbone, "up.0@100")
    with pytest.raises(ValueError, match=message):
        DiffusionExtractor(backbone, "/up_blocks.1@100")
    with pytest.raises(ValueError, match=message):
        backbone.denoise(images, 10, backbone.condition(None, 3))
    with pytest.raises(ValueError, match=message):
        backbone.model.state_dict()


def test_the_hash_is_the_whole_models_until_a_weight_changes():
    backbone = loaded(tiny.unet())
    extract = DiffusionExtractor(backbone, "mid@100", trim=True)
    assert backbone.weights_hash == tiny.unet().weights_hash == extract(tiny.images()).identity["weights"]
    backbone.model.conv_in.weight.mul_(2)
    with pytest.raises(ValueError, match="load it again"):
        extract(tiny.images())


def test_an_input_tap_needs_nothing_of_its_module():
    backbone = loaded(tiny.dit())
    extract = DiffusionExtractor(backbone, "block.1.in@100", trim=True)
    assert all(one.is_meta for one in backbone.model.transformer_blocks[1].parameters())
    expected = DiffusionExtractor(tiny.dit(), "block.0@100")(tiny.images(2, 8, 8))["block.0@100"]
    assert torch.equal(extract(tiny.images(2, 8, 8))["block.1.in@100"], expected)


def test_only_what_repkit_loaded_is_trimmed(tmp_path, caplog):
    pipeline = DDPMPipeline(tiny.unet_model(), DDPMScheduler())
    for backbone in (load(pipeline), tiny.unet()):
        with pytest.raises(ValueError, match="was handed in, so its weights are not repkit's to free"):
            DiffusionExtractor(backbone, "mid@100", trim=True)
        assert backbone.trimmed == 0 and not any(one.is_meta for one in backbone.model.parameters())
    pipeline.save_pretrained(tmp_path)
    backbone = load(tmp_path)
    with caplog.at_level(logging.INFO, "repkit"):
        freed = trim(backbone, ["mid"])
    assert freed == backbone.trimmed > 0
    assert f"trimmed to mid: {freed / 2**20:.1f} MiB freed" in caplog.text


def test_gradients_still_reach_the_images():
    images = tiny.images().requires_grad_()
    extract = DiffusionExtractor(loaded(tiny.unet()), "mid@261", trim=True)
    extract(images, grad=True)["mid@261"].square().sum().backward()
    assert images.grad.abs().max() > 0
