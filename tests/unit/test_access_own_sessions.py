"""What users see and end of their own sessions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from access_cases import PASSWORD, memory_access
from coordinator_fakes import Clock
from people_cases import ADMIN

from glora_server.coordinator.access import Access, SessionTimes
from glora_server.coordinator.model import Page
from glora_server.coordinator.people import Role

HOUR = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(clock: Clock) -> Iterator[Access]:
    with memory_access("none", clock, SessionTimes(absolute=48 * HOUR, idle=2 * HOUR)) as access:
        yield access


async def test_own_sessions_are_the_living_ones_newest_first(access: Access, clock: Clock) -> None:
    await access.create_user(ADMIN, "ada", Role.OPERATOR, PASSWORD)
    await access.create_user(ADMIN, "bob", Role.VIEWER, PASSWORD)
    await access.sign_in("ada", PASSWORD, origin="192.0.2.1")
    clock.now += HOUR
    await access.sign_in("ada", PASSWORD, origin="192.0.2.2")
    ada, _ = await access.sign_in("ada", PASSWORD, origin="192.0.2.3")
    await access.sign_in("bob", PASSWORD, origin="192.0.2.4")
    assert {session.origin for session in await access.own_sessions(ada)} == {"192.0.2.1", "192.0.2.2", "192.0.2.3"}
    assert (await access.own_sessions(ada))[-1].origin == "192.0.2.1"
    clock.now += 1.5 * HOUR
    assert {session.origin for session in await access.own_sessions(ada)} == {"192.0.2.2", "192.0.2.3"}


async def test_a_session_that_its_user_ends_is_refused_at_once(access: Access) -> None:
    await access.create_user(ADMIN, "ada", Role.OPERATOR, PASSWORD)
    old, secret = await access.sign_in("ada", PASSWORD, origin="192.0.2.1")
    ada, _ = await access.sign_in("ada", PASSWORD, origin="192.0.2.2")
    seen = access.revision
    await access.end_own_session(ada, old.credential_id)
    assert await access.of_session(secret, origin="192.0.2.1") is None
    assert await access.still_holds(ada) == ada
    assert access.revision > seen, "those who hold a connection of that session must hear of it"
    last = (await access.store.read(lambda uow: uow.audit.list(Page(size=1)))).items[0]
    assert (last.actor, last.action, last.target) == ("ada", "session.end", "ada")


async def test_nobody_ends_somebody_elses_session(access: Access) -> None:
    for name in ("ada", "bob"):
        await access.create_user(ADMIN, name, Role.OPERATOR, PASSWORD)
    ada, secret = await access.sign_in("ada", PASSWORD, origin="192.0.2.1")
    bob, _ = await access.sign_in("bob", PASSWORD, origin="192.0.2.2")
    await access.end_own_session(bob, ada.credential_id)
    assert await access.of_session(secret, origin="192.0.2.1") == ada
