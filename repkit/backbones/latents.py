"""Images to clean latents: pixels as they are, or the posterior of an autoencoder."""

from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

Latent = Literal["mode", "sample"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601; a grey image keeps its value


def encode_pixels(images: Float[Tensor, "b 3 H W"], channels: int) -> Float[Tensor, "b c H W"]:
    """RGB in [0, 1] to [-1, 1], reduced to luma for a network of one channel."""
    if channels == 1:
        images = einsum(images, torch.tensor(_LUMA, device=images.device), "b c h w, c -> b h w")[:, None]
    elif channels != 3:
        raise ValueError(f"a pixel model with {channels} channels is not supported; have 1 (luma) and 3 (RGB)")
    return images * 2 - 1


def encode_vae(vae: Any, images: Float[Tensor, "b 3 H W"], latent: Latent) -> Float[Tensor, "b c h w"]:
    """The mode, or a sample, of the autoencoder's posterior, shifted and scaled as the denoiser was trained on it."""
    images = (images * 2 - 1).to(next(vae.parameters()).dtype)
    posterior = vae.encode(images).latent_dist
    x0 = posterior.mode() if latent == "mode" else posterior.sample()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (x0.float() - shift) * vae.config.scaling_factor


def latent_stride(vae: Any, channels: int, name: str) -> int:
    """Image pixels a latent pixel. Raises ValueError unless the autoencoder makes as many channels as `name` takes."""
    stride = vae_stride(vae)
    if channels != (made := vae.config.latent_channels):
        raise ValueError(
            f"{name} takes latents of {channels} channels and the autoencoder makes {made}; give the vae= that it was "
            "trained on (models that see a second image, as for inpainting, editing or upscaling, are not supported)"
        )
    return stride


def vae_stride(vae: Any) -> int:
    """Image pixels a latent pixel. Raises ValueError where a model on latents came without an autoencoder."""
    if vae is None:
        raise ValueError("the pipeline came without its vae, so images cannot become latents; get all of its parts")
    return 2 ** (len(vae.config.block_out_channels) - 1)
