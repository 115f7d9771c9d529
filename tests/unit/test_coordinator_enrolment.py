"""Joining: what a token gives, what it refuses, and who gets the same answer again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from coordinator_fakes import START
from coordinator_world import World, a_world
from people_cases import ADMIN

from glora_server.coordinator.model import DeviceState, Page
from glora_wire.errors import GloraError, Reason
from glora_wire.join_token import JoinToken


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as made:
        yield made


async def refused(world: World, reason: Reason, token: JoinToken, name: str = "b", **request: Any) -> str:
    with pytest.raises(GloraError) as caught:
        await world.enrol(name, token, **request)
    assert caught.value.reason is reason
    return caught.value.message


async def uses(world: World, token: JoinToken) -> int:
    found = await world.read(lambda uow: uow.tokens.list(Page()))
    return next(item.uses for item in found.items if item.id == token.token_id)


async def test_a_device_gets_what_the_token_gives(world: World) -> None:
    token = await world.token(tags=("lab", "north"))
    record = await world.enrol("a", token, rank=3)
    assert record.device.state is DeviceState.APPROVED
    assert (record.device.granted_rank, record.device.tags) == (3, ("lab", "north"))
    assert record.expires_at == START + 1000.0
    assert record.authority_pem == "the authority"
    assert not record.approval_pending
    entry = (await world.now.queries.audit(Page())).items[0]
    assert (entry.action, entry.target, entry.actor) == ("device.enrol", "a", f"token:{token.token_id}")
    assert json.loads(entry.details_json)["peer"] == "10.0.0.1:5"


async def test_a_device_without_an_opinion_gets_the_rank_of_the_token(world: World) -> None:
    assert (await world.enrol("a", await world.token(), rank=0)).device.granted_rank == 8


async def test_a_secret_is_neither_stored_nor_shown(world: World) -> None:
    token = await world.token()
    stored = repr(await world.read(lambda uow: uow.tokens.list(Page())))
    stored += repr(await world.read(lambda uow: uow.audit.list(Page())))
    assert token.secret.hex() not in stored


async def test_the_same_key_gets_the_same_certificate_and_uses_no_turn(world: World) -> None:
    token = await world.token(uses=1)
    first = await world.enrol("a", token)
    assert await world.enrol("a", token) == first
    assert await uses(world, token) == 1
    message = await refused(world, Reason.TOKEN_USED_UP, token)
    assert "1 of 1 times" in message


async def test_after_the_certificate_expired_the_same_key_needs_another_turn(world: World) -> None:
    token = await world.token(uses=2, ttl_seconds=10_000.0)
    first = await world.enrol("a", token)
    world.clock.now += 1001.0
    again = await world.enrol("a", token)
    assert again.device.id == first.device.id
    assert again.certificate_pem != first.certificate_pem
    assert again.expires_at == world.clock.now + 1000.0
    assert await uses(world, token) == 2
    world.clock.now += 1001.0
    await refused(world, Reason.TOKEN_USED_UP, token, "a")


async def test_a_known_key_with_another_token_gets_a_new_certificate(world: World) -> None:
    first = await world.enrol("a", await world.token())
    other = await world.token(max_rank=2)
    again = await world.enrol("a", other, rank=2)
    assert (again.device.id, again.device.granted_rank) == (first.device.id, 4)
    assert again.certificate_pem != first.certificate_pem
    assert await uses(world, other) == 1


async def test_what_a_token_refuses(world: World) -> None:
    token = await world.token(ttl_seconds=100.0)
    wrong = JoinToken(token.token_id, bytes(32), token.ca_sha256)
    stranger = JoinToken("aaaaaaaaaaaa", token.secret, token.ca_sha256)
    unknown = await refused(world, Reason.TOKEN_UNKNOWN, stranger)
    assert await refused(world, Reason.TOKEN_UNKNOWN, wrong) == unknown, "which of them is wrong is nobody's business"
    message = await refused(world, Reason.RANK_NOT_ALLOWED, token, rank=9)
    assert "join with --rank 8" in message
    await refused(world, Reason.NAME_INVALID, token, "-x")
    await refused(world, Reason.NAME_INVALID, token, "a b")
    world.clock.now += 100.0
    await refused(world, Reason.TOKEN_EXPIRED, token)
    assert await uses(world, token) == 0


async def test_a_revoked_token_lets_nobody_in_but_changes_nothing_for_its_devices(world: World) -> None:
    token = await world.token()
    first = await world.enrol("a", token)
    await world.now.commands.revoke_token(ADMIN, token.token_id)
    await refused(world, Reason.TOKEN_REVOKED, token)
    assert await world.enrol("a", token) == first
    assert (await world.now.devices.identify(first.device.key_sha256)).name == "a"


async def test_a_name_belongs_to_one_device_until_it_is_revoked(world: World) -> None:
    token = await world.token()
    await world.enrol("a", token)
    await refused(world, Reason.NAME_TAKEN, token, "a", key="another")
    assert await uses(world, token) == 1, "a join that failed costs no turn"
    await world.now.commands.revoke_device(ADMIN, "a")
    message = await refused(world, Reason.DEVICE_REVOKED, token, "a")
    assert "new state folder" in message
    assert (await world.enrol("a", token, key="another")).device.name == "a"


async def test_a_device_of_a_cautious_token_waits_for_an_operator(world: World) -> None:
    record = await world.enrol("a", await world.token(approve=False))
    assert record.approval_pending
    with pytest.raises(GloraError, match="glora device approve a") as caught:
        await world.now.devices.identify(record.device.key_sha256)
    assert caught.value.reason is Reason.DEVICE_PENDING
    await world.now.commands.approve_device(ADMIN, "a")
    assert (await world.now.devices.identify(record.device.key_sha256)).state is DeviceState.APPROVED


async def test_a_certificate_is_renewed_for_the_same_key_only(world: World) -> None:
    record = await world.enrol("a", await world.token())
    world.clock.now += 500.0
    renewed = await world.now.enrolment.renew(record.device, "csr a")
    assert renewed.expires_at == record.expires_at + 500.0
    assert renewed.device.id == record.device.id
    with pytest.raises(GloraError) as caught:
        await world.now.enrolment.renew(record.device, "csr another")
    assert caught.value.reason is Reason.CSR_INVALID


@pytest.mark.parametrize("wrong", [{"uses": 0}, {"ttl_seconds": 0.5}, {"ttl_seconds": 1e9}, {"max_rank": 0}])
async def test_an_impossible_token_is_refused(world: World, wrong: dict[str, Any]) -> None:
    with pytest.raises(GloraError, match=f"{next(iter(wrong))} must be between") as caught:
        await world.token(**wrong)
    assert caught.value.reason is Reason.SPEC_INVALID


async def test_a_stranger_is_unknown(world: World) -> None:
    with pytest.raises(GloraError) as caught:
        await world.now.devices.identify("00" * 32)
    assert caught.value.reason is Reason.CERTIFICATE_UNKNOWN
