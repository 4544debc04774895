"""DiffusionExtractor: images -> Features, at chosen blocks and times of a frozen denoiser."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import log
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from repkit.backbones.base import Backbone, Block
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.prompts import Told
from repkit.capture import Point
from repkit.compiling import compile_blocks, stand_in
from repkit.features import Features, Identity, check_finite, check_latents, identity_hash
from repkit.images import Resize, decode, decoder_identity, digest, to_tensor, to_uint8
from repkit.massive import ADALN, call_points, massive_channels
from repkit.noise import NOISE_VERSION, SHARED, batch_noise
from repkit.precision import full_float32
from repkit.taps import Tap, Time, parse_taps
from repkit.trimming import trim as trim_to

Images = Float[Tensor, "b 3 H W"] | Sequence[Image.Image | Path | str]
Noise = Literal["image", "shared", "fresh"]

logger = logging.getLogger("repkit")


class Extractor(ABC):
    """What exports, heads and indexes ask of an extractor.

    `blocks` maps each output key to its channels and stride, `provenance` says from what it was loaded.
    """

    resize: Resize
    blocks: Mapping[str, Block]
    provenance: Mapping[str, Any]

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """(c, h, w) of each key's map for images that went through `resize`."""

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """What decides the features' values, as JSON-ready data; equal identities mean comparable features."""

    @abstractmethod
    def __call__(self, images: Images, cond: Cond = None, *, grad: bool = False, check: bool = True) -> Features:
        """Extract every tap; see the extractor's own words for `cond`."""

    def learn(self, conds: Iterable[Cond] | None = None, told: Told | None = None) -> None:  # noqa: B027
        """Get ready for what images will be told, where that takes something that can be freed afterwards."""


@dataclass(frozen=True)
class Batch:
    """Images as a network takes them: RGB in [0, 1], with the mask of what a padding resize left."""

    images: Float[Tensor, "b 3 H W"]
    mask: Bool[Tensor, "b H W"] | None = None


def prepare(images: Images, resize: Resize, device: torch.device) -> Batch:
    """Decode and resize paths and PIL images; tensors are used as they are."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not len(images) or not images.is_floating_point():
            raise ValueError(
                f"images of shape {tuple(images.shape)} and {images.dtype}; give float tensors [b 3 H W], RGB in [0, 1]"
            )
        low, high = images.detach().aminmax()
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # true for NaN as well
            raise ValueError(
                f"images range from {low:g} to {high:g}; scale them to [0, 1] (8-bit values: divide by 255)"
            )
        return Batch(images.to(device, torch.float32))
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise TypeError(f"images is one {type(images).__name__}; give a list, of one image if need be")
    if len(images) == 0:
        raise ValueError("no images given; give at least one")
    pixels, masks = zip(*(resize(decode(image)) for image in images), strict=True)
    mask = None if masks[0] is None else torch.from_numpy(np.stack(masks)).to(device)
    return Batch(to_tensor(np.stack(pixels)).to(device), mask)


def resize_identity(resize: Resize, height: int, width: int) -> Identity:
    """That of the extractor's resize, unless tensors came in another size, which it does not touch."""
    return resize.identity if (height, width) == resize.shape else {"size": [height, width], "policy": "as given"}


@dataclass(frozen=True)
class Level:
    """A resolved noise level: what the network is told, and whether the image gets noise at all."""

    t: float
    clean: bool = False


class DiffusionExtractor(Extractor):
    """Images -> Features at `taps` of a diffusion backbone.

    taps: groups `BLOCKS@TIMES`. resize: how paths and PIL images become network inputs; None is the backbone's size,
    bicubic, centre crop. cond: a prompt, a class name or an index, for all images. draws: the mean is taken over that
    many noises. noise: "image" depends on the image's content, "shared" is the same for all, "fresh" is new each call.

    compile: run the denoiser's blocks as compiled code: the first calls compile, and values move by their rounding.
    trim: free all weights that the taps do not need, for good: the backbone, which `load` must have read, refuses later
    taps and `denoise` afterwards. discard: for `*.in.adaln` taps, by key or block, the channels of the block's input
    that are zero before its norm; `massive` finds candidates.
    """

    def __init__(
        self,
        backbone: Backbone,
        taps: str | Sequence[str],
        *,
        resize: Resize | None = None,
        cond: Cond = None,
        draws: int = 1,
        seed: int = 0,
        noise: Noise = "image",
        compile: bool = False,
        trim: bool = False,
        discard: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if noise not in ("image", "shared", "fresh"):
            raise ValueError(f"no noise {noise!r}; have image, shared, fresh")
        if type(draws) is not int or draws < 1:
            raise ValueError(f"draws={draws!r}; give a whole number of at least 1")
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed={seed!r}; give a whole number that fits in 64 bits")
        if resize is not None and not isinstance(resize, Resize):
            raise TypeError(f"resize={resize!r}; give repkit.Resize(size, policy)")
        self.backbone, self.cond, self.draws, self.seed, self.noise = backbone, cond, draws, seed, noise
        self.provenance = {**backbone.provenance, **({"compile": "blocks"} if compile else {})}
        self.resize = resize or Resize(backbone.size)
        self.taps = {str(tap): tap for tap in parse_taps(taps, list(backbone.points), model=backbone.name)}
        self.levels = {key: resolve(backbone, tap.time) for key, tap in self.taps.items() if tap.time is not None}
        names = [tap.block for tap in self.taps.values()]
        self._found = backbone.shapes(names, backbone.size, backbone.size)
        self.blocks = {key: self._block(tap.block) for key, tap in self.taps.items()}
        self.discard = self._discard(discard or {})
        backbone.condition(cond, 1 if cond is None or isinstance(cond, str | int) else len(cond))
        if trim:
            trim_to(backbone, list(dict.fromkeys(names)))
        self._compiled = compile_blocks(backbone.model, self._points()) if compile else None

    def __call__(self, images: Images, cond: Cond = None, *, grad: bool = False, check: bool = True) -> Features:
        """Extract every tap with one forward for each (time, draw); `cond` overrides the extractor's.

        grad=True keeps the graph, so that features can be differentiated with respect to the images. Non-finite
        features raise FloatingPointError, unless check=False leaves them to the caller.
        """
        self.backbone.check_frozen()
        batch = prepare(images, self.resize, self.backbone.device)
        height, width = batch.images.shape[-2:]
        self.backbone.check_size(height, width)
        digests = self._digests(batch.images)
        # A training loop's autocast around this call would change the values.
        plain = torch.autocast(self.backbone.device.type, enabled=False)
        with nullcontext() if grad else torch.no_grad(), plain, full_float32():
            x0 = self.backbone.encode(batch.images)
            condition = self.backbone.condition(self.cond if cond is None else cond, len(x0))
            maps: dict[str, Tensor] = {}
            for level in dict.fromkeys(self.levels.values()):
                maps |= self._at(level, x0, condition, digests)
        if check:
            check_latents(x0)
            check_finite(maps, _name(self.backbone.dtype))
        identity = self.identity if cond is None else {**self.identity, "cond": _plain(cond)}
        identity = {**identity, "resize": resize_identity(self.resize, height, width)}
        return Features({key: maps[key] for key in self.taps}, (height, width), batch.mask, identity)

    def _at(self, level: Level, x0: Tensor, condition: Condition, digests: list[bytes]) -> dict[str, Tensor]:
        """The taps of one level, averaged over the draws."""
        keys = {key: self.taps[key].block for key, at in self.levels.items() if at == level}
        discard = {self.taps[key].block: channels for key, channels in self.discard.items() if key in keys}
        model = None if self._compiled is None else stand_in(self.backbone.model, self._compiled)
        blocks = list(dict.fromkeys(keys.values()))
        draws = 1 if level.clean else self.draws
        mean: dict[str, Tensor] = {}
        for draw in range(draws):
            x_t = x0 if level.clean else self._noised(x0, level, digests, draw)
            maps = self.backbone.activations(x_t, level.t, condition, blocks, model=model, discard=discard)
            for key, block in keys.items():
                value = maps[block].float().contiguous()  # whatever the network's memory format
                value = value if draws == 1 else value / draws  # no copy for nothing
                mean[key] = mean[key] + value if key in mean else value
        return mean

    def _noised(self, x0: Tensor, level: Level, digests: list[bytes], draw: int) -> Tensor:
        if self.noise == "fresh":
            eps = torch.randn_like(x0)
        else:
            eps = batch_noise(x0.shape[1:], seed=self.seed, digests=digests, t=level.t, draw=draw).to(x0.device)
        return self.backbone.schedule.add_noise(x0, eps, level.t)

    def _digests(self, images: Float[Tensor, "b 3 H W"]) -> list[bytes]:
        if self.noise != "image":
            return [SHARED] * len(images)
        return [digest(image) for image in to_uint8(images.detach())]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """(c, h, w) of each key's map for images that went through `resize`."""
        found, side = self._found, self.backbone.size
        if self.resize.shape != (side, side):
            found = self.backbone.shapes(list(found), *self.resize.shape)
        return {key: found[tap.block] for key, tap in self.taps.items()}

    @property
    def identity(self) -> Identity:
        """What decides the features' values, as JSON-ready data; equal identities mean comparable features."""
        return {
            "extractor": "diffusion",
            "weights": self.backbone.weights_hash,
            "schedule": self.backbone.schedule.identity,
            "taps": {key: self._resolved(level) for key, level in self.levels.items()},
            "resize": self.resize.identity,
            "decoder": decoder_identity(),
            "classes": identity_hash({"names": list(self.backbone.class_names or [])}),
            "cond": _plain(self.cond),
            "draws": self.draws,
            "seed": self.seed,
            "noise": self.noise,
            "noise_version": NOISE_VERSION,
            "dtype": _name(self.backbone.dtype),
            **({} if self.backbone.prompts is None else {"text": self.backbone.prompts.hash}),
            **({"discard": self.discard} if self.discard else {}),
            **self.backbone.options,
        }

    def learn(self, conds: Iterable[Cond] | None = None, told: Told | None = None) -> None:
        """Encode what images will be told, then let go of the text encoders until a text comes that is not known.

        conds: None is the extractor's own condition. told: called with the texts encoded and their number.
        """
        if self.backbone.prompts is None:
            return
        if freed := self.backbone.prompts.learn([self.cond] if conds is None else conds, told):
            logger.info("text encoders of %s freed: %.1f MiB", self.backbone.name, freed / 2**20)

    def massive(self, images: Images, cond: Cond = None) -> dict[str, list[int]]:
        """For each `*.in.adaln` tap, the channels of its block's input that dwarf the others: what to discard."""
        keys = [key for key, tap in self.taps.items() if tap.block.endswith(ADALN)]
        if not keys:
            raise ValueError(f"massive channels matter to *{ADALN} taps, not to {', '.join(self.taps)}; add such a tap")
        inputs = {key: str(Tap(self.taps[key].block.removesuffix(ADALN) + ".in", self.taps[key].time)) for key in keys}
        settings: dict[str, Any] = {"resize": self.resize, "draws": self.draws, "seed": self.seed, "noise": self.noise}
        told = self.cond if cond is None else cond
        features = DiffusionExtractor(self.backbone, list(inputs.values()), cond=told, **settings)(images)
        return {key: massive_channels(features[inputs[key]]) for key in keys}

    def _block(self, name: str) -> Block:
        channels, height, _ = self._found[name]
        return Block(channels, self.backbone.size // height)

    def _points(self) -> list[Point]:
        """Where the taps reach into the network."""
        inside = [call_points(self.backbone.points, self.taps[key].block)[0] for key in self.discard]
        return [*(self.backbone.point(tap.block) for tap in self.taps.values()), *inside]

    def _discard(self, given: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """The channels for each tap, from what was given by key or by block."""
        if not isinstance(given, Mapping):
            raise TypeError(f"discard={given!r}; give a mapping such as {{'single.9.in.adaln': [154, 1446]}}")
        found: dict[str, list[int]] = {}
        for name, channels in given.items():
            keys = [key for key, tap in self.taps.items() if name in (key, tap.block)]
            if not keys:
                raise ValueError(f"no tap {name!r} to discard channels of; have {', '.join(self.taps)}")
            for key in keys:
                call_points(self.backbone.points, self.taps[key].block)  # refuses what has no norm of its own
                count = self.blocks[key].channels
                if wrong := [channel for channel in channels if not 0 <= channel < count]:
                    raise ValueError(f"no channel {wrong[0]} in {key} to discard; have 0 ... {count - 1}")
                found[key] = sorted({*found.get(key, []), *channels})
        return found

    def _resolved(self, level: Level) -> dict[str, Any]:
        if level.clean:
            return {"t": level.t, "clean": True}
        alpha, sigma = (float(value) for value in self.backbone.schedule.coefficients(level.t))
        # Rounded, because the last bits of a schedule's table differ between machines.
        return {"t": level.t, "logsnr": round(2 * (log(alpha) - log(sigma)), 4) if alpha and sigma else None}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(cond: Cond) -> str | int | list[str | int] | None:
    """A condition as JSON has it."""
    return cond if cond is None or isinstance(cond, str | int) else list(cond)


def resolve(backbone: Backbone, time: Time) -> Level:
    """The native time of what a tap asks for; ValueError where the model has no such time."""
    schedule = backbone.schedule
    if time.kind == "clean":
        told = backbone.clean_t if time.value is None else time.value
        schedule.coefficients(told)  # refuses what is out of range
        return Level(float(told), clean=True)
    assert time.value is not None
    if time.kind == "sigma":
        return Level(float(schedule.time(sigma=time.value)))
    if time.kind == "logsnr":
        return Level(float(schedule.time(logsnr=time.value)))
    if schedule.kind == "edm":
        raise ValueError(f"{backbone.name} has no training timesteps, so no time {time}; write sigma=... instead")
    schedule.coefficients(time.value)
    return Level(float(time.value))
