"""Client: the service from Python, with answers as values."""

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
from jaxtyping import Float32

Metadata = Mapping[str, Any]
Where = Mapping[str, Any]
Picture = Path | str | bytes
Vector = Sequence[float] | np.ndarray


@dataclass(frozen=True, eq=False)
class Hit:
    """A found item; score: cosine or inner product, of which more is nearer, or for "l2" the distance."""

    id: str
    score: float
    metadata: Metadata
    vector: Float32[np.ndarray, " d"] | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """Hits, nearest first; version: of the last change that was seen; scanned: among how many items was chosen."""

    hits: list[Hit]
    exact: bool
    version: int
    scanned: int
    took_ms: float
    model: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Item:
    """An item as it is kept; the vector has length 1 under "cosine"."""

    id: str
    vector: Float32[np.ndarray, " d"]
    metadata: Metadata
    version: int = 0


@dataclass(frozen=True)
class Correspondence:
    """A point (x, y) of the source and the place of the target that is most like it, in pixels; score: their cosine."""

    point: tuple[float, float]
    place: tuple[float, float]
    score: float


@dataclass(frozen=True, eq=False)
class Matched:
    """Places that correspond, the most alike first.

    heat: cosines of the point with the cells of the target, NaN where there are none; box: the left, top, right and
    bottom edges of these cells, in pixels of the target; both None without a point.
    """

    correspondences: list[Correspondence]
    source: tuple[int, int]
    target: tuple[int, int]
    heat: Float32[np.ndarray, "h w"] | None
    box: tuple[float, float, float, float] | None


class Client:
    """A service at `url`; key: one of its keys; timeout: seconds for each request.

    Errors of the service are raised as builtin ones with its message: ValueError for a request that is wrong,
    PermissionError for a key that does not suffice, LookupError for what is not there, TimeoutError past a deadline,
    ConnectionError where it is busy or out of reach, OSError where a change cannot be stored. Numbers of numpy count
    as those of Python.
    """

    def __init__(self, url: str, key: str | None = None, timeout: int | float = 30.0) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {_header(key, 'key')}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search(self, query: Vector | str, k: int = 10, *, where: Where | None = None, **options: Any) -> Found:
        """The items nearest to a vector, or to an item by its id; options: exact, ef, nprobe, include_vectors."""
        return _found(self._ask("POST", "/v1/search", json=_query(query, k, where, options)))

    def search_batch(
        self, queries: Sequence[Vector | str], k: int = 10, *, where: Where | None = None, **options: Any
    ) -> list[Found]:
        """As `search`, for several vectors or ids at once."""
        asked = [_query(query, k, where, options) for query in queries]
        return [_found(one) for one in self._ask("POST", "/v1/search/batch", json={"queries": asked})["answers"]]

    def search_image(self, picture: Picture, k: int = 10, *, where: Where | None = None, **options: Any) -> Found:
        """The items most like a picture, given as a path or as the bytes of a file; options: exact, ef, nprobe."""
        data = {"k": k, **options, **({} if where is None else {"where": _json(where)})}
        return _found(self._ask("POST", "/v1/search/image", data=data, files={"file": _content(picture)}))

    def match(
        self, source: Picture, target: Picture, point: tuple[float, float] | None = None, *, dense: bool = False
    ) -> Matched:
        """Places that correspond in two pictures; a text is the id of an item, a path or bytes are a file."""
        fields: dict[str, Any] = {"dense": (None, str(dense))}
        for name, picture in (("source", source), ("target", target)):
            if isinstance(picture, str):
                fields[f"{name}_id"] = (None, picture)
            else:
                fields[name] = _content(picture)
        if point is not None:
            fields["point"] = (None, f"{float(point[0])},{float(point[1])}")
        return _matched(self._ask("POST", "/v1/match", files=fields))

    def upsert(self, items: Sequence[Item], *, idempotency_key: str | None = None) -> int:
        """Add or replace items, all or none; the version that searches see from now on."""
        rows = [{"id": one.id, "vector": _numbers(one.vector), "metadata": dict(one.metadata)} for one in items]
        return self._ask("PUT", "/v1/items", json={"items": rows}, headers=_once(idempotency_key))["version"]

    def upsert_image(
        self, id: str, picture: Picture, metadata: Metadata | None = None, *, idempotency_key: str | None = None
    ) -> int:
        """Add or replace an item by its picture, which the service keeps."""
        data = {"id": id, "metadata": _json(dict(metadata or {}))}
        sent: dict[str, Any] = {"data": data, "files": {"file": _content(picture)}}
        return self._ask("POST", "/v1/items/image", headers=_once(idempotency_key), **sent)["version"]

    def update(self, id: str, metadata: Metadata) -> int:
        """Set columns in an item's metadata, and take away those that are None; the version as of `upsert`."""
        return self._ask("PATCH", f"/v1/items/{_quoted(id)}", json={"metadata": dict(metadata)})["version"]

    def delete(self, ids: Sequence[str]) -> int:
        """Delete items; how many of them were there."""
        return self._ask("POST", "/v1/items/delete", json={"ids": _listed(ids)})["deleted"]

    def get(self, ids: Sequence[str]) -> list[Item]:
        """The items that are there among these."""
        found = self._ask("POST", "/v1/items/get", json={"ids": _listed(ids)})["items"]
        return [Item(one["id"], _vector(one["vector"]), one["metadata"], one["version"]) for one in found]

    def list(self, where: Where | None = None, *, page: int = 1000) -> "Iterator[tuple[str, Metadata]]":
        """The id and the metadata of every item, or of those that pass a filter, in the order of their ids."""
        after: str | None = None
        while True:
            asked = {"limit": page, "after": after, "where": None if where is None else _json(where)}
            answer = self._ask("GET", "/v1/items", params={name: one for name, one in asked.items() if one is not None})
            yield from ((one["id"], one["metadata"]) for one in answer["items"])
            if (after := answer["after"]) is None:
                return

    def count(self, where: Where | None = None) -> int:
        """How many items there are, or pass a filter."""
        params = {} if where is None else {"where": _json(where)}
        return self._ask("GET", "/v1/count", params=params)["count"]

    def thumbnail(self, id: str, side: int = 256) -> bytes:
        """The picture of an item as PNG or JPEG, its longer side `side` pixels at most."""
        return self._send("GET", "/v1/thumbnails", params={"id": id, "side": side}).content

    def model(self) -> dict[str, Any]:
        """What made the index, and what it is."""
        return self._ask("GET", "/v1/model")

    def stats(self) -> dict[str, Any]:
        """Numbers of the index and of what waits."""
        return self._ask("GET", "/v1/stats")

    def columns(self) -> "Sequence[dict[str, Any]]":
        """The columns of the metadata: name, type, and values, min and max where these are known."""
        return self._ask("GET", "/v1/columns")["columns"]

    def snapshots(self) -> "Sequence[dict[str, Any]]":
        """The snapshots that there are: name, version, count and bytes."""
        return self._ask("GET", "/v1/snapshots")["snapshots"]

    def make_snapshot(self, name: str) -> None:
        """Make a snapshot of the index as it is now."""
        self._ask("POST", "/v1/snapshots", json={"name": name})

    def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot."""
        self._ask("DELETE", f"/v1/snapshots/{_quoted(name)}")

    def ready(self) -> bool:
        """Whether the service takes requests."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _ask(self, method: str, path: str, **sent: Any) -> Any:
        answer = self._send(method, path, **sent)
        try:
            return answer.json()
        except ValueError:
            raise ConnectionError(f"{self._http.base_url} is no repkit service: it answers without JSON") from None

    def _send(self, method: str, path: str, **sent: Any) -> httpx.Response:
        if "json" in sent:
            headers = {"Content-Type": "application/json", **sent.pop("headers", {})}
            sent = {**sent, "content": _json(sent.pop("json")), "headers": headers}
        try:
            answer = self._http.request(method, path, **sent)
        except httpx.TimeoutException as error:
            raise TimeoutError(f"{self._http.base_url} did not answer {method} {path} in time") from error
        except httpx.TransportError as error:
            raise ConnectionError(f"{self._http.base_url} does not answer ({error})") from error
        if answer.is_error:
            raise _raised(answer)
        return answer


def _raised(answer: httpx.Response) -> Exception:
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the service answered {answer.status_code}"
    status = answer.status_code
    if status in (401, 403):
        return PermissionError(message)
    if status == 404:
        return LookupError(message)
    if status == 504:
        return TimeoutError(message)
    if status == 507:
        return OSError(errno.ENOSPC, message)
    if status in (429, 503):
        return ConnectionError(message)
    return RuntimeError(message) if status >= 500 else ValueError(message)


def _query(query: Vector | str, k: int, where: Where | None, options: Mapping[str, Any]) -> dict[str, Any]:
    source = {"id": query} if isinstance(query, str) else {"vector": _numbers(query)}
    return {**source, "k": k, **({} if where is None else {"where": dict(where)}), **options}


def _listed(ids: Sequence[str]) -> list[str]:
    if isinstance(ids, str):  # whose letters would be ids
        raise ValueError(f"give a list of ids, such as [{ids!r}]")
    return list(ids)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise ValueError(f"{str(value)[:60]!r} is a {type(value).__name__}; give texts, numbers, true or false")


def _numbers(vector: Vector) -> Sequence[float]:
    return np.asarray(vector, np.float64).tolist()


def _vector(values: Sequence[float]) -> Float32[np.ndarray, " d"]:
    return np.asarray(values, np.float32)


def _content(picture: Picture) -> bytes:
    return picture if isinstance(picture, bytes) else Path(picture).read_bytes()


def _quoted(text: str) -> str:
    """As a part of a path, in which httpx would resolve dots."""
    return quote(text, safe="").replace(".", "%2E")


def _once(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Idempotency-Key": _header(key, "idempotency_key")}


def _header(text: str, name: str) -> str:
    """A text that can be sent in a header; it is in no error, since it may be a secret."""
    if not text.isascii() or not text.isprintable():
        raise ValueError(f"the {name} has a line break or a letter beyond ASCII; give it without")
    return text


def _found(answer: Mapping[str, Any]) -> Found:
    hits = [
        Hit(one["id"], one["score"], one["metadata"], _vector(one["vector"]) if one.get("vector") else None)
        for one in answer["hits"]
    ]
    return Found(**{**answer, "hits": hits})


def _matched(answer: Mapping[str, Any]) -> Matched:
    rows = [Correspondence(_pair(one["point"]), _pair(one["place"]), one["score"]) for one in answer["correspondences"]]
    source, target = ((answer[name]["width"], answer[name]["height"]) for name in ("source", "target"))
    heat = answer["heat"]
    if heat is None:
        return Matched(rows, source, target, None, None)
    return Matched(rows, source, target, np.array(heat["grid"], np.float32), tuple(heat["box"]))


def _pair(point: Mapping[str, float]) -> tuple[float, float]:
    return point["x"], point["y"]
