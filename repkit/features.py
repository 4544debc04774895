"""Features: what an extractor returns, and the identity that says which extractor made them."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Identity = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Features(Mapping[str, Tensor]):
    """A frozen mapping from tap key to its map [b c h w]; `cls` tokens are [b c 1 1].

    size: (H, W) of the images the network saw, in pixels. mask: True where a padded image has content, else None.
    identity: the extractor that made them.
    """

    maps: Mapping[str, Float[Tensor, "b _c _h _w"]]
    size: tuple[int, int]
    mask: Bool[Tensor, "b H W"] | None = None
    identity: Identity = field(default_factory=dict, repr=False)

    def __getitem__(self, key: str) -> Tensor:
        try:
            return self.maps[key]
        except KeyError:
            raise KeyError(f"no features {key!r}; have {', '.join(self.maps)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: they stay in a sum, which is far cheaper than a look at each value."""
    values = values.detach()
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())  # finite values may overflow it


def check_finite(maps: Mapping[str, Tensor], dtype: str | None = None) -> None:
    """Raise FloatingPointError naming the first tap with a non-finite value, and the remedy.

    dtype: what the network computes in, by its name in the identity; None where that is not known.
    """
    for key, value in maps.items():
        if not all_finite(value):
            raise FloatingPointError(f"{key} is not finite in {_bad(value)}; {_remedy(dtype)}")


def check_latents(x0: Float[Tensor, "b c h w"]) -> None:
    """Raise FloatingPointError, with the remedy, for latents that are not finite."""
    if not all_finite(x0):
        raise FloatingPointError(
            f"the latents are not finite in {_bad(x0)}; load the model with vae_dtype=torch.float32 "
            "(some autoencoders overflow in float16)"
        )


def _bad(values: Tensor) -> str:
    return f"{int((~torch.isfinite(values)).flatten(1).any(1).sum())} of {len(values)} images"


def _remedy(dtype: str | None) -> str:
    if dtype in (None, "float16"):
        return (
            "load the model with dtype=torch.bfloat16 or torch.float32, and vae_dtype=torch.float32 "
            "(float16 ends at 65504, which some networks pass)"
        )
    return f"{dtype} has the range for it, so the weights may be damaged: get the model again"


def identity_hash(identity: Identity) -> str:
    """sha256 (hex) of the identity's canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def identity_differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    """Say line by line where two identities differ: `seed: 0 here, 1 there`."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        keys = [*mine, *(key for key in theirs if key not in mine)]
        missing = "nothing"
        return [
            line
            for key in keys
            for line in identity_differences(
                mine.get(key, missing), theirs.get(key, missing), f"{path}.{key}" if path else str(key)
            )
        ]
    return [] if mine == theirs else [f"{path}: {mine} here, {theirs} there"]
