"""Uploads: resumed at any byte, owned by one stream, answered alike when repeated."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coordinator_world import EVALUATOR, Phone, Trained, World, a_world, eventually
from people_cases import ADMIN

from glora_server.coordinator import upload_session
from glora_server.coordinator.messages import UploadStatus, WorkOffer
from glora_server.coordinator.spool import Spool
from glora_server.coordinator.upload_session import UploadSession
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.round import DeadlinePassed, Round, RoundPhase
from glora_wire.digests import digest_bytes
from glora_wire.errors import GloraError, Reason


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as made:
        yield made


async def ready(world: World, **policy: Any) -> tuple[Phone, WorkOffer, Trained]:
    phone = await world.phone("a")
    await world.start_run(**policy)
    offer = await phone.offer()
    return phone, offer, phone.train(offer)


async def begun(phone: Phone, offer: WorkOffer, trained: Trained, offset: int = 0) -> UploadSession:
    session = await phone.stream(offer, trained, offset=offset)
    assert not isinstance(session, UploadStatus)
    return session


async def refused(question: object, reason: Reason) -> GloraError:
    with pytest.raises(GloraError) as caught:
        await question  # type: ignore[misc]
    assert caught.value.reason is reason, caught.value
    return caught.value


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 1.0])
async def test_an_upload_goes_on_at_any_byte(world: World, share: float) -> None:
    phone, offer, trained = await ready(world)
    there = int(share * len(trained.data))
    session = await begun(phone, offer, trained)
    if there:
        await session.chunk(0, trained.data[:there])
    await session.close()
    known = await world.now.uploads.query(await phone.me(), offer.assignment.id, trained.header.digest)
    assert (known.state, known.committed_bytes) == ("partial", there)
    assert (await phone.push(offer, trained)).state == "accepted"


async def test_a_stream_that_is_wrong_about_its_offset_is_told_the_right_one(world: World) -> None:
    phone, offer, trained = await ready(world)
    session = await begun(phone, offer, trained)
    await session.chunk(0, trained.data[:50])
    error = await refused(session.chunk(40, trained.data[40:60]), Reason.OFFSET_INVALID)
    assert error.details == {"committed_bytes": "50"}
    await session.close()
    error = await refused(phone.stream(offer, trained, offset=49), Reason.OFFSET_INVALID)
    assert error.details == {"committed_bytes": "50"}


async def test_a_newer_stream_fences_the_older_one(world: World) -> None:
    phone, offer, trained = await ready(world)
    older = await begun(phone, offer, trained)
    await older.chunk(0, trained.data[:50])
    newer = await begun(phone, offer, trained, 50)
    await refused(older.chunk(50, trained.data[50:60]), Reason.UPLOAD_FENCED)
    await refused(older.finish(trained.header.digest), Reason.UPLOAD_FENCED)
    await older.close()
    await newer.chunk(50, trained.data[50:])
    assert (await newer.finish(trained.header.digest)).state == "accepted"


async def test_of_streams_that_wait_for_a_place_only_the_last_one_writes(tmp_path: Path) -> None:
    async with a_world(tmp_path, places=1) as world:
        phone, other = await world.phone("a"), await world.phone("b")
        await world.start_run(quorum=2)
        offer, elsewhere = await asyncio.gather(phone.offer(), other.offer())
        trained = phone.train(offer)
        blocker = await begun(other, elsewhere, other.train(elsewhere))
        first = asyncio.create_task(phone.stream(offer, trained))
        second = asyncio.create_task(phone.stream(offer, trained))
        await eventually(lambda: len(world.now.uploads.places._waiters or ()) >= 2)
        await blocker.close()
        one = await first
        assert isinstance(one, UploadSession)
        await one.chunk(0, trained.data[:10])
        await one.close()
        await refused(second, Reason.OFFSET_INVALID)
        assert (await phone.push(offer, trained)).state == "accepted"


async def test_a_place_comes_back_however_a_stream_ends(tmp_path: Path) -> None:
    async with a_world(tmp_path, places=1) as world:
        phone, offer, trained = await ready(world)
        await refused(phone.stream(offer, trained, offset=7), Reason.OFFSET_INVALID)
        session = await begun(phone, offer, trained)
        hung = asyncio.create_task(phone.stream(offer, trained))
        await eventually(lambda: bool(world.now.uploads.places._waiters))
        hung.cancel()
        await asyncio.gather(hung, return_exceptions=True)
        await session.close()
        assert not world.now.uploads.places.locked()
        assert (await phone.push(offer, trained)).state == "accepted"
        assert not world.now.uploads.places.locked()


async def test_bytes_that_are_not_those_announced_are_dropped(world: World) -> None:
    phone, offer, trained = await ready(world)
    session = await begun(phone, offer, trained)
    await session.chunk(0, b"\x00" * len(trained.data))
    await refused(session.finish(trained.header.digest), Reason.DIGEST_MISMATCH)
    await session.close()
    known = await world.now.uploads.query(await phone.me(), offer.assignment.id, trained.header.digest)
    assert (known.state, known.committed_bytes) == ("partial", 0)
    assert (await phone.push(offer, trained)).state == "accepted"


async def test_an_upload_that_ends_early_can_go_on(world: World) -> None:
    phone, offer, trained = await ready(world)
    session = await begun(phone, offer, trained)
    await session.chunk(0, trained.data[:10])
    error = await refused(session.finish(trained.header.digest), Reason.UPLOAD_TRUNCATED)
    assert error.details == {"committed_bytes": "10"}
    await refused(session.finish(digest_bytes(b"other")), Reason.STREAM_MALFORMED)
    await session.close()
    assert (await phone.push(offer, trained)).state == "accepted"


async def test_what_is_too_large_is_refused_before_and_during_the_stream(world: World) -> None:
    phone, offer, trained = await ready(world)
    huge = replace(trained, header=replace(trained.header, digest=replace(trained.header.digest, size=10**9)))
    error = await refused(phone.stream(offer, huge), Reason.UPLOAD_TOO_LARGE)
    assert error.details["limit"] == str(offer.max_upload_bytes)
    session = await begun(phone, offer, trained)
    await refused(session.chunk(0, trained.data + b"x"), Reason.UPLOAD_TOO_LARGE)
    assert (
        await world.now.uploads.query(await phone.me(), offer.assignment.id, trained.header.digest)
    ).state == "partial"
    await session.close()


async def test_an_update_of_no_rows_is_refused(world: World) -> None:
    phone, offer, _ = await ready(world)
    await refused(phone.stream(offer, phone.train(offer, rows=0)), Reason.WEIGHT_INVALID)


async def test_the_same_update_again_gets_the_first_answer_and_another_one_is_refused(world: World) -> None:
    phone, offer, trained = await ready(world, target_devices=1, rounds=1)
    first = await phone.push(offer, trained)
    assert first.state == "accepted"
    assert await phone.push(offer, trained) == first
    assert await phone.stream(offer, trained) == first
    other = phone.train(offer, value=2.0)
    await refused(phone.stream(offer, other), Reason.UPLOAD_CONFLICT)
    known = await world.now.uploads.query(await phone.me(), offer.assignment.id, other.header.digest)
    assert known.state == "discarded"


async def test_a_rejection_is_repeated_too(world: World) -> None:
    phone, offer, _ = await ready(world)
    bad = phone.train(offer, value=float("nan"))
    first = await phone.push(offer, bad)
    assert (first.state, first.refusal and first.refusal.reason) == ("rejected", Reason.NON_FINITE)
    assert await phone.push(offer, bad) == first


async def test_a_better_update_drops_what_was_stored_of_the_first(world: World) -> None:
    phone, offer, trained = await ready(world)
    session = await begun(phone, offer, trained)
    await session.chunk(0, trained.data[:10])
    await session.close()
    other = phone.train(offer, value=2.0)
    session = await begun(phone, offer, other)
    assert [path.name.count(other.header.digest.hex) for path in world.workspace.spool.iterdir()] == [1]
    await session.close()


async def test_nobody_uploads_for_somebody_else_or_for_an_evaluation(world: World) -> None:
    phone, offer, trained = await ready(world)
    thief, judge = await world.phone("thief"), await world.phone("judge", profile=EVALUATOR)
    await refused(thief.stream(offer, trained), Reason.ASSIGNMENT_UNKNOWN)
    await refused(thief.push(offer, trained), Reason.ASSIGNMENT_UNKNOWN)
    with pytest.raises(GloraError, match="no assignment"):
        await world.now.devices.open_adapter(await thief.me(), offer.assignment.id, key="train", offset=0, digest=None)
    measured = await judge.offer()
    await refused(judge.stream(measured, trained), Reason.ASSIGNMENT_CLOSED)
    assert (await phone.push(offer, trained)).state == "accepted"


async def test_a_stream_that_the_round_overtook_is_told_so(world: World) -> None:
    phone, slow = await world.phone("a"), await world.phone("slow")
    run = await world.start_run(quorum=1, target_devices=2, rounds=1)
    offer, late = await asyncio.gather(phone.offer(), slow.offer())
    update = slow.train(late)
    await phone.push(offer, phone.train(offer))
    session = await begun(slow, late, update)
    await session.chunk(0, update.data[:10])
    world.clock.now += 1000.0
    round_ = await world.round(run)
    await world.now.engine.apply(round_.id, DeadlinePassed())
    await world.until(run.id, lambda uow: uow.rounds.get(round_.id).phase is RoundPhase.COMMITTED)
    await world.quiet()
    error = await refused(session.chunk(10, update.data[10:]), Reason.ASSIGNMENT_CLOSED)
    assert "deadline" in error.message
    await session.close()
    assert list(world.workspace.spool.iterdir()) == []
    await refused(slow.stream(late, update), Reason.ASSIGNMENT_CLOSED)
    known = await world.now.uploads.query(await slow.me(), late.assignment.id, update.header.digest)
    assert (known.state, known.refusal and known.refusal.reason) == ("discarded", Reason.DEADLINE_PASSED)


async def test_a_round_that_closes_while_a_stream_begins_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    phone, offer, trained = await ready(world, rounds=1)
    begin = UploadSession.begin

    async def slow_begin(session: UploadSession) -> None:
        await begin(session)
        await world.now.commands.abort_run(ADMIN, "first", "Enough.")

    monkeypatch.setattr(UploadSession, "begin", slow_begin)
    error = await refused(phone.stream(offer, trained), Reason.ASSIGNMENT_CLOSED)
    assert "Enough." in error.message


async def test_a_whole_update_that_comes_too_late_is_discarded_and_not_kept(world: World) -> None:
    phone, offer, trained = await ready(world, rounds=1)
    session = await begun(phone, offer, trained)
    await session.chunk(0, trained.data)
    round_id = offer.assignment.round_id
    assert round_id is not None
    await world.sql.write(lambda uow: uow.rounds.save(_expired(uow.rounds.get(round_id))))
    status = await session.finish(trained.header.digest)
    assert (status.state, status.refusal and status.refusal.reason) == ("discarded", Reason.ROUND_CLOSED)
    assert not world.blobs.exists(trained.header.digest)
    assert list(world.workspace.spool.iterdir()) == []


def _expired(round_: Round) -> Round:
    closed = tuple(
        replace(a, phase=AssignmentPhase.EXPIRED, reason=Reason.ROUND_CLOSED, message="Over.", closed_at=1.0)
        for a in round_.assignments
    )
    return replace(round_, phase=RoundPhase.FAILED, assignments=closed)


async def test_a_device_that_hangs_up_after_its_last_byte_is_counted(world: World) -> None:
    """The connection breaks while the update is being handed in: no answer, but the update is there."""
    phone, offer, trained = await ready(world, rounds=1)
    session = await begun(phone, offer, trained)
    await session.chunk(0, trained.data)
    finishing = asyncio.create_task(session.finish(trained.header.digest))
    await eventually(lambda: session._working is not None and not session._working.done())
    finishing.cancel()
    await asyncio.gather(finishing, return_exceptions=True)
    await session.close()
    run = offer.run
    await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 1)


async def test_a_full_disk_is_told_to_the_device_and_the_rest_can_follow(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone, offer, trained = await ready(world)
    session = await begun(phone, offer, trained)
    with monkeypatch.context() as patch:

        def no_room(_spool: Spool, _data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Spool, "write", no_room)
        error = await refused(session.chunk(0, trained.data), Reason.STORAGE_FULL)
        assert error.retry_after
    await session.close()
    assert (await phone.push(offer, trained)).state == "accepted"


async def test_a_transfer_that_moves_near_the_deadline_prolongs_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_session, "_PROLONG_EVERY_SECONDS", -1.0)
    phone, offer, trained = await ready(world, max_round_seconds=120.0)
    session = await begun(phone, offer, trained)
    deadlines = []
    for at, begin in ((0.0, 0), (80.0, 100), (115.0, 200)):
        world.clock.now = (offer.assignment.offered_at) + at
        await session.chunk(begin, trained.data[begin : begin + 100])
        now = await world.read(lambda uow: uow.rounds.assignment(offer.assignment.id))
        deadlines.append(now.deadline_at - offer.assignment.offered_at)
    assert deadlines == [100.0, 110.0, 120.0]
    view = await world.run()
    assert "a uploading" in view.waiting
    await session.close()


async def test_a_slow_stream_gives_its_place_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(tmp_path, places=1) as world:
        phone, offer, trained = await ready(world)
        session = await begun(phone, offer, trained)
        assert world.now.uploads.places.locked()
        monkeypatch.setattr(session, "_begun", session._begun - 100.0)
        await session.chunk(0, trained.data[:10])
        assert not world.now.uploads.places.locked()
        await session.chunk(10, trained.data[10:])
        assert (await session.finish(trained.header.digest)).state == "accepted"
        assert not world.now.uploads.places.locked()


async def test_nothing_is_remembered_of_uploads_that_are_over(world: World) -> None:
    phone, offer, trained = await ready(world, rounds=1)
    await phone.push(offer, trained)
    await world.until(offer.run.id, lambda uow: uow.runs.get(offer.run.id).rounds_done == 1)
    await world.quiet()
    hub = world.now.hub
    assert (world.now.uploads._sessions, hub.progress, hub.traffic) == ({}, {}, {})
    assert not [key for key in hub.signals._counts if isinstance(key, tuple) and key[0] == "assignment"]
    assert not hub.signals._waiters.get(("assignment", offer.assignment.id))
