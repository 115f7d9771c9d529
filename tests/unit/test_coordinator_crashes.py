"""The process ends at every interesting point; the next one finishes the run with every update that was received."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coordinator_world import EVALUATOR, Phone, Trained, World, a_world
from people_cases import ADMIN
from tiny_numerics import tensor

from glora_server.coordinator import shards
from glora_server.coordinator.messages import UploadStatus, WorkOffer
from glora_server.coordinator.model import Run
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.round import RoundPhase
from glora_server.rounds.run import RunPhase


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as made:
        yield made


async def two_at_work(world: World, **policy: Any) -> tuple[Run, list[Phone], list[WorkOffer], list[Trained]]:
    """A run of one round whose two devices have trained; their mean has 3.0 in its first entry."""
    phones = [await world.phone("a"), await world.phone("b")]
    settings: dict[str, Any] = {"quorum": 2, "rounds": 1} | policy
    run = await world.start_run(**settings)
    offers = list(await asyncio.gather(*(phone.offer() for phone in phones)))
    trained = [phone.train(offer, value=value) for phone, offer, value in zip(phones, offers, (1.0, 5.0), strict=True)]
    return run, phones, offers, trained


async def check_finished(world: World, run: Run) -> None:
    """The run is complete, both updates count, and nothing is left over."""
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    await world.quiet()
    round_ = await world.round(run)
    assert (round_.phase, round_.number, round_.attempt) == (RoundPhase.COMMITTED, 1, 1)
    assert [a.phase for a in round_.assignments] == [AssignmentPhase.ACCEPTED_UPDATE] * 2
    version = await world.read(lambda uow: uow.versions.by_number(run.id, 1))
    part = await world.read(lambda uow: uow.versions.parts(version.id, ["layer.0.query"])[0])
    assert (tensor(part, "u") @ tensor(part, "a"))[0, 0] == pytest.approx(3.0)
    bias = await world.read(lambda uow: uow.versions.parts(version.id, ["classifier.bias"])[0])
    np.testing.assert_allclose(tensor(bias, "value"), 3.0)
    assert list(world.workspace.spool.iterdir()) == []
    named = await world.read(lambda uow: uow.versions.readout_digests())
    assert {digest.text for digest in world.blobs.stored()} <= named


async def cut(world: World, *questions: Coroutine[object, object, object]) -> None:
    """The devices ask, and hear nothing: the process ends where the test wanted it to."""
    tasks = [asyncio.ensure_future(question) for question in questions]
    await world.blown()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_after_some_bytes_were_spooled_the_device_goes_on_where_it_was(world: World) -> None:
    run, phones, offers, trained = await two_at_work(world)
    session = await phones[0].stream(offers[0], trained[0])
    assert not isinstance(session, UploadStatus)
    await session.chunk(0, trained[0].data[:333])
    await world.crash()
    known = await world.now.uploads.query(await phones[0].me(), offers[0].assignment.id, trained[0].header.digest)
    assert (known.state, known.committed_bytes) == ("partial", 333)
    for phone, offer, update in zip(phones, offers, trained, strict=True):
        assert (await phone.push(offer, update)).state == "accepted"
    await check_finished(world, run)


async def test_after_the_last_byte_was_spooled_only_the_trailer_is_sent_again(world: World) -> None:
    run, phones, offers, trained = await two_at_work(world)
    session = await phones[0].stream(offers[0], trained[0])
    assert not isinstance(session, UploadStatus)
    await session.chunk(0, trained[0].data)
    await world.crash()
    again = await phones[0].stream(offers[0], trained[0], offset=len(trained[0].data))
    assert not isinstance(again, UploadStatus)
    assert (await again.finish(trained[0].header.digest)).state == "accepted"
    await phones[1].push(offers[1], trained[1])
    await check_finished(world, run)


@pytest.mark.parametrize("before", [True, False], ids=["before-the-commit", "after-the-commit"])
async def test_while_an_update_is_handed_in(world: World, *, before: bool) -> None:
    """Before the commit the bytes are a blob that no row names; after it the validation is owed."""
    run, phones, offers, trained = await two_at_work(world)
    setattr(world.now.store, "crash_before" if before else "crash_after", "_receive")
    await cut(world, phones[0].push(offers[0], trained[0]))
    await world.crash()
    for phone, offer, update in zip(phones, offers, trained, strict=True):
        assert (await phone.push(offer, update)).state == "accepted"
    await check_finished(world, run)


async def test_a_received_update_is_judged_by_the_next_process_without_its_device(world: World) -> None:
    run, phones, offers, trained = await two_at_work(world)
    world.numerics.crash_at["check"] = 1
    await cut(world, phones[0].push(offers[0], trained[0]))
    assert (await world.round(run)).find(offers[0].assignment.id).phase is AssignmentPhase.RECEIVED
    await world.crash()
    assert (await phones[1].push(offers[1], trained[1])).state == "accepted"
    await check_finished(world, run)


@pytest.mark.parametrize("before", [True, False], ids=["before-the-commit", "after-the-commit"])
async def test_while_a_verdict_is_entered(world: World, *, before: bool) -> None:
    run, phones, offers, trained = await two_at_work(world)
    setattr(world.now.store, "crash_before" if before else "crash_after", "_enter")
    await cut(world, phones[0].push(offers[0], trained[0]))
    await world.crash()
    assert (await phones[1].push(offers[1], trained[1])).state == "accepted"
    await check_finished(world, run)


@pytest.mark.parametrize("job", [1, 2, 3], ids=["before-the-first-part", "between-parts", "before-the-last-part"])
async def test_while_parts_are_aggregated(world: World, monkeypatch: pytest.MonkeyPatch, job: int) -> None:
    """Parts that were stored are not computed again."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    run, phones, offers, trained = await two_at_work(world)
    world.numerics.crash_at["aggregate"] = job
    statuses = await asyncio.gather(*(p.push(o, t) for p, o, t in zip(phones, offers, trained, strict=True)))
    assert {status.state for status in statuses} == {"accepted"}
    await world.blown()
    assert (await world.round(run)).phase is RoundPhase.AGGREGATING
    await world.crash()
    await check_finished(world, run)
    assert [name for names in world.numerics.parts for name in names] == [
        "layer.0.query",
        "layer.0.value",
        "classifier.weight",
        "classifier.bias",
    ]


@pytest.mark.parametrize("before", [True, False], ids=["before-the-commit", "after-the-commit"])
async def test_while_the_version_is_published(world: World, *, before: bool) -> None:
    run, phones, offers, trained = await two_at_work(world)
    setattr(world.now.store, "crash_before" if before else "crash_after", "_publish")
    await cut(world, *(p.push(o, t) for p, o, t in zip(phones, offers, trained, strict=True)))
    await world.crash()
    await check_finished(world, run)


@pytest.mark.parametrize("name", ["_next_round", "_open"])
@pytest.mark.parametrize("before", [True, False], ids=["before-the-commit", "after-the-commit"])
async def test_while_a_round_is_planned_or_opened(world: World, name: str, *, before: bool) -> None:
    phones = [await world.phone("a"), await world.phone("b")]
    setattr(world.now.store, "crash_before" if before else "crash_after", name)
    run = await world.start_run(quorum=2, rounds=1)
    await cut(world, *(phone.ask(5.0) for phone in phones))
    await world.crash()
    statuses = await asyncio.gather(phones[0].work(value=1.0), phones[1].work(value=5.0))
    assert [status.state for status in statuses] == ["accepted", "accepted"]
    await check_finished(world, run)


async def test_while_a_run_is_started(world: World) -> None:
    world.now.store.crash_after = "_store"
    await cut(world, world.start_run())
    await world.crash()
    run = await world.now.commands.start_run(ADMIN, "first")
    phone = await world.phone("a")
    assert (await phone.work()).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 1)


async def test_a_deadline_that_passed_while_nothing_ran_comes_at_once(world: World) -> None:
    run, phones, offers, trained = await two_at_work(world, quorum=1)
    assert (await phones[0].push(offers[0], trained[0])).state == "accepted"
    await world.crash()
    assert (await world.round(run)).phase is RoundPhase.COLLECTING
    world.clock.now += 500.0
    await world.crash()
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    assert [a.phase for a in (await world.round(run)).assignments].count(AssignmentPhase.EXPIRED) == 1


async def test_an_offer_survives_and_is_the_same(world: World) -> None:
    _, phones, offers, _ = await two_at_work(world)
    await world.crash()
    again = await phones[0].offer()
    assert (again.assignment.id, again.seed, again.version) == (
        offers[0].assignment.id,
        offers[0].seed,
        offers[0].version,
    )


async def test_an_evaluation_is_offered_again_and_not_twice(world: World) -> None:
    judge = await world.phone("judge", profile=EVALUATOR)
    await world.start_run()
    first = await judge.offer()
    await world.crash()
    assert (await judge.offer()).assignment.id == first.assignment.id


async def test_a_blob_that_no_row_names_is_swept_with_the_partials_of_closed_rounds(world: World) -> None:
    run, phones, offers, trained = await two_at_work(world)
    world.now.store.crash_before = "_receive"
    await cut(world, phones[0].push(offers[0], trained[0]))
    assert world.blobs.exists(trained[0].header.digest)
    await world.crash()
    assert not world.blobs.exists(trained[0].header.digest)
    session = await phones[0].stream(offers[0], trained[0])
    assert not isinstance(session, UploadStatus)
    await session.chunk(0, trained[0].data[:10])
    await world.now.commands.abort_run(ADMIN, "first", "enough")
    await world.quiet()
    assert list(world.workspace.spool.iterdir()) == []
    assert (await world.round(run)).phase is RoundPhase.ABORTED


@pytest.mark.parametrize("keep", [True, False])
async def test_uploads_are_kept_only_where_the_run_says_so(world: World, *, keep: bool) -> None:
    run, phones, offers, trained = await two_at_work(world, retention={"keep_uploads": keep})
    await asyncio.gather(*(p.push(o, t) for p, o, t in zip(phones, offers, trained, strict=True)))
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    await world.quiet()
    assert [world.blobs.exists(update.header.digest) for update in trained] == [keep, keep]
