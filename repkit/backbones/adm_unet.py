"""The U-Net of OpenAI's guided-diffusion (ADM), with parameters named and shaped as in its checkpoints."""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Resample = Literal["resblock", "conv", "plain"]
GROUPS = 32  # of every normalisation


class ADMUNet(nn.Module):
    """A U-Net on pixels (Dhariwal and Nichol 2021); `config` holds the arguments it was made with.

    image_size: side in pixels of its training images. channel_mult: the width of each level in units of
    model_channels. attention_strides: the levels, by their stride in pixels, that have attention beside the middle's.
    resample: by whole residual blocks, by a convolution, or plainly (mean of 2x2, nearest). num_heads, or
    num_head_channels for a number that grows with the width. use_new_attention_order: whether one row of weights goes
    q, k, v and then by heads (True) or by heads and then q, k, v. num_classes: None for an unconditional network.

    Fresh weights are torch's own; the original starts some at zero, so that each of its blocks only passes its input.
    """

    def __init__(
        self,
        *,
        image_size: int,
        model_channels: int,
        channel_mult: Sequence[int | float],
        num_res_blocks: int,
        attention_strides: Sequence[int],
        resample: Resample = "resblock",
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        use_new_attention_order: bool = False,
        use_scale_shift_norm: bool = True,
        num_classes: int | None = None,
        in_channels: int = 3,
        out_channels: int = 6,
    ) -> None:
        super().__init__()
        config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.config: Mapping[str, Any] = {
            **config,
            "channel_mult": tuple(channel_mult),
            "attention_strides": tuple(attention_strides),
        }
        embedding = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embedding)
        self._build(_Parts(embedding, self.config))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ADMUNet":
        """A network with fresh weights."""
        return cls(**config)

    def _build(self, parts: "_Parts") -> None:
        """The blocks, each of which keeps one skip tensor on the way down and takes one on the way up."""
        config = self.config
        widths = [int(mult * config["model_channels"]) for mult in config["channel_mult"]]
        count, last = config["num_res_blocks"], len(widths) - 1
        channels = widths[0]
        down, skips = [Stage(nn.Conv2d(config["in_channels"], channels, 3, padding=1))], [channels]
        for level, width in enumerate(widths):
            for _ in range(count):
                down.append(Stage(*parts.layer(channels, width, level)))
                channels = width
                skips.append(channels)
            if level < last:
                down.append(Stage(parts.sampler(channels, "down")))
                skips.append(channels)
        up = []
        middle = parts.resnet(channels, channels), parts.attention(channels), parts.resnet(channels, channels)
        for level, width in reversed(list(enumerate(widths))):
            for index in range(count + 1):
                layers = parts.layer(channels + skips.pop(), width, level)
                channels = width
                sampler = [parts.sampler(channels, "up")] if level and index == count else []
                up.append(Stage(*layers, *sampler))
        self.input_blocks, self.middle_block = nn.ModuleList(down), Stage(*middle)
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(
            GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, config["out_channels"], 3, padding=1)
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Int[Tensor, "b"], y: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b _c h w"]:
        """The prediction for images x at timesteps t of classes y."""
        embedding = self.time_embed(embed_times(t, self.config["model_channels"]).to(x.dtype))
        if y is not None:
            embedding = embedding + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), embedding)
        return self.out(x)


def embed_times(t: Int[Tensor, "b"], channels: int) -> Float[Tensor, "b channels"]:
    """Cosines, then sines, of t at frequencies from 1 down to nearly 1/10000."""
    half = channels // 2
    frequencies = torch.exp(-log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class _Parts:
    """Makes the layers of a network, all after one config."""

    def __init__(self, embedding: int, config: Mapping[str, Any]) -> None:
        self.embedding, self.config = embedding, config

    def layer(self, channels: int, width: int, level: int) -> list[nn.Module]:
        """A residual block, with attention where its level has it."""
        attends = 2**level in self.config["attention_strides"]
        return [self.resnet(channels, width), *([self.attention(width)] if attends else [])]

    def resnet(self, channels: int, width: int, resample: Literal["down", "up"] | None = None) -> "ResBlock":
        return ResBlock(channels, width, self.embedding, self.config["use_scale_shift_norm"], resample)

    def attention(self, channels: int) -> "Attention":
        size = self.config["num_head_channels"]
        heads = channels // size if size else self.config["num_heads"]
        if not heads or channels % heads or (size and channels % size):
            raise ValueError(
                f"{channels} channels in {heads} heads (num_heads={self.config['num_heads']}, "
                f"num_head_channels={size}); give one of the two, by which the channels can be divided"
            )
        return Attention(channels, heads, self.config["use_new_attention_order"])

    def sampler(self, channels: int, direction: Literal["down", "up"]) -> nn.Module:
        if self.config["resample"] == "resblock":
            return self.resnet(channels, channels, direction)
        sampler = Downsample if direction == "down" else Upsample
        return sampler(channels, learned=self.config["resample"] == "conv")


class Stage(nn.Sequential):
    """Layers in a row, of which the residual blocks are told the time."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class GroupNorm(nn.GroupNorm):
    """Computed in float32 whatever the dtype, in which sums over a group could overflow."""

    def forward(self, x: Float[Tensor, "b c *n"]) -> Float[Tensor, "b c *n"]:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; the time shifts (and scales) what lies between them."""

    def __init__(
        self,
        channels: int,
        width: int,
        embedding: int,
        scale_shift: bool,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = nn.Identity() if resample is None else SAMPLERS[resample](channels, learned=False)
        self.in_layers = nn.Sequential(GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, width, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * width if scale_shift else width))
        self.out_layers = nn.Sequential(
            GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Identity(),  # the place of the checkpoints' dropout
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if width == channels else nn.Conv2d(channels, width, 1)

    def forward(self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b _c _h _w"]:
        norm, act, conv = self.in_layers
        hidden = conv(self.resample(act(norm(x))))
        told = rearrange(self.emb_layers(embedding), "b c -> b c 1 1")
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = told.chunk(2, 1)
            hidden = norm(hidden) * (1 + scale) + shift
        else:
            hidden = norm(hidden + told)
        for layer in rest:
            hidden = layer(hidden)
        return self.skip_connection(self.resample(x)) + hidden


class Downsample(nn.Module):
    """Half the side, by a convolution with stride 2 or by the mean of 2x2 pixels."""

    def __init__(self, channels: int, *, learned: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else nn.AvgPool2d(2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _h _w"]:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the side, each pixel repeated, then a convolution where it is learned."""

    def __init__(self, channels: int, *, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _h _w"]:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


SAMPLERS: Mapping[str, type[Downsample] | type[Upsample]] = {"down": Downsample, "up": Upsample}


class Attention(nn.Module):
    """Self-attention over all pixels, added to its input. `q`, `k` and `v` [b n c] pass through modules to be taken."""

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads = heads
        self.order = "b (part head c) n -> part b n (head c)" if new_order else "b (head part c) n -> part b n (head c)"
        self.norm = GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.q, self.k, self.v = nn.Identity(), nn.Identity(), nn.Identity()
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        qkv = self.qkv(rearrange(self.norm(x), "b c h w -> b c (h w)"))
        parts = rearrange(qkv, self.order, part=3, head=self.heads)
        q, k, v = (
            rearrange(named(part), "b n (head c) -> b head n c", head=self.heads)
            for named, part in zip((self.q, self.k, self.v), parts, strict=True)
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b head n c -> b (head c) n")
        return x + rearrange(self.proj_out(attended), "b c (h w) -> b c h w", h=x.shape[2])
