"""What an ADM checkpoint is: read off its weights as far as they tell, by its published file name for the rest."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from repkit.backbones.options import COUNT, FLAG, Kind, check_options, one_of

NOISES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # guided-diffusion's names, and diffusers'
TOLD: Mapping[str, Kind] = {
    "image_size": COUNT,
    "num_heads": COUNT,
    "num_head_channels": COUNT,
    "use_new_attention_order": FLAG,
    "noise_schedule": one_of(*NOISES),
    "diffusion_steps": COUNT,
}

# What the weights do not tell, from guided-diffusion's README; the widths tell another network of the same file name.
_WIDTHS = {256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}


def _published(
    size: int, channels: int, *, new_order: bool = False, noise: str = "linear", **heads: int
) -> dict[str, Any]:
    return {
        "model_channels": channels,
        "channel_mult": _WIDTHS[size],
        "image_size": size,
        **(heads or {"num_head_channels": 64}),
        "use_new_attention_order": new_order,
        "noise_schedule": noise,
    }


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "64x64_diffusion": _published(64, 192, new_order=True, noise="cosine"),
    "128x128_diffusion": _published(128, 256, num_heads=4),
    "512x512_diffusion": _published(512, 256),
    **dict.fromkeys(("256x256_diffusion", "256x256_diffusion_uncond"), _published(256, 256)),
    **dict.fromkeys(("lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"), _published(256, 256)),
    "ffhq": _published(256, 256),  # of label-efficient segmentation
    "ffhq_10m": _published(256, 128),  # of ILVR and P2 weighting
}


def told_config(name: str, weights_config: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the weights do not tell: from the published file `name`, and `config` before it.

    Raises ValueError where something is neither published nor given, and for what `TOLD` does not take.
    """
    given = check_options(config, TOLD, name)
    known = PUBLISHED.get(name, {})
    if any(weights_config[key] != known.get(key) for key in ("model_channels", "channel_mult")):
        known = {}
    told = {key: value for key, value in known.items() if key in TOLD}
    if {"num_heads", "num_head_channels"} & set(given):
        told = {key: value for key, value in told.items() if key not in ("num_heads", "num_head_channels")}
    told |= given
    missing = {"image_size", "use_new_attention_order", "noise_schedule"} - set(told)
    if missing or ("num_heads" in told) == ("num_head_channels" in told):
        raise ValueError(
            f"the weights of {name} do not tell how its network was run, and it is none of {', '.join(PUBLISHED)}; "
            "give image_size=256, num_head_channels=64 (or num_heads=4), use_new_attention_order=false and "
            "noise_schedule=linear (or cosine), as it was trained, each as --config KEY=VALUE or in config="
        )
    return told


def infer_config(weights: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The arguments of ADMUNet that shapes tell: all but the image's size, the heads and their order.

    Raises OSError for weights of which some are missing.
    """
    width = _shape(weights, "input_blocks.1.0.out_layers.3.weight", name)[0]
    told = _shape(weights, "input_blocks.1.0.emb_layers.1.weight", name)[0]
    model_channels = _shape(weights, "time_embed.0.weight", name)[1]
    _shape(weights, "output_blocks.0.0.out_layers.3.weight", name)
    blocks = _count(weights, "output_blocks")  # as many as input blocks; those of a level end with its sampler
    resampling = next((index for index in range(blocks) if _resamples(weights, index)), None)
    last = _before_gap(weights) if resampling is None else resampling
    each = blocks if last is None else last + 1
    starts = range(1, 1 + blocks, each)
    widths = [_shape(weights, f"input_blocks.{start}.0.out_layers.3.weight", name)[0] for start in starts]
    labels = weights.get("label_emb.weight")
    return {
        "model_channels": model_channels,
        "channel_mult": tuple(_mult(width, model_channels) for width in widths),
        "num_res_blocks": each - 1,
        "attention_strides": tuple(
            2**level for level, start in enumerate(starts) if f"input_blocks.{start}.1.qkv.weight" in weights
        ),
        "resample": "plain" if resampling is None else _resamples(weights, resampling),
        "use_scale_shift_norm": told == 2 * width,
        "num_classes": None if labels is None else labels.shape[0],
        "in_channels": _shape(weights, "input_blocks.0.0.weight", name)[1],
        "out_channels": _shape(weights, "out.2.weight", name)[0],
    }


def _resamples(weights: Mapping[str, Tensor], block: int) -> str | None:
    """How an output block ends, where that has weights."""
    for layer in (1, 2):  # after the residual block, and the attention if there is one
        if f"output_blocks.{block}.{layer}.conv.weight" in weights:
            return "conv"
        if f"output_blocks.{block}.{layer}.in_layers.2.weight" in weights:
            return "resblock"
    return None


def _before_gap(weights: Mapping[str, Tensor]) -> int | None:
    """Residual blocks before the first input block without weights, which is a plain downsampler."""
    count = _count(weights, "input_blocks")
    gaps = (index for index in range(1, count) if f"input_blocks.{index}.0.in_layers.2.weight" not in weights)
    gap = next(gaps, None)
    return None if gap is None else gap - 1


def _count(weights: Mapping[str, Tensor], blocks: str) -> int:
    indices = [int(key.split(".")[1]) for key in weights if key.startswith(f"{blocks}.")]
    return max(indices, default=-1) + 1


def _mult(width: int, model_channels: int) -> int | float:
    mult = width / model_channels
    return int(mult) if mult.is_integer() else mult


def _shape(weights: Mapping[str, Tensor], key: str, name: str) -> tuple[int, ...]:
    if key not in weights:
        raise OSError(f"{name} has no {key}, so it is no whole ADM checkpoint; get it again")
    return tuple(weights[key].shape)
