"""Tiny random pipelines of the Stable Diffusion family: every part a real class, every structure that of the original.

Latents are 8 cells wide and images 16 pixels; two stages suffice for a middle, a sampler each way and skips.
"""

from typing import Any

from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.tiny import randomise, vae_model
from tests.tiny_texts import clip_encoder, clip_tokenizer

BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def sd_unet(seed: int = 0, **options: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
        "attention_head_dim": 2,  # heads, by the old name that SD's configs keep
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return randomise(UNet2DConditionModel(**(config | options)), seed)


def sdxl_unet(seed: int = 0, **options: Any) -> UNet2DConditionModel:
    """No attention at full resolution, and several blocks deep below."""
    config = {
        "cross_attention_dim": 12 + 10,
        "attention_head_dim": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
    }
    return sd_unet(seed, **(config | options))


def sd_pipeline(unet: Any = None, **parts: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1: eps-prediction, convolutions around attention."""
    components = {
        "vae": vae_model(),
        "text_encoder": clip_encoder(12),
        "tokenizer": clip_tokenizer(),
        "unet": unet or sd_unet(),
        "scheduler": PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return StableDiffusionPipeline(**(components | parts))


def sd21_pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion 2.1: v-prediction, linear layers around attention, more heads below."""
    unet = sd_unet(attention_head_dim=(1, 4), use_linear_projection=True)
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    return sd_pipeline(unet, scheduler=scheduler)


def sdxl_pipeline(unet: Any = None, **parts: Any) -> StableDiffusionXLPipeline:
    """SDXL: two text encoders, the second with a projection and padded with an exclamation mark."""
    components = {
        "vae": vae_model(),
        "text_encoder": clip_encoder(12),
        "text_encoder_2": clip_encoder(10, projected=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad_token="!"),
        "unet": unet or sdxl_unet(),
        "scheduler": EulerDiscreteScheduler(**BETAS, steps_offset=1),
        "add_watermarker": False,
    }
    return StableDiffusionXLPipeline(**(components | parts))


def ssd_pipeline() -> StableDiffusionXLPipeline:
    """SSD-1B: one residual block in the middle, and depths that differ from layer to layer and between down and up."""
    depths = {
        "transformer_layers_per_block": (1, 2),
        "reverse_transformer_layers_per_block": ((2, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    }
    return sdxl_pipeline(sdxl_unet(**depths))
