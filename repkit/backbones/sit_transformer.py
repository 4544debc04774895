"""The transformer of SiT, REPA, SVG and the first DiT, under the module names of their published checkpoints."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

Tokens = Float[Tensor, "b n c"]
Vectors = Float[Tensor, "b c"]


class SiTTransformer(nn.Module):
    """A class-conditional diffusion transformer with adaptive layer norm, on a square grid of patches.

    sample_size: side of the latents. labels: rows of the table of labels, the null class among them. mlp_width: hidden
    width of the feed-forward. qk_norm: a layer norm on each head's queries and keys. t is in the units that the
    network was trained with. Fresh weights are torch's own, not the zeros that training starts from, under which every
    block would be the identity.
    """

    def __init__(
        self,
        sample_size: int,
        patch_size: int,
        in_channels: int,
        out_channels: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        labels: int,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        given = dict(locals())
        self.config = {key: value for key, value in given.items() if key not in ("self", "__class__")}
        self.x_embedder = PatchEmbedder(in_channels, width, patch_size)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(labels, width)
        self.register_buffer("pos_embed", sine_cosine_grid(sample_size // patch_size, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * out_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SiTTransformer":
        """The same network with fresh weights."""
        return cls(**config)

    def forward(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], labels: Int[Tensor, "b"]
    ) -> Float[Tensor, "b d h w"]:
        patch = self.config["patch_size"]
        tokens = self.x_embedder(x_t) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(labels)
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition)
        height = x_t.shape[-2] // patch
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch, q=patch)


class PatchEmbedder(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x_t: Float[Tensor, "b _c _h _w"]) -> Tokens:
        return rearrange(self.proj(x_t), "b c h w -> b (h w) c")


class TimeEmbedder(nn.Module):
    FREQUENCIES = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, "b"]) -> Vectors:
        index = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * index / self.FREQUENCIES)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(labels, width)

    def forward(self, labels: Int[Tensor, "b"]) -> Vectors:
        return self.embedding_table(labels)


class AdaptiveNorm(nn.LayerNorm):
    """Layer norm without weights of its own, then a shift and scale that the condition decides."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=False)

    def forward(self, tokens: Tokens, shift: Vectors, scale: Vectors) -> Tokens:  # type: ignore[override]
        return super().forward(tokens) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        # One layer projects all three; these give each a module of its own, at which it can be taken.
        self.q, self.k, self.v = nn.Identity(), nn.Identity(), nn.Identity()
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tokens) -> Tokens:
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in (self.q(q), self.k(k), self.v(v)))
        heads = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(rearrange(heads, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tokens) -> Tokens:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = AdaptiveNorm(width), AdaptiveNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = FeedForward(width, mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, tokens: Tokens, condition: Vectors) -> Tokens:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        tokens = tokens + gate1[:, None] * self.attn(self.norm1(tokens, shift1, scale1))
        return tokens + gate2[:, None] * self.mlp(self.norm2(tokens, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = AdaptiveNorm(width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tokens, condition: Vectors) -> Float[Tensor, "b n d"]:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(self.norm_final(tokens, shift, scale))


def sine_cosine_grid(side: int, width: int) -> Float[Tensor, "1 n c"]:
    """Fixed positions of a square grid, row by row: half of the channels for the column, half for the row."""
    quarter = width // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, c/2]
    columns, rows = repeat(line, "w c -> (h w) c", h=side), repeat(line, "h c -> (h w) c", w=side)
    return torch.cat([columns, rows], dim=1)[None].float()
