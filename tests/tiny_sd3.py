"""Tiny random Stable Diffusion 3 pipelines, also as 3.5-medium has it: normed queries, a second attention."""

from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests import tiny, tiny_t5, tiny_texts

MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}


def transformer(seed: int = 0, **options: Any) -> SD3Transformer2DModel:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 4,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 8,
        "pooled_projection_dim": 14,  # of both CLIPs
        "pos_embed_max_size": 10,
    }
    return tiny.randomise(SD3Transformer2DModel(**(config | options)), seed)


def autoencoder(seed: int = 1) -> AutoencoderKL:
    model = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return tiny.randomise(model, seed)


def pipeline(with_t5: bool = True, **options: Any) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer(**options),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        autoencoder(),
        tiny_texts.clip_encoder(8, projected=True, seed=2),
        tiny_texts.clip_tokenizer(),
        tiny_texts.clip_encoder(10, projected=True, seed=4),
        tiny_texts.clip_tokenizer(pad_token="!"),
        tiny_t5.t5_encoder(24) if with_t5 else None,
        tiny_t5.t5_tokenizer() if with_t5 else None,
    )
