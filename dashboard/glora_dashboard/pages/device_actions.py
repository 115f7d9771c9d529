"""What operators do with a device: approve, suspend, revoke, change its rank."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from markupsafe import Markup
from nicegui import ui
from nicegui.element import Element

from glora_dashboard.pages.forms import Trouble, confirm, number_field, whole
from glora_dashboard.pages.parts import Block, button, sheet
from glora_dashboard.pages.site import Site
from glora_server.coordinator.model import DeviceState
from glora_server.coordinator.people import Principal, Role
from glora_server.coordinator.views import DeviceView
from glora_wire.errors import GloraError

_POSSIBLE: Final = {
    DeviceState.PENDING: frozenset({"approve", "rank", "revoke"}),
    DeviceState.APPROVED: frozenset({"suspend", "rank", "revoke"}),
    DeviceState.SUSPENDED: frozenset({"approve", "rank", "revoke"}),
    DeviceState.REVOKED: frozenset[str](),
}


class DeviceActions:
    """The row of buttons above a device; `shown` is called with the device after each change."""

    def __init__(self, site: Site, view: DeviceView, shown: Callable[[DeviceView], None]) -> None:
        self._site = site
        self._view = view
        self._name = view.device.name
        self._shown = shown
        with ui.element("div").classes("actions").props('role="group" aria-label="Actions"'):
            self._buttons: dict[str, Element] = {
                "approve": button("Approve", self._approve, kind="primary"),
                "rank": button("Change rank", self._rank),
                "suspend": button("Suspend", self._suspend),
                "revoke": button("Revoke", self._revoke, kind="danger"),
            }
        self.show(view)

    def show(self, view: DeviceView) -> None:
        """Offer what is possible now."""
        self._view = view
        for name, element in self._buttons.items():
            element.set_visibility(name in _POSSIBLE[view.device.state])

    async def _do(
        self, action: Callable[[Principal], Awaitable[object]], done: str, *, show_refusal: bool = True
    ) -> GloraError | None:
        refused = await self._site.act(Role.OPERATOR, action, done=done, show_refusal=show_refusal)
        if refused is None:
            self._shown(await self._site.queries.device(self._name))
        return refused

    async def _approve(self) -> None:
        await self._do(lambda who: self._site.commands.approve_device(who, self._name), f"{self._name} may work.")

    async def _suspend(self) -> None:
        async def go() -> GloraError | None:
            done = f"{self._name} is suspended."
            return await self._do(lambda who: self._site.commands.suspend_device(who, self._name), done)

        explanation = "It gets no work until it is approved again. What it is doing now is lost."
        confirm(f"Suspend {self._name}?", explanation, go, words="Suspend", danger=False)

    async def _revoke(self) -> None:
        async def go() -> GloraError | None:
            done = f"{self._name} is revoked."
            return await self._do(lambda who: self._site.commands.revoke_device(who, self._name), done)

        confirm(
            f"Revoke {self._name}?",
            "The server refuses it at once and for good; to come back it has to join with a new token.",
            go,
            words="Revoke the device",
            name=self._name,
            what="Name of the device",
        )

    async def _rank(self) -> None:
        device = self._view.device
        with sheet(f"Rank of {self._name}") as dialog:
            says = Markup("<p>It says that it can do rank {}. Another rank counts from its next assignment on.</p>")
            Block(says.format(device.declared_rank))
            trouble = Trouble()
            field = number_field("Largest rank it may use", device.granted_rank, least=1).props("autofocus")

            async def save() -> None:
                rank = whole(field.value)
                if rank is None:
                    trouble.say("A rank is a whole number.")
                    return
                refused = await self._do(
                    lambda who: self._site.commands.set_device_rank(who, self._name, rank),
                    f"{self._name} may use rank {rank}.",
                    show_refusal=False,
                )
                trouble.show(refused)
                if refused is None:
                    dialog.close()

            with ui.element("div").classes("actions end"):
                button("Cancel", dialog.close)
                button("Save", save, kind="primary")
        dialog.open()
