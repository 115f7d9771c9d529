"""What is true only while this process lives: who is connected, how far everyone is, who waits for what.

Everything here can be lost: devices say it again within seconds of a restart. Used from the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from glora_server.coordinator.feed import ChangeKind, Feed
from glora_server.coordinator.model import Profile
from glora_server.coordinator.views import LiveProgress
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId

Available = Mapping[DeviceId, tuple[Profile, float]]
"""What each device says about itself, and since when it says so."""
_FRESH_SECONDS = 10.0
"""A device that asked for work this long ago is still taken as there: it is about to ask again."""

_GONE_SECONDS = 60.0
"""A device that was silent for so long is offline; when it comes back it may have been restarted."""


ROSTER: Final = ("roster",)
"""The signal for "a device was enrolled or changed"."""


class Signals:
    """Counters that can be waited for; a change between reading a counter and waiting for it is never missed."""

    def __init__(self) -> None:
        self._counts: dict[Hashable, int] = {}
        self._waiters: dict[Hashable, set[asyncio.Future[None]]] = {}

    def revision(self, key: Hashable) -> int:
        """How often `key` was notified."""
        return self._counts.get(key, 0)

    def notify(self, key: Hashable) -> None:
        """Count up and wake everyone who waits for `key`."""
        self._counts[key] = self._counts.get(key, 0) + 1
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, key: Hashable, seen: int, timeout: float) -> int:  # noqa: ASYNC109 - a long poll has one
        """The revision of `key` as soon as it differs from `seen`, or after `timeout` seconds."""
        if self.revision(key) == seen:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.setdefault(key, set()).add(waiter)
            try:
                # Not wait_for: before Python 3.12 it forgets that it was cancelled when the waiter is woken right then.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        await waiter
            finally:
                self._forget_waiter(key, waiter)
        return self.revision(key)

    def forget(self, key: Hashable) -> None:
        """Drop the counter of something that is over; only when nobody waits for it any more."""
        if key not in self._waiters:
            self._counts.pop(key, None)

    def _forget_waiter(self, key: Hashable, waiter: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(key)
        if waiters is not None:
            waiters.discard(waiter)
            if not waiters:
                del self._waiters[key]


@dataclass(slots=True)
class _Presence:
    profile: Profile
    since: float
    """When the device first came with this profile, or came back after it was gone."""
    last_seen_at: float
    polls: int = 0
    saved_at: float = 0.0
    told: frozenset[tuple[str, str]] = frozenset()
    """(run, reason) pairs of the notices that it was last answered with."""
    measures: RunId | None = None
    """The run for which it still measures what it has sent."""


@dataclass(slots=True)
class Traffic:
    """Bytes that one assignment has moved so far."""

    down: int = 0
    up: int = 0


@dataclass(slots=True)
class Hub:
    """Presence, progress, traffic, waiting sentences and wake-ups."""

    signals: Signals = field(default_factory=Signals)
    feed: Feed = field(default_factory=Feed)
    """What changed, for those who watch."""
    waiting: dict[RunId, str] = field(default_factory=dict)
    """Why the run's next round does not open, a sentence."""
    progress: dict[AssignmentId, LiveProgress] = field(default_factory=dict)
    traffic: dict[AssignmentId, Traffic] = field(default_factory=dict)
    _present: dict[DeviceId, _Presence] = field(default_factory=dict)

    def arrive(self, device_id: DeviceId, profile: Profile, at: float) -> bool:
        """Note a device that asks for work; True when this is news (it was away, or says something new)."""
        known = self._present.get(device_id)
        news = known is None or known.profile != profile or at - known.last_seen_at > _FRESH_SECONDS
        if known is None:
            known = self._present[device_id] = _Presence(profile=profile, since=at, last_seen_at=at)
        elif known.profile != profile or at - known.last_seen_at > _GONE_SECONDS:
            known.since, known.told = at, frozenset()
        known.profile, known.last_seen_at = profile, at
        known.polls += 1
        if news or known.measures is not None:
            self.feed.note(ChangeKind.DEVICE, device_id)
        known.measures = None
        return news

    def leave(self, device_id: DeviceId, at: float, *, lost: bool) -> None:
        """A device's question was answered, or (`lost`) its connection broke."""
        known = self._present.get(device_id)
        if known is not None:
            known.polls = max(0, known.polls - 1)
            known.last_seen_at = at - _FRESH_SECONDS if lost and known.polls == 0 else at
            if lost:
                self.feed.note(ChangeKind.DEVICE, device_id)

    def is_news(self, device_id: DeviceId, notices: frozenset[tuple[str, str]]) -> bool:
        """Whether the device has not been told all of these (run, reason) pairs yet."""
        known = self._present.get(device_id)
        return known is not None and not notices <= known.told

    def tell(self, device_id: DeviceId, notices: frozenset[tuple[str, str]]) -> None:
        """The device is being told these, and nothing else speaks against it any more."""
        known = self._present.get(device_id)
        if known is not None:
            known.told = notices

    def seen(self, device_id: DeviceId, at: float) -> None:
        """Any other sign of life."""
        known = self._present.get(device_id)
        if known is not None:
            known.last_seen_at = at

    def measures(self, device_id: DeviceId, run_id: RunId) -> None:
        """The device still measures what it has sent for the run."""
        known = self._present.get(device_id)
        if known is not None and known.measures != run_id:
            known.measures = run_id
            self.feed.note(ChangeKind.DEVICE, device_id)

    def measuring(self, at: float) -> frozenset[DeviceId]:
        """Devices that are there and still measure what they have sent."""
        return frozenset(device_id for device_id in self._present if self.measures_for(device_id, at) is not None)

    def measures_for(self, device_id: DeviceId, at: float) -> RunId | None:
        """The run for which a device that is there still measures what it has sent."""
        return self._present[device_id].measures if self.is_online(device_id, at) else None

    def forget_device(self, device_id: DeviceId) -> None:
        """The device may not work any more."""
        self._present.pop(device_id, None)
        self.device_changed(device_id)

    def available(self, at: float) -> Available:
        """Devices that would take work now."""
        return {
            device_id: (known.profile, known.since)
            for device_id, known in self._present.items()
            if known.polls > 0 or at - known.last_seen_at < _FRESH_SECONDS
        }

    @property
    def open_polls(self) -> int:
        """Questions for work that are being held open."""
        return sum(known.polls for known in self._present.values())

    def is_online(self, device_id: DeviceId, at: float) -> bool:
        """The device asked for work or moved an assignment within the last minute."""
        known = self._present.get(device_id)
        return known is not None and (known.polls > 0 or at - known.last_seen_at < _GONE_SECONDS)

    def since(self, device_id: DeviceId) -> float | None:
        """Since when the device says what it says; None when it was not heard of by this process."""
        known = self._present.get(device_id)
        return known.since if known else None

    def last_seen(self, device_id: DeviceId) -> float | None:
        """When the device was last heard of by this process."""
        known = self._present.get(device_id)
        return known.last_seen_at if known else None

    def unsaved(self, at: float, every: float) -> dict[DeviceId, tuple[float, Profile]]:
        """Signs of life that the database should learn of; marks them as told."""
        due = {}
        for device_id, known in self._present.items():
            if known.last_seen_at - known.saved_at > every:
                due[device_id] = (known.last_seen_at, known.profile)
                known.saved_at = at
        return due

    def traffic_of(self, assignment_id: AssignmentId) -> Traffic:
        """What this process saw of the assignment's payload bytes."""
        return self.traffic.get(assignment_id, Traffic())

    def moved(self, assignment_id: AssignmentId, *, down: int = 0, up: int = 0) -> None:
        """Count bytes of an assignment."""
        traffic = self.traffic.setdefault(assignment_id, Traffic())
        traffic.down += down
        traffic.up += up

    def device_changed(self, device_id: DeviceId) -> None:
        """A device was enrolled, or somebody changed what it may do."""
        self.signals.notify(ROSTER)
        self.wake_device(device_id)

    def wake_device(self, device_id: DeviceId) -> None:
        """Let the device's open question be answered again: there is work for it, or it lost what it had."""
        self.signals.notify(("device", device_id))
        self.feed.note(ChangeKind.DEVICE, device_id)

    def wake_all(self) -> None:
        """Let every open question be answered again."""
        for device_id in list(self._present):
            self.signals.notify(("device", device_id))

    def run_changed(self, run_id: RunId) -> None:
        """Tell everyone who watches the run."""
        self.signals.notify(("run", run_id))
        self.feed.note(ChangeKind.RUN, run_id)

    def round_changed(self, run_id: RunId, round_id: RoundId, number: int) -> None:
        """Tell everyone who watches the run or the round."""
        self.feed.note(ChangeKind.ROUND, round_id, run_id=run_id, number=number)
        self.run_changed(run_id)

    def drop_assignments(self, assignment_ids: Iterable[AssignmentId]) -> None:
        """Forget the live side of assignments that are over for good."""
        for assignment_id in assignment_ids:
            self.progress.pop(assignment_id, None)
            self.traffic.pop(assignment_id, None)
            self.signals.forget(("assignment", assignment_id))
