"""What the service counts about itself, for Prometheus, in a registry of its own."""

import math
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PROBES = 200  # that the recall is the mean of


class Metrics:
    """Counters of one service; every name begins with `repkit_`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.seconds = Histogram(
            "repkit_request_seconds",
            "Time of a request, from its headers to the end of its answer.",
            ("route", "method", "status"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.refused = Counter("repkit_refused", "Requests refused, by reason.", ("reason",), registry=registry)
        self.batch = Histogram("repkit_batch_size", "Queries a search.", buckets=_SIZES, registry=registry)
        self.search = Histogram("repkit_search_seconds", "Time of a search.", buckets=_SECONDS, registry=registry)
        self.images = Counter("repkit_images", "Pictures decoded, by outcome.", ("outcome",), registry=registry)
        self.probes = Counter("repkit_recall_probes", "Searches repeated exactly.", registry=registry)
        self._recalls: deque[float] = deque(maxlen=PROBES)
        self.gauge("repkit_recall", f"Mean recall of the last {PROBES} probes; NaN before the first.", self._recall)

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A value that is read when it is asked for."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def probed(self, recall: float) -> None:
        """Count one search that was repeated exactly."""
        self.probes.inc()
        self._recalls.append(recall)

    def _recall(self) -> float:
        found = list(self._recalls)
        return sum(found) / len(found) if found else math.nan

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
