"""One text through one text encoder of transformers: CLIP's hidden states and pooled vector, T5's hidden states."""

import logging
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

logger = logging.getLogger("repkit")


def needed(encoders: Mapping[str, Any], *names: str, model: str) -> list[Any]:
    """The encoders and tokenizers of these names; ValueError, naming them, for those that the pipeline lacks."""
    if missing := [name for name in names if encoders.get(name) is None]:
        raise ValueError(
            f"{model} came without {', '.join(missing)}, so no prompt can be encoded; get all of its parts"
        )
    return [encoders[name] for name in names]


def clip(
    tokenizer: Any, encoder: Any, text: str, *, layer: int | None = None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " p"]]:
    """Hidden states of the padded text and its pooled vector, projected where the encoder has a projection.

    layer: None is the last, after the final norm; -2 is the one before the last, without it, as SDXL and SD3 take it.
    """
    ids, mask = _tokens(tokenizer, text, tokenizer.model_max_length)
    masked = {"attention_mask": mask.to(encoder.device)} if getattr(encoder.config, "use_attention_mask", False) else {}
    out = encoder(ids.to(encoder.device), output_hidden_states=True, **masked)
    hidden = out.last_hidden_state if layer is None else out.hidden_states[layer]
    pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
    return hidden[0], pooled[0]


def t5(
    tokenizer: Any, encoder: Any, text: str, *, length: int, masked: bool = False
) -> tuple[Float[Tensor, "n d"], Int64[Tensor, " n"]]:
    """Hidden states of the text padded to `length` tokens, and which of them are no padding (1, else 0).

    masked: whether the encoder itself is told of the padding: PixArt's is, SD3's and FLUX's are not.
    """
    ids, mask = _tokens(tokenizer, text, length)
    told = {"attention_mask": mask.to(encoder.device)} if masked else {}
    return encoder(ids.to(encoder.device), **told).last_hidden_state[0], mask[0]


def _tokens(tokenizer: Any, text: str, length: int) -> tuple[Int64[Tensor, "1 n"], Int64[Tensor, "1 n"]]:
    whole = len(tokenizer(text, truncation=False, verbose=False).input_ids)
    if whole > length:
        logger.warning("a prompt of %d tokens is cut to %d: %s...", whole, length, text[:40])
    tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask
