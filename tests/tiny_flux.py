"""Tiny FLUX.1 pipelines: real diffusers and transformers classes, a few thousand weights, none of them zero."""

from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from repkit.backbones.flux import Flux
from repkit.schedule import Schedule
from tests.tiny import randomise
from tests.tiny_t5 import t5_encoder, t5_tokenizer
from tests.tiny_texts import clip_encoder, clip_tokenizer

TEXT, POOLED = 12, 10  # widths of T5 and CLIP


def flux_model(seed: int = 0, **options: Any) -> FluxTransformer2DModel:
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }
    return randomise(FluxTransformer2DModel(**(config | options)), seed)


def flux_vae(seed: int = 1) -> AutoencoderKL:
    """As FLUX's: shifted and scaled, without convolutions around the latent."""
    return randomise(
        AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            scaling_factor=0.7,
            shift_factor=0.1,
            sample_size=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        seed,
    )


def flux_pipeline(**options: Any) -> FluxPipeline:
    """FLUX.1-dev; with guidance_embeds=False FLUX.1-schnell."""
    shift = options.get("guidance_embeds", True)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shift, shift=3.0 if shift else 1.0),
        vae=flux_vae(),
        text_encoder=clip_encoder(POOLED),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(TEXT),
        tokenizer_2=t5_tokenizer(),
        transformer=flux_model(**options),
    )


def flux(**options: Any) -> Flux:
    """Without text encoders, and with short texts, for what needs no prompt."""
    return Flux(flux_model(), Schedule.flow(3.0), flux_vae(), **{"tokens": 5, **options})
