"""Bases: the principal components of an extractor's maps over a set of images, fitted once and saved."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from repkit.extractors import Extractor, Images
from repkit.features import Features


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal directions `components`, that of the largest variance first, of channels centred by `mean`."""

    mean: Float[Tensor, " c"]
    components: Float[Tensor, "d c"]

    def project(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """The coordinates of each pixel."""
        centred = maps - rearrange(self.mean.to(maps), "c -> c 1 1")
        return einsum(centred, self.components.to(maps), "b c h w, d c -> b d h w")

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over the shape and the values."""
        digest = hashlib.sha256(f"{tuple(self.components.shape)}:".encode())
        for tensor in (self.mean, self.components):
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Moments:
    """What a covariance needs of the pixels seen so far: their number, their sum, the sum of their outer products."""

    count: int
    total: Float64[Tensor, " c"]
    second: Float64[Tensor, "c c"]

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.second + other.second)


def fit_bases(
    extractor: Extractor, images: Images, dim: int, *, keys: Sequence[str] | None = None, batch_size: int = 16
) -> dict[str, Basis]:
    """The first `dim` principal components of each key over all pixels of `images`, without those that were padded.

    Exact (by the eigenvectors of the covariance, in float64), so the same images give the same bases. keys: None is
    all of the extractor's. Raises ValueError where there are fewer channels or pixels than components.
    """
    chosen = list(extractor.blocks if keys is None else keys)
    moments: dict[str, Moments] = {}
    for start in range(0, len(images), batch_size):
        features = extractor(images[start : start + batch_size])
        for key in chosen:
            found = _moments(_pixels(features, key))
            moments[key] = moments[key] + found if key in moments else found
    if not moments:
        raise ValueError(f"{len(images)} images and {len(chosen)} keys to fit a basis on; give at least one of each")
    return {key: _principal(key, one, dim) for key, one in moments.items()}


def save_bases(bases: Mapping[str, Basis], path: str | Path) -> Path:
    """Write bases to a .safetensors file; its path."""
    tensors: dict[str, Tensor] = {}
    for key, basis in bases.items():
        tensors |= {f"mean.{key}": basis.mean.contiguous(), f"components.{key}": basis.components.contiguous()}
    save_file(tensors, str(path))
    return Path(path)


def load_bases(path: str | Path) -> dict[str, Basis]:
    """Read what `save_bases` wrote; FileNotFoundError without the file, ValueError for one that holds no bases."""
    try:
        tensors = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"cannot read {path}: {error}; give a file of save_bases") from error
    keys = [name.removeprefix("mean.") for name in tensors if name.startswith("mean.")]
    names = {f"{part}.{key}" for part in ("mean", "components") for key in keys}
    if not keys or names != set(tensors):
        raise ValueError(f"{path} holds no bases but {', '.join(sorted(tensors)[:3])}; give a file of save_bases")
    return {key: Basis(tensors[f"mean.{key}"], tensors[f"components.{key}"]) for key in keys}


def _pixels(features: Features, key: str) -> Float64[Tensor, "n c"]:
    """The vectors of every pixel at least half of which has content."""
    maps = features[key].detach().double()
    pixels = rearrange(maps, "b c h w -> (b h w) c")
    if features.mask is None:
        return pixels
    covered = adaptive_avg_pool2d(features.mask[:, None].float(), (maps.shape[-2], maps.shape[-1])) >= 0.5
    return pixels[covered.flatten().to(pixels.device)]


def _moments(pixels: Float64[Tensor, "n c"]) -> Moments:
    return Moments(len(pixels), pixels.sum(0), einsum(pixels, pixels, "n c, n d -> c d"))


def _principal(key: str, moments: Moments, dim: int) -> Basis:
    most = min(len(moments.total), moments.count - 1)
    if not 0 < dim <= most:
        raise ValueError(
            f"dim={dim} for {key}, which has {len(moments.total)} channels and was seen at {moments.count} pixels; "
            f"give 1 ... {most}" + ("" if len(moments.total) <= most else ", or more images")
        )
    mean = moments.total / moments.count
    covariance = moments.second / moments.count - einsum(mean, mean, "c, d -> c d")
    components = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[:dim]
    # An eigenvector's sign is arbitrary: its largest entry is made positive, or the hash would depend on the machine.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return Basis(mean.float().cpu(), (components * largest.sign()).float().cpu())
