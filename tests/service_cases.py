"""A service for tests: in a thread of this process, on a real socket, over an index of random vectors."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import httpx
import numpy as np

from repkit.retrieval import Index
from repkit.service.app import create_app
from repkit.service.metrics import Metrics
from repkit.service.run import Server, listening
from repkit.service.settings import Settings
from repkit.service.state import Service

COUNT, DIMENSION = 400, 12


def vectors_of(count: int = COUNT, dimension: int = DIMENSION, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def make_index(folder: Path, vectors: np.ndarray, metric: str = "cosine", kind: str = "flat") -> Path:
    """Items "0", "1" ... with a label of three and a size."""
    items = {
        "label": [f"class-{row % 3}" for row in range(len(vectors))],
        "size": [row % 7 for row in range(len(vectors))],
    }
    Index.build(vectors, kind=kind, metric=metric, metadata=items).save(folder)
    return folder


@contextmanager
def running(settings: Settings) -> Iterator[tuple[str, Service]]:
    """The address of a service, and the service itself to look into."""
    addresses: SimpleQueue[str] = SimpleQueue()
    service = Service.open(settings, Metrics())
    with listening("127.0.0.1", 0) as taken:
        server = Server(create_app(settings, service), settings, addresses.put)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            yield addresses.get(timeout=30), service
        finally:
            server.should_exit = True
            thread.join()


def asking(url: str, key: str | None = None) -> httpx.Client:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)


def metric(text: str, name: str) -> float:
    """The sum of a metric's samples, whatever their labels."""
    lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
