"""Prompts: texts to what a denoiser is told, each text encoded once, by encoders that can be freed afterwards."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.hashing import hash_weights

Encoders = Mapping[str, Any]  # tokenizers and text encoders by their names in a pipeline: tokenizer, text_encoder_2
Row = Mapping[str, Tensor]  # what one text is to a denoiser, without a batch dimension
Told = Callable[[int, int], None]  # how far the encoding is: texts done, and all

MEMORY = 1 << 32  # bytes: 17,000 prompts of Stable Diffusion 1, 512 of FLUX.1-dev in float32
_FULL = (
    "%d of %d prompts of %s are encoded ahead, since memory holds %.3g GiB of them; the others are encoded later "
    "and the text encoders stay; prompt_cache= (--prompt-cache) keeps them all on disk"
)

logger = logging.getLogger("repkit")


class TextEncoders:
    """The tokenizers and text encoders of a pipeline, opened when they are first needed.

    open_encoders: gives them, frozen and in place. cache: a folder in which embeddings are kept between processes.
    fingerprint: what tells these encoders from others without opening them (their files); without one the cache
    cannot be asked before they are open.
    """

    def __init__(
        self, open_encoders: Callable[[], Encoders], *, cache: Path | None = None, fingerprint: str | None = None
    ) -> None:
        self.cache, self._open, self._fingerprint = cache, open_encoders, fingerprint
        self._opened: Encoders | None = None
        self._hash: str | None = None

    def open(self) -> Encoders:
        """The encoders, by their names in the pipeline."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def free(self) -> int:
        """Let go of the encoders until one is needed again; returns the bytes of their weights. Their hash is kept."""
        if self._opened is None:
            return 0
        _ = self.hash
        freed = sum(tensor.nbytes for network in _networks(self._opened).values() for tensor in network.parameters())
        self._opened = None
        return freed

    @property
    def hash(self) -> str:
        """sha256 over the encoders' configs and weights, and the tokenizers' vocabularies and lengths."""
        if self._hash is None:
            self._hash = self._recorded() or self._computed()
        return self._hash

    def _computed(self) -> str:
        encoders = self.open()
        digest = hashlib.sha256(hash_weights(_networks(encoders)).encode())
        for name, part in sorted(encoders.items()):
            if part is not None and not isinstance(part, nn.Module):
                vocabulary = sorted(part.get_vocab().items())
                digest.update(f"{name}:{part.model_max_length}:{vocabulary}".encode())
        if (record := self._record()) is not None:
            _write(record, lambda path: path.write_text(digest.hexdigest()))
        return digest.hexdigest()

    def _recorded(self) -> str | None:
        record = self._record()
        return record.read_text() if record is not None and record.is_file() else None

    def _record(self) -> Path | None:
        return None if self.cache is None or self._fingerprint is None else self.cache / f"{self._fingerprint}.hash"


class Prompts:
    """Texts to conditions. `encode(encoders, text)` gives one row of each tensor.

    shapes: of one row of each tensor, which are known before any text is encoded. null: the text that the null prompt
    is; None where it is zeros. memory: bytes of rows that are kept; those that were not used for longest go first, to
    be read from the encoders' cache again, or encoded again where there is none.
    """

    def __init__(
        self,
        texts: TextEncoders | None,
        encode: Callable[[Encoders, str], Mapping[str, Tensor]],
        *,
        shapes: Mapping[str, tuple[int, ...]],
        model: str,
        null: str | None = "",
        memory: int = MEMORY,
    ) -> None:
        self.texts, self.shapes, self.memory = texts, shapes, memory
        self._encode, self._model, self._null = encode, model, null
        self._known: dict[str, Row] = {}  # the one used last comes last
        self._held = 0

    def condition(self, cond: Cond, batch: int, device: torch.device, dtype: torch.dtype) -> Condition:
        """One text for all images or one for each, floats in `dtype`; None is the null prompt."""
        rows = [self.row(self._null if text is None else text) for text in self._each(cond, batch)]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return Condition({name: _placed(tensor, device, dtype) for name, tensor in stacked.items()})

    def blank(self, batch: int, device: torch.device, dtype: torch.dtype) -> Condition:
        """A condition that has the shapes and says nothing: for forwards on shapes alone."""
        return Condition(
            {name: torch.ones(batch, *shape, device=device, dtype=dtype) for name, shape in self.shapes.items()}
        )

    def row(self, text: str | None) -> Row:
        """The tensors of one text, without a batch dimension, from memory, from the cache, or encoded now, alone.

        Alone, because a text's embedding would change in its last bits with the texts beside it. None is zeros.
        """
        if text is None:
            return {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        found = self._known.pop(text, None)
        if found is None:
            found = self._cached(text) or self._encoded(text)
            self._make_room(_bytes(found))
        self._known[text] = found
        return found

    def learn(self, conds: Iterable[Cond], told: Told | None = None) -> int:
        """Encode what images will be told, then let go of the text encoders; returns the bytes of their weights.

        Where memory cannot hold it all and no cache keeps the rest, that is left for later, and the encoders stay.
        told: called after each of several texts with the number encoded and that of all.
        """
        each = (text for cond in conds for text in self._each(cond, _count(cond)))
        texts = dict.fromkeys(self._null if text is None else text for text in each)
        new = [text for text in texts if text is not None and text not in self._known]
        for count, text in enumerate(new, 1):
            row = self.row(text)
            full = not self._is_kept() and count < len(new) and self._held + _bytes(row) > self.memory
            if told is not None and len(new) > 1:
                told(count, count if full else len(new))
            if full:
                logger.warning(_FULL, count, len(new), self._model, self.memory / 2**30)
                return 0
        return self.free()

    @property
    def hash(self) -> str:
        """That of the encoders; "none" where there are none."""
        return "none" if self.texts is None else self.texts.hash

    def free(self) -> int:
        """Let go of the text encoders; texts that were encoded stay known. Returns the bytes of their weights."""
        return 0 if self.texts is None else self.texts.free()

    def _each(self, cond: Cond, batch: int) -> list[str | None]:
        each: Sequence[Any] = [cond] * batch if cond is None or isinstance(cond, str | int) else list(cond)
        if len(each) != batch:
            raise ValueError(f"{len(each)} prompts for {batch} images; give one for all or one for each")
        for one in each:
            if not (isinstance(one, str) or (one is None and cond is None)):
                raise ValueError(f"{self._model} is told a text, not the class {one!r}; give cond= a prompt")
        return list(each)

    def _make_room(self, size: int) -> None:
        """Forget the texts that were not used for longest, until a row of this size has its place."""
        while self._known and self._held + size > self.memory:
            self._held -= _bytes(self._known.pop(next(iter(self._known))))
        self._held += size

    def _encoded(self, text: str) -> Row:
        if self.texts is None:
            raise ValueError(f"{self._model} came without text encoders, so no prompt can be encoded; load its folder")
        with torch.no_grad():
            row = {name: tensor.detach().cpu() for name, tensor in self._encode(self.texts.open(), text).items()}
        if (path := self._path(text)) is not None:
            _write(path, lambda temporary: save_file({name: t.contiguous() for name, t in row.items()}, temporary))
        return row

    def _is_kept(self) -> bool:
        """Whether what is forgotten can be read again."""
        return self.texts is not None and self.texts.cache is not None

    def _cached(self, text: str) -> Row | None:
        path = self._path(text)
        if path is None or not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError:  # cut short by a kill on a file system that renames early: encode it again
            return None

    def _path(self, text: str) -> Path | None:
        if self.texts is None or self.texts.cache is None:
            return None
        said = f"{self.hash}:{sorted(self.shapes.items())}:text:{text}"  # the shapes hold the length of the padding
        return self.texts.cache / f"{hashlib.sha256(said.encode()).hexdigest()}.safetensors"


def _count(cond: Cond) -> int:
    return 1 if cond is None or isinstance(cond, str | int) else len(cond)


def _bytes(row: Row) -> int:
    return sum(tensor.nbytes for tensor in row.values())


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _networks(encoders: Encoders) -> dict[str, nn.Module]:
    return {name: part for name, part in encoders.items() if isinstance(part, nn.Module)}


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under another name, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)
