"""Keys: who may read and who may write; of a key only its sha256 is kept."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path
from typing import Literal

Scope = Literal["read", "write"]
SHORTEST = 16  # characters: fewer can be guessed


@dataclass(frozen=True)
class Keys:
    """The sha256 of the keys that may change the index, and of those that may only read; false where there are none."""

    write: frozenset[bytes] = frozenset()
    read: frozenset[bytes] = frozenset()

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self.write or self.read)

    def scope(self, authorization: str | None) -> Scope | None:
        """What the value of an Authorization header allows; "write" includes reading, None is nothing."""
        if not self:
            return "write"
        scheme, _, key = (authorization or "").partition(" ")
        given = _hashed(key.strip()) if scheme.lower() == "bearer" else b""
        if _among(given, self.write):
            return "write"
        return "read" if _among(given, self.read) else None


def _among(given: bytes, known: Iterable[bytes]) -> bool:
    """Every one is compared, so that the time tells nothing."""
    return any([compare_digest(given, one) for one in known])


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(write: Path | None, read: Path | None) -> Keys:
    """The keys in two files, one a line; ValueError for a file without a key and for a key that can be guessed."""
    return Keys(_read(write), _read(read))


def _read(path: Path | None) -> frozenset[bytes]:
    if path is None:
        return frozenset()
    try:
        keys = path.read_text().split()
    except FileNotFoundError:
        raise ValueError(f"no key file {path}; make one: (umask 077; openssl rand -hex 32 > {path})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text; write one key a line") from None
    if not keys or min(map(len, keys)) < SHORTEST:
        raise ValueError(f"{path} has no key, or one of fewer than {SHORTEST} characters; write one key a line")
    return frozenset(map(_hashed, keys))
