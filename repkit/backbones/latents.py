"""Images to clean latents and back: pixels as they are, or an autoencoder's posterior and its decoder."""

from typing import Any, Literal

import torch
from einops import einsum, repeat
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


def decode_pixels(x0: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 3 H W"]:
    """The inverse of `encode_pixels`, clipped; of one channel it is a grey image."""
    images = (x0.float() + 1) / 2
    return (repeat(images, "b 1 h w -> b c h w", c=3) if x0.shape[1] == 1 else images).clamp(0, 1)


def encode_vae(vae: Any, images: Float[Tensor, "b 3 H W"], latent: Latent) -> Float[Tensor, "b c h w"]:
    """The mode, or a sample, of the autoencoder's posterior, shifted and scaled as the denoiser was trained on it."""
    images = (images * 2 - 1).to(next(vae.parameters()).dtype)
    posterior = vae.encode(images).latent_dist
    x0 = posterior.mode() if latent == "mode" else posterior.sample()
    return (x0.float() - _shift(vae)) * vae.config.scaling_factor


def decode_vae(vae: Any, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """What the autoencoder makes of latents as the denoiser has them, clipped."""
    latents = (x0.float() / vae.config.scaling_factor + _shift(vae)).to(next(vae.parameters()).dtype)
    return ((vae.decode(latents).sample.float() + 1) / 2).clamp(0, 1)


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


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
