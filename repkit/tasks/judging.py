"""Judge: the denoising errors of one image told several captions, all at the same levels and under the same noise."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float64

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Condition
from repkit.datasets.captions import Picture
from repkit.features import identity_hash
from repkit.images import Resize, decode, decoder_identity, digest, to_tensor
from repkit.noise import NOISE_VERSION
from repkit.precision import full_float32
from repkit.zeroshot.evaluating import LOSSES, Evaluator, Prepared
from repkit.zeroshot.levels import Levels, levels_at, strata
from repkit.zeroshot.weightings import weigh


@dataclass(frozen=True, eq=False)
class Judge:
    """Tells a backbone captions of an image, with the same levels and noise for all of them.

    evaluations: levels, in the middles of equal strata of native time. weighting, loss: as the classifier has them.
    Raises ValueError for values out of range and for a weighting the backbone's schedule does not have.
    """

    backbone: Backbone
    evaluations: int = 32
    weighting: str = "train"
    loss: str = "l2"
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.batch_size < 1:
            raise ValueError(f"evaluations={self.evaluations}, batch_size={self.batch_size}; give at least 1 of each")
        if self.loss not in LOSSES:
            raise ValueError(f"no loss {self.loss!r}; have {', '.join(LOSSES)}")
        self._weights  # noqa: B018  an unknown weighting is told now

    def learn(self, captions: Iterable[str], told: Callable[[int, int], None] | None = None) -> None:
        """Encode captions and the null prompt, and let go of the text encoders where all of them can be kept.

        told: called with the number of texts encoded and that of all.
        """
        if self.backbone.prompts is not None:
            self.backbone.prompts.learn([*dict.fromkeys(captions), None], told)

    def errors(self, image: Picture, captions: Sequence[str], null: bool) -> Float64[np.ndarray, "k"]:
        """The error of each caption and, with `null`, last that of the null prompt.

        Captions that are the same to the network have the same error. Raises OSError and ValueError for an image that
        cannot be read, FloatingPointError where the network returns something that is not finite.
        """
        self.backbone.check_frozen()
        pixels, _ = self._resize(decode(image))
        told, place = distinct_conditions(self.backbone, [*captions, *[None] * null])
        names = [[*captions, "nothing"][place.index(row)] for row in range(max(place) + 1)]
        evaluator = Evaluator(self.backbone, told, names, self._levels, seed=self.seed, batch_size=self.batch_size)
        plain = torch.autocast(self.backbone.device.type, enabled=False)  # a training loop's would change the values
        with torch.no_grad(), plain, full_float32():
            tensor = to_tensor(pixels)[None].to(self.backbone.device)
            prepared = list(evaluator.encode(tensor, [digest(pixels)]))
            return self._weighted(evaluator, prepared)[place]

    def _weighted(self, evaluator: Evaluator, prepared: Sequence[Prepared]) -> Float64[np.ndarray, "j"]:
        """One error for each distinct condition; batches go level by level, since a level is noised once for all."""
        grid = np.indices((1, self.evaluations, len(evaluator.names)))  # image, level, condition
        rows = rearrange(grid, "which b n j -> (b n j) which")
        parts = [
            evaluator.errors(prepared, rows[first : first + self.batch_size])
            for first in range(0, len(rows), self.batch_size)
        ]
        losses = rearrange(np.concatenate(parts)[:, LOSSES.index(self.loss)], "(n j) -> n j", n=self.evaluations)
        return reduce(self._weights[:, None] * losses, "n j -> j", "mean")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the errors, as JSON values."""
        backbone = self.backbone
        return {
            "weights": backbone.weights_hash,
            "schedule": backbone.schedule.identity,
            "resize": self._resize.identity,
            "decoder": decoder_identity(),
            "classes": identity_hash({"names": list(backbone.class_names or [])}),
            "evaluations": self.evaluations,
            "weighting": self.weighting,
            "loss": self.loss,
            "seed": self.seed,
            "noise_version": NOISE_VERSION,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            **({} if backbone.prompts is None else {"text": backbone.prompts.hash}),
            **backbone.options,
        }

    @cached_property
    def _resize(self) -> Resize:
        return Resize(self.backbone.size)

    @cached_property
    def _levels(self) -> Levels:
        return levels_at(self.backbone.schedule, strata(self.evaluations))

    @cached_property
    def _weights(self) -> Float64[np.ndarray, "n"]:
        return weigh(self.weighting, self._levels, self.loss)


def distinct_conditions(backbone: Backbone, conds: Sequence[str | None]) -> tuple[Condition, list[int]]:
    """What the network is told, each thing once, and for each of `conds` the row of it; None is the null prompt.

    Texts can be the same to a network: those that differ after the last token it reads, or the empty one and none.
    """
    rows: list[Condition] = []
    row_of: dict[bytes, int] = {}
    place = []
    for cond in conds:
        told = backbone.condition(cond, 1)
        said = b"".join(tensor.float().cpu().numpy().tobytes() for tensor in told.tensors.values())
        place.append(row_of.setdefault(said, len(row_of)))
        if len(row_of) > len(rows):
            rows.append(told)
    names = rows[0].tensors
    return Condition({name: torch.cat([row.tensors[name] for row in rows]) for name in names}), place
