"""What decides how the service behaves: where things are, who may ask, and how much at once."""

from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path

from repkit.service.keys import Keys

Seconds = int | float


@dataclass(frozen=True)
class Settings:
    """One service over one index; times in seconds, sizes in bytes.

    images: the folder whose files are shown as thumbnails; None is the one the index was made from. model: where the
    weights are, if not where they were. most_waiting: searches, and half as many changes, that may wait. most_k,
    most_queries: of one request. body_seconds: for the whole body of a request. deadline: of a request that names none,
    and the longest that it may name. notice: between the signal to end and the end, while readyz says no. grace: for
    requests that run then. probe_share: of the searches that are repeated exactly, to measure recall.

    Raises ValueError for an address that others reach where no key is asked for.
    """

    index: Path
    images: Path | None = None
    model: str | None = None
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = field(default_factory=Keys)
    max_body: int = 20_000_000
    most_waiting: int = 256
    most_k: int = 1000
    most_queries: int = 100
    decoders: int = 2
    max_pixels: int = 50_000_000
    decode_seconds: Seconds = 20.0
    body_seconds: Seconds = 20.0
    deadline: Seconds = 30.0
    notice: Seconds = 1.0
    grace: Seconds = 30.0
    probe_share: float = 0.01

    def __post_init__(self) -> None:
        if not self.keys and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached from other machines, and no key is asked for; give --key-file, "
                "or leave --host out"
            )


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a service that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
