"""Text cache: keys and values of the prompts in cross-attention, computed once instead of in every forward.

In Stable Diffusion's U-Nets and in PixArt they depend on nothing but the prompt. Where text and image attend to each
other in one sequence (SD3, FLUX), they depend on the image from the second block on, and nothing is cached.
"""

import logging
from copy import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Condition
from repkit.backbones.pixart import PixArt
from repkit.backbones.text_unet import TextUNet
from repkit.capture import copy_along, shallow_copy
from repkit.precision import full_float32

BUDGET = 2**30  # bytes; Stable Diffusion 1 takes 3.8 MB a prompt in half precision
TEXT, PROJECTION = "encoder_hidden_states", "caption_projection"

logger = logging.getLogger("repkit")


class Lookup(nn.Module):
    """Rows of a table, by their numbers, in the place of what would compute them."""

    def __init__(self, table: Float[Tensor, "j n d"]) -> None:
        super().__init__()
        self.table = table

    def forward(self, numbers: Int[Tensor, "r n _w"]) -> Float[Tensor, "r n d"]:
        return self.table[numbers[:, 0, 0]]


class Widen(nn.Module):
    """Numbers repeated to a width, for a network that looks at the shape of its text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, numbers: Int[Tensor, "r n 1"]) -> Int[Tensor, "r n d"]:
        return numbers.expand(-1, -1, self.width)


def cache_texts(backbone: Backbone, conditions: Condition, *, budget: int = BUDGET) -> tuple[Backbone, Condition]:
    """A stand-in for the backbone that looks keys and values up, and the conditions it takes: the prompts' numbers.

    The same two as given where that would not be exact, or where the tables would take more than `budget` bytes. The
    caller's backbone stays as it is and shares its weights; a later change of these does not reach the tables.
    """
    paths = _cross_attentions(backbone)
    if not paths:
        return backbone, conditions
    text = conditions.tensors[TEXT]
    with full_float32(), torch.no_grad(), torch.autocast(text.device.type, enabled=False):
        size = sum(2 * backbone.model.get_submodule(path).inner_kv_dim for path in paths) * text[..., 0].nbytes
        if size > budget:
            logger.info("the prompts' keys and values take %d bytes, more than %d, and are not kept", size, budget)
            return backbone, conditions
        standing_in = copy(backbone)
        standing_in.model = _stand_in(backbone.model, paths, text)
    numbers = torch.arange(len(text), device=text.device)[:, None, None].expand(-1, text.shape[1], 1)
    return standing_in, Condition({**conditions.tensors, TEXT: numbers})


def _cross_attentions(backbone: Backbone) -> list[str]:
    """Paths of the layers that read the prompt; none where one of them uses it in a way that is not known."""
    if not isinstance(backbone, TextUNet | PixArt):
        return []
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    modules = dict(backbone.model.named_modules())
    if any("forward" in vars(module) for module in modules.values()):  # bound to the original, as offloading leaves it
        return []
    layers = {
        path: layer for path, layer in modules.items() if isinstance(layer, Attention) and layer.is_cross_attention
    }
    plain = (AttnProcessor, AttnProcessor2_0)  # they take nothing but keys and values from the prompt
    known = all(type(layer.processor) in plain and layer.norm_cross is None for layer in layers.values())
    return list(layers) if known else []


def _stand_in(model: nn.Module, paths: list[str], text: Float[Tensor, "j n d"]) -> nn.Module:
    copies = {"": shallow_copy(model)}
    projection = getattr(model, PROJECTION, None)
    told = text if projection is None else projection(text)
    for path in paths:
        layer = copy_along(copies, path)
        for name in ("to_k", "to_v"):
            layer._modules[name] = Lookup(getattr(layer, name)(told))
    if projection is not None:
        copies[""]._modules[PROJECTION] = Widen(told.shape[-1])
    return copies[""]
