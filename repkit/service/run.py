"""Run: the service on a socket, until it is told to end; then it finishes what it has begun."""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from repkit.service.app import create_app
from repkit.service.limits import CROWDED
from repkit.service.metrics import Metrics
from repkit.service.settings import Settings
from repkit.service.state import Service

HEADER_SECONDS = 10.0  # for the headers of a request, from the connection or the answer before
ANSWER_SECONDS = 20.0  # for a client to read so much of an answer that the rest can be sent
MOST_CONNECTIONS = 512  # beyond these, the one idle for longest is hung up on; where none is, requests are refused
MOST_REFUSED = 256  # connections; those beyond these are hung up on


class _Patient(H11Protocol):
    """HTTP/1.1, but a client that is slow to send the headers of a request, or to read the answer, is hung up on."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.since = self.loop.time()  # when it was made, or answered last
        if len(self.connections) > MOST_CONNECTIONS and not self._make_room():
            self.app_state = {**self.app_state, CROWDED: True}
            if len(self.connections) > MOST_CONNECTIONS + MOST_REFUSED:
                transport.abort()
        self._waits: asyncio.TimerHandle | None = None
        self._reads: asyncio.TimerHandle | None = None
        self._wait()

    def _make_room(self) -> bool:
        """Hang up on the connection that is idle for longest; False where all others are busy."""
        idle = [one for one in self.connections if isinstance(one, _Patient) and one is not self and one.idle]
        if idle:
            min(idle, key=lambda one: one.since).transport.abort()
        return bool(idle)

    @property
    def idle(self) -> bool:
        """Whether nothing is asked on it, so that it may be closed."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def _wait(self) -> None:
        self._waits = self.loop.call_later(HEADER_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()  # it would wait for what was sent to be read
        elif self.idle:
            self.transport.close()
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reads = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reads is not None:
            self._reads.cancel()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._waits is not None:
            self._waits.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.since = self.loop.time()
        if self._waits is not None:
            self._waits.cancel()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._waits, self._reads):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Tells when it is ready; after SIGTERM says so by /readyz for a while, and only then stops to listen."""

    def __init__(self, app: FastAPI, settings: Settings, ready: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=_Patient,
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(HEADER_SECONDS),
            timeout_graceful_shutdown=int(settings.grace),
        )
        super().__init__(config)
        self._app, self._settings, self._ready, self._told = app, settings, ready, 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell the address."""
        await super().startup(sockets)
        if self.started:
            address = self.servers[0].sockets[0].getsockname()
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            self._ready(f"http://{host}:{address[1]}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, a second one hurries it."""
        self._told += 1
        service = getattr(self._app.state, "service", None)
        if service is None or self._told > 1:
            self.force_exit = self.should_exit = True
            return
        service.draining = True
        if sig == signal.SIGINT:
            self.should_exit = True
        else:
            asyncio.get_running_loop().call_later(self._settings.notice, self._end)

    def _end(self) -> None:
        self.should_exit = True


def serve(settings: Settings, ready: Callable[[str], None], progress: Any = None) -> None:
    """Serve until a signal, and finish what has begun.

    ready: called with the address once requests are answered. Raises ValueError and OSError for an index that cannot
    be opened and for an address that cannot be listened on.
    """
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.ERROR)  # what strangers send is no news
    with listening(settings.host, settings.port) as taken:
        service = Service.open(settings, Metrics(), progress)
        server = Server(create_app(settings, service), settings, ready)
        gc.collect()
        gc.freeze()  # what is there by now stays: to look through it for garbage took a third of a request's time
        try:
            server.run(sockets=[taken])
        finally:
            gc.unfreeze()  # else libraries complain at the end of what was never freed


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to an address; OSError naming it where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once (TCP_NODELAY) only where the socket says that it is of TCP.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise OSError(error.errno, f"cannot listen there ({error.strerror})", f"{host}:{port}") from error
    return taken
