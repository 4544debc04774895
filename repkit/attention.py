"""Attention maps: from the queries and keys of one attention layer to maps on the image grid, per token and per word.

A family adds a map in one line, `Point("transformer_blocks.0.attn", "attention")`: any module that calls
`scaled_dot_product_attention` will do. The point's raw value is an `Attended`, which costs nothing until a map is
made of it; `Backbone.fold` makes it. Where all queries lie on the image grid (self-attention, cross-attention),
the base class does that already. Where text and image are one sequence, the family gives two points,

    attn.map         Point(path, "attention")           image queries x image keys
    attn.text.map    Point(path, "attention", "text")   image queries x text keys

and its `fold` says which tokens come first: `joint_map(raw, point.part, h, w, text_first=True)`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

Part = Literal["image", "text"]


@dataclass(frozen=True)
class Attended:
    """What one attention layer compares: queries and keys as they enter the product, after norms and rotations.

    mask: as `scaled_dot_product_attention` takes it: True where a key is seen, or what is added to the logits.
    """

    q: Float[Tensor, "b heads q d"]
    k: Float[Tensor, "b kv_heads k d"]
    mask: Tensor | None
    scale: float
    causal: bool


class Watch(TorchFunctionMode):
    """While active, hands what every `scaled_dot_product_attention` of this thread compares to `seen`, then runs it."""

    def __init__(self, seen: Callable[[Attended], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self._seen(_attended(*args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    if query.ndim != 4:
        raise ValueError(f"attention over queries of shape {tuple(query.shape)} is unsupported; need [b heads q d]")
    return Attended(query, key, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale, is_causal)


def attention_map(
    attended: Attended, queries: slice = slice(None), keys: slice = slice(None)
) -> Float[Tensor, "b q k"]:
    """softmax(q k^T scale + mask) over all keys, float32, the mean over heads; of it, the rows and columns asked for.

    One head is held at a time, unless a graph is kept.
    """
    q, k = attended.q[:, :, queries], attended.k
    batch, heads, count, _ = q.shape
    shared = heads // k.shape[1]  # grouped queries: so many heads share one head of keys
    total = q.new_zeros((batch, count, len(range(k.shape[2])[keys])), dtype=torch.float32)
    if isinstance(q, FakeTensor):  # a forward on shapes alone, where the many products would take seconds
        return total
    mask = _bias(attended)
    for head in range(heads):
        logits = (q[:, head].float() * attended.scale) @ k[:, head // shared].float().mT
        if mask is not None:
            logits = logits + mask[:, head, queries]
        total += logits.softmax(-1)[..., keys]
    return total / heads


def _bias(attended: Attended) -> Float[Tensor, "b heads q k"] | None:
    """What is added to the logits, as a view that takes no memory for what it repeats."""
    (batch, heads, queries, _), keys = attended.q.shape, attended.k.shape[2]
    mask = attended.mask
    if attended.causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=attended.q.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    return mask.float().expand(batch, heads, queries, keys)


def fold_map(weights: Float[Tensor, "b q k"], h: int, w: int) -> Float[Tensor, "b k h w"]:
    """A map with its queries on their grid, one channel a key."""
    return rearrange(weights, "b (h w) k -> b k h w", h=h, w=w)


def joint_map(attended: Attended, part: Part, h: int, w: int, *, text_first: bool) -> Float[Tensor, "b k h w"]:
    """Of attention over text and image as one sequence: how image queries on their grid look at `part`.

    Not renormalised: over both parts, the weights of a query sum to one.
    """
    text = attended.k.shape[2] - h * w
    image = slice(text, None) if text_first else slice(None, h * w)
    texts = slice(None, text) if text_first else slice(h * w, None)
    return fold_map(attention_map(attended, image, image if part == "image" else texts), h, w)


def word_groups(tokenizer: Any, prompt: str, *, length: int | None = None, first: int = 0) -> dict[str, list[int]]:
    """Each word of a prompt -> its places among the tokens; a word said twice has both places.

    prompt: as the encoder gets it (PixArt's in lower case). length: what prompts are cut to; None is the tokenizer's
    own. first: where this tokenizer's tokens begin among the map's, for models that put one encoder's after another's.
    A word that was cut off is left out.
    """
    groups: dict[str, list[int]] = {}
    spans = _spans(tokenizer, prompt, length)
    for word in re.finditer(r"\w+(?:['’-]\w+)*", prompt):
        places = [place for place, (start, end) in enumerate(spans) if start < word.end() and end > word.start()]
        if places:
            groups.setdefault(word.group(), []).extend(first + place for place in places)
    return groups


def _spans(tokenizer: Any, prompt: str, length: int | None) -> list[tuple[int, int]]:
    """Where in the prompt each token is from, (0, 0) for those that are not."""
    if tokenizer.is_fast:
        told = tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True)
        return [(start, end) for start, end in told.offset_mapping]
    text, spans, end = prompt.lower(), [], 0
    for token in tokenizer(prompt, truncation=True, max_length=length).input_ids:
        piece = "" if token in tokenizer.all_special_ids else tokenizer.decode([token]).strip().lower()
        start = text.find(piece, end) if piece else -1
        end = end if start < 0 else start + len(piece)
        spans.append((0, 0) if start < 0 else (start, end))
    return spans


def word_maps(maps: Float[Tensor, "b tokens h w"], groups: Sequence[Sequence[int]]) -> Float[Tensor, "b words h w"]:
    """The mean map over each word's tokens, in the order of `groups` (see `word_groups`)."""
    for places in groups:
        if not places or not all(0 <= place < maps.shape[1] for place in places):
            raise ValueError(f"tokens {list(places)} of maps of {maps.shape[1]} tokens; give at least one, from 0 on")
    return torch.stack([maps[:, list(places)].mean(1) for places in groups], 1)


def aggregate(maps: Sequence[Float[Tensor, "b c _h _w"]], size: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """The mean of several layers' maps of the same tokens, each resized to size (h, w), bilinear and antialiased."""
    if len({found.shape[:2] for found in maps}) != 1:
        raise ValueError(f"maps of shapes {[tuple(found.shape) for found in maps]}; give maps of the same tokens")
    resized = [F.interpolate(found.float(), size, mode="bilinear", antialias=True) for found in maps]
    return torch.stack(resized).mean(0)
