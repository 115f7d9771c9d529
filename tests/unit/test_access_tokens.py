"""API tokens: whose they are, what they may, how they end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from access_cases import PASSWORD, memory_access
from coordinator_fakes import Clock
from people_cases import ADMIN, principal

from glora_server.coordinator.access import Access
from glora_server.coordinator.access_tokens import MAX_TOKENS
from glora_server.coordinator.model import Page
from glora_server.coordinator.people import Credential, Principal, Role
from glora_wire.errors import GloraError, Reason

ADMIN_TOKEN = "the-token-of-the-data-folder"
ADA = principal("ada", Role.OPERATOR)
BOB = principal("bob", Role.VIEWER)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(clock: Clock) -> Iterator[Access]:
    with memory_access(ADMIN_TOKEN, clock) as access:
        yield access


@pytest.fixture(autouse=True)
async def people(access: Access) -> None:
    for name, role in (("admin", Role.ADMIN), ("ada", Role.OPERATOR), ("bob", Role.VIEWER)):
        await access.create_user(ADMIN, name, role, PASSWORD)


async def bearer(access: Access, text: str) -> Principal:
    who = await access.of_bearer(text, origin="192.0.2.1")
    assert who is not None
    return who


async def test_a_token_is_its_user_with_its_own_role(access: Access) -> None:
    view, text = await access.create_api_token(ADA, name="ci", role=Role.VIEWER)
    assert text.startswith("glora-api-")
    assert (view.user, view.token.role) == ("ada", Role.VIEWER)
    who = await bearer(access, text)
    assert (who.name, who.role, who.credential) == ("ada", Role.VIEWER, Credential.API_TOKEN)
    assert who.credential_id == view.token.id
    assert await access.still_holds(who) == who
    assert text[10:] not in repr(view)
    assert view.token.secret_sha256 not in repr(view)


async def test_no_token_is_above_its_user_or_its_maker(access: Access) -> None:
    with pytest.raises(GloraError) as caught:
        await access.create_api_token(ADA, name="ci", role=Role.ADMIN)
    assert caught.value.reason is Reason.ROLE_TOO_LOW
    with pytest.raises(GloraError) as caught:
        await access.create_api_token(ADMIN, name="ci", role=Role.OPERATOR, user="bob")
    assert caught.value.reason is Reason.ROLE_TOO_LOW
    _, text = await access.create_api_token(ADA, name="ci", role=Role.VIEWER)
    with pytest.raises(GloraError) as caught:
        await access.create_api_token(await bearer(access, text), name="more", role=Role.OPERATOR)
    assert caught.value.reason is Reason.ROLE_TOO_LOW


async def test_a_token_falls_and_rises_with_its_user(access: Access) -> None:
    _, text = await access.create_api_token(ADA, name="ci", role=Role.OPERATOR)
    await access.set_role(ADMIN, "ada", Role.VIEWER)
    assert (await bearer(access, text)).role is Role.VIEWER
    await access.disable_user(ADMIN, "ada")
    assert await access.of_bearer(text, origin="") is None
    await access.enable_user(ADMIN, "ada")
    await access.set_role(ADMIN, "ada", Role.ADMIN)
    assert (await bearer(access, text)).role is Role.OPERATOR
    await access.remove_user(ADMIN, "ada")
    assert await access.of_bearer(text, origin="") is None


async def test_a_token_ends_when_it_said(access: Access, clock: Clock) -> None:
    _, text = await access.create_api_token(ADA, name="ci", ttl_seconds=100.0)
    _, endless = await access.create_api_token(ADA, name="ci", ttl_seconds=None)
    who = await bearer(access, text)
    clock.now += 100.0
    assert await access.of_bearer(text, origin="") is None
    assert await access.still_holds(who) is None
    clock.now += 10 * 366 * 86400.0
    await bearer(access, endless)


async def test_a_token_of_a_token_ends_no_later(access: Access, clock: Clock) -> None:
    first, text = await access.create_api_token(ADA, name="ci", ttl_seconds=100.0)
    clock.now += 50.0
    for wanted in (1000.0, None):
        second, _ = await access.create_api_token(await bearer(access, text), name="more", ttl_seconds=wanted)
        assert second.token.expires_at == first.token.expires_at


async def test_revoking_counts_at_once_and_twice_does_no_harm(access: Access) -> None:
    view, text = await access.create_api_token(ADA, name="ci")
    who = await bearer(access, text)
    before = access.revision
    assert (await access.revoke_api_token(ADA, view.token.id)).token.revoked
    assert (await access.revoke_api_token(ADA, view.token.id)).token.revoked
    assert await access.of_bearer(text, origin="") is None
    assert await access.still_holds(who) is None
    assert access.revision > before
    entries = (await access.store.read(lambda uow: uow.audit.list(Page()))).items
    assert [entry.action for entry in entries if entry.target == view.token.id] == [
        "api-token.revoke",
        "api-token.create",
    ]
    assert not any(text[10:] in repr(entry) for entry in entries)


async def test_one_sees_and_revokes_one_s_own_and_admins_everybody_s(access: Access) -> None:
    hers, _ = await access.create_api_token(ADA, name="hers")
    his, _ = await access.create_api_token(BOB, name="his")
    assert [view.token.id for view in (await access.api_tokens(ADA)).items] == [hers.token.id]
    assert {view.user for view in (await access.api_tokens(ADMIN)).items} == {"ada", "bob"}
    assert [view.user for view in (await access.api_tokens(ADMIN, user="bob")).items] == ["bob"]
    with pytest.raises(GloraError) as caught:
        await access.api_tokens(ADA, user="bob")
    assert caught.value.reason is Reason.ROLE_TOO_LOW
    refusals = []
    for token_id in (his.token.id, "nothing"):
        with pytest.raises(GloraError) as caught:
            await access.revoke_api_token(ADA, token_id)
        refusals.append((caught.value.reason, caught.value.message.replace(token_id, "ID")))
    assert refusals[0] == refusals[1], "strangers do not learn which ids there are"
    assert (await access.revoke_api_token(ADMIN, his.token.id)).user == "bob"


async def test_the_token_of_the_data_folder_names_the_user(access: Access) -> None:
    root = await bearer(access, ADMIN_TOKEN)
    with pytest.raises(GloraError) as caught:
        await access.create_api_token(root, name="ci")
    assert caught.value.reason is Reason.USER_UNKNOWN
    view, _ = await access.create_api_token(root, name="ci", user="bob")
    assert view.user == "bob"


@pytest.mark.parametrize("wrong", [{"name": " "}, {"name": "x" * 101}, {"ttl_seconds": 0.5}, {"ttl_seconds": 1e12}])
async def test_what_makes_no_sense_is_refused(access: Access, wrong: dict[str, object]) -> None:
    with pytest.raises(GloraError) as caught:
        await access.create_api_token(ADA, **({"name": "ci"} | wrong))  # type: ignore[arg-type]
    assert caught.value.reason is Reason.REQUEST_INVALID


async def test_a_user_has_so_many_tokens_and_no_more(access: Access) -> None:
    views = [await access.create_api_token(BOB, name=f"{number}") for number in range(MAX_TOKENS)]
    with pytest.raises(GloraError, match="revoke some"):
        await access.create_api_token(BOB, name="one more")
    await access.revoke_api_token(BOB, views[0][0].token.id)
    await access.create_api_token(BOB, name="one more")


async def test_uses_are_noted_to_the_minute(access: Access, clock: Clock) -> None:
    view, text = await access.create_api_token(ADA, name="ci")
    assert view.token.used_at is None
    first = clock.now
    await bearer(access, text)
    clock.now += 30.0
    await bearer(access, text)
    assert (await access.api_tokens(ADA)).items[0].token.used_at == first
    clock.now += 30.0
    await bearer(access, text)
    assert (await access.api_tokens(ADA)).items[0].token.used_at == first + 60.0


async def test_a_password_alone_makes_a_token_for_the_command_line(access: Access) -> None:
    who = await access.check_password("ada", PASSWORD, origin="192.0.2.1")
    view, text = await access.create_api_token(who, name="laptop", role=who.role)
    assert (view.user, (await bearer(access, text)).role) == ("ada", Role.OPERATOR)
    assert await access.still_holds(who) is None, "it is no session"
