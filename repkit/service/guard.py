"""The outermost layer: who may pass, what every answer carries, and how long it took."""

from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException

from repkit.service.answers import code_of, refusal, refused
from repkit.service.limits import OPEN, App, Receive, Scope, Send, header
from repkit.service.metrics import Metrics
from repkit.service.settings import Settings, is_loopback

READS = ("/v1/search", "/v1/search/batch", "/v1/search/image", "/v1/match", "/v1/items/get")  # by POST
_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": _PAGE.encode(),
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}


class Guard:
    """An ASGI layer that refuses whoever may not ask, before anything of the request is read."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics, page: frozenset[str]) -> None:
        self.app, self.settings, self.metrics, self.page = app, settings, metrics, page
        self.local = not settings.keys and is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request that may pass, and measure it; refuse another."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = perf_counter(), 500

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _with_ours(message["headers"])}
            await send(message)

        try:
            self._check(scope)
        except HTTPException as error:
            await refused(error)(scope, receive, counted)
        else:
            await self.app(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            if status >= 400:
                self.metrics.refused.labels(code_of(status)).inc()
            self.metrics.seconds.labels(route, method, str(status)).observe(perf_counter() - start)

    def _check(self, scope: Scope) -> None:
        if self.local:
            _check_host(scope)
        _check_origin(scope)
        path, method = scope["path"], scope["method"]
        if path in OPEN or path in self.page:
            return
        allowed = self.settings.keys.scope(header(scope, b"authorization"))
        if allowed is None:
            raise refusal(401, "give a key as Authorization: Bearer KEY", WWW_Authenticate="Bearer")
        if allowed == "read" and method not in ("GET", "HEAD") and (method != "POST" or path not in READS):
            raise refusal(403, "this key may only read")


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def _with_ours(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    given = {name.lower() for name, _ in headers}
    ours = _HEADERS if b"cache-control" in given else {**_HEADERS, b"cache-control": b"no-store"}
    return [*headers, *((name, value) for name, value in ours.items() if name not in given)]


def _check_host(scope: Scope) -> None:
    """Without keys, a name that some web site has pointed at this machine must not reach the service."""
    host = urlsplit(f"//{header(scope, b'host') or ''}").hostname if _valid(header(scope, b"host")) else None
    if host is None or not is_loopback(host):
        raise refusal(403, "this service is for this machine: ask it as 127.0.0.1 or localhost")


def _check_origin(scope: Scope) -> None:
    """A page of another site must not make a browser send what its user may."""
    origin = header(scope, b"origin")
    if origin is None:
        return
    if not _valid(origin) or urlsplit(origin).netloc != header(scope, b"host"):
        raise refusal(403, "pages of other sites may not ask this service")


def _valid(url: str | None) -> bool:
    try:
        return url is not None and urlsplit(url if "//" in url else f"//{url}").hostname is not None
    except ValueError:
        return False
