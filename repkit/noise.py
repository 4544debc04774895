"""Noise that depends on the image alone: the same image gets the same eps whatever its batch, order or process."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

NOISE_VERSION = 1
SHARED = b"shared"  # stands in for the digest where every image is to get the same noise


def noise_like(shape: Sequence[int], *, seed: int, digest: bytes, t: float | int, draw: int) -> Float[Tensor, "..."]:
    """Standard normal noise of one image, float32 on the CPU: a function of (seed, digest, t, draw) and nothing else.

    The four make the key of a counter-based generator (numpy's Philox), so no state passes from one image to the next.
    """
    name = struct.pack("<Iqdq", NOISE_VERSION, seed, float(t), draw) + digest
    key = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def batch_noise(
    shape: Sequence[int], *, seed: int, digests: Sequence[bytes], t: float | int, draw: int
) -> Float[Tensor, "b ..."]:
    """The noise of each image of a batch, stacked; equal digests are drawn once."""
    drawn = {digest: noise_like(shape, seed=seed, digest=digest, t=t, draw=draw) for digest in dict.fromkeys(digests)}
    return torch.stack([drawn[digest] for digest in digests])
