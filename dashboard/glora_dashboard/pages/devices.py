"""The list of devices: found by state, tag, name and presence; those that wait are approved here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from markupsafe import Markup
from nicegui import ui

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.device_parts import devices_table
from glora_dashboard.pages.filters import Address, find_field, pick_field
from glora_dashboard.pages.forms import confirm, on_rows
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import Block, button, card, empty
from glora_dashboard.pages.site import Site, may
from glora_server.coordinator.model import DeviceState, Listing, Page
from glora_server.coordinator.people import Principal, Role
from glora_server.coordinator.views_history import DeviceCounts, DeviceFilter, DeviceLine, DeviceOrder
from glora_wire.errors import GloraError

DEVICES_SHOWN: Final = 25
_MOST_AT_ONCE: Final = 1000
_NAMED: Final = 12
_ANY: Final = "any"
_STATES: Final = {
    _ANY: "not revoked",
    DeviceState.APPROVED.value: "approved",
    DeviceState.PENDING.value: "waiting for approval",
    DeviceState.SUSPENDED.value: "suspended",
    DeviceState.REVOKED.value: "revoked",
}
_PRESENCE: Final = {_ANY: "any", "yes": "online", "no": "away"}
_ORDERS: Final = {
    DeviceOrder.NAME.value: "name",
    DeviceOrder.LAST_SEEN.value: "last seen first",
    DeviceOrder.RELIABILITY.value: "least reliable first",
    DeviceOrder.ENROLMENT.value: "oldest first",
}


@page("/devices", title="Devices", nav="Devices")
async def devices_page(
    site: Site,
    *,
    state: str = _ANY,
    tag: str = "",
    text: str = "",
    online: str = _ANY,
    order: str = DeviceOrder.NAME.value,
) -> None:
    """The devices, in parts; the revoked ones where their state is picked."""
    counts = await site.queries.device_counts()
    with frame("Devices"):
        if not counts.total and state != DeviceState.REVOKED.value:
            _nobody(operator=may(Role.OPERATOR))
            return
        listed = _List(site, counts, _wanted(state, tag, text, online, order))
        await listed.refresh()
        keep_fresh(site, listed.refresh)


def _nobody(*, operator: bool) -> None:
    sentence = "A device joins with a token and one command; then it is listed here with what it can do."
    empty("No device yet", sentence, link=("Make a join token", "/enrolment") if operator else None)


def _wanted(state: str, tag: str, text: str, online: str, order: str) -> DeviceFilter:
    """What the address asks for; what it spells wrongly is as if it were left out."""
    return DeviceFilter(
        state=DeviceState(state) if state in _STATES and state != _ANY else None,
        tag=tag,
        text=text,
        online={"yes": True, "no": False}.get(online),
        order=DeviceOrder(order) if order in _ORDERS else DeviceOrder.NAME,
    )


class _List:
    """Filters, the notice about those that wait, and the list itself."""

    def __init__(self, site: Site, counts: DeviceCounts, wanted: DeviceFilter) -> None:
        self._site = site
        self._wanted = wanted
        self._operator = may(Role.OPERATOR)
        self._summary = Block(_summary(counts), tag="p").classes("lead")
        with ui.element("div").classes("notice") as self._notice:
            self._waiting = Block(Markup(""), tag="p")
            button("Show them", self._show_waiting)
            button("Approve them", self._approve_all, kind="primary")
        with card("All devices") as section:
            self._filters = _Filters(counts, wanted, self._refilter)
            self._pager: Pager[DeviceLine] = Pager(
                self._ask, self._draw, size=DEVICES_SHOWN, newer="Previous", older="Next"
            )
        on_rows(section, self._act)
        self._tell(counts)

    async def refresh(self) -> None:
        """Look again."""
        self._tell(await self._site.queries.device_counts())
        await self._pager.refresh()

    def _tell(self, counts: DeviceCounts) -> None:
        pending = counts.by_state.get(DeviceState.PENDING, 0)
        self._summary.show(_summary(counts))
        verb = "waits" if pending == 1 else "wait"
        self._waiting.show(Markup("{} {} for approval.").format(fmt.count(pending, "device"), verb))
        self._notice.set_visibility(bool(pending) and self._operator)

    def _draw(self, lines: tuple[DeviceLine, ...]) -> Markup:
        if not lines:
            return Markup('<p class="muted">No device is like that. Change what is looked for above.</p>')
        return devices_table(lines, operator=self._operator)

    async def _ask(self, part: Page) -> Listing[DeviceLine]:
        return await self._site.queries.device_lines(part, self._wanted)

    async def _refilter(self, wanted: DeviceFilter) -> None:
        self._wanted = wanted
        await self._pager.restart()

    async def _show_waiting(self) -> None:
        self._filters.show_pending()

    async def _act(self, action: str, name: str) -> None:
        if action == "approve":
            await self._site.act(
                Role.OPERATOR, lambda who: self._site.commands.approve_device(who, name), done=f"{name} may work."
            )
            await self.refresh()

    async def _approve_all(self) -> None:
        """Ask about all that wait and fit the other filters, then approve each of them."""
        waiting = DeviceFilter(state=DeviceState.PENDING, tag=self._wanted.tag, text=self._wanted.text)
        found = await self._site.queries.devices(Page(size=_MOST_AT_ONCE), waiting)
        names = [view.device.name for view in found.items]
        if not names:
            ui.notify("None of those that wait fits what is looked for.", type="warning")
            return

        async def approve(who: Principal) -> None:
            for name in names:
                await self._site.commands.approve_device(who, name)

        async def go() -> GloraError | None:
            done = f"{fmt.count(len(names), 'device')} may work."
            refused = await self._site.act(Role.OPERATOR, approve, done=done)
            await self.refresh()
            return refused

        title = f"Approve {fmt.count(len(names), 'device')}?"
        confirm(title, f"They get work from now on: {_listed(names)}.", go, words="Approve", danger=False)


def _summary(counts: DeviceCounts) -> Markup:
    return Markup("{} of {} online.").format(f"{counts.online:,}", fmt.count(counts.total, "device"))


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED:,} more"


class _Filters:
    """The row of fields above the list; the address follows them."""

    def __init__(
        self, counts: DeviceCounts, wanted: DeviceFilter, changed: Callable[[DeviceFilter], Awaitable[None]]
    ) -> None:
        self._changed = changed
        self._address = Address("/devices")
        online = {None: _ANY, True: "yes", False: "no"}[wanted.online]
        tags = {"": "any tag"} | {tag: tag for tag in counts.tags} | ({wanted.tag: wanted.tag} if wanted.tag else {})
        with ui.element("div").classes("filters").props('role="search" aria-label="Devices"'):
            self._text = find_field("Name, id or platform", wanted.text, self._apply)
            state = wanted.state.value if wanted.state else _ANY
            self._state = pick_field("State", dict(_STATES), state, self._apply)
            self._online = pick_field("Presence", dict(_PRESENCE), online, self._apply)
            self._tag = pick_field("Tag", tags, wanted.tag, self._apply)
            self._order = pick_field("Order", dict(_ORDERS), wanted.order.value, self._apply)

    def show_pending(self) -> None:
        """Look for those that wait."""
        self._state.value = DeviceState.PENDING.value

    async def _apply(self) -> None:
        values = {
            "state": self._state.value,
            "tag": self._tag.value or "",
            "text": (self._text.value or "").strip(),
            "online": self._online.value,
            "order": self._order.value,
        }
        plain = {"state": _ANY, "online": _ANY, "order": DeviceOrder.NAME.value}
        self._address.show({key: value for key, value in values.items() if value and value != plain.get(key)})
        await self._changed(_wanted(**values))
