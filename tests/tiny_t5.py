"""A tiny T5 and its tokenizer: real transformers classes, a vocabulary of single letters."""

from string import ascii_lowercase, digits

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel, T5TokenizerFast  # type: ignore[attr-defined] # lazy, in 5

from tests.tiny import randomise

SPECIAL = ["<pad>", "</s>", "<unk>"]


def t5_tokenizer(length: int = 512) -> T5TokenizerFast:
    """One token a letter, digit or start of a word; what is none of these is unknown."""
    pieces = [(piece, 0.0) for piece in SPECIAL] + [(piece, -2.0) for piece in f"▁{ascii_lowercase}{digits},."]
    # Built by hand: only transformers 5 makes one from a vocabulary.
    whole = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index("<unk>")))
    whole.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    whole.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=whole, extra_ids=0, model_max_length=length)


def t5_encoder(width: int = 12, seed: int = 3) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=4,
        num_heads=2,
        d_ff=2 * width,
        num_layers=2,
        feed_forward_proj="gated-gelu",  # as in T5 v1.1, which every diffusion model has
        dropout_rate=0.0,
    )
    return randomise(T5EncoderModel(config), seed)
