"""Keeps a page up to date: one task per page and client that waits for changes, and ends when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import structlog
from nicegui import background_tasks, context, ui

from glora_dashboard.pages.site import Site
from glora_wire.errors import GloraError

log = structlog.get_logger(__name__)
Refresh = Callable[[], Awaitable[None]]
_PAUSE_SECONDS: Final = 0.5
"""Between two refreshes at least: what changes faster is shown together."""
_AGE_SECONDS: Final = 3.0
"""How old a page may get where nothing says that it changed."""


def keep_fresh(site: Site, refresh: Refresh, *, run: str = "") -> None:
    """Call `refresh` after changes (of one run, where it is named) while the page of this context is open.

    Also every few seconds, since what is relative to now grows old by itself. `refresh` updates the page's elements in
    place. Ends when the viewer leaves; the gate closes the connection of those who are signed out.
    """
    client = context.client

    async def follow() -> None:
        await client.connected()
        async for _ in _changes(site, run):
            if client.is_deleted:
                return
            if client.has_socket_connection:
                await refresh()
            await asyncio.sleep(_PAUSE_SECONDS)

    async def guarded() -> None:
        with client:
            try:
                await follow()
            except GloraError as error:
                # What the page shows is gone, or the database is away: loading the page anew says which.
                log.warning("page_not_refreshed", page=client.page.path, reason=error.reason.value)
                ui.navigate.reload()

    task = background_tasks.create(guarded(), name=f"keep {client.page.path} fresh")

    def leave() -> None:
        task.cancel()

    client.on_delete(leave)


async def _changes(site: Site, run: str) -> AsyncIterator[None]:
    """Comes back whenever what the page shows may have changed, and after some seconds at the latest."""
    if not run:
        async for _ in site.queries.events(heartbeat=_AGE_SECONDS):
            yield
    revision = -1
    while run:
        revision = await site.queries.changed(run, revision, _AGE_SECONDS)
        yield
