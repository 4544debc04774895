"""DinoExtractor: images -> Features, at chosen blocks of a timm vision transformer (DINO, v2, v3, and any other)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repkit.backbones.base import Block
from repkit.backbones.conditions import Cond
from repkit.backbones.hashing import current_hash
from repkit.capture import Point, capture
from repkit.extractors import Extractor, Images, prepare, resize_identity
from repkit.features import Features, Identity, check_finite
from repkit.images import Resize, decoder_identity
from repkit.precision import full_float32
from repkit.taps import parse_blocks

Tokens = Float[Tensor, "b n c"]


@dataclass(frozen=True)
class Reading:
    """How a named block is read: where its tokens are taken, what is applied to them, and how many channels that has.

    cls: the class token alone, instead of the map of patch tokens.
    """

    point: Point
    channels: int
    apply: Callable[[Tokens], Tensor] | None = None
    cls: bool = False


class DinoExtractor(Extractor):
    """Images -> Features at `taps` of a timm VisionTransformer or Eva (DINOv3, EVA-02): one forward for all taps.

    model: a timm name (`vit_small_patch14_dinov2`, also `timm:...` or `hf-hub:...`), a folder with `config.json` and
    `model.safetensors`, or a network in eval mode, which stays as it is and where it is; `device` and `dtype` are for
    what is loaded here. resize: None is the size the network was built for, bicubic, centre crop; networks loaded here
    take any multiple of the patch.

    taps, commas and `*` allowed: `block.11` (the block's output), `block.11.norm` (that through the final norm),
    `cls.11` (the class token of that, [b c 1 1]),
    `block.11.q`, `.k`, `.v` (projections in that block's attention, heads concatenated, before any norm of q and k and
    before rotary positions), `norm` (after the final norm), `cls` (the class token after it, [b c 1 1]). Maps are
    patch tokens on their grid, without class and register tokens. Where timm pools before it normalises (networks
    with an `fc_norm`), the final norm is the identity.

    Raises ValueError for a tap or model that does not exist, OSError for weights that cannot be read or fetched.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        taps: str | Sequence[str] = ("norm",),
        *,
        resize: Resize | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if isinstance(model, nn.Module):
            self.name, self.model = type(model).__name__, _checked(model, type(model).__name__)
            self.provenance = {}
        else:
            self.name = str(model)
            self.model = _checked(_load(self.name), self.name).to(device, dtype)
            self.provenance = {"model": f"timm:{self.name.removeprefix('timm:')}"}
        self.readings = _chosen(taps, _readings(self.model), self.name)
        self.resize = resize or Resize(tuple(self.model.patch_embed.img_size))
        self.check_size(*self.resize.shape)
        # `cls` is one cell as large as the image
        self.blocks = {key: Block(c, self.resize.shape[0] // h) for key, (c, h, _) in self.shapes.items()}

    def __call__(self, images: Images, cond: Cond = None, *, grad: bool = False, check: bool = True) -> Features:
        """Extract every tap; nothing after the last tapped block is computed.

        grad=True keeps the graph, so that features can be differentiated with respect to the images. Non-finite
        features raise FloatingPointError, unless check=False leaves them to the caller. There is nothing to condition:
        any `cond` is a ValueError.
        """
        if cond is not None:
            raise ValueError(f"{self.name} takes no condition; leave cond out instead of giving {cond!r}")
        _check_eval(self.model)
        batch = prepare(images, self.resize, self.device)
        height, width = batch.images.shape[-2:]
        self.check_size(height, width)
        # A training loop's autocast around this call would change the values.
        plain = torch.autocast(self.device.type, enabled=False)
        with nullcontext() if grad else torch.no_grad(), plain, full_float32():
            pixels = self._normalise(batch.images)
            points = [reading.point for reading in self.readings.values()]
            raw = capture(self.model, points, lambda model: model.forward_features(pixels))  # type: ignore[operator]
            grid = self._grid(height, width)
            maps = {key: self._read(reading, raw[reading.point], grid) for key, reading in self.readings.items()}
        if check:
            check_finite(maps)
        identity = {**self.identity, "resize": resize_identity(self.resize, height, width)}
        return Features(maps, (height, width), batch.mask, identity)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming the nearest valid size, for an image size the network cannot take."""
        built = tuple(self.model.patch_embed.img_size)
        if not self.model.dynamic_img_size and (height, width) != built:
            raise ValueError(
                f"{self.name} takes {built[0]}x{built[1]} images only, not {height}x{width}; "
                "resize them, or build the model with dynamic_img_size=True"
            )
        patch = self.model.patch_embed.feat_ratio(as_scalar=False)
        if height % patch[0] or width % patch[1]:
            near = [max(1, round(side / step)) * step for side, step in zip((height, width), patch, strict=True)]
            raise ValueError(
                f"{self.name} takes sides that are multiples of its patch of {patch[0]}x{patch[1]}, "
                f"not {height}x{width}; nearest: {near[0]}x{near[1]}"
            )

    def _normalise(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
        mean, std = (
            torch.tensor(self.model.pretrained_cfg[name], device=images.device)[:, None, None]
            for name in ("mean", "std")
        )
        return ((images - mean) / std).to(self.dtype)

    def _read(self, reading: Reading, raw: Float[Tensor, "b n _c"], grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
        tokens = (raw if reading.apply is None else reading.apply(raw)).float()
        if reading.cls:
            return rearrange(tokens[:, 0], "b c -> b c 1 1")
        patches = tokens[:, self.model.num_prefix_tokens :]
        return rearrange(patches, "b (h w) c -> b c h w", h=grid[0], w=grid[1])

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return self.model.patch_embed.dynamic_feat_size((height, width))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """(c, h, w) of each key's map for images that went through `resize`."""
        grid = self._grid(*self.resize.shape)
        return {key: (one.channels, *((1, 1) if one.cls else grid)) for key, one in self.readings.items()}

    @property
    def weights_hash(self) -> str:
        """sha256 over the names, dtypes, shapes and bytes of all weights."""
        return current_hash(self, {"dino": self.model})

    @property
    def identity(self) -> Identity:
        """What decides the features' values, as JSON-ready data; equal identities mean comparable features."""
        return {
            "extractor": "dino",
            "weights": self.weights_hash,
            "heads": [getattr(getattr(block, "attn", None), "num_heads", None) for block in self.model.blocks],
            "taps": list(self.readings),
            "resize": self.resize.identity,
            "decoder": decoder_identity(),
            "normalisation": {name: list(self.model.pretrained_cfg[name]) for name in ("mean", "std")},
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _chosen(taps: str | Sequence[str], known: Mapping[str, Reading], name: str) -> dict[str, Reading]:
    """The readings of all `taps`, in order, each once."""
    groups = [taps] if isinstance(taps, str) else list(taps)
    if not groups:
        raise ValueError("no taps given; write at least one, for example norm")
    for group in groups:
        if "@" in group or "/" in group:
            raise ValueError(f"tap {group!r}: {name} has named blocks only, no times (@) and no module paths (/)")
    return {block: known[block] for group in groups for block in parse_blocks(group, list(known), model=name)}


def _readings(model: Any) -> dict[str, Reading]:
    """Every name that can be tapped, in the order of the forward."""
    readings: dict[str, Reading] = {}
    for index, block in enumerate(model.blocks):
        name, path = f"block.{index}", f"blocks.{index}"
        attention = getattr(block, "attn", None)
        if hasattr(attention, "qkv"):  # blocks that fuse attention and MLP have no such projections
            for facet in "qkv":
                # The attention's input, since some networks use their projection's weights without calling it.
                point, apply = Point(f"{path}.attn", "input"), partial(_project, attention, facet)
                readings[f"{name}.{facet}"] = Reading(point, _width(attention, facet), apply)
        readings[name] = Reading(Point(path), model.embed_dim)
        readings[f"{name}.norm"] = Reading(Point(path), model.embed_dim, model.norm)
        if model.cls_token is not None:
            readings[f"cls.{index}"] = Reading(Point(path), model.embed_dim, model.norm, cls=True)
    readings["norm"] = Reading(Point("norm"), model.embed_dim)
    if model.cls_token is not None:
        readings["cls"] = Reading(Point("norm"), model.embed_dim, cls=True)
    return readings


def _project(attention: Any, facet: str, tokens: Tokens) -> Float[Tensor, "b n d"]:
    """Queries, keys or values of all heads, by the very operation of timm's attention: the bits are the same."""
    if attention.qkv is None:
        return getattr(attention, f"{facet}_proj")(tokens)
    if getattr(attention, "q_bias", None) is None:
        joint = attention.qkv(tokens)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        joint = F.linear(tokens, attention.qkv.weight, bias)
    return joint.chunk(3, dim=-1)["qkv".index(facet)]


def _width(attention: Any, facet: str) -> int:
    if attention.qkv is None:
        return getattr(attention, f"{facet}_proj").out_features
    return attention.qkv.out_features // 3


def _load(name: str) -> nn.Module:
    """The frozen network of a timm name or a local folder, for images of any multiple of its patch."""
    source = name.removeprefix("timm:")
    if Path(source).is_dir() and not timm.is_model(source):
        if not (Path(source) / "model.safetensors").is_file():
            raise OSError(f"no model.safetensors in {source}; pickled weights are not read, save them as safetensors")
        source = f"local-dir:{source}"
    if ":" not in source and not timm.is_model(source):
        near = get_close_matches(source, timm.list_models(pretrained=True), n=3)
        hint = f"; close to it: {', '.join(near)}" if near else ""
        raise ValueError(f"no model {name!r} in timm and no such folder{hint} (timm.list_models lists all)")
    try:
        model = timm.create_model(source, pretrained=True, num_classes=0, dynamic_img_size=True)
    except TypeError as error:  # it has no such option
        raise ValueError(f"{name} is no VisionTransformer or Eva of timm; choose one that is") from error
    except OSError as error:
        raise _no_weights(name, error) from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load {name}: {_first_line(error)}") from error
    except Exception as error:  # what networks, archives and unpicklers raise has no common class
        raise _no_weights(name, error) from error
    return model.eval().requires_grad_(False)


def _no_weights(name: str, error: Exception) -> OSError:
    return OSError(
        f"cannot get the weights of {name}: {_first_line(error)} Fetch them once with a network (without "
        "HF_HUB_OFFLINE), set HF_HOME to a cache that has them, or give a folder with config.json and model.safetensors"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."


def _checked(model: nn.Module, name: str) -> Any:
    """The network itself, if it is one whose tokens and statistics are known."""
    if not isinstance(model, VisionTransformer | Eva):
        raise ValueError(f"{name} is no VisionTransformer or Eva of timm; choose one that is")
    if not {"mean", "std"} <= set(getattr(model, "pretrained_cfg", None) or {}):
        raise ValueError(f"{name} does not say how its images were normalised; set model.pretrained_cfg (mean, std)")
    _check_eval(model)
    return model


def _check_eval(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode, where features would be random; call model.eval() first")
