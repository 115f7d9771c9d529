"""The audit of commands: from where, what it was before and what it is after."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from coordinator_world import MANIFEST, World, a_world, spec
from people_cases import EVE

from glora_server.coordinator.model import AuditEntry, Page


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as made:
        yield made


async def entries(world: World) -> dict[str, AuditEntry]:
    """Eve's entries by action, the last one of each."""
    listing = await world.read(lambda uow: uow.audit.list(Page(size=1000)))
    return {entry.action: entry for entry in reversed(listing.items) if entry.actor == EVE.name}


def change(entry: AuditEntry) -> tuple[object, object]:
    return json.loads(entry.before_json), json.loads(entry.after_json)


async def test_changes_of_devices_say_what_was_before_and_after(world: World) -> None:
    await world.phone("a")
    await world.now.commands.set_device_rank(EVE, "a", 2)
    await world.now.commands.suspend_device(EVE, "a")
    found = await entries(world)
    assert change(found["device.set-rank"]) == ({"granted_rank": 4}, {"granted_rank": 2})
    assert change(found["device.suspend"]) == ({"state": "approved"}, {"state": "suspended"})
    assert {entry.origin for entry in found.values()} == {EVE.origin}


async def test_changes_of_runs_say_what_was_before_and_after(world: World) -> None:
    await world.now.commands.create_run(EVE, spec(), MANIFEST, start=True)
    await world.now.commands.pause_run(EVE, "first")
    before = (await world.run()).spec.policy.quorum
    await world.now.commands.edit_policy(EVE, "first", {"quorum": before + 1})
    await world.now.commands.abort_run(EVE, "first", "wrong data")
    found = await entries(world)
    assert json.loads(found["run.create"].before_json) is None
    assert change(found["run.start"]) == ({"phase": "created"}, {"phase": "active"})
    assert change(found["run.pause"]) == ({"phase": "active"}, {"phase": "paused"})
    assert change(found["run.edit"]) == ({"quorum": before}, {"quorum": before + 1})
    assert change(found["run.abort"]) == ({"phase": "paused"}, {"phase": "aborted"})
    assert json.loads(found["run.abort"].details_json) == {"reason": "wrong data"}


async def test_a_join_token_is_noted_without_its_secret(world: World) -> None:
    record, text = await world.now.commands.create_token(EVE, ttl_seconds=60.0, max_rank=4, tags=("lab",))
    await world.now.commands.revoke_token(EVE, record.id)
    found = await entries(world)
    before, after = change(found["token.revoke"])
    assert isinstance(before, dict)
    assert after == before | {"revoked": True}
    assert (before["max_rank"], before["tags"]) == (4, ["lab"])
    secret = text.rsplit("-", 1)[-1]
    assert secret not in repr(found)
    assert record.secret_sha256 not in repr(found)
