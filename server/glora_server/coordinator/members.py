"""Who holds a key: every call of a device asks, so the answer is remembered for a moment."""

from __future__ import annotations

import time
from typing import Final

from glora_server.coordinator.hub import ROSTER, Hub
from glora_server.coordinator.model import Device
from glora_server.coordinator.ports import Store

_GOOD_FOR_SECONDS: Final = 1.0
"""What another process changed counts after this; what this one changed, at once."""
_REMEMBERED: Final = 4096


class Members:
    """The devices by their key."""

    def __init__(self, store: Store, hub: Hub) -> None:
        self._store = store
        self._hub = hub
        self._known: dict[str, tuple[Device, int, float]] = {}

    async def holder(self, key_sha256: str) -> Device | None:
        """The device with that key, None when there is none."""
        revision = self._hub.signals.revision(ROSTER)
        device, seen, read_at = self._known.get(key_sha256, (None, -1, 0.0))
        if seen == revision and time.monotonic() - read_at < _GOOD_FOR_SECONDS:
            return device
        begun = time.monotonic()
        device = await self._store.read(lambda uow: uow.devices.by_key(key_sha256))
        if device is not None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key_sha256] = device, revision, begun
        return device
