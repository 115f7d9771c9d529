"""Keeps a page up to date: one task per page and client that waits for changes, and ends when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from nicegui import background_tasks, context, ui

from glora_dashboard.pages.site import Site
from glora_server.coordinator.people import Role
from glora_wire.errors import GloraError, Reason

log = structlog.get_logger(__name__)
Change = Callable[[], Awaitable[None]]
_PAUSE_SECONDS: Final = 0.5
"""Between two refreshes at least: what changes faster is shown together."""
_AGE_SECONDS: Final = 2.0
"""How old a page may be where nothing says that it changed."""
_ASK_AGAIN_SECONDS: Final = 10.0
"""How long somebody who was signed out may go on seeing news."""


def keep_fresh(site: Site, refresh: Change, *, run: str = "") -> None:
    """Call `refresh` after changes (of one run, where it is named) while the page of this context is open.

    Also every few seconds, since what is relative to now grows old by itself. `refresh` updates the page's elements in
    place. Ends when the viewer leaves or is signed out.
    """
    client = context.client

    async def follow() -> None:
        await client.connected()
        asked_at = time.monotonic()
        revision = -1
        while not client.is_deleted:
            revision = await _changed(site, run, revision)
            if client.is_deleted:
                return
            if client.has_socket_connection:
                if time.monotonic() - asked_at > _ASK_AGAIN_SECONDS:
                    await site.require(Role.VIEWER)
                    asked_at = time.monotonic()
                await refresh()
            await asyncio.sleep(_PAUSE_SECONDS)

    async def guarded() -> None:
        try:
            with client:
                await follow()
        except GloraError as error:
            if client.is_deleted:
                return
            if error.reason is not Reason.SIGN_IN_NEEDED:
                log.warning("page_not_refreshed", page=client.page.path, reason=error.reason.value)
            with client:
                ui.navigate.reload()

    task = background_tasks.create(guarded(), name=f"keep {client.page.path} fresh")

    def leave() -> None:
        task.cancel()

    client.on_delete(leave)


async def _changed(site: Site, run: str, revision: int) -> int:
    """The next revision of what the page shows, after some seconds at the latest."""
    if run:
        return await site.queries.changed(run, revision, _AGE_SECONDS)
    await asyncio.sleep(_AGE_SECONDS)
    return revision
