"""Who holds a key: read once in a while, and never a moment too late."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from storage_records import device

from glora_server.coordinator import members
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.members import Members
from glora_server.coordinator.model import Device, DeviceState
from glora_server.coordinator.ports import Store


@dataclass
class _Devices:
    """A store that holds one device and counts who asks."""

    held: Device | None = field(default_factory=device)
    asked: int = 0
    meanwhile: Callable[[], None] = lambda: None

    async def read(self, work: Callable[[Any], Any]) -> Any:
        self.asked += 1
        answer = work(self)
        self.meanwhile()
        return answer

    @property
    def devices(self) -> _Devices:
        return self

    def by_key(self, key_sha256: str) -> Device | None:
        return self.held if self.held is not None and self.held.key_sha256 == key_sha256 else None


@dataclass
class _Desk:
    store: _Devices
    hub: Hub
    holder: Callable[[str], Awaitable[Device | None]]

    @property
    def key(self) -> str:
        return device().key_sha256

    def revoke(self) -> None:
        assert self.store.held is not None
        self.store.held = replace(self.store.held, state=DeviceState.REVOKED)


@pytest.fixture
def desk() -> _Desk:
    store, hub = _Devices(), Hub()
    return _Desk(store, hub, Members(cast("Store", store), hub).holder)


async def test_a_device_that_calls_again_is_known(desk: _Desk) -> None:
    assert [await desk.holder(desk.key) for _ in range(5)] == [device()] * 5
    assert desk.store.asked == 1


async def test_what_this_process_changed_counts_at_once(desk: _Desk) -> None:
    await desk.holder(desk.key)
    desk.revoke()
    desk.hub.forget_device(device().id)
    found = await desk.holder(desk.key)
    assert found is not None
    assert found.state is DeviceState.REVOKED


async def test_a_change_while_it_is_read_is_not_lost(desk: _Desk) -> None:
    def change() -> None:
        desk.store.meanwhile = lambda: None
        desk.revoke()
        desk.hub.forget_device(device().id)

    desk.store.meanwhile = change
    await desk.holder(desk.key)
    found = await desk.holder(desk.key)
    assert found is not None
    assert found.state is DeviceState.REVOKED


async def test_what_another_process_changed_counts_after_a_second(desk: _Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(members, "time", SimpleNamespace(monotonic=lambda: now))
    await desk.holder(desk.key)
    desk.revoke()
    now += 1.0
    found = await desk.holder(desk.key)
    assert found is not None
    assert found.state is DeviceState.REVOKED


async def test_a_key_that_nobody_holds_is_asked_for_every_time(desk: _Desk) -> None:
    desk.store.held = None
    assert await desk.holder(desk.key) is None
    desk.store.held = device()
    assert await desk.holder(desk.key) == device()


async def test_few_are_remembered(desk: _Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_REMEMBERED", 2)
    for key in ("a", "b", "c", "a"):
        desk.store.held = device(key_sha256=key)
        assert await desk.holder(key) == desk.store.held
    assert desk.store.asked == 4
