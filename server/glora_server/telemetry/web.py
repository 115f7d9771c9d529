"""Counts HTTP requests and open websockets, as plain ASGI around everything else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glora_server.telemetry.instruments import Instruments
from glora_server.telemetry.names import BROWSER_CLIENTS, HTTP_REQUESTS, HTTP_SECONDS

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED: Final = "unmatched"
"""Route of requests that no route took, or that were refused before one was looked for."""


class WebMetrics:
    """An ASGI application that counts what passes through it and changes nothing."""

    def __init__(self, app: ASGIApp, instruments: Instruments) -> None:
        self._app = app
        self._requests = instruments.counter(HTTP_REQUESTS)
        self._seconds = instruments.histogram(HTTP_SECONDS)
        self._clients = instruments.gauge(BROWSER_CLIENTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on and count."""
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case _:
                await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.perf_counter()
        answered = False

        async def counting(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start" and not answered:
                answered = True
                self._count(scope, int(message["status"]), time.perf_counter() - begun)
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except Exception:
            if not answered:  # uvicorn is going to answer 500
                self._count(scope, 500, time.perf_counter() - begun)
            raise

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = route_template(scope)
        self._requests.labels(route=route, method=method, status=str(status)).inc()
        self._seconds.labels(route=route, method=method).observe(seconds)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        open_ = False

        async def counting(message: Message) -> None:
            nonlocal open_
            if message["type"] == "websocket.accept" and not open_:
                open_ = True
                self._clients.inc()
            await send(message)

        try:
            await self._app(scope, receive, counting)
        finally:
            if open_:
                self._clients.dec()


def route_template(scope: Scope) -> str:
    """The path of the route that took the request, parameters as {name}; never what the caller wrote.

    FastAPI leaves the route of an included router without its prefixes in the scope and the whole path in a context
    of its own; under a mount both are relative to it, and a mount without routes has none.
    """
    mount = str(scope.get("root_path", ""))
    included = scope.get("fastapi")
    context = included.get("effective_route_context") if isinstance(included, Mapping) else None
    for found in (context, scope.get("route")):
        path = getattr(found, "path_format", None)
        if isinstance(path, str) and not isinstance(found, Mount):
            return mount + path
    return f"{mount}/*" if mount else UNMATCHED
