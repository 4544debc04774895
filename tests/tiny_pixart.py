"""Tiny random PixArt pipelines: alpha, which is told the image's size, and Sigma, which is not."""

from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests import tiny, tiny_t5


def transformer(seed: int = 0, **options: Any) -> PixArtTransformer2DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 6,  # 12 channels: a third of them for each size that alpha is told
        "in_channels": 4,
        "out_channels": 8,  # the second half is the learned variance
        "num_layers": 2,
        "cross_attention_dim": 12,
        "caption_channels": 10,
        "norm_num_groups": 4,
        "sample_size": 8,
        "use_additional_conditions": True,
    }
    return tiny.randomise(PixArtTransformer2DModel(**(config | options)), seed)


def autoencoder() -> AutoencoderKL:
    model = tiny.vae_model()
    model.register_to_config(shift_factor=None)  # the published ones have none
    return model


def alpha(**options: Any) -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        tiny_t5.t5_tokenizer(),
        tiny_t5.t5_encoder(10),
        autoencoder(),
        transformer(**options),
        DDPMScheduler(clip_sample=False),
    )


def sigma(**options: Any) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        tiny_t5.t5_tokenizer(),
        tiny_t5.t5_encoder(10),
        autoencoder(),
        transformer(use_additional_conditions=False, **options),
        DDPMScheduler(clip_sample=False),
    )
