"""People: who may sign in and with which role, and everybody's API tokens. For admins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from nicegui import ui

from glora_dashboard.pages.forms import Trouble, choice_field, confirm, on_rows, show_secret, text_field, text_of
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import button, card, sheet
from glora_dashboard.pages.people_parts import ROLE_WORDS, made_up_password, tokens_table, users_table
from glora_dashboard.pages.site import Site
from glora_server.coordinator.access_tokens import ApiTokenView
from glora_server.coordinator.model import Listing, Page
from glora_server.coordinator.people import Principal, Role, User
from glora_wire.errors import GloraError

USERS_SHOWN: Final = 25
TOKENS_SHOWN: Final = 10


@page("/people", title="People", nav="People", least=Role.ADMIN)
async def people_page(site: Site) -> None:
    """Users and API tokens."""
    me = await site.require(Role.ADMIN)
    with frame("People"):
        users = _Users(site, me)
        tokens = _Tokens(site)
        await users.refresh()
        await tokens.refresh()

        async def refresh() -> None:
            await users.refresh()
            await tokens.refresh()

        keep_fresh(site, refresh)


class _Users:
    """The users, and what admins do with them."""

    def __init__(self, site: Site, me: Principal) -> None:
        self._site = site
        with card("Users") as section:
            with ui.element("div").classes("actions"):
                button("New user", self._create, kind="primary")
            self._pager: Pager[User] = Pager(self._ask, partial(users_table, me=me.name), size=USERS_SHOWN)
        on_rows(section, self._act)

    async def refresh(self) -> None:
        """Look again."""
        await self._pager.refresh()

    async def _ask(self, part: Page) -> Listing[User]:
        return await self._site.access.users(await self._site.require(Role.ADMIN), part)

    async def _do(
        self, action: Callable[[Principal], Awaitable[object]], done: str, *, show_refusal: bool = True
    ) -> GloraError | None:
        refused = await self._site.act(Role.ADMIN, action, done=done, show_refusal=show_refusal)
        if refused is None:
            await self.refresh()
        return refused

    async def _act(self, action: str, name: str) -> None:
        match action:
            case "role":
                await self._set_role(name)
            case "password":
                self._reset(name)
            case "disable":
                self._disable(name)
            case "enable":
                await self._do(lambda who: self._site.access.enable_user(who, name), f"{name} may sign in again.")
            case "remove":
                self._remove(name)
            case _:
                return

    async def _create(self) -> None:
        with sheet("New user") as dialog:
            trouble = Trouble()
            with ui.element("div").classes("form"):
                name = text_field("Name", hint="Small letters, digits, '.', '_', '@' and '-'.").props("autofocus")
                role = choice_field("Role", dict(ROLE_WORDS), Role.VIEWER.value)
                given = text_field("Password", password=True, hint="Left empty, one is made up and shown once.")

            async def create() -> None:
                who, password = text_of(name).strip(), given.value or made_up_password()
                refused = await self._do(
                    lambda admin: self._site.access.create_user(admin, who, Role(role.value), password),
                    f"{who} may sign in.",
                    show_refusal=False,
                )
                trouble.show(refused)
                if refused is None:
                    dialog.close()
                    if not given.value:
                        _show_password(who, password)

            with ui.element("div").classes("actions end"):
                button("Cancel", dialog.close)
                button("Create", create, kind="primary")
        dialog.open()

    async def _set_role(self, name: str) -> None:
        user = await self._site.access.user(await self._site.require(Role.ADMIN), name)
        with sheet(f"Role of {name}") as dialog:
            trouble = Trouble()
            role = choice_field("Role", dict(ROLE_WORDS), user.role.value, hint="The user has to sign in again.")

            async def save() -> None:
                refused = await self._do(
                    lambda who: self._site.access.set_role(who, name, Role(role.value)),
                    f"{name} is {role.value} now.",
                    show_refusal=False,
                )
                trouble.show(refused)
                if refused is None:
                    dialog.close()

            with ui.element("div").classes("actions end"):
                button("Cancel", dialog.close)
                button("Save", save, kind="primary")
        dialog.open()

    def _reset(self, name: str) -> None:
        async def reset() -> GloraError | None:
            password = made_up_password()
            done = f"{name} has a new password."
            refused = await self._do(lambda who: self._site.access.set_password(who, name, password), done)
            if refused is None:
                _show_password(name, password)
            return refused

        explanation = "A new password is made up and shown once. The user's sessions end."
        confirm(f"Reset the password of {name}?", explanation, reset, words="Reset the password", danger=False)

    def _disable(self, name: str) -> None:
        async def disable() -> GloraError | None:
            return await self._do(lambda who: self._site.access.disable_user(who, name), f"{name} is disabled.")

        explanation = "Sessions end at once, and API tokens rest until the user is enabled again."
        confirm(f"Disable {name}?", explanation, disable, words="Disable the user")

    def _remove(self, name: str) -> None:
        async def remove() -> GloraError | None:
            return await self._do(lambda who: self._site.access.remove_user(who, name), f"{name} is removed.")

        explanation = "The user's sessions and API tokens end for good; the audit keeps the name."
        confirm(f"Remove {name}?", explanation, remove, words="Remove the user", name=name, what="Name of the user")


def _show_password(name: str, password: str) -> None:
    explanation = f"Give {name} this password; it can be changed under Account after signing in."
    show_secret(f"Password of {name}", explanation, (("Password", password),), rows=1)


class _Tokens:
    """Everybody's API tokens."""

    def __init__(self, site: Site) -> None:
        self._site = site
        with card("API tokens", note="of everybody; each is made under Account") as section:
            self._pager: Pager[ApiTokenView] = Pager(self._ask, tokens_table, size=TOKENS_SHOWN)
        on_rows(section, self._act)

    async def refresh(self) -> None:
        """Look again."""
        await self._pager.refresh()

    async def _ask(self, part: Page) -> Listing[ApiTokenView]:
        return await self._site.access.api_tokens(await self._site.require(Role.ADMIN), part)

    async def _act(self, action: str, token_id: str) -> None:
        if action == "revoke":
            confirm_revoking(self._site, token_id, Role.ADMIN, self.refresh)


def confirm_revoking(site: Site, token_id: str, role: Role, then: Callable[[], Awaitable[None]]) -> None:
    """Ask, then revoke an API token."""

    async def revoke() -> GloraError | None:
        refused = await site.act(
            role, lambda who: site.access.revoke_api_token(who, token_id), done="The token is revoked."
        )
        await then()
        return refused

    confirm("Revoke this API token?", "Programs that use it are refused from now on.", revoke, words="Revoke the token")
