"""Features: one thread runs the index's own extractor over pictures, as many at once as wait."""

import logging
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from repkit.service.answers import refusal
from repkit.service.decoder import Picture
from repkit.service.metrics import Metrics
from repkit.service.waiting import Line, Waiting

if TYPE_CHECKING:
    from repkit.extractors import Extractor
    from repkit.matching.featuremap import FeatureMap

_log = logging.getLogger("repkit")
BATCH = 16  # pictures of one forward
CACHED_BYTES = 256 << 20  # of maps: clicks in one picture should not run the network again


@dataclass(frozen=True)
class Origin:
    """What made an index's vectors, from its manifest."""

    identity: Mapping[str, Any] | None
    provenance: Mapping[str, Any] | None
    key: str | None
    pool: str | None


@dataclass(frozen=True)
class _Asked:
    picture: Picture
    name: str | None  # of the picture, where its map is wanted and not the pooled vector


_Waiting = Waiting[_Asked]


class FeatureThread:
    """The extractor of an index in a thread of its own; `missing` says why there is none.

    Pictures come decoded and resized. Raises HTTP errors: 503 where there is no extractor, 429 where too many wait, 422
    for a picture whose features are not finite.
    """

    def __init__(self, origin: Origin, metrics: Metrics, *, model: str | None, device: str, most_waiting: int) -> None:
        self.missing: str | None = "the model is being loaded"
        self.shape: tuple[int, int] = (0, 0)
        self.policy: Any = "crop"
        self._origin, self._model, self._device = origin, model, device
        self._extractor: Extractor | None = None
        self._maps: OrderedDict[str, FeatureMap] = OrderedDict()
        self._line: Line[_Asked] = Line(
            "repkit-features", most_waiting, "pictures", _oldest, self._answer, prepare=self._load
        )
        self.start, self.close = self._line.start, self._line.close
        metrics.gauge("repkit_waiting_features", "Pictures that wait for the model.", lambda: len(self._line))

    async def vector(self, picture: Picture) -> Float32[np.ndarray, " d"]:
        """The picture's vector, pooled as those of the index."""
        return await self._ask(picture, None)

    async def map(self, picture: Picture, name: str) -> "FeatureMap":
        """The picture's features before pooling; `name` is the same for the same picture only."""
        return await self._ask(picture, name)

    def known(self, name: str) -> bool:
        """Whether the map of a picture is kept from an earlier call."""
        return name in self._maps

    def check(self) -> None:
        """Raise the HTTP error that says why there is no extractor, where there is none."""
        if self.missing is not None:
            raise refusal(503, self.missing, "no_model")

    async def _ask(self, picture: Picture, name: str | None) -> Any:
        self.check()
        return await self._line.ask(_Asked(picture, name))

    def _load(self) -> None:
        if self._origin.identity is None or self._origin.key is None or self._origin.pool is None:
            self.missing = "the index was built from an array, so no model makes queries for it; search by vector or id"
            return
        try:
            from repkit.tasks.building import rebuild_extractor

            told = self._origin.identity, self._origin.provenance or {}
            self._extractor = rebuild_extractor(*told, model=self._model, device=self._device)
            self.shape, self.policy = self._extractor.resize.shape, self._extractor.resize.policy
            self.missing = None
        except Exception as error:  # without its model the index still answers searches by vector and id
            # The reason names folders of this machine, which no client is to know.
            _log.warning("no search by picture: %s", next(iter(str(error).splitlines()), type(error).__name__))
            self.missing = (
                "no search by picture: the model of the index could not be loaded; the service's log says why"
            )

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        wanted = [one for one in batch if not one.future.done()]
        try:
            self._extract([one for one in wanted if not self._cached(one)])
        except Exception as error:
            for one in wanted:
                one.result = error if one.result is None else one.result

    def _cached(self, one: _Waiting) -> bool:
        if one.asked.name is None or one.asked.name not in self._maps:
            return False
        self._maps.move_to_end(one.asked.name)
        one.result = self._maps[one.asked.name]
        return True

    def _extract(self, batch: Sequence[_Waiting]) -> None:
        if not batch:
            return
        from repkit.features import all_finite
        from repkit.pooling import pool

        key, how = self._origin.key, self._origin.pool
        assert self._extractor is not None and key is not None and how is not None
        features, mask = _forward(self._extractor, [one.asked.picture for one in batch])
        maps = features[key].float()
        vectors = pool(maps, how, mask).cpu().numpy()
        for row, one in enumerate(batch):
            if not all_finite(maps[row]) or not np.isfinite(vectors[row]).all():
                one.result = refusal(422, "the picture's features are not finite", "no_picture")
            elif one.asked.name is None:
                one.result = vectors[row]
            else:
                one.result = self._keep(one.asked.name, maps[row], None if mask is None else mask[row])

    def _keep(self, name: str, values: Any, mask: Any) -> "FeatureMap":
        from repkit.matching.featuremap import FeatureMap

        found = self._maps[name] = FeatureMap(values.cpu().clone(), self.shape, None if mask is None else mask.cpu())
        each = found.values.numel() * found.values.element_size()
        while len(self._maps) > max(2, CACHED_BYTES // each):
            self._maps.popitem(last=False)
        return found


def _oldest(waiting: deque[_Waiting]) -> list[_Waiting]:
    return [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]


def _forward(extractor: "Extractor", pictures: Sequence[Picture]) -> tuple[Mapping[str, Any], Any]:
    """The features, and the mask of what was padded; as `repkit extract` runs the extractor."""
    import torch

    from repkit.images import to_tensor

    images = to_tensor(np.stack([one.pixels for one in pictures]))
    features = extractor(images, check=False)
    masks = [one.mask for one in pictures if one.mask is not None]
    mask = torch.from_numpy(np.stack(masks)) if masks else None
    return features, None if mask is None else mask.to(features[next(iter(features))].device)
