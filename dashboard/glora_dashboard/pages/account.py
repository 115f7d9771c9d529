"""The account of whoever is looking: password, own API tokens, own sessions."""

from __future__ import annotations

from functools import partial
from typing import Final

from markupsafe import Markup
from nicegui import ui

from glora_dashboard.pages.forms import Trouble, choice_field, on_rows, show_secret, text_field, text_of
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import Block, button, card, facts, sheet
from glora_dashboard.pages.people import confirm_revoking
from glora_dashboard.pages.people_parts import ROLE_WORDS, sessions_table, tokens_table
from glora_dashboard.pages.site import Site
from glora_server.coordinator.access_tokens import ApiTokenView
from glora_server.coordinator.model import Listing, Page
from glora_server.coordinator.people import Credential, Principal, Role

TOKENS_SHOWN: Final = 10
_DAY: Final = 86400
_ENDS: Final = {str(7 * _DAY): "1 week", str(90 * _DAY): "90 days", str(365 * _DAY): "1 year", "": "until revoked"}


@page("/account", title="Account")
async def account_page(site: Site) -> None:
    """One's own account."""
    me = await site.require(Role.VIEWER)
    with frame("Account"):
        with card("You"):
            Block(facts((("Name", me.name), ("Role", ROLE_WORDS[me.role]))))
        if me.credential is Credential.ADMIN_TOKEN:
            Block(Markup('<p class="muted">The token of the data folder belongs to no user.</p>'))
            return
        with card("Password"):
            _Password(site)
        tokens = _Tokens(site, me)
        sessions = _Sessions(site)
        await tokens.refresh()
        await sessions.refresh()

        async def refresh() -> None:
            await tokens.refresh()
            await sessions.refresh()

        keep_fresh(site, refresh)


class _Password:
    """The form that changes one's own password."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._trouble = Trouble()
        with ui.element("form").classes("stacked").on("submit.prevent", self._change):
            with ui.element("div").classes("form three"):
                self._current = text_field("Current password", password=True)
                self._current.props["autocomplete"] = "current-password"
                self._new = text_field("New password", password=True, hint="At least 10 characters.")
                self._again = text_field("New password again", password=True)
            Block(Markup('<p class="muted small">All your sessions end; sign in again with the new one.</p>'))
            with ui.element("div").classes("actions"):
                Block(Markup("Change the password"), tag="button").classes("button").props('type="submit"')

    async def _change(self) -> None:
        if self._new.value != self._again.value:
            self._trouble.say("The new password is not the same both times.")
            return

        async def change(who: Principal) -> None:
            await self._site.access.change_password(who, text_of(self._current), text_of(self._new))

        refused = await self._site.act(
            Role.VIEWER, change, done="The password is changed. Sign in again.", show_refusal=False
        )
        self._trouble.show(refused)
        if refused is None:
            ui.navigate.to("/login?next=/account")


class _Tokens:
    """One's own API tokens."""

    def __init__(self, site: Site, me: Principal) -> None:
        self._site = site
        self._me = me
        with card("API tokens", note="for programs and the command line") as section:
            with ui.element("div").classes("actions"):
                button("New API token", self._create, kind="primary")
            draw = partial(tokens_table, own=True)
            self._pager: Pager[ApiTokenView] = Pager(self._ask, draw, size=TOKENS_SHOWN)
        on_rows(section, self._act)

    async def refresh(self) -> None:
        """Look again."""
        await self._pager.refresh()

    async def _ask(self, part: Page) -> Listing[ApiTokenView]:
        me = await self._site.require(Role.VIEWER)
        return await self._site.access.api_tokens(me, part, user=me.name)

    async def _act(self, action: str, token_id: str) -> None:
        if action == "revoke":
            confirm_revoking(self._site, token_id, Role.VIEWER, self.refresh)

    async def _create(self) -> None:
        roles = {role: words for role, words in ROLE_WORDS.items() if self._me.role.includes(Role(role))}
        with sheet("New API token") as dialog:
            trouble = Trouble()
            with ui.element("div").classes("form"):
                name = text_field("What it is for", hint="Such as: nightly export.").props("autofocus")
                role = choice_field("What it may do at most", roles, Role.VIEWER.value)
                ends = choice_field("Valid for", dict(_ENDS), str(90 * _DAY))

            async def create() -> None:
                made: list[str] = []

                async def make(who: Principal) -> None:
                    seconds = float(ends.value) if ends.value else None
                    _, text = await self._site.access.create_api_token(
                        who, name=text_of(name), role=Role(role.value), ttl_seconds=seconds
                    )
                    made.append(text)

                trouble.show(await self._site.act(Role.VIEWER, make, done="The token is made.", show_refusal=False))
                if made:
                    dialog.close()
                    _show_token(made[0])
                    await self._pager.restart()

            with ui.element("div").classes("actions end"):
                button("Cancel", dialog.close)
                button("Create", create, kind="primary")
        dialog.open()


def _show_token(text: str) -> None:
    show_secret(
        "Your API token",
        Markup(
            'Programs send it as <span class="mono">Authorization: Bearer TOKEN</span>; the command line takes it as '
            '<span class="mono">--token</span> or <span class="mono">$GLORA_TOKEN</span>.'
        ),
        (("Token", text),),
    )


class _Sessions:
    """Where one is signed in."""

    def __init__(self, site: Site) -> None:
        self._site = site
        with card("Sessions", note="browsers that you are signed in with") as section:
            self._list = Block(Markup(""))
        on_rows(section, self._act)

    async def refresh(self) -> None:
        """Look again."""
        me = await self._site.require(Role.VIEWER)
        self._list.show(sessions_table(await self._site.access.own_sessions(me), me.credential_id))

    async def _act(self, action: str, session_id: str) -> None:
        if action == "end":
            await self._site.act(
                Role.VIEWER,
                lambda who: self._site.access.end_own_session(who, session_id),
                done="The session has ended.",
            )
            await self.refresh()
