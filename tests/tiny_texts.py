"""A tiny CLIP text encoder and its tokenizer: real transformers classes, a vocabulary of single characters."""

import json
from pathlib import Path
from string import printable
from tempfile import TemporaryDirectory

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tiny import randomise

START, END = "<|startoftext|>", "<|endoftext|>"
_CHARACTERS = [character for character in printable if not character.isspace()]
_MERGES = [("c", "a"), ("ca", "t</w>")]
PIECES = [*_CHARACTERS, *(f"{c}</w>" for c in _CHARACTERS), *("".join(pair) for pair in _MERGES), START, END]


def clip_tokenizer(pad_token: str = END, length: int = 77) -> CLIPTokenizer:
    """One token a character, but for the word cat. SDXL's second tokenizer pads with "!"."""
    with TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({piece: index for index, piece in enumerate(PIECES)}))
        merges.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in _MERGES)]) + "\n")
        return CLIPTokenizer(str(vocabulary), str(merges), pad_token=pad_token, model_max_length=length)


def clip_encoder(
    width: int = 12, projected: bool = False, seed: int = 2
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Three layers, so that the last, the one before it and the embeddings all differ."""
    config = CLIPTextConfig(
        vocab_size=len(PIECES),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=width - 2,
        bos_token_id=PIECES.index(START),
        eos_token_id=PIECES.index(END),
        pad_token_id=PIECES.index(END),
    )
    encoder = randomise((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)
    for parameter in encoder.parameters():
        parameter *= 5  # so that attention is not even, and one word is felt in all that follow
    return encoder
