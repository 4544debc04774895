"""Backbone: a frozen denoiser whose activations have names. One subclass a family, in the files beside this one."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from repkit.attention import Attended, attention_map, fold_map
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.hashing import current_hash
from repkit.backbones.prompts import Prompts
from repkit.capture import Point, capture
from repkit.massive import call_points, discarded
from repkit.schedule import Schedule
from repkit.taps import parse_blocks

# Attention on CPUs, which older torch does not count.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
UNCOUNTED = {_CPU_ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}


@dataclass(frozen=True)
class Block:
    """A tappable activation: its channels, and its stride in image pixels at the backbone's default size."""

    channels: int
    stride: int


@dataclass(frozen=True)
class Cost:
    """What a block gives and costs: its map's (c, h, w), and the share of the FLOPs when the forward stops there."""

    shape: tuple[int, ...]
    flops: float

    @property
    def bytes(self) -> int:
        """Of the map of one image, dense, in float32."""
        return 4 * prod(self.shape)


class Backbone(ABC):
    """A frozen denoiser: images -> clean latents, label or prompt -> condition, (x_t, t, condition) -> prediction.

    A family defines `encode`, `condition`, `predict` and `points`; everything else follows from them.
    `size`: default image side in pixels. `multiple`: what image sides must be divisible by. `square`: whether both
    sides must equal `size`. `clean_t`: the native time the network is told for images without noise.
    """

    name: str
    model: Any  # an nn.Module, whose attributes torch's own types do not know
    schedule: Schedule
    size: int
    multiple: int
    square: bool = False
    class_names: Sequence[str] | None = None
    clean_t: float | int = 0
    options: Mapping[str, str] = {}  # what else decides the values, for the identity: how latents are taken, ...
    provenance: Mapping[str, Any] = {}  # what `load` was given, from which it can be loaded again
    evidence_weights: Mapping[str, Any] | None = None  # the table of a zero-shot classifier's weights, as JSON has it
    prompts: Prompts | None = None  # what texts are encoded by, where the condition is a text
    trimmed: int = 0  # bytes of weights that were freed, since the taps in use do not need them

    @abstractmethod
    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Images, RGB in [0, 1] at a valid size, to the clean latents x0 the network works on."""

    def decode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Clean latents to images, RGB clipped to [0, 1]; ValueError where nothing makes images of the latents."""
        raise ValueError(
            f"{self.name} cannot generate images, for nothing turns its latents back into pixels; take a model on "
            "pixels or on the latents of an autoencoder"
        )

    @abstractmethod
    def condition(self, cond: Cond, batch: int) -> Condition:
        """One condition for all, or a sequence with one for each image; None is the null condition where there is one.

        Raises ValueError for None where the model has no null condition, and for what it does not know.
        """

    @abstractmethod
    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call `model`, which stands in for `self.model`, as the family's forward wants it: t is [b], native."""

    @cached_property
    @abstractmethod
    def points(self) -> Mapping[str, Point]:
        """Where each named block is taken, stage by stage."""

    def denoise(self, x_t: Float[Tensor, "b c h w"], t: Tensor | float | int, condition: Condition) -> Tensor:
        """The network's prediction, in the schedule's kind, float32; a learned-variance half is dropped."""
        return self.predict(self.model, x_t.to(self.dtype), self._times(t, x_t), condition).float()

    def activations(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Tensor | float | int,
        condition: Condition,
        blocks: Sequence[str],
        *,
        model: nn.Module | None = None,
        discard: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, Float[Tensor, "b _c _h _w"]]:
        """The maps of `blocks` (names, or module paths written `/a.b`) from one forward that ends at the last one.

        model: what runs in the place of the backbone's own. discard: for `*.in.adaln` blocks, the channels of the
        block's input that are zero before its norm.
        """
        points, discard = {block: self.point(block) for block in blocks}, discard or {}
        calls = {block: call_points(self.points, block) for block in discard}
        taken = {block: calls[block][0] if block in calls else point for block, point in points.items()}
        times = self._times(t, x_t)
        raw = capture(
            self.model if model is None else model,
            list(taken.values()),
            lambda model: self.predict(model, x_t.to(self.dtype), times, condition),
        )
        values = {block: raw[point] for block, point in taken.items()}
        values |= {block: discarded(values[block], discard[block], tap) for block, (_, tap) in calls.items()}
        return {block: self.fold(point, values[block], x_t) for block, point in points.items()}

    def point(self, block: str) -> Point:
        """The point of a block name or of a module path written `/a.b`; ValueError for a name that is not known."""
        if block.startswith("/"):
            return Point(block[1:])
        if block not in self.points:
            parse_blocks(block, list(self.points), model=self.name)  # says what there is
            raise ValueError(f"{block!r} is not one block; give the names without wildcards or commas")
        return self.points[block]

    def fold(self, point: Point, raw: Any, x_t: Float[Tensor, "b _c _h _w"]) -> Float[Tensor, "b c h w"]:
        """What `point` gave, as a map: maps as they are, tokens on their grid. Families drop their text tokens here."""
        if isinstance(raw, Attended):
            return fold_map(attention_map(raw), *grid_of(raw.q.shape[2], x_t.shape[-2], x_t.shape[-1]))
        value = raw[0] if isinstance(raw, tuple) else raw
        if value.ndim == 4:
            return value
        if value.ndim != 3:
            raise ValueError(
                f"an activation of shape {tuple(value.shape)} is neither a map [b c h w] nor tokens [b n c]"
            )
        height, width = grid_of(value.shape[1], x_t.shape[-2], x_t.shape[-1])
        return rearrange(value, "b (h w) c -> b c h w", h=height, w=width)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming the nearest valid sizes, for an image size the network cannot take."""
        if self.square and (height, width) != (self.size, self.size):
            raise ValueError(
                f"{self.name} takes {self.size}x{self.size} images only, not {height}x{width}; resize them"
            )
        if height % self.multiple or width % self.multiple:
            near = "x".join(str(max(1, round(side / self.multiple)) * self.multiple) for side in (height, width))
            raise ValueError(
                f"{self.name} takes sides that are multiples of {self.multiple}, not {height}x{width}; nearest: {near}"
            )

    def check_frozen(self) -> None:
        """Raise ValueError where a network is in training mode, in which values would be random."""
        for name, network in self.networks.items():
            if any(module.training for module in network.modules()):
                raise ValueError(f"the {name} of {self.name} is in training mode; call .eval() on it first")

    def _times(self, t: Tensor | float | int, x_t: Tensor) -> Tensor:
        """t as [b]; training timesteps are integers, since some networks look them up in a table."""
        times = torch.as_tensor(t, device=x_t.device)
        return (times.long() if self.schedule.kind == "discrete" else times.float()).expand(len(x_t))

    @property
    def device(self) -> torch.device:
        return self._a_parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._a_parameter.dtype

    @property
    def _a_parameter(self) -> Tensor:
        """One that has values, unless none has: those that were trimmed are on the meta device."""
        parameters = self.model.parameters()
        first = next(parameters)
        return first if first.device.type != "meta" else next((p for p in parameters if p.device.type != "meta"), first)

    @cached_property
    def blocks(self) -> Mapping[str, Block]:
        """Every named block with its channels and stride, from a forward on shapes alone: nothing is computed."""
        return self.describe(list(self.points))

    def describe(self, blocks: Sequence[str]) -> dict[str, Block]:
        """Channels and stride of blocks given by name or module path; ValueError for a path that is not there."""
        shapes = self.shapes(blocks, self.size, self.size)
        return {block: Block(shape[0], self.size // shape[1]) for block, shape in shapes.items()}

    def shapes(self, blocks: Sequence[str], height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """The shape (c, h, w) of each block's map for images of height x width."""
        self.check_size(height, width)
        with self._shapes_only(height, width) as (x_t, condition):
            maps = self.activations(x_t, self.clean_t, condition, blocks)
            return {block: (found.shape[1], found.shape[2], found.shape[3]) for block, found in maps.items()}

    @cached_property
    def flops(self) -> Mapping[str, float]:
        """For each named block, the share of the full forward's FLOPs that is spent when it is reached."""
        costs = self.costs(list(self.points), self.size, self.size)
        return {block: cost.flops for block, cost in costs.items()}

    def costs(self, blocks: Sequence[str], height: int, width: int) -> dict[str, Cost]:
        """What each block costs and gives for images of height x width, from one forward on shapes alone."""
        self.check_size(height, width)
        points, spent = {block: self.point(block) for block in blocks}, dict[Point, int]()
        with self._shapes_only(height, width) as (x_t, condition):
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                raw = capture(
                    self.model,
                    list(points.values()),
                    lambda model: self.predict(model, x_t, self._times(self.clean_t, x_t), condition),
                    stop=False,
                    taken_at=lambda point: spent.setdefault(point, counter.get_total_flops()),
                )
            shapes = {block: self.fold(point, raw[point], x_t).shape[1:] for block, point in points.items()}
        total = counter.get_total_flops()
        return {block: Cost((*shapes[block],), spent[point] / total) for block, point in points.items()}

    @contextmanager
    def _shapes_only(self, height: int, width: int) -> Iterator[tuple[Tensor, Condition]]:
        """The input of one image that has shapes and no values, so that a forward costs nothing."""
        condition = self.blank_condition(1)
        # On the meta device, where networks without weights are, no tensor has values anyway.
        valueless = nullcontext() if self.device.type == "meta" else FakeTensorMode(allow_non_fake_inputs=True)
        with torch.no_grad(), valueless:
            images = torch.zeros(1, 3, height, width, device=self.device)
            yield self.encode(images).to(self.dtype), condition

    def blank_condition(self, batch: int) -> Condition:
        """A condition of the right shapes, whatever it says; no text is encoded for it."""
        if self.prompts is not None:
            return self.prompts.blank(batch, self.device, self.dtype)
        try:
            return self.condition(None, batch)
        except ValueError:  # a class-conditional network without a null class
            return self.condition(0, batch)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Every network that features depend on; a family adds its autoencoder and text encoders."""
        return {"denoiser": self.model}

    @property
    def weights_hash(self) -> str:
        """sha256 over the config and all weights of `networks`: names, dtypes, shapes and bytes."""
        return current_hash(self, self.networks)


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """The grid (h, w) that `tokens` make on a latent of height x width: the latent divided by one whole factor."""
    for factor in range(1, max(height, width) + 1):
        grid = ceil(height / factor), ceil(width / factor)
        if grid[0] * grid[1] == tokens:
            return grid
    raise ValueError(f"{tokens} tokens do not lie on a grid over a {height}x{width} latent")
