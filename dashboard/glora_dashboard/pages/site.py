"""What every page works with: commands, queries, and who is looking at it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from nicegui import context, ui
from starlette.requests import Request

from glora_dashboard.permission import principal_of, require
from glora_dashboard.ports import Commands, HealthProbe, Queries
from glora_server.coordinator.access import Access
from glora_server.coordinator.people import Principal, Role
from glora_wire.errors import GloraError, Reason

_STATE: Final = "glora_site"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One server's pages: everything that a page may use."""

    commands: Commands
    queries: Queries
    access: Access
    health: HealthProbe | None = None
    """Asks the parts of the server how they are; None where nobody can (the system page then shows what it knows)."""

    async def require(self, role: Role) -> Principal:
        """Who is looking at this page, asked anew; raises SIGN_IN_NEEDED or ROLE_TOO_LOW."""
        principal = principal_of(context.client.request.scope)
        if principal is not None:
            principal = await self.access.still_holds(principal)
        return require(principal, role)

    async def act(
        self, role: Role, action: Callable[[Principal], Awaitable[object]], *, done: str, show_refusal: bool = True
    ) -> GloraError | None:
        """Do what a button says, for somebody who has `role` now; tells how it went.

        `done` is the sentence for success. A refusal is returned, and shown unless the caller shows it in its form.
        """
        try:
            await action(await self.require(role))
        except GloraError as error:
            if error.reason is Reason.SIGN_IN_NEEDED:
                ui.navigate.reload()
            elif show_refusal:
                ui.notify(error.message, type="negative", multi_line=True, timeout=10_000, close_button="Close")
            return error
        ui.notify(done, type="positive")
        return None


def put_site(scope_state: dict[str, object], site: Site) -> None:
    """Let pages of this request find `site`."""
    scope_state[_STATE] = site


def site_of(request: Request) -> Site:
    """The site that a page belongs to."""
    site = request.scope["state"][_STATE]
    if not isinstance(site, Site):
        raise TypeError(f"{site!r} is no Site")
    return site


def may(role: Role) -> bool:
    """Whether who opened this page had `role` then: decides what is shown, never what is done."""
    principal = principal_of(context.client.request.scope)
    return principal is not None and principal.role.includes(role)
