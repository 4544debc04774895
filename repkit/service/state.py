"""What a running service consists of, opened together and closed in order."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, Request
from jaxtyping import Float32

from repkit.service.batching import Batcher, Options
from repkit.service.calibration import calibrate
from repkit.service.decoder import Decoder
from repkit.service.features import FeatureThread, Origin
from repkit.service.items import Answer
from repkit.service.live import LiveIndex
from repkit.service.metrics import Metrics
from repkit.service.settings import Settings
from repkit.service.thumbnails import Files, Kept
from repkit.service.workers import Workers

READERS, WRITERS = 4, 8  # threads; writers wait for one commit together


@dataclass(eq=False)
class Service:
    """The parts of one service; `draining` is set once it is to end."""

    settings: Settings
    live: LiveIndex
    batcher: Batcher
    decoder: Decoder
    features: FeatureThread
    files: Files
    thumbnails: Kept
    reads: Workers
    writes: Workers
    metrics: Metrics
    draining: bool = False

    @classmethod
    def open(cls, settings: Settings, metrics: Metrics, progress: Any = None) -> "Service":
        """Open the index, calibrate the search, load the model; raises OSError and ValueError for what is no index."""
        live = LiveIndex.open(settings.index, progress=progress)
        try:
            service = cls(settings, live, **_parts(settings, live, metrics), metrics=metrics)
            service.batcher.start()
            service.features.start()
        except BaseException:
            live.close()
            raise
        if service.features.missing is None:
            service.decoder.warm()
        metrics.gauge("repkit_items", "Items in the index.", lambda: len(live))
        return service

    @cached_property
    def maker(self) -> dict[str, Any]:
        """What made the vectors, as each answer tells it."""
        described, identity = self.live.described, self.live.described.get("identity")
        text = None if identity is None else json.dumps(identity, sort_keys=True)
        return {
            "name": model_name(described),
            "key": described.get("key"),
            "metric": self.live.metric,
            "identity": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        }

    def close(self) -> None:
        """Finish what is under way, then give the index free."""
        for part in (self.features, self.batcher, self.decoder, self.reads, self.writes, self.live):
            part.close()


def _parts(settings: Settings, live: LiveIndex, metrics: Metrics) -> dict[str, Any]:
    origin = Origin(*(live.described.get(name) for name in ("identity", "provenance", "key", "pool")))
    waiting = settings.most_waiting
    return {
        "batcher": Batcher(
            _searching(live),
            _cut,
            recall_of(live.metric),
            metrics,
            most_waiting=waiting,
            probe_share=settings.probe_share,
            prepare=lambda: _calibrate(live),
        ),
        "decoder": Decoder(
            settings.decoders,
            metrics,
            max_pixels=settings.max_pixels,
            seconds=settings.decode_seconds,
            most_waiting=max(1, waiting // 4),
        ),
        "features": FeatureThread(
            origin, metrics, model=settings.model, device=settings.device, most_waiting=max(1, waiting // 4)
        ),
        "files": Files(settings.index / "items.parquet", settings.images),
        "thumbnails": Kept(),
        "reads": Workers("reads", READERS, waiting),
        "writes": Workers("changes", WRITERS, max(1, waiting // 2)),
    }


def _calibrate(live: LiveIndex) -> None:
    """Measure with some of the index's own vectors."""
    stored = [live.get(one.id) for one in live.list(None, 16)]
    queries = [one.vector for one in stored if one is not None]
    if queries:
        search = partial(live.search, k=10)
        calibrate(search, np.stack(queries), multiplies=live.described.get("kind") != "hnsw")


def _searching(live: LiveIndex) -> Any:
    def search(vectors: Float32[np.ndarray, "q d"], options: Options) -> Answer:
        where = None if options.where is None else json.loads(options.where)
        settings = {"ef": options.ef, "nprobe": options.nprobe}
        return live.search(vectors, options.k, where=where, exact=options.exact, **settings)

    return search


def _cut(answer: Answer, first: int, end: int) -> Answer:
    return replace(answer, hits=answer.hits[first:end])


def recall_of(metric: str) -> Any:
    """A function from an answer and the exact one to the share of hits that are as near as those; ties count."""
    sign = -1 if metric == "l2" else 1

    def recall(answer: Answer, exact: Answer) -> float | None:
        if answer.version != exact.version:  # the index has changed between the two
            return None
        shares = []
        for found, truth in zip(answer.hits, exact.hits, strict=True):
            if not truth:
                continue
            least = sign * truth[-1].score - 1e-5 * abs(truth[-1].score)
            shares.append(sum(sign * hit.score >= least for hit in found) / len(truth))
        return sum(shares) / len(shares) if shares else None

    return recall


def model_name(described: Mapping[str, Any]) -> str | None:
    """What the model was loaded as, without the folders it lay in; of a fusion, all of its models."""
    provenance = described.get("provenance") or {}
    sources = [provenance, *(provenance.get("parts") or [])]
    names = [str(one["model"]) for one in sources if one.get("model")]
    return " + ".join(Path(name).name if name.startswith("/") else name for name in names) or None


async def running(request: Request) -> Service:
    """The service that a request is for."""
    return request.app.state.service


Running = Annotated[Service, Depends(running)]
