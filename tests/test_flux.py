"""FLUX.1 against diffusers: its pipeline, and plain calls and hooks of its transformer."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.models.embeddings import apply_rotary_emb
from einops import rearrange

import repkit
from repkit.backbones.flux import Flux, pack, unpack
from repkit.capture import Point
from repkit.schedule import Schedule
from tests import tiny, tiny_flux

HEIGHT, WIDTH = 16, 24  # a latent of 8x12, a grid of 4x6
PROMPTS = ["a cat", "two dogs", ""]
SIGMA = 0.26


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux.flux_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dev(folder):
    return repkit.load(folder)


@pytest.fixture(scope="module")
def schnell():
    pipeline = tiny_flux.flux_pipeline(guidance_embeds=False)
    return pipeline, repkit.load(pipeline)


@pytest.fixture
def flux():
    return tiny_flux.flux()


def noised(backbone, rows=3):
    x0 = backbone.encode(tiny.images(rows, HEIGHT, WIDTH))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    return x0, eps, (1 - SIGMA) * x0 + SIGMA * eps


def drawn_condition(backbone, rows):
    """Random embeddings, which say more than a tiny text encoder does."""
    generator = torch.Generator().manual_seed(1)
    blank = backbone.blank_condition(rows)
    return type(blank)({name: torch.randn(t.shape, generator=generator) for name, t in blank.tensors.items()})


def call_by_hand(pipeline, x_t, sigma, texts, pooled, guidance):
    """diffusers' own packing, positions and unpacking around a plain call."""
    rows, channels, h, w = x_t.shape
    ids = FluxPipeline._prepare_latent_image_ids(rows, h // 2, w // 2, "cpu", torch.float32)
    out = pipeline.transformer(
        hidden_states=FluxPipeline._pack_latents(x_t, rows, channels, h, w),
        timestep=torch.full((rows,), sigma),
        guidance=None if guidance is None else torch.full((rows,), guidance),
        pooled_projections=pooled,
        encoder_hidden_states=texts,
        txt_ids=torch.zeros(texts.shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(out, 2 * h, 2 * w, vae_scale_factor=2)


def on_grid(tokens):
    return rearrange(tokens, "b (h w) c -> b c h w", h=4, w=6)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * max(1.0, wanted.abs().max().item()))


def test_a_folder_loads_as_the_pipeline_does(dev, pipeline):
    assert isinstance(dev, Flux) and isinstance(repkit.load(pipeline), Flux)
    assert (dev.size, dev.multiple, dev.clean_t) == (16, 4, 0)
    assert dev.weights_hash == repkit.load(pipeline).weights_hash
    assert dev.schedule == Schedule.from_diffusers(pipeline.scheduler)
    assert dev.options == {"latent": "mode", "guidance": "3.5", "tokens": "512"}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_texts_are_encoded_as_the_pipeline_does(dev, pipeline, prompt):
    texts, pooled, _ = pipeline.encode_prompt(prompt)
    told = dev.condition(prompt, 1).tensors
    assert torch.equal(told["encoder_hidden_states"], texts) and torch.equal(told["pooled_projections"], pooled)
    assert {name: tensor.shape for name, tensor in dev.blank_condition(1).tensors.items()} == {
        name: tensor.shape for name, tensor in told.items()
    }


def test_schnell_reads_shorter_texts_and_has_no_guidance(schnell):
    pipeline, backbone = schnell
    texts, pooled, _ = pipeline.encode_prompt("a cat", max_sequence_length=256)
    assert torch.equal(backbone.condition("a cat", 1).tensors["encoder_hidden_states"], texts)
    assert backbone.options["guidance"] == "None" and backbone.options["tokens"] == "256"
    x0, _, x_t = noised(backbone, 1)
    wanted = call_by_hand(pipeline, x_t, SIGMA, texts, pooled, None)
    close(backbone.denoise(x_t, 1000 * SIGMA, backbone.condition("a cat", 1)), wanted)


def test_no_prompt_is_the_empty_text(dev):
    null, empty, cat = (dev.condition(cond, 1).tensors["encoder_hidden_states"] for cond in (None, "", "a cat"))
    assert torch.equal(null, empty) and not torch.allclose(null, cat)


def test_latents_noise_features_and_conversions_are_those_of_plain_calls(dev, pipeline):
    images = tiny.images(3, HEIGHT, WIDTH)
    x0, eps, x_t = noised(dev)
    moments = pipeline.vae.encoder(images * 2 - 1)
    assert torch.equal(x0, (moments[:, :4] - 0.1) * 0.7)
    close(dev.schedule.add_noise(x0, eps, 1000 * SIGMA), x_t)
    texts, pooled = (torch.cat(rows) for rows in zip(*(pipeline.encode_prompt(p)[:2] for p in PROMPTS), strict=True))
    taken = {}
    blocks = {"block.1": pipeline.transformer.transformer_blocks[1]}
    blocks["single.1"] = pipeline.transformer.single_transformer_blocks[1]
    handles = [
        block.register_forward_hook(lambda m, a, out, name=name: taken.update({name: on_grid(out[1])}))
        for name, block in blocks.items()
    ]
    flow = call_by_hand(pipeline, x_t, SIGMA, texts, pooled, 3.5)
    for handle in handles:
        handle.remove()
    condition = dev.condition(PROMPTS, 3)
    for name, found in dev.activations(x_t, 1000 * SIGMA, condition, list(blocks)).items():
        close(found, taken[name])
    prediction = dev.denoise(x_t, 1000 * SIGMA, condition)
    close(prediction, flow)
    close(dev.schedule.convert(prediction, x_t, 1000 * SIGMA, to="x0"), x_t - SIGMA * flow)
    close(dev.schedule.convert(prediction, x_t, 1000 * SIGMA, to="eps"), x_t + (1 - SIGMA) * flow)


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_one_step_of_the_pipeline_is_the_prediction(name, dev, pipeline, schnell):
    """An Euler step to sigma 0 is x_t - sigma * prediction, with everything the pipeline does on the way."""
    pipeline, backbone = (pipeline, dev) if name == "dev" else schnell
    sigma = 1.0 if name == "dev" else SIGMA  # dev's scheduler would shift any other
    pipeline.set_progress_bar_config(disable=True)
    x_t = torch.randn(1, 4, HEIGHT // 2, WIDTH // 2, generator=torch.Generator().manual_seed(2))
    # The whole step is in packed tokens; the pipeline takes guidance 3.5 if it is not told another.
    packed = FluxPipeline._pack_latents(x_t, 1, 4, HEIGHT // 2, WIDTH // 2)
    told = {"height": HEIGHT, "width": WIDTH, "latents": packed, "max_sequence_length": backbone.tokens}
    stepped = pipeline(
        "a cat", sigmas=[sigma], num_inference_steps=1, guidance_scale=3.5, output_type="latent", **told
    ).images
    prediction = backbone.denoise(x_t, 1000 * sigma, backbone.condition("a cat", 1))
    close(pack(x_t - sigma * prediction), stepped)


def test_guidance_matters_and_is_in_the_identity(dev):
    other = Flux(dev.model, dev.schedule, dev.vae, dev.prompts.texts, guidance=1.0)
    _, _, x_t = noised(dev, 1)
    told = [each.denoise(x_t, 260, each.condition("a cat", 1)) for each in (dev, other)]
    assert not torch.allclose(told[0], told[1], rtol=1e-3)
    identities = [repkit.DiffusionExtractor(each, "single.0@260").identity for each in (dev, other)]
    assert identities[0]["guidance"] == "3.5" and identities[1]["guidance"] == "1.0"


def modulation(norm, temb, count):
    return [chunk[:, None] for chunk in norm.linear(F.silu(temb)).chunk(count, dim=1)]


def maps_and_temb(flux):
    _, _, x_t = noised(flux, 2)
    condition = drawn_condition(flux, 2)
    temb = flux.model.time_text_embed(
        torch.full((2,), 1000 * SIGMA), torch.full((2,), 3500.0), condition.tensors["pooled_projections"]
    )
    maps = flux.activations(x_t, 1000 * SIGMA, condition, list(flux.points))
    return {name: rearrange(found, "b c h w -> b (h w) c") for name, found in maps.items()}, temb


def test_inner_taps_of_double_blocks_are_what_the_block_adds_up(flux):
    maps, temb = maps_and_temb(flux)
    for index, block in enumerate(flux.model.transformer_blocks):
        name = f"block.{index}"
        shift, scale, gate, _, _, gate_mlp = modulation(block.norm1, temb, 6)
        hidden = maps[f"{name}.in"]
        normed = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale) + shift
        close(maps[f"{name}.in.adaln"], normed)
        close(maps[f"{name}.attn.q"], F.linear(normed, block.attn.to_q.weight, block.attn.to_q.bias))
        close(maps[f"{name}.attn.k"], F.linear(normed, block.attn.to_k.weight, block.attn.to_k.bias))
        close(maps[f"{name}.attn.v"], F.linear(normed, block.attn.to_v.weight, block.attn.to_v.bias))
        close(maps[name], hidden + gate * maps[f"{name}.attn.out"] + gate_mlp * maps[f"{name}.mlp"])
    close(maps["block.1.in"], maps["block.0"])


def test_inner_taps_of_single_blocks_are_the_image_part_of_what_the_block_adds_up(flux):
    maps, temb = maps_and_temb(flux)
    close(maps["single.0.in"], maps["block.1"])
    close(maps["single.1.in"], maps["single.0"])
    for index, block in enumerate(flux.model.single_transformer_blocks):
        name = f"single.{index}"
        shift, scale, gate = modulation(block.norm, temb, 3)
        hidden = maps[f"{name}.in"]
        normed = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale) + shift
        close(maps[f"{name}.in.adaln"], normed)
        close(maps[f"{name}.attn.q"], F.linear(normed, block.attn.to_q.weight, block.attn.to_q.bias))
        close(maps[f"{name}.attn.v"], F.linear(normed, block.attn.to_v.weight, block.attn.to_v.bias))
        close(maps[f"{name}.mlp"], F.gelu(block.proj_mlp(normed), approximate="tanh"))
        joined = torch.cat([maps[f"{name}.attn.out"], maps[f"{name}.mlp"]], dim=2)
        close(maps[name], hidden + gate * block.proj_out(joined))


def test_adaln_taps_are_what_attention_is_given(flux):
    _, _, x_t = noised(flux, 1)
    condition = drawn_condition(flux, 1)
    given = {}
    attentions = {f"block.{i}": block.attn for i, block in enumerate(flux.model.transformer_blocks)}
    attentions |= {f"single.{i}": block.attn for i, block in enumerate(flux.model.single_transformer_blocks)}
    for name, attention in attentions.items():
        attention.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: given.update({name: kwargs["hidden_states"][:, -24:]}), with_kwargs=True
        )
    flux.denoise(x_t, 260, condition)
    for name, tokens in given.items():
        tap = f"{name}.in.adaln"
        assert torch.equal(flux.activations(x_t, 260, condition, [tap])[tap], on_grid(tokens))


@pytest.mark.parametrize("name", ["block.1", "single.0"])
def test_maps_are_how_image_tokens_look_at_image_and_text(flux, name):
    _, _, x_t = noised(flux, 2)
    condition = drawn_condition(flux, 2)
    kind, index = name.split(".")
    blocks = flux.model.transformer_blocks if kind == "block" else flux.model.single_transformer_blocks
    attention, given = blocks[int(index)].attn, {}
    attention.register_forward_pre_hook(lambda m, args, kwargs: given.update(kwargs), with_kwargs=True)
    maps = flux.activations(x_t, 260, condition, [f"{name}.attn.map", f"{name}.attn.text.map"])

    def heads(projection, norm, tokens):
        return norm(rearrange(projection(tokens), "b n (head c) -> b n head c", head=2))

    q, k = (
        heads(getattr(attention, f"to_{part}"), getattr(attention, f"norm_{part}"), given["hidden_states"])
        for part in "qk"
    )
    if kind == "block":
        text = given["encoder_hidden_states"]
        q = torch.cat([heads(attention.add_q_proj, attention.norm_added_q, text), q], dim=1)
        k = torch.cat([heads(attention.add_k_proj, attention.norm_added_k, text), k], dim=1)
    q, k = (apply_rotary_emb(part, given["image_rotary_emb"], sequence_dim=1) for part in (q, k))
    weights = (torch.einsum("bqhc,bkhc->bhqk", q, k) / 8**0.5).softmax(-1).mean(1)[:, 5:]
    close(maps[f"{name}.attn.map"], rearrange(weights[:, :, 5:], "b (h w) k -> b k h w", h=4))
    close(maps[f"{name}.attn.text.map"], rearrange(weights[:, :, :5], "b (h w) k -> b k h w", h=4))


def test_stopping_gives_the_bits_of_the_full_run(flux):
    _, _, x_t = noised(flux, 2)
    condition = drawn_condition(flux, 2)
    full = flux.activations(x_t, 260, condition, [*flux.points, "/proj_out"])
    for name in flux.points:
        assert torch.equal(flux.activations(x_t, 260, condition, [name])[name], full[name])


def test_a_batch_gives_what_its_images_give_alone(dev):
    _, _, x_t = noised(dev)
    names = ["block.0.mlp", "single.1.in.adaln", "single.1"]
    together = dev.activations(x_t, 260, dev.condition(PROMPTS, 3), names)
    for row, prompt in enumerate(PROMPTS):
        alone = dev.activations(x_t[row : row + 1], 260, dev.condition(prompt, 1), names)
        for name in names:
            scale = together[name].abs().max().item()
            torch.testing.assert_close(together[name][row], alone[name][0], rtol=0, atol=1e-5 * scale)
    swapped = dev.activations(x_t, 260, dev.condition(PROMPTS[::-1], 3), ["single.1"])["single.1"]
    assert not torch.allclose(swapped[0], together["single.1"][0])


def test_taps_do_not_keep_the_joint_sequence_in_memory(flux):
    _, _, x_t = noised(flux, 1)
    maps = flux.activations(x_t, 260, drawn_condition(flux, 1), list(flux.points))
    assert all(found.untyped_storage().nbytes() == found.nbytes for found in maps.values())


def test_single_blocks_that_return_the_joint_sequence_fold_alike(flux):
    """Older diffusers pass text and image on as one tensor."""
    _, _, x_t = noised(flux, 2)
    text, image = torch.randn(2, 5, 16), torch.randn(2, 24, 16)
    point = Point("single_transformer_blocks.0")
    joined = flux.fold(point, torch.cat([text, image], dim=1), x_t)
    assert torch.equal(joined, flux.fold(point, (text, image), x_t)) and torch.equal(joined, on_grid(image))


def test_packing_is_the_pipelines(flux):
    _, _, x_t = noised(flux, 2)
    packed = FluxPipeline._pack_latents(x_t, 2, 4, 8, 12)
    assert torch.equal(pack(x_t), packed) and torch.equal(unpack(packed, 4, 6), x_t)


def test_sizes_are_multiples_of_two_latent_pixels(flux):
    with pytest.raises(ValueError, match="multiples of 4, not 18x24; nearest: 16x24"):
        flux.check_size(18, 24)
    assert flux.shapes(["single.1", "single.1.mlp"], 20, 12) == {"single.1": (16, 5, 3), "single.1.mlp": (64, 5, 3)}


def test_half_precision_is_that_of_plain_calls(folder, pipeline):
    half = repkit.load(folder, dtype=torch.bfloat16, vae_dtype=torch.float32)
    _, _, x_t = noised(half, 1)
    condition = half.condition("a cat", 1)
    lowered = FluxPipeline(**{**pipeline.components, "transformer": half.model})
    texts, pooled = condition.tensors["encoder_hidden_states"], condition.tensors["pooled_projections"]
    wanted = call_by_hand(lowered, x_t.bfloat16(), SIGMA, texts, pooled, 3.5)
    assert torch.equal(half.denoise(x_t, 1000 * SIGMA, condition), wanted.float())


def test_texts_need_both_encoders_and_are_no_classes(pipeline, dev):
    lacking = FluxPipeline(**{**pipeline.components, "text_encoder_2": None, "tokenizer_2": None})
    with pytest.raises(ValueError, match="came without tokenizer_2, text_encoder_2"):
        repkit.load(lacking).condition("a cat", 1)
    with pytest.raises(ValueError, match="is told a text, not the class 3"):
        dev.condition(3, 1)


def test_transformers_that_take_more_than_the_latent_are_refused():
    with pytest.raises(ValueError, match="takes latents of 24 channels and the autoencoder makes 4"):
        Flux(tiny_flux.flux_model(in_channels=96, out_channels=16), Schedule.flow(), tiny_flux.flux_vae())
