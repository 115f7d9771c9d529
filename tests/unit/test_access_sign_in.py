"""Signing in and out, sessions and how they end, and how often somebody may try."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from access_cases import PASSWORD, memory_access
from coordinator_fakes import Clock
from people_cases import ADMIN

from glora_server.coordinator.access import Access, SessionTimes
from glora_server.coordinator.access_limits import SignInLimits, TooSoonError, network_of
from glora_server.coordinator.model import AuditEntry, Page
from glora_server.coordinator.people import Credential, Role
from glora_wire.errors import GloraError, Reason

ADMIN_TOKEN = "the-token-of-the-data-folder"
HOUR = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(clock: Clock) -> Iterator[Access]:
    with memory_access(ADMIN_TOKEN, clock, SessionTimes(absolute=48 * HOUR, idle=2 * HOUR)) as access:
        yield access


@pytest.fixture
async def ada(access: Access) -> None:
    await access.create_user(ADMIN, "ada", Role.OPERATOR, PASSWORD)


async def audit(access: Access) -> tuple[AuditEntry, ...]:
    """Oldest first."""
    return (await access.store.read(lambda uow: uow.audit.list(Page(size=1000)))).items[::-1]


async def refusal(access: Access, name: str, password: str, origin: str = "192.0.2.1") -> GloraError:
    with pytest.raises(GloraError) as caught:
        await access.sign_in(name, password, origin=origin)
    return caught.value


@pytest.mark.usefixtures("ada")
async def test_a_session_says_who_it_is(access: Access) -> None:
    who, secret = await access.sign_in("Ada", PASSWORD, origin="192.0.2.1")
    assert (who.name, who.role, who.credential, who.origin) == ("ada", Role.OPERATOR, Credential.SESSION, "192.0.2.1")
    again = await access.of_session(secret, origin="192.0.2.9")
    assert again is not None
    assert (again.name, again.credential_id, again.origin) == ("ada", who.credential_id, "192.0.2.9")
    assert await access.still_holds(who) == who


@pytest.mark.usefixtures("ada")
async def test_only_the_hash_of_a_session_s_secret_is_kept(access: Access) -> None:
    who, secret = await access.sign_in("ada", PASSWORD, origin="")
    _, other = await access.sign_in("ada", PASSWORD, origin="")
    assert len(secret) >= 43
    assert secret != other
    stored = await access.store.read(lambda uow: uow.sessions.find(who.credential_id))  # type: ignore[arg-type]
    assert stored is not None
    assert secret not in stored.secret_sha256
    assert stored.secret_sha256 not in repr(stored)
    assert await access.of_session(stored.secret_sha256, origin="") is None


@pytest.mark.usefixtures("ada")
async def test_a_refusal_does_not_say_whether_there_is_such_a_user(access: Access) -> None:
    await access.create_user(ADMIN, "bob", Role.VIEWER, PASSWORD)
    await access.disable_user(ADMIN, "bob")
    refusals = [
        await refusal(access, "ada", "wrong password"),
        await refusal(access, "nobody", PASSWORD),
        await refusal(access, "bob", PASSWORD),
        await refusal(access, "\x00", PASSWORD),
        await refusal(access, "ada", "x" * 100_000),
    ]
    assert {(error.reason, error.message) for error in refusals} == {
        (Reason.SIGN_IN_REFUSED, "The user name or the password is wrong, or the user is disabled.")
    }


@pytest.mark.usefixtures("ada")
async def test_unknown_users_cost_as_much_work(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    matches = access.passwords.matches

    async def counted(password_hash: str | None, password: str) -> bool:
        compared.append(password_hash is None)
        return await matches(password_hash, password)

    monkeypatch.setattr(access.passwords, "matches", counted)
    await refusal(access, "ada", "wrong password")
    await refusal(access, "nobody", "wrong password")
    await refusal(access, "not a name", "wrong password")
    assert compared == [False, True, True]


@pytest.mark.usefixtures("ada")
async def test_signing_in_failing_and_signing_out_are_noted(access: Access) -> None:
    await refusal(access, "ada", "wrong password")
    await refusal(access, "my-secret-typed-into-the-wrong-field", "x")
    who, _ = await access.sign_in("ada", PASSWORD, origin="192.0.2.1")
    await access.sign_out(who)
    noted = [(entry.action, entry.actor, entry.target, entry.origin) for entry in (await audit(access))[1:]]
    assert noted == [
        ("session.refused", "ada", "ada", "192.0.2.1"),
        ("session.refused", "", "", "192.0.2.1"),
        ("session.sign-in", "ada", "ada", "192.0.2.1"),
        ("session.sign-out", "ada", "ada", "192.0.2.1"),
    ]


@pytest.mark.usefixtures("ada")
async def test_signing_out_ends_one_session(access: Access) -> None:
    who, secret = await access.sign_in("ada", PASSWORD, origin="")
    _, other = await access.sign_in("ada", PASSWORD, origin="")
    await access.sign_out(who)
    assert await access.of_session(secret, origin="") is None
    assert await access.of_session(other, origin="") is not None


@pytest.mark.usefixtures("ada")
async def test_a_session_ends_when_it_is_not_used(access: Access, clock: Clock) -> None:
    _, secret = await access.sign_in("ada", PASSWORD, origin="")
    for _ in range(4):
        clock.now += 1.5 * HOUR
        assert await access.of_session(secret, origin="") is not None
    clock.now += 2 * HOUR
    assert await access.of_session(secret, origin="") is None


@pytest.mark.usefixtures("ada")
async def test_a_session_ends_however_much_it_is_used(access: Access, clock: Clock) -> None:
    who, secret = await access.sign_in("ada", PASSWORD, origin="")
    for _ in range(47):
        clock.now += HOUR
        assert await access.of_session(secret, origin="") is not None
    clock.now += HOUR
    assert await access.of_session(secret, origin="") is None
    assert await access.still_holds(who) is None
    await access.sign_in("ada", PASSWORD, origin="")
    assert await access.store.read(lambda uow: uow.sessions.find(who.credential_id)) is None, "old ones are swept"  # type: ignore[arg-type]


@pytest.mark.usefixtures("ada")
async def test_a_password_that_changes_during_the_comparison_lets_nobody_in(
    access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    matches = access.passwords.matches

    async def slow(password_hash: str | None, password: str) -> bool:
        right = await matches(password_hash, password)
        await access.set_password(ADMIN, "ada", "another long password")
        return right

    monkeypatch.setattr(access.passwords, "matches", slow)
    assert (await refusal(access, "ada", PASSWORD)).reason is Reason.SIGN_IN_REFUSED


@pytest.mark.usefixtures("ada")
async def test_an_old_hash_is_made_anew(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (await access.user(ADMIN, "ada")).password_hash
    monkeypatch.setattr(access.passwords, "outdated", lambda password_hash: password_hash == before)
    _, secret = await access.sign_in("ada", PASSWORD, origin="")
    assert (await access.user(ADMIN, "ada")).password_hash != before
    assert await access.of_session(secret, origin="") is not None
    await access.sign_in("ada", PASSWORD, origin="")


@pytest.mark.usefixtures("ada")
async def test_too_many_tries_are_told_when_to_try_again(access: Access, clock: Clock) -> None:
    for _ in range(10):
        assert (await refusal(access, "ada", "wrong password")).reason is Reason.SIGN_IN_REFUSED
    limited = await refusal(access, "ada", PASSWORD)
    assert limited.reason is Reason.TOO_MANY_REQUESTS
    assert limited.retry_after is not None
    noted = len(await audit(access))
    await refusal(access, "ada", PASSWORD)
    assert len(await audit(access)) == noted, "tries that are not looked at do not fill the audit"
    clock.now += limited.retry_after
    await access.sign_in("ada", PASSWORD, origin="192.0.2.1")


@pytest.mark.usefixtures("ada")
async def test_strangers_with_many_addresses_do_not_fill_the_audit(access: Access, clock: Clock) -> None:
    for number in range(120):
        await refusal(access, "ada" if number % 20 == 0 else f"nobody{number}", "wrong", f"192.0.2.{number}")
    refused = [entry for entry in await audit(access) if entry.action == "session.refused"]
    assert len(refused) == 100
    assert {entry.details_json for entry in refused} == {'{"left_out_before": 0}'}
    clock.now += 60.0
    for _ in range(2):
        await refusal(access, "ada", "wrong", "198.51.100.1")
    refused = [entry for entry in await audit(access) if entry.action == "session.refused"]
    assert len(refused) == 101
    assert (refused[-1].origin, refused[-1].details_json) == ("198.51.100.1", '{"left_out_before": 20}')


@pytest.mark.usefixtures("ada")
async def test_tries_at_the_same_time_do_not_slip_through(access: Access) -> None:
    ends = await asyncio.gather(
        *(access.sign_in("ada", f"guess {number}", origin="192.0.2.1") for number in range(30)), return_exceptions=True
    )
    judged = [end for end in ends if isinstance(end, GloraError) and end.reason is Reason.SIGN_IN_REFUSED]
    assert len(judged) == 10


def test_a_user_is_guarded_against_many_addresses_but_not_locked_out_of_a_known_one() -> None:
    clock = Clock()
    limits = SignInLimits(clock)
    limits.take("ada", "10.0.0.1")
    limits.succeeded("ada", "10.0.0.1")
    for number in range(10):
        limits.take("ada", f"192.0.2.{number}")
    with pytest.raises(TooSoonError):
        limits.take("ada", "192.0.2.99")
    limits.take("ada", "10.0.0.1")
    limits.take("bob", "192.0.2.99")


def test_an_address_that_tries_many_names_is_slowed_down() -> None:
    clock = Clock()
    limits = SignInLimits(clock)
    for number in range(10):
        limits.take(f"user{number}", "2001:db8::1")
    with pytest.raises(TooSoonError) as caught:
        limits.take("another", "2001:db8::2")
    assert caught.value.retry_after == 6.0
    limits.take("another", "2001:db8:1::2")
    clock.now += 6.0
    limits.take("another", "2001:db8::2")


def test_good_tries_cost_nothing_and_memory_is_bounded() -> None:
    limits = SignInLimits(Clock())
    for number in range(10_000):
        limits.take("ada", f"10.0.{number // 250}.{number % 250}")
        limits.succeeded("ada", f"10.0.{number // 250}.{number % 250}")
    assert len(limits._known) == len(limits._addresses._buckets) == 4096


@pytest.mark.parametrize(
    ("origin", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_what_is_counted_as_one_address(origin: str, network: str) -> None:
    assert network_of(origin) == network


async def test_the_token_of_the_data_folder_is_an_admin(access: Access) -> None:
    who = await access.of_bearer(ADMIN_TOKEN, origin="127.0.0.1")
    assert who is not None
    assert (who.name, who.role, who.credential) == ("admin.token", Role.ADMIN, Credential.ADMIN_TOKEN)
    assert await access.still_holds(who) == who
    assert await access.of_bearer("", origin="") is None
    assert await access.of_bearer("glora-api-" + "0" * 64, origin="") is None
