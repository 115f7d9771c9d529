"""All devices in memory, in few words each: what lists are filtered by, sorted by and counted from.

Presence is known to this process only, and tags and profiles are texts to the database; so the choosing happens here,
and only the devices of a page are read whole. The roster is read again when a device was changed through this process,
and otherwise after a few seconds when somebody asks.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from glora_server.coordinator.hub import ROSTER, Hub
from glora_server.coordinator.model import Listing, Page
from glora_server.coordinator.ports import Store
from glora_server.coordinator.views_history import (
    DeviceCounts,
    DeviceFilter,
    DeviceOrder,
    RosterEntry,
    reliability,
)
from glora_server.rounds.ids import DeviceId
from glora_wire.errors import GloraError, Reason

_GOOD_FOR_SECONDS: Final = 5.0
_TAGS_SHOWN: Final = 200
_LARGEST_PAGE: Final = 1000

Key = tuple[float | str, str]
"""What a list is sorted by, and the id where that is equal."""


class Roster:
    """The devices that are not revoked; `entries` reads them when that is due."""

    def __init__(self, store: Store, hub: Hub) -> None:
        self._store = store
        self._hub = hub
        self._entries: Mapping[DeviceId, RosterEntry] = {}
        self._revision = -1
        self._read_at = 0.0
        self._reading = asyncio.Lock()

    async def entries(self) -> Mapping[DeviceId, RosterEntry]:
        """The devices by id, in order of enrolment."""
        if not self._is_good():
            async with self._reading:
                if not self._is_good():
                    revision = self._hub.signals.revision(ROSTER)
                    found = await self._store.read(lambda uow: uow.lists.roster())
                    self._entries = {entry.id: entry for entry in found}
                    self._revision, self._read_at = revision, time.monotonic()
        return self._entries

    def _is_good(self) -> bool:
        fresh = time.monotonic() - self._read_at < _GOOD_FOR_SECONDS
        return fresh and self._revision == self._hub.signals.revision(ROSTER)


def chosen(entries: Iterable[RosterEntry], wanted: DeviceFilter, hub: Hub, now: float) -> list[tuple[Key, RosterEntry]]:
    """The wanted devices in the wanted order."""
    key = _keys(wanted.order, hub)
    found = [(key(entry), entry) for entry in entries if _fits(entry, wanted, hub, now)]
    found.sort(key=lambda pair: pair[0])
    return found


def part(found: Sequence[tuple[Key, RosterEntry]], page: Page) -> Listing[RosterEntry]:
    """The part of the list after the page's token; raises REQUEST_INVALID for a token that we did not make."""
    begin = 0
    if page.token:
        last = _decoded(page.token)
        if found and type(found[0][0][0]) is not type(last[0]):
            raise _not_ours(page.token)
        begin = sum(key <= last for key, _ in found)
    if page.size < 1:
        raise GloraError(Reason.REQUEST_INVALID, f"A page has at least one item, not {page.size}.", page_size=page.size)
    size = min(page.size, _LARGEST_PAGE)
    items = tuple(entry for _, entry in found[begin : begin + size])
    more = begin + size < len(found)
    return Listing(items=items, next_token=_encoded(found[begin + size - 1][0]) if more else "")


def counts(entries: Iterable[RosterEntry], hub: Hub, now: float) -> DeviceCounts:
    """How many there are."""
    listed = list(entries)
    tags = sorted({tag for entry in listed for tag in entry.tags})
    return DeviceCounts(
        total=len(listed),
        online=sum(hub.is_online(entry.id, now) for entry in listed),
        by_state=dict(Counter(entry.state for entry in listed)),
        tags=tuple(tags[:_TAGS_SHOWN]),
    )


def _fits(entry: RosterEntry, wanted: DeviceFilter, hub: Hub, now: float) -> bool:
    if wanted.state is not None and entry.state is not wanted.state:
        return False
    if wanted.tag and wanted.tag not in entry.tags:
        return False
    if wanted.online is not None and hub.is_online(entry.id, now) != wanted.online:
        return False
    text = wanted.text.casefold()
    return not text or any(text in word.casefold() for word in (entry.name, entry.id, entry.profile.platform))


def _keys(order: DeviceOrder, hub: Hub) -> Callable[[RosterEntry], Key]:
    match order:
        case DeviceOrder.ENROLMENT:
            return lambda entry: (entry.created_at, entry.id)
        case DeviceOrder.NAME:
            return lambda entry: (entry.name.casefold(), entry.id)
        case DeviceOrder.LAST_SEEN:
            return lambda entry: (-(hub.last_seen(entry.id) or entry.last_seen_at or 0.0), entry.id)
        case DeviceOrder.RELIABILITY:
            return lambda entry: (_known(reliability(entry.outcomes)), entry.id)


def _known(share: float | None) -> float:
    return 2.0 if share is None else share


def _encoded(key: Key) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


def _decoded(token: str) -> Key:
    try:
        values = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError) as error:
        raise _not_ours(token) from error
    match values:
        case [float() | str() as first, str() as last]:
            return first, last
        case _:
            raise _not_ours(token)


def _not_ours(token: str) -> GloraError:
    return GloraError(
        Reason.REQUEST_INVALID,
        "The page token is not one that this list gave out; leave it out to start from the beginning.",
        page_token=token[:80],
    )
