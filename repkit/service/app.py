"""The service as an ASGI application: its routes, what surrounds them, and the page."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import Response

from repkit import __version__
from repkit.service.answers import Json, add_handlers
from repkit.service.guard import Guard
from repkit.service.limits import Limits
from repkit.service.metrics import Metrics
from repkit.service.routes_about import router as about
from repkit.service.routes_items import router as items
from repkit.service.routes_pictures import router as pictures
from repkit.service.routes_search import router as search
from repkit.service.settings import Settings
from repkit.service.state import Service

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def create_app(settings: Settings, service: Service | None = None) -> FastAPI:
    """The application, whose routes are all below /v1 but for /livez, /readyz, /metrics, the page at / and its files.

    service: one that is open already; else the application's start opens one, which takes a while. Its end closes it.
    """
    metrics, page = Metrics() if service is None else service.metrics, _page()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opened = await asyncio.to_thread(Service.open, settings, metrics) if service is None else service
        app.state.service = opened
        try:
            yield
        finally:
            await asyncio.to_thread(opened.close)

    app = FastAPI(
        title="repkit search",
        version=__version__,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        default_response_class=Json,
        redirect_slashes=False,
        lifespan=lifespan,
        middleware=[
            Middleware(Guard, settings=settings, metrics=metrics, page=frozenset(page)),
            Middleware(Limits, settings=settings),
        ],
    )
    add_handlers(app)
    for router in (search, items, pictures, about):
        app.include_router(router)
    for path, (content, kind) in page.items():
        app.add_api_route(path, _file(content, kind), methods=["GET", "HEAD"], include_in_schema=False)
    return app


def _page() -> dict[str, tuple[bytes, str]]:
    """What is served at which path; read once, so that no request names a file."""
    folder = files("repkit.service").joinpath("page")
    if not folder.is_dir():
        return {}
    found = {one.name: one.read_bytes() for one in folder.iterdir() if "." + one.name.rpartition(".")[2] in _TYPES}
    page = {f"/static/{name}": (content, _TYPES["." + name.rpartition(".")[2]]) for name, content in found.items()}
    if "index.html" in found:
        page["/"] = (found["index.html"], _TYPES[".html"])
    return page


def _file(content: bytes, kind: str) -> Any:
    async def answer() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return answer
