"""Puts the pages behind an application: NiceGUI's own application, its lifespan, and our static files."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI
from nicegui import app as nicegui_app
from nicegui import ui
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from glora_dashboard.pages import (
    account,
    audit,
    device,
    devices,
    enrolment,
    exports,
    new_run,
    overview,
    people,
    round,  # noqa: A004 - the page of a round
    run,
    system,
)
from glora_dashboard.pages.assets import MARK, STATIC, STATIC_PREFIX
from glora_dashboard.pages.not_found import show_missing_page
from glora_dashboard.pages.site import Site, put_site

_PAGES: Final = (overview, new_run, run, round, devices, device, enrolment, exports, audit, system, people, account)
"""Modules whose import registers pages; new_run before run, whose path would take its own."""
_RECONNECT_SECONDS: Final = 20.0


def mount_pages(app: FastAPI, site: Site) -> None:
    """Serve the pages of `site` at every path of `app` that nothing else answers.

    To be called after all routes of `app` are there. NiceGUI keeps one state per process, so that a process should
    serve one application with pages at a time. Needs uvicorn's lifespan.
    """
    shell = _shell()
    app.router.routes.insert(0, _Pages(_WithSite(shell, site), app.router.routes))
    before = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[None]:
        async with before(running), shell.router.lifespan_context(shell):
            yield

    app.router.lifespan_context = lifespan


@functools.cache
def _shell() -> FastAPI:
    """An application that holds nothing but NiceGUI's; its settings are made once in a process."""
    shell = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    nicegui_app.add_static_files(STATIC_PREFIX, STATIC, max_cache_age=3600)
    # Quasar learns of the viewer's choice of light or dark, which the browser keeps.
    nicegui_app.config.vue_config_script += "\n        globalThis.glora?.applyTheme();\n"
    ui.run_with(
        shell,
        root=show_missing_page,
        title="glora",
        favicon=MARK,
        dark=None,
        language="en-US",
        binding_refresh_interval=None,
        reconnect_timeout=_RECONNECT_SECONDS,
        tailwind=False,
        show_welcome_message=False,
    )
    return shell


class _WithSite:
    """ASGI: tells the pages which site they belong to."""

    def __init__(self, app: ASGIApp, site: Site) -> None:
        self._app = app
        self._site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in {"http", "websocket"}:
            put_site(scope.setdefault("state", {}), self._site)
        await self._app(scope, receive, send)


class _Pages(Mount):
    """The front page, and everything that no other route knows.

    A known path with a wrong method stays with its route, which says so.
    """

    def __init__(self, app: ASGIApp, others: list[BaseRoute]) -> None:
        super().__init__("/", app=app)
        self._others = others

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether the pages answer."""
        if scope["type"] == "http" and scope["path"].lower().startswith("/api"):
            return Match.NONE, {}
        if any(route.matches(scope)[0] is not Match.NONE for route in self._others if route is not self):
            return Match.NONE, {}
        return super().matches(scope)
