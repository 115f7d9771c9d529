"""The form that makes a join token, and the command that it is pasted with."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Final

from markupsafe import Markup
from nicegui import context, ui
from nicegui.element import Element

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.forms import (
    Trouble,
    choice_field,
    copyable,
    number_field,
    tags_of,
    text_field,
    text_of,
    whole,
)
from glora_dashboard.pages.parts import Block, button
from glora_dashboard.pages.site import Site
from glora_server.coordinator.model import TokenRecord
from glora_server.coordinator.people import Principal, Role

_STANDARD_PORT: Final = 7444
_TIMES: Final = {"3600": "1 hour", "86400": "1 day", "604800": "1 week", "2592000": "30 days", "31536000": "1 year"}


class TokenForm:
    """The fields, and below them the command with the newest token; `made` is called after a token was made."""

    def __init__(self, site: Site, *, enrolment_port: int) -> None:
        self._site = site
        self._port = enrolment_port
        self.made: Callable[[], Awaitable[None]] | None = None
        self._trouble = Trouble()
        with ui.element("div").classes("form three"):
            self._what = text_field("What it is for", hint="So that you know it again, such as: lab, rack 3.")
            self._uses = number_field("Devices that may join with it", 1, least=1)
            self._ends = choice_field("Valid for", dict(_TIMES), "86400")
            self._rank = number_field("Largest rank they may use", 16, least=1)
            self._tags = text_field("Tags", hint="Commas between them; runs can ask for tags.")
            self._host = text_field("This server, as devices reach it", _own_host(), hint=_host_hint())
        self._hold = ui.checkbox("Each device waits until an operator approves it")
        with ui.element("div").classes("actions"):
            button("Make the token", self._make, kind="primary")
        self._result = ui.element("div").classes("token-made").props('aria-live="polite"')
        self._result.set_visibility(False)

    async def _make(self) -> None:
        uses, rank = whole(self._uses.value), whole(self._rank.value)
        if uses is None or rank is None:
            self._trouble.say("The number of devices and the rank are whole numbers.")
            return
        made: list[tuple[TokenRecord, str]] = []

        async def create(who: Principal) -> None:
            made.append(
                await self._site.commands.create_token(
                    who,
                    description=text_of(self._what).strip(),
                    uses=uses,
                    ttl_seconds=float(self._ends.value),
                    max_rank=rank,
                    tags=tags_of(text_of(self._tags)),
                    approve=not self._hold.value,
                )
            )

        refused = await self._site.act(Role.OPERATOR, create, done="The token is made.", show_refusal=False)
        self._trouble.show(refused)
        if made:
            self._show(*made[0])
        if made and self.made is not None:
            await self.made()

    def _show(self, record: TokenRecord, token: str) -> None:
        """Put the command below the form; the token is in it, and nowhere else."""
        self._result.clear()
        with self._result:
            _joining(record)
            copyable(join_command(token, server=self._server()), label="Run this on the device", rows=3)
            Block(
                Markup(
                    '<p class="muted small">Put a name of your own in place of NAME, one for each device. The token is '
                    "shown this once. Then the device works with "
                    '<span class="mono">glora client run --model MODEL --data train.jsonl</span>.</p>'
                )
            )
        self._result.set_visibility(True)

    def _server(self) -> str:
        host = text_of(self._host).strip() or _own_host()
        has_port = host.rpartition(":")[2].isdecimal() and (host.count(":") == 1 or "]:" in host)
        if has_port:
            return host
        bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return bracketed if self._port == _STANDARD_PORT else f"{bracketed}:{self._port}"


def join_command(token: str, *, server: str) -> str:
    """What to run on a device."""
    return f"glora client join --server {server} --token {token} --name NAME"


def _joining(record: TokenRecord) -> Element:
    devices = fmt.count(record.max_uses, "device")
    words = "Then they may work at once." if record.approve else "Then they wait for your approval, above on this page."
    markup = Markup("<p><b>A token for {}</b>, rank up to {}; it ends {}. {}</p>")
    return Block(markup.format(devices, record.max_rank, fmt.moment(record.expires_at), words))


def _own_host() -> str:
    return context.client.request.url.hostname or "localhost"


def _host_hint() -> str:
    """Devices on other machines cannot use this machine's name for itself."""
    host = _own_host()
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return "Other machines know it by another name or address: write that here." if local else ""
