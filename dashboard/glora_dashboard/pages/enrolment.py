"""Enrolment: make join tokens, see what became of them, approve the devices that wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.device_parts import abilities, tags
from glora_dashboard.pages.enrolment_form import TokenForm
from glora_dashboard.pages.forms import confirm, on_rows, row_button
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.lists import Cell, wide_table
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import Block, anchor, card, pill
from glora_dashboard.pages.site import Site
from glora_server.coordinator.model import DeviceState, Page, TokenRecord
from glora_server.coordinator.people import Role
from glora_server.coordinator.views import DeviceView
from glora_server.coordinator.views_history import DeviceFilter
from glora_wire.errors import GloraError

TOKENS_SHOWN: Final = 10
PENDING_SHOWN: Final = 10
_PENDING: Final = DeviceFilter(state=DeviceState.PENDING)
_TOKEN_HEAD: Final = ("Token", "State", "Used", "Ends", "Rank up to", "Tags", "Devices", "")


@page("/enrolment", title="Enrolment", nav="Enrolment", least=Role.OPERATOR)
async def enrolment_page(site: Site) -> None:
    """Join tokens and pending approvals."""
    system = await site.queries.system()
    with frame("Enrolment"):
        waiting = _Waiting(site)
        with card("Let devices join", note="a token, and the one command to run on the device"):
            form = TokenForm(site, enrolment_port=system.enrolment_port)
        tokens = _Tokens(site)
        form.made = tokens.restart
        await waiting.refresh()
        await tokens.refresh()

        async def refresh() -> None:
            await waiting.refresh()
            await tokens.refresh()

        keep_fresh(site, refresh)


class _Waiting:
    """The devices that joined and wait; hidden while there are none."""

    def __init__(self, site: Site) -> None:
        self._site = site
        with card("Waiting for approval", note="they joined with a token that asks for it") as self._section:
            self._list = Block(Markup(""))
        on_rows(self._section, self._act)

    async def refresh(self) -> None:
        """Look again."""
        found = await self._site.queries.devices(Page(size=PENDING_SHOWN), _PENDING)
        self._section.set_visibility(bool(found.items))
        more = Markup("<p>{}</p>").format(anchor("All that wait", "/devices?state=pending")) if found.next_token else ""
        self._list.show(Markup("{}{}").format(_pending_table(found.items), more))

    async def _act(self, action: str, name: str) -> None:
        if action == "approve":
            await self._site.act(
                Role.OPERATOR, lambda who: self._site.commands.approve_device(who, name), done=f"{name} may work."
            )
            await self.refresh()
        elif action == "revoke":
            confirm(
                f"Refuse {name}?",
                "It is revoked for good; to come back it has to join with a new token.",
                lambda: self._refuse(name),
                words="Refuse the device",
            )

    async def _refuse(self, name: str) -> GloraError | None:
        refused = await self._site.act(
            Role.OPERATOR, lambda who: self._site.commands.revoke_device(who, name), done=f"{name} is refused."
        )
        await self.refresh()
        return refused


def _pending_table(views: Sequence[DeviceView]) -> Markup:
    head = ("Device", "Can", "Asks for rank", "Tags", "Joined", "")
    return wide_table(head, map(_pending_row, views), label="Devices that wait for approval")


def _pending_row(view: DeviceView) -> Sequence[Cell]:
    device = view.device
    name = device.name
    buttons = Markup('<span class="row-actions">{}{}</span>').format(
        row_button("Approve", "approve", name, kind="primary", label=f"Approve {name}"),
        row_button("Refuse", "revoke", name, kind="danger", label=f"Refuse {name}"),
    )
    return (
        Markup("<b>{}</b><small>{}</small>").format(anchor(name, f"/devices/{name}"), device.profile.platform),
        abilities(device.profile),
        f"{device.declared_rank}, may use {device.granted_rank}",
        tags(device.tags),
        fmt.moment(device.created_at),
        buttons,
    )


class _Tokens:
    """Every token that was made, newest first."""

    def __init__(self, site: Site) -> None:
        self._site = site
        with card("Tokens", note="revoking one lets no further device join; those that joined stay") as section:
            self._pager: Pager[TokenRecord] = Pager(site.queries.tokens, _tokens_table, size=TOKENS_SHOWN)
        on_rows(section, self._act)

    async def refresh(self) -> None:
        """Look again."""
        await self._pager.refresh()

    async def restart(self) -> None:
        """Show the newest."""
        await self._pager.restart()

    async def _act(self, action: str, token_id: str) -> None:
        if action == "revoke":
            confirm(
                "Revoke this token?",
                Markup('No device can join with <span class="mono">{}</span> any more.').format(token_id),
                lambda: self._revoke(token_id),
                words="Revoke the token",
            )

    async def _revoke(self, token_id: str) -> GloraError | None:
        refused = await self._site.act(
            Role.OPERATOR, lambda who: self._site.commands.revoke_token(who, token_id), done="The token is revoked."
        )
        await self.refresh()
        return refused


def _tokens_table(tokens: tuple[TokenRecord, ...]) -> Markup:
    if not tokens:
        return Markup('<p class="muted">No token was made yet. Make one above.</p>')
    now = time.time()
    return wide_table(_TOKEN_HEAD, (_token_row(token, now) for token in tokens), label="Tokens")


def token_state(token: TokenRecord, now: float) -> tuple[str, str]:
    """Whether devices can join with it: a tone and words."""
    if token.revoked:
        return "bad", "revoked"
    if token.uses >= token.max_uses:
        return "idle", "used up"
    if token.expires_at <= now:
        return "idle", "expired"
    return "good", "valid"


def _token_row(token: TokenRecord, now: float) -> Sequence[Cell]:
    tone, words = token_state(token, now)
    ends = fmt.moment(token.expires_at)
    revoke = row_button("Revoke", "revoke", token.id, kind="danger", label=f"Revoke token {token.id}")
    return (
        Markup('<b>{}</b><small class="mono">{}</small>').format(token.description or "without a name", token.id),
        pill(tone, words),
        f"{token.uses:,} of {token.max_uses:,}",
        Markup('<span class="nowrap">{}</span>').format(ends),
        str(token.max_rank),
        tags(token.tags),
        "may work at once" if token.approve else "wait for approval",
        Markup('<span class="row-actions">{}</span>').format(revoke) if tone == "good" else "",
    )
