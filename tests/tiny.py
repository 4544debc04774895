"""Tiny random networks on pixels and classes: real diffusers classes, a few thousand weights, none of them zero."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from repkit.backbones.dit import DiT
from repkit.backbones.unet import UNet
from repkit.schedule import Schedule


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw every parameter, since weights that start at zero would hide mistakes; frozen, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval().requires_grad_(False)


def unet_model(seed: int = 0, **options: Any) -> UNet2DModel:
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return randomise(UNet2DModel(**(config | options)), seed)


def dit_model(seed: int = 0, **options: Any) -> DiTTransformer2DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,  # the second half is the learned variance
        "num_layers": 2,
        "sample_size": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": 3,
        "norm_num_groups": 4,
    }
    return randomise(DiTTransformer2DModel(**(config | options)), seed)


def vae_model(seed: int = 1) -> AutoencoderKL:
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
            sample_size=8,
        ),
        seed,
    )


def linear(prediction: Any = "eps") -> Schedule:
    return Schedule.from_betas("linear", prediction)


NAMES = ["cat", "dog", "owl"]


def unet(**options: Any) -> UNet:
    return UNet(unet_model(**options), linear())


def grey_unet() -> UNet:
    """Class-conditional with a null class, one channel, learned variance, v-prediction."""
    model = unet_model(in_channels=1, out_channels=2, num_class_embeds=4)
    return UNet(model, linear("v"), name="grey", class_names=NAMES)


def skip_unet() -> UNet:
    """The blocks of NCSN++, whose image pyramid runs beside the network."""
    types = {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    }
    return unet(block_out_channels=(32, 32), norm_num_groups=8, **types)


def resnet_unet() -> UNet:
    """The blocks of ADM, which change size by whole residual blocks; no attention in the middle."""
    return unet(
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        add_attention=False,
        block_out_channels=(8, 16),
    )


def edm_unet() -> UNet:
    return UNet(unet_model(), Schedule.edm())


def dit() -> DiT:
    return DiT(dit_model(), linear(), vae_model(), class_names=NAMES)


def pixel_dit() -> DiT:
    return DiT(dit_model(in_channels=3, out_channels=3, sample_size=8), linear())


OURS = {
    "unet": unet,
    "grey": grey_unet,
    "skip": skip_unet,
    "resnet": resnet_unet,
    "edm": edm_unet,
    "dit": dit,
    "pixel-dit": pixel_dit,
}


def images(count: int = 3, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    """Random 8-bit images as float tensors in [0, 1]."""
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return pixels.float() / 255
