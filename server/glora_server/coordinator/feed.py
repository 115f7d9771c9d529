"""What changed, for everybody who watches: small typed events that can be missed and made up for.

Only the newest event about each thing is kept, so a slow reader costs nothing and reads less, not later. A reader is a
place in the sequence; one whose place is no longer covered (the server was restarted, or too much has happened) is
told so by a "reset" and asks for everything again. Used from the event loop only.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_REMEMBERED: Final = 4096
"""Things whose newest event is kept."""
_LEAST_SECONDS: Final = 0.5
"""Between two batches for one reader."""


class ChangeKind(StrEnum):
    """What changed."""

    RUN = "run"
    ROUND = "round"
    DEVICE = "device"
    RESET = "reset"
    """Anything may have: read again what is on the screen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something is not what it was; ask a query what it is now."""

    kind: ChangeKind
    id: str
    """Of the run, round or device; empty for a reset."""
    run_id: str = ""
    """The run of a round."""
    number: int | None = None
    """The number of a round."""
    revision: int
    """Place in the sequence of this server's events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Events since the batch before, oldest first (none: nothing happened for a while), and where to go on."""

    changes: tuple[Change, ...]
    place: str
    """An opaque text; `Feed.follow(place)` goes on after this batch."""


class Feed:
    """The events of one server process."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._epoch = secrets.token_hex(4)
        self._remembered = remembered
        self._revision = 0
        self._dropped = 0
        """The newest revision that is not kept any more although nothing newer was said about its thing."""
        self._newest: OrderedDict[tuple[ChangeKind, str], Change] = OrderedDict()
        self._news: asyncio.Event = asyncio.Event()

    def note(self, kind: ChangeKind, id_: str, *, run_id: str = "", number: int | None = None) -> None:
        """Something changed."""
        self._revision += 1
        self._newest.pop((kind, id_), None)
        self._newest[kind, id_] = Change(kind=kind, id=id_, run_id=run_id, number=number, revision=self._revision)
        if len(self._newest) > self._remembered:
            _, oldest = self._newest.popitem(last=False)
            self._dropped = oldest.revision
        self._news.set()
        self._news = asyncio.Event()

    @property
    def place(self) -> str:
        """Where a reader who knows everything up to now goes on."""
        return f"{self._epoch}-{self._revision}"

    def since(self, place: str) -> tuple[Change, ...]:
        """Events after `place`, oldest first; one reset when that place is not covered."""
        epoch, _, text = place.partition("-")
        seen = int(text) if text.isdecimal() and len(text) < 19 else -1
        if epoch != self._epoch or not self._dropped <= seen <= self._revision:
            return (Change(kind=ChangeKind.RESET, id="", revision=self._revision),)
        found: list[Change] = []
        for change in reversed(self._newest.values()):
            if change.revision <= seen:
                break
            found.append(change)
        return tuple(reversed(found))

    async def follow(
        self, place: str = "", *, heartbeat: float = 15.0, least: float = _LEAST_SECONDS
    ) -> AsyncIterator[Batch]:
        """Batches from `place` (empty: from now) for ever, `least` seconds apart; an empty one every `heartbeat`."""
        place = place or self.place
        while True:
            news = self._news
            changes = self.since(place)
            if not changes:
                await _wait(news, heartbeat)
                changes = self.since(place)
            place = self.place
            yield Batch(changes=changes, place=place)
            if changes:
                await asyncio.sleep(least)


async def _wait(news: asyncio.Event, seconds: float) -> None:
    # Not wait_for: before Python 3.12 it forgets that it was cancelled when the event comes at that moment.
    try:
        async with asyncio.timeout(seconds):
            await news.wait()
    except TimeoutError:
        return
