"""What every store does with users, sessions, API tokens and the audit's new columns (the same on each database)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from storage_records import NOW, bound

from glora_server.coordinator.model import AuditEntry, Page
from glora_server.coordinator.people import ApiToken, ApiTokenId, Role, Session, SessionId, User, UserId
from glora_server.coordinator.ports import UnitOfWork
from glora_server.storage.store import SqlStore
from glora_wire.errors import GloraError, Reason

ADA = User(id=UserId("u1"), name="ada", role=Role.ADMIN, password_hash="$argon2id$x", created_at=NOW)
BOB = replace(ADA, id=UserId("u2"), name="bob", role=Role.VIEWER, last_sign_in_at=NOW)
SESSION = Session(
    id=SessionId("s1"),
    user_id=ADA.id,
    secret_sha256="ab",
    created_at=NOW,
    expires_at=NOW + 100,
    seen_at=NOW,
    origin="2001:db8::1",
)
TOKEN = ApiToken(
    id=ApiTokenId("t1"),
    user_id=ADA.id,
    name="ci",
    role=Role.OPERATOR,
    secret_sha256="cd",
    created_at=NOW,
    expires_at=None,
)


@pytest.fixture
async def people(store: SqlStore) -> None:
    def work(uow: UnitOfWork) -> None:
        for user in (ADA, BOB):
            uow.users.add(user)
        uow.sessions.add(SESSION)
        uow.api_tokens.add(TOKEN)

    assert not await store.read(lambda uow: uow.users.any())
    await store.write(work)


@pytest.mark.usefixtures("people")
async def test_people_come_back_as_they_were_stored(store: SqlStore) -> None:
    for user in (ADA, BOB):
        assert await store.read(bound(lambda uow, user: uow.users.get(user.id), user)) == user
        assert await store.read(bound(lambda uow, user: uow.users.by_name(user.name), user)) == user
    assert await store.read(lambda uow: uow.users.any())
    assert await store.read(lambda uow: uow.users.find("eve\x00")) is None
    assert await store.read(lambda uow: uow.sessions.find(SESSION.id)) == SESSION
    assert await store.read(lambda uow: uow.sessions.by_secret("ab")) == SESSION
    assert await store.read(lambda uow: uow.api_tokens.get(TOKEN.id)) == TOKEN
    assert await store.read(lambda uow: uow.api_tokens.by_secret("cd")) == TOKEN
    assert await store.read(lambda uow: uow.sessions.by_secret("cd")) is None


@pytest.mark.usefixtures("people")
async def test_a_user_s_name_is_taken_once(store: SqlStore) -> None:
    with pytest.raises(GloraError) as caught:
        await store.write(lambda uow: uow.users.add(replace(BOB, id=UserId("u3"), name="ada")))
    assert caught.value.reason is Reason.NAME_TAKEN
    with pytest.raises(GloraError, match="'eve'") as caught:
        await store.read(lambda uow: uow.users.by_name("eve"))
    assert caught.value.reason is Reason.USER_UNKNOWN
    with pytest.raises(GloraError) as caught:
        await store.read(lambda uow: uow.api_tokens.get(ApiTokenId("t9")))
    assert caught.value.reason is Reason.API_TOKEN_UNKNOWN


@pytest.mark.usefixtures("people")
async def test_saving_over_somebody_else_s_change_is_refused(store: SqlStore) -> None:
    saved = await store.write(lambda uow: uow.users.save(replace(BOB, disabled=True)))
    assert (saved.disabled, saved.row_version) == (True, 1)
    await store.write(lambda uow: uow.users.signed_in(BOB.id, NOW + 5))
    assert (await store.read(lambda uow: uow.users.get(BOB.id))) == replace(saved, last_sign_in_at=NOW + 5)
    with pytest.raises(GloraError) as caught:
        await store.write(lambda uow: uow.users.save(BOB))
    assert caught.value.reason is Reason.STALE_STATE
    await store.write(lambda uow: uow.api_tokens.used(TOKEN.id, NOW + 5))
    revoked = await store.write(lambda uow: uow.api_tokens.save(replace(TOKEN, revoked=True, used_at=NOW + 5)))
    assert await store.read(lambda uow: uow.api_tokens.find(TOKEN.id)) == revoked
    with pytest.raises(GloraError):
        await store.write(lambda uow: uow.api_tokens.save(TOKEN))


@pytest.mark.usefixtures("people")
async def test_sessions_end_by_themselves_with_their_user_and_when_they_are_old(store: SqlStore) -> None:
    def more(uow: UnitOfWork) -> None:
        for number, (expires, seen) in enumerate(((NOW + 10, NOW), (NOW + 100, NOW - 50), (NOW + 100, NOW))):
            key = SessionId(f"more{number}")
            uow.sessions.add(replace(SESSION, id=key, secret_sha256=key, expires_at=expires, seen_at=seen))

    await store.write(more)
    await store.write(lambda uow: uow.sessions.seen(SESSION.id, NOW + 7))
    assert (await store.read(lambda uow: uow.sessions.find(SESSION.id))) == replace(SESSION, seen_at=NOW + 7)
    assert await store.write(lambda uow: uow.sessions.end_old(expired_at=NOW + 10, seen_before=NOW - 50)) == 2
    assert await store.read(lambda uow: uow.sessions.find(SessionId("more2"))) is not None
    await store.write(lambda uow: uow.sessions.end(SessionId("more2")))
    assert await store.read(lambda uow: uow.sessions.find(SessionId("more2"))) is None
    assert await store.write(lambda uow: uow.sessions.end_of_user(BOB.id)) == 0
    assert await store.write(lambda uow: uow.sessions.end_of_user(ADA.id)) == 1


@pytest.mark.usefixtures("people")
async def test_a_user_who_is_removed_leaves_no_way_in(store: SqlStore) -> None:
    await store.write(lambda uow: uow.users.remove(ADA.id))
    assert await store.read(lambda uow: uow.users.find("ada")) is None
    assert await store.read(lambda uow: uow.sessions.find(SESSION.id)) is None
    assert await store.read(lambda uow: uow.api_tokens.find(TOKEN.id)) is None
    await store.write(lambda uow: uow.users.add(replace(ADA, id=UserId("u9"))))


@pytest.mark.usefixtures("people")
async def test_tokens_are_listed_newest_first_and_counted_while_they_hold(store: SqlStore) -> None:
    def more(uow: UnitOfWork) -> None:
        for number in range(4):
            key = ApiTokenId(f"more{number}")
            uow.api_tokens.add(
                replace(
                    TOKEN,
                    id=key,
                    secret_sha256=key,
                    created_at=NOW + number,
                    user_id=BOB.id if number == 3 else ADA.id,
                    expires_at=NOW + 10 if number == 1 else None,
                    revoked=number == 2,
                )
            )

    await store.write(more)
    first = await store.read(lambda uow: uow.api_tokens.list(Page(size=2)))
    rest = await store.read(lambda uow: uow.api_tokens.list(Page(size=9, token=first.next_token)))
    assert [token.id for token in (*first.items, *rest.items)] == ["more3", "more2", "more1", "t1", "more0"]
    hers = await store.read(lambda uow: uow.api_tokens.list(Page(), ADA.id))
    assert {token.id for token in hers.items} == {"more2", "more1", "t1", "more0"}
    assert await store.read(lambda uow: uow.api_tokens.live_of(ADA.id, NOW)) == 3
    assert await store.read(lambda uow: uow.api_tokens.live_of(ADA.id, NOW + 10)) == 2


async def test_two_stores_leave_one_admin(shared_url: str) -> None:
    """Each of two processes takes away the other's admin: the second one sees what the first one did."""
    stores = [SqlStore.open(shared_url, clock=lambda: NOW) for _ in range(2)]
    try:
        admins = (ADA, replace(BOB, role=Role.ADMIN))
        for user in admins:
            await stores[0].write(bound(lambda uow, user: uow.users.add(user), user))

        def demote(uow: UnitOfWork, victim: User) -> None:
            before = uow.users.get(victim.id)
            if [admin.id for admin in uow.users.admins()] != [victim.id]:
                uow.users.save(replace(before, role=Role.VIEWER))

        await asyncio.gather(
            *(store.write(bound(demote, user)) for store, user in zip(stores, admins, strict=True)),
            return_exceptions=True,
        )
        assert len(await stores[0].read(lambda uow: uow.users.admins())) == 1
    finally:
        for store in stores:
            await store.close()


async def test_the_audit_says_from_where_before_and_after(store: SqlStore) -> None:
    entry = AuditEntry(
        at=NOW,
        actor="ada",
        origin="192.0.2.1",
        action="device.set-rank",
        target="pi",
        before_json='{"granted_rank": 8}',
        after_json='{"granted_rank": 4}',
    )
    await store.write(lambda uow: uow.audit.add(entry))
    listed = (await store.read(lambda uow: uow.audit.list(Page()))).items
    assert [replace(found, id=0) for found in listed] == [entry]
