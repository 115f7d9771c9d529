"""What every store does with devices, tokens and runs (the same on each database)."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
from storage_records import NOW, bound, device, run, stage, together, token

from glora_server.coordinator.model import DeviceState, Page, Profile
from glora_server.rounds.ids import DeviceId, RunId, TokenId, VersionId
from glora_server.rounds.run import RunPhase
from glora_server.storage.store import SqlStore
from glora_wire.errors import GloraError, Reason


def _reason(raised: pytest.ExceptionInfo[GloraError]) -> Reason:
    return raised.value.reason


async def test_a_device_comes_back_as_it_was_stored(store: SqlStore) -> None:
    await store.write(lambda uow: uow.tokens.add(token()))
    for stored in (device("pi"), device("nano", token_id=TokenId("t"), last_seen_at=NOW, profile=Profile(), tags=())):
        await store.write(bound(lambda uow, stored: uow.devices.add(stored), stored))
        assert await store.read(bound(lambda uow, stored: uow.devices.get(stored.id), stored)) == stored
        assert await store.read(bound(lambda uow, stored: uow.devices.by_name(stored.name), stored)) == stored
        assert await store.read(bound(lambda uow, stored: uow.devices.by_name(stored.id), stored)) == stored
        assert await store.read(bound(lambda uow, stored: uow.devices.by_key(stored.key_sha256), stored)) == stored


async def test_an_unknown_device_is_named(store: SqlStore) -> None:
    with pytest.raises(GloraError, match="'ghost'") as raised:
        await store.read(lambda uow: uow.devices.get(DeviceId("ghost")))
    assert _reason(raised) is Reason.DEVICE_UNKNOWN
    with pytest.raises(GloraError, match="'ghost'") as raised:
        await store.read(lambda uow: uow.devices.by_name("ghost"))
    assert _reason(raised) is Reason.DEVICE_UNKNOWN
    assert await store.read(lambda uow: uow.devices.by_key("ghost")) is None


async def test_a_name_is_free_again_once_its_device_was_revoked(store: SqlStore) -> None:
    old, new = device("pi"), device("pi", id=DeviceId("second"), key_sha256="other", created_at=NOW + 1)
    await store.write(lambda uow: uow.devices.add(old))
    with pytest.raises(GloraError) as raised:
        await store.write(lambda uow: uow.devices.add(new))
    assert _reason(raised) is Reason.NAME_TAKEN
    revoked = await store.write(lambda uow: uow.devices.save(replace(old, state=DeviceState.REVOKED)))
    await store.write(lambda uow: uow.devices.add(new))
    assert (await store.read(lambda uow: uow.devices.by_name("pi"))).id == "second"
    assert await store.read(lambda uow: uow.devices.all()) == (new,)
    with pytest.raises(GloraError) as raised:
        await store.write(lambda uow: uow.devices.save(replace(revoked, state=DeviceState.APPROVED)))
    assert _reason(raised) is Reason.NAME_TAKEN


async def test_a_key_is_one_device_even_after_it_was_revoked(store: SqlStore) -> None:
    await store.write(lambda uow: uow.devices.add(device("pi", state=DeviceState.REVOKED)))
    twin = device("twin", key_sha256="key-pi")
    with pytest.raises(GloraError) as raised:
        await store.write(lambda uow: uow.devices.add(twin))
    assert _reason(raised) is Reason.STALE_STATE


async def test_saving_over_a_newer_row_is_refused(store: SqlStore) -> None:
    await store.write(stage)
    await store.write(lambda uow: uow.tokens.add(token()))
    first = await store.read(lambda uow: uow.devices.get(DeviceId("id-pi")))
    saved = await store.write(lambda uow: uow.devices.save(replace(first, granted_rank=4)))
    assert saved == replace(first, granted_rank=4, row_version=1)
    assert await store.read(lambda uow: uow.devices.get(DeviceId("id-pi"))) == saved
    with pytest.raises(GloraError, match="somebody else") as raised:
        await store.write(lambda uow: uow.devices.save(replace(first, granted_rank=2)))
    assert _reason(raised) is Reason.STALE_STATE
    save_both = together(lambda uow: uow.runs.save(run(message="x")), lambda uow: uow.tokens.save(token(uses=1)))
    await store.write(save_both)
    with pytest.raises(GloraError) as raised:
        await store.write(save_both)
    assert _reason(raised) is Reason.STALE_STATE
    assert (await store.read(lambda uow: uow.tokens.get(TokenId("t")))).row_version == 1


async def test_signs_of_life_do_not_touch_the_row_version(store: SqlStore) -> None:
    await store.write(stage)
    profile = Profile(max_rank=4, run_name="first")
    seen = {DeviceId("id-pi"): (NOW + 5, profile), DeviceId("gone"): (NOW, profile)}
    await store.write(lambda uow: uow.devices.seen(seen))
    found = await store.read(lambda uow: uow.devices.get(DeviceId("id-pi")))
    assert (found.last_seen_at, found.profile, found.row_version) == (NOW + 5, profile, 0)
    assert (await store.read(lambda uow: uow.devices.get(DeviceId("id-nano")))).last_seen_at is None


async def test_lists_come_in_pages_without_gaps_or_repeats(store: SqlStore) -> None:
    names = [f"d{i}" for i in range(7)]
    for i, name in enumerate(names):
        await store.write(bound(lambda uow, i, name: uow.tokens.add(token(name, created_at=NOW + i // 3)), i, name))
        await store.write(bound(lambda uow, i, name: uow.runs.add(run(name, created_at=NOW + i)), i, name))
    found: dict[str, list[str]] = {"tokens": [], "runs": []}
    for kind, listed in found.items():
        page = Page(size=2)
        while True:
            part = await store.read(bound(lambda uow, kind, page: getattr(uow, kind).list(page), kind, page))
            assert len(part.items) <= 2
            listed += [item.id.removeprefix("id-") for item in part.items]
            if not part.next_token:
                break
            page = Page(size=2, token=part.next_token)
    assert found["tokens"] == names[::-1]
    assert found["runs"] == names[::-1]
    assert (await store.read(lambda uow: uow.tokens.list(Page(size=7)))).next_token == ""


async def test_a_page_token_that_was_not_given_out_is_refused(store: SqlStore) -> None:
    for bad in ("x", "äö", "%00", _token('["a", 1]'), _token("{}"), _token("[1.5]")):
        with pytest.raises(GloraError, match="page token") as raised:
            await store.read(bound(lambda uow, bad: uow.tokens.list(Page(token=bad)), bad))
        assert _reason(raised) is Reason.REQUEST_INVALID


def _token(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


async def test_a_page_has_at_least_one_item(store: SqlStore) -> None:
    with pytest.raises(GloraError, match="at least one"):
        await store.read(lambda uow: uow.runs.list(Page(size=0)))


async def test_tokens_are_stored_and_counted(store: SqlStore) -> None:
    await store.write(lambda uow: uow.tokens.add(token()))
    assert await store.read(lambda uow: uow.tokens.get(TokenId("t"))) == token()
    with pytest.raises(GloraError) as raised:
        await store.read(lambda uow: uow.tokens.get(TokenId("ghost")))
    assert _reason(raised) is Reason.TOKEN_UNKNOWN


async def test_a_token_is_never_used_more_often_than_it_may_be(store: SqlStore) -> None:
    """The database refuses it, whatever the code thinks."""
    await store.write(lambda uow: uow.tokens.add(token(max_uses=1)))
    with pytest.raises(Exception, match="ck_tokens_uses"):
        await store.write(lambda uow: uow.tokens.save(token(max_uses=1, uses=2)))
    assert (await store.read(lambda uow: uow.tokens.get(TokenId("t")))).uses == 0


async def test_runs_are_found_by_name_and_id(store: SqlStore) -> None:
    stored = run(version_id=VersionId("v9"), reason=Reason.QUORUM_MISSED, message="2 of 3", started_at=NOW)
    await store.write(lambda uow: uow.runs.add(stored))
    for find in (
        lambda uow: uow.runs.get(RunId("id-first")),
        lambda uow: uow.runs.by_name("first"),
        lambda uow: uow.runs.by_name("id-first"),
    ):
        assert await store.read(find) == stored
    with pytest.raises(GloraError) as raised:
        await store.write(lambda uow: uow.runs.add(run(id=RunId("other"))))
    assert _reason(raised) is Reason.NAME_TAKEN
    with pytest.raises(GloraError, match="the newest are first") as raised:
        await store.read(lambda uow: uow.runs.by_name("frist"))
    assert _reason(raised) is Reason.RUN_UNKNOWN
    with pytest.raises(GloraError, match="'ghost'"):
        await store.read(lambda uow: uow.runs.get(RunId("ghost")))


async def test_runs_stay_active_for_a_day_after_they_ended(store: SqlStore) -> None:
    runs = [
        run("created", phase=RunPhase.CREATED),
        run("paused", phase=RunPhase.PAUSED, created_at=NOW - 1),
        run("active", created_at=NOW - 2),
        run("fresh", phase=RunPhase.COMPLETED, ended_at=NOW - 86399, created_at=NOW - 3),
        run("stale", phase=RunPhase.COMPLETED, ended_at=NOW - 86401),
        run("failed", phase=RunPhase.FAILED, ended_at=NOW),
    ]
    await store.write(together(*(bound(lambda uow, item: uow.runs.add(item), item) for item in runs)))
    active = await store.read(lambda uow: uow.runs.active())
    assert [item.name for item in active] == ["fresh", "active", "paused", "failed"]


async def test_what_postgresql_cannot_spell_is_replaced_everywhere(store: SqlStore) -> None:
    await store.write(lambda uow: uow.devices.add(device("a\x00b\ud800")))
    found = await store.read(lambda uow: uow.devices.get(DeviceId("id-a\x00b\ud800")))
    assert found.name == "a\ufffdb?"
