"""The audit: who did what to what, from where, and what it was before; filtered, and exported as JSON."""

from __future__ import annotations

import time
from typing import Final
from urllib.parse import urlencode

from markupsafe import Markup
from nicegui import ui
from nicegui.element import Element
from nicegui.events import GenericEventArguments

from glora_dashboard.pages.audit_parts import audit_table
from glora_dashboard.pages.filters import Address, Apply, find_field, pick_field
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import Block, card
from glora_dashboard.pages.site import Site
from glora_server.coordinator.model import AuditEntry, Listing, Page
from glora_server.coordinator.people import Role
from glora_server.coordinator.views_history import AuditFilter

ROWS_SHOWN: Final = 25
_ACTIONS: Final = {
    "": "everything",
    "run.": "runs",
    "round.": "rounds",
    "run.export": "exports",
    "device.": "devices",
    "token.": "join tokens",
    "user.": "users",
    "session.": "signing in and out",
    "session.refused": "refused sign-ins",
    "api-token.": "API tokens",
}
_BETWEEN: Final = "between"
_TIMES: Final = {
    "": "at any time",
    "3600": "in the last hour",
    "86400": "in the last day",
    "604800": "in the last week",
    "2592000": "in the last 30 days",
    _BETWEEN: "between two times",
}


@page("/audit", title="Audit", nav="Audit", least=Role.OPERATOR)
async def audit_page(site: Site, *, actor: str = "", action: str = "", target: str = "", when: str = "") -> None:
    """Rows of the audit, newest first, in parts."""
    with frame("Audit"), card("Who did what", note="nothing of it can be changed or removed here"):
        listed = _List(site, actor=actor, action=action, target=target, when=when)
        await listed.refresh()
        keep_fresh(site, listed.refresh)


class _List:
    """Filters, the link to the JSON export, and the rows."""

    def __init__(self, site: Site, *, actor: str, action: str, target: str, when: str) -> None:
        self._site = site
        self._address = Address("/audit")
        actions = dict(_ACTIONS) if action in _ACTIONS else {**_ACTIONS, action: action}
        with ui.element("div").classes("filters").props('role="search" aria-label="Audit"'):
            self._actor = find_field("Who (the whole name)", actor, self._apply)
            self._action = pick_field("What", actions, action, self._apply)
            self._target = find_field("To what (the whole name)", target, self._apply)
            self._when = pick_field("When", dict(_TIMES), when if when in _TIMES else "", self._apply)
        with ui.element("div").classes("filters") as self._between:
            self._since = _TimeField("From", self._apply)
            self._until = _TimeField("Until", self._apply)
        self._export = Block(Markup(""), tag="div").classes("actions")
        self._pager: Pager[AuditEntry] = Pager(self._ask, audit_table, size=ROWS_SHOWN)
        self._show_links()

    async def refresh(self) -> None:
        """Look again."""
        await self._pager.refresh()

    async def _ask(self, part: Page) -> Listing[AuditEntry]:
        return await self._site.queries.audit(part, self._wanted())

    def _wanted(self) -> AuditFilter:
        when = self._when.value or ""
        between = when == _BETWEEN
        return AuditFilter(
            actor=(self._actor.value or "").strip(),
            action=self._action.value or "",
            target=(self._target.value or "").strip(),
            since=self._since.at if between else time.time() - float(when) if when else None,
            until=self._until.at if between else None,
        )

    async def _apply(self) -> None:
        self._show_links()
        await self._pager.restart()

    def _show_links(self) -> None:
        wanted = self._wanted()
        self._between.set_visibility(self._when.value == _BETWEEN)
        plain = {"actor": wanted.actor, "action": wanted.action, "target": wanted.target}
        kept = plain | ({"when": self._when.value} if self._when.value else {})
        self._address.show({key: value for key, value in kept.items() if value})
        asked = plain | {key: f"{at:.3f}" for key, at in (("since", wanted.since), ("until", wanted.until)) if at}
        query = urlencode({key: value for key, value in asked.items() if value})
        self._export.show(
            Markup('<a class="button" download href="/api/v1/audit/export?{}">Download these rows as JSON</a>').format(
                query
            )
        )


class _TimeField:
    """A date and a time in the viewer's zone; `at` is the moment in Unix seconds, None while nothing is chosen."""

    def __init__(self, label: str, apply: Apply) -> None:
        self.at: float | None = None
        self._apply = apply
        field = Block(Markup('<span>{}</span><input type="datetime-local">').format(label), tag="label")
        field.classes("time-field")
        self._listen(field)

    def _listen(self, field: Element) -> None:
        async def changed(event: GenericEventArguments) -> None:
            self.at = float(event.args) if isinstance(event.args, int | float) else None
            await self._apply()

        field.on("change", changed, js_handler="(e) => emit(new Date(e.target.value).getTime() / 1000 || null)")
