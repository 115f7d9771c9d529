"""Users, their roles and passwords, and the admin who is always left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator

import pytest
from access_cases import PASSWORD, memory_access
from coordinator_fakes import Clock
from people_cases import ADMIN, EVE, principal

from glora_server.coordinator.access import Access
from glora_server.coordinator.access_base import checked_password, user_name
from glora_server.coordinator.model import AuditEntry, Page
from glora_server.coordinator.people import Role
from glora_wire.errors import GloraError, Reason

ADMIN_TOKEN = "the-token-of-the-data-folder"
OTHER = "twelve blue bottles"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(clock: Clock) -> Iterator[Access]:
    with memory_access(ADMIN_TOKEN, clock) as access:
        yield access


async def audit(access: Access) -> tuple[AuditEntry, ...]:
    """Oldest first."""
    return (await access.store.read(lambda uow: uow.audit.list(Page()))).items[::-1]


async def test_the_first_start_makes_an_admin_whose_password_is_told_once(access: Access) -> None:
    password = await access.ensure_admin()
    assert password is not None
    assert len(password) >= 20
    assert await access.ensure_admin() is None
    who, _ = await access.sign_in("admin", password, origin="192.0.2.1")
    assert (who.name, who.role) == ("admin", Role.ADMIN)


async def test_the_first_password_may_come_from_the_settings(access: Access) -> None:
    assert await access.ensure_admin(PASSWORD) is None
    assert (await access.sign_in("admin", PASSWORD, origin=""))[0].role is Role.ADMIN
    assert await access.ensure_admin(OTHER) is None
    with pytest.raises(GloraError):
        await access.sign_in("admin", OTHER, origin="")


async def test_a_first_password_that_would_be_guessed_makes_nobody(access: Access) -> None:
    with pytest.raises(GloraError) as caught:
        await access.ensure_admin("admin")
    assert caught.value.reason is Reason.PASSWORD_REFUSED
    assert (await access.users(ADMIN)).items == ()


async def test_users_are_made_listed_and_found(access: Access) -> None:
    made = await access.create_user(ADMIN, " Ada ", Role.OPERATOR, PASSWORD)
    await access.create_user(ADMIN, "bob", Role.VIEWER, PASSWORD)
    assert (made.name, made.role, made.disabled) == ("ada", Role.OPERATOR, False)
    assert [user.name for user in (await access.users(ADMIN)).items] == ["ada", "bob"]
    assert (await access.user(ADMIN, "ADA")).id == made.id
    with pytest.raises(GloraError) as caught:
        await access.create_user(ADMIN, "ada", Role.VIEWER, PASSWORD)
    assert caught.value.reason is Reason.NAME_TAKEN
    with pytest.raises(GloraError) as caught:
        await access.set_role(ADMIN, "carol", Role.VIEWER)
    assert caught.value.reason is Reason.USER_UNKNOWN


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "admin.token", "Admin.Token", "x" * 65, "a\x00", "ä", "a/b"])
async def test_names_that_would_confuse_are_refused(access: Access, name: str) -> None:
    with pytest.raises(GloraError) as caught:
        await access.create_user(ADMIN, name, Role.VIEWER, PASSWORD)
    assert caught.value.reason is Reason.NAME_INVALID
    assert user_name(name) is None


@pytest.mark.parametrize("password", ["short", "ada is my name", "aaaaaaaaaaaa", "x" * 257, ""])
async def test_passwords_that_would_be_guessed_are_refused_and_not_repeated(access: Access, password: str) -> None:
    with pytest.raises(GloraError) as caught:
        await access.create_user(ADMIN, "ada", Role.VIEWER, password)
    assert caught.value.reason is Reason.PASSWORD_REFUSED
    assert not password or password not in f"{caught.value.message} {caught.value.details}"


def test_a_password_is_the_same_however_a_keyboard_composes_it() -> None:
    assert checked_password("cafe\u0301 cr\u00e8me", "ada") == checked_password("caf\u00e9 cre\u0300me", "ada")


async def test_who_is_no_admin_does_nothing_with_users(access: Access) -> None:
    await access.create_user(ADMIN, "ada", Role.VIEWER, PASSWORD)
    attempts: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: access.users(EVE),
        lambda: access.user(EVE, "ada"),
        lambda: access.create_user(EVE, "mallory", Role.VIEWER, PASSWORD),
        lambda: access.set_role(EVE, "eve", Role.ADMIN),
        lambda: access.set_password(EVE, "ada", OTHER),
        lambda: access.disable_user(EVE, "ada"),
        lambda: access.enable_user(EVE, "ada"),
        lambda: access.remove_user(EVE, "ada"),
    )
    for attempt in attempts:
        with pytest.raises(GloraError) as caught:
            await attempt()
        assert caught.value.reason is Reason.ROLE_TOO_LOW
    assert [entry.action for entry in await audit(access)] == ["user.create"]


async def test_the_last_admin_stays(access: Access) -> None:
    await access.ensure_admin(PASSWORD)
    await access.create_user(ADMIN, "ada", Role.ADMIN, PASSWORD)
    await access.disable_user(ADMIN, "ada")
    attempts: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: access.set_role(ADMIN, "admin", Role.OPERATOR),
        lambda: access.disable_user(ADMIN, "admin"),
        lambda: access.remove_user(ADMIN, "admin"),
    )
    for attempt in attempts:
        with pytest.raises(GloraError) as caught:
            await attempt()
        assert caught.value.reason is Reason.LAST_ADMIN
    await access.enable_user(ADMIN, "ada")
    await access.set_role(ADMIN, "admin", Role.OPERATOR)
    with pytest.raises(GloraError):
        await access.remove_user(ADMIN, "ada")
    await access.set_password(ADMIN, "ada", OTHER)
    await access.remove_user(ADMIN, "admin")


async def test_two_who_take_away_the_other_admin_leave_one(access: Access) -> None:
    for name in ("ada", "bob"):
        await access.create_user(ADMIN, name, Role.ADMIN, PASSWORD)
    ends = await asyncio.gather(
        access.set_role(principal("ada"), "bob", Role.VIEWER),
        access.set_role(principal("bob"), "ada", Role.VIEWER),
        return_exceptions=True,
    )
    assert sum(isinstance(end, GloraError) for end in ends) == 1
    assert [user.role for user in (await access.users(ADMIN)).items].count(Role.ADMIN) == 1


@pytest.mark.parametrize("change", ["role", "password", "own-password", "disable", "remove"])
async def test_sessions_end_with_what_they_were_given_for(access: Access, change: str) -> None:
    await access.ensure_admin(OTHER)
    await access.create_user(ADMIN, "ada", Role.OPERATOR, PASSWORD)
    who, secret = await access.sign_in("ada", PASSWORD, origin="")
    _, bystander = await access.sign_in("admin", OTHER, origin="")
    before = access.revision
    match change:
        case "role":
            await access.set_role(ADMIN, "ada", Role.VIEWER)
        case "password":
            await access.set_password(ADMIN, "ada", OTHER)
        case "own-password":
            await access.change_password(who, PASSWORD, OTHER)
        case "disable":
            await access.disable_user(ADMIN, "ada")
        case _:
            await access.remove_user(ADMIN, "ada")
    assert await access.of_session(secret, origin="") is None
    assert await access.still_holds(who) is None
    assert access.revision > before, "open connections are told"
    assert await access.of_session(bystander, origin="") is not None


async def test_one_s_own_password_needs_the_one_before(access: Access) -> None:
    await access.create_user(ADMIN, "ada", Role.VIEWER, PASSWORD)
    who, secret = await access.sign_in("ada", PASSWORD, origin="")
    with pytest.raises(GloraError) as caught:
        await access.change_password(who, "something else", OTHER)
    assert caught.value.reason is Reason.PASSWORD_REFUSED
    assert await access.of_session(secret, origin="") is not None
    await access.change_password(who, PASSWORD, OTHER)
    await access.sign_in("ada", OTHER, origin="")
    with pytest.raises(GloraError):
        await access.sign_in("ada", PASSWORD, origin="")


async def test_guessing_the_password_with_somebody_s_session_is_slowed_down(access: Access) -> None:
    await access.create_user(ADMIN, "ada", Role.VIEWER, PASSWORD)
    who, _ = await access.sign_in("ada", PASSWORD, origin="192.0.2.1")
    reasons = []
    for _ in range(12):
        with pytest.raises(GloraError) as caught:
            await access.change_password(who, "guess", OTHER)
        reasons.append(caught.value.reason)
    assert reasons[-1] is Reason.TOO_MANY_REQUESTS


async def test_the_token_of_the_data_folder_is_nobody_s_password(access: Access) -> None:
    who = await access.of_bearer(ADMIN_TOKEN, origin="127.0.0.1")
    assert who is not None
    with pytest.raises(GloraError) as caught:
        await access.change_password(who, "", OTHER)
    assert caught.value.reason is Reason.USER_UNKNOWN


async def test_every_change_is_noted_with_before_and_after_and_without_secrets(access: Access) -> None:
    await access.create_user(ADMIN, "ada", Role.OPERATOR, PASSWORD)
    await access.set_role(ADMIN, "ada", Role.VIEWER)
    await access.set_role(ADMIN, "ada", Role.VIEWER)
    await access.set_password(ADMIN, "ada", OTHER)
    await access.disable_user(ADMIN, "ada")
    await access.remove_user(ADMIN, "ada")
    entries = await audit(access)
    assert [entry.action for entry in entries] == [
        "user.create",
        "user.set-role",
        "user.set-password",
        "user.disable",
        "user.remove",
    ], "what changes nothing leaves no entry"
    assert {(entry.actor, entry.origin, entry.target) for entry in entries} == {("admin", "192.0.2.7", "ada")}
    role = entries[1]
    assert json.loads(role.before_json) == {"role": "operator", "disabled": False}
    assert json.loads(role.after_json) == {"role": "viewer", "disabled": False}
    assert (entries[0].before_json, entries[4].after_json) == ("null", "null")
    assert not any(secret in repr(entries) for secret in (PASSWORD, OTHER, "argon2"))


async def test_records_do_not_show_their_secrets(access: Access) -> None:
    user = await access.create_user(ADMIN, "ada", Role.OPERATOR, PASSWORD)
    assert "argon2" in user.password_hash
    assert "argon2" not in repr(user)
