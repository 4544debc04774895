"""Limits of a request, counted before anything of it is parsed: bytes, time to send them, requests and time at once."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from time import monotonic
from typing import Any

from fastapi import HTTPException

from repkit.service.answers import failure, refusal, refused
from repkit.service.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/livez", "/readyz")  # to everybody at any time
SEARCHES = "/v1/search"  # and what is below
CROWDED = "repkit.crowded"  # in the state of requests on a connection that is one too many
DEADLINE = b"x-timeout-ms"
MOST_JSON = 8_000_000  # bytes
BODIES = 8  # the memory for bodies, in bodies of the largest size
WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")
REST_SECONDS = 1.0  # for the rest of a body that is refused: a client that still sends would not read the answer


class Limits:
    """An ASGI layer that hands on requests whose whole body is there, within a number of requests and of seconds."""

    def __init__(self, app: App, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.held = self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = _Started(send)
        body = _Body()
        self.running += 1
        try:
            deadline = monotonic() + self._seconds(scope)
            scope.setdefault("state", {})["deadline"] = deadline
            self._check_free(scope)
            if not await self._read(scope, receive, body):
                return  # the client has gone
            async with asyncio.timeout(max(0.0, deadline - monotonic())):
                await self.app(scope, body.replayed(receive), started)
        except (HTTPException, TimeoutError) as error:
            if started.yes:
                raise
            await refused(failure(error))(scope, receive, send)
        finally:
            self.running -= 1
            self.held -= body.size

    def _check_free(self, scope: Scope) -> None:
        if scope["path"] in OPEN:  # whoever watches the service is told how it is at any time
            return
        if CROWDED in scope["state"]:
            raise refusal(429, "too many connections at once; try again", Connection="close")
        if self.running > 4 * self.settings.most_waiting:
            raise refusal(429, "too many requests at once; try again")
        # Parsed and then refused, too many searches would take much of the time of those that can be answered.
        if scope["path"].startswith(SEARCHES) and scope["app"].state.service.batcher.full:
            raise refusal(429, "too many searches wait already; try again")

    def _seconds(self, scope: Scope) -> float:
        given = header(scope, DEADLINE)
        if given is None:
            return self.settings.deadline
        if not given.isdecimal() or not given.isascii() or len(given) > 9 or int(given) == 0:
            raise refusal(400, "X-Timeout-Ms is a whole number of milliseconds above 0")
        return min(int(given) / 1000, self.settings.deadline)

    async def _read(self, scope: Scope, receive: Receive, body: "_Body") -> bool:
        """Take in the whole body; False where the client goes away."""
        length, chunked = header(scope, b"content-length"), header(scope, b"transfer-encoding")
        if chunked is None and length in (None, "0"):
            return True
        if chunked is not None and length is not None:  # a proxy may have believed the other one
            raise refusal(400, "give Content-Length or Transfer-Encoding, not both", Connection="close")
        # JSON is parsed by the thread that serves all; pictures are only copied.
        most = min(self.settings.max_body, MOST_JSON) if _kind(scope) == "application/json" else self.settings.max_body
        if length is not None and (len(length) > 15 or int(length) > most):
            await self._discard(receive)
            raise _too_large(most)
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while body.more:
                    if not await self._take(receive, body, most):
                        return False
        except TimeoutError:
            seconds = f"{self.settings.body_seconds:g}"
            raise refusal(408, f"the body did not come within {seconds} seconds", Connection="close") from None
        return True

    async def _take(self, receive: Receive, body: "_Body", most: int) -> bool:
        message = await receive()
        if message["type"] != "http.request":
            return False
        part = message.get("body", b"")
        if body.size + len(part) > most:
            await self._discard(receive)
            raise _too_large(most)
        if self.held + len(part) > BODIES * self.settings.max_body:
            raise refusal(429, "too many large requests at once; try again", Connection="close")
        self.held += len(part)
        body.add(part, message.get("more_body", False))
        return True

    @staticmethod
    async def _discard(receive: Receive) -> None:
        try:
            async with asyncio.timeout(REST_SECONDS):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except TimeoutError:
            pass


class _Body:
    """A body as it was received, in parts."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size, self.more = 0, True

    def add(self, part: bytes, more: bool) -> None:
        self.parts.append(part)
        self.size += len(part)
        self.more = more

    def replayed(self, receive: Receive) -> Receive:
        """The whole body as the one message, then what comes after it: that the client goes away."""
        waiting = [{"type": "http.request", "body": b"".join(self.parts), "more_body": False}]
        self.parts.clear()

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        return again


class _Started:
    """A `send` that knows whether an answer has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.yes = send, False

    async def __call__(self, message: Any) -> None:
        self.yes = True
        await self.send(message)


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of a name in small letters; None where there is none."""
    found = next((value for key, value in scope["headers"] if key == name), None)
    return None if found is None else found.decode("latin-1")


def _too_large(most: int) -> HTTPException:
    return refusal(413, f"the body has more than {most} bytes", Connection="close")


def _kind(scope: Scope) -> str:
    kind = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data") and scope["method"] not in WITHOUT_BODY:
        raise refusal(415, "give a body of application/json or multipart/form-data", Connection="close")
    if header(scope, b"content-encoding") not in (None, "identity"):
        raise refusal(415, "give a body without content-encoding", Connection="close")
    return kind
