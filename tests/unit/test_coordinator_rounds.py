"""Whole rounds through the services: from the first question of a device to the published version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coordinator_world import EVALUATOR, MANIFEST, PROFILE, World, a_world, spec
from people_cases import ADMIN
from tiny_numerics import tensor

from glora_server.coordinator.messages import EvaluationRecord, WorkOffer
from glora_server.coordinator.model import MetricPhase, Page
from glora_server.coordinator.ports import UnitOfWork
from glora_server.rounds.assignment import Assignment, AssignmentKind, AssignmentPhase
from glora_server.rounds.ids import DeviceId, RunId
from glora_server.rounds.round import DeadlinePassed, RoundPhase
from glora_server.rounds.run import RunPhase
from glora_wire.errors import GloraError, Reason, Refusal


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as made:
        yield made


def evaluation(rank: int, accuracy: float = 0.75, rows: int = 20) -> EvaluationRecord:
    return EvaluationRecord(phase=MetricPhase.VERSION, rank=rank, loss=0.5, accuracy=accuracy, rows=rows, seconds=0.1)


async def test_two_devices_take_a_run_from_its_start_to_its_end(world: World) -> None:
    big, small = await world.phone("big", rank=4), await world.phone("small", rank=2)
    run = await world.start_run(quorum=2, rounds=2)
    for number in (1, 2):
        first, second = await asyncio.gather(big.work(value=1.0, rows=300), small.work(value=5.0, rows=100))
        assert (first.state, second.state) == ("accepted", "accepted")
        await world.until(run.id, lambda uow, number=number: uow.runs.get(run.id).rounds_done == number)  # type: ignore[misc]
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    await world.quiet()
    version = await world.read(lambda uow: uow.versions.by_number(run.id, 2))
    part = await world.read(lambda uow: uow.versions.parts(version.id, ["layer.0.query"])[0])
    expected = np.zeros((4, 6))
    expected[0, 0] = 0.75 * 1.0 + 0.25 * 5.0
    np.testing.assert_allclose(tensor(part, "u") @ tensor(part, "a"), expected, atol=1e-6)
    assert version.parent_id is not None
    view = await world.run()
    assert (view.run.phase, view.version_number, view.waiting) == (RunPhase.COMPLETED, 2, "")
    assert await world.owed() == ()


async def test_the_adapter_is_the_readout_of_the_current_version(world: World) -> None:
    phone = await world.phone("a", rank=2)
    await world.start_run()
    first = await phone.offer()
    assert (first.round_number, first.version.number, first.assignment.rank) == (1, 0, 2)
    zero = await phone.pull(first)
    assert zero["base_model.model.layer.0.query.lora_A.weight"].shape == (2, 6)
    assert not any(values.any() for values in zero.values())
    assert "base_model.model.classifier.bias" not in zero, "the server has no value of it before the first aggregate"
    await phone.push(first, phone.train(first, value=3.0))
    second = await phone.offer()
    assert (second.round_number, second.version.number) == (2, 1)
    assert second.seed != first.seed
    one = await phone.pull(second)
    b, a = one["base_model.model.layer.0.query.lora_B.weight"], one["base_model.model.layer.0.query.lora_A.weight"]
    assert (second.spec.lora.scale * b @ a)[0, 0] == pytest.approx(3.0)
    np.testing.assert_allclose(one["base_model.model.classifier.bias"], 3.0)


async def test_an_evaluator_gets_every_version_with_the_first_and_the_last(world: World) -> None:
    phone, judge = await world.phone("a"), await world.phone("judge", profile=EVALUATOR)
    run = await world.start_run(rounds=2)
    seen = []
    for number in range(3):
        offer = await judge.offer()
        assert offer.assignment.kind is AssignmentKind.EVALUATE
        assert [adapter.rank for adapter in offer.adapters] == [1, 2, 4]
        seen.append(offer.version.number)
        me = await judge.me()
        await world.now.devices.accepted(me, offer.assignment.id)
        for adapter in offer.adapters:
            await judge.pull(offer, adapter.key)
        measured = [evaluation(adapter.rank, accuracy=0.25 * (number + 1)) for adapter in offer.adapters]
        await world.now.devices.measured(me, offer.assignment.id, measured, complete=True)
        if number < 2:
            await phone.work()
            await world.until(run.id, lambda uow, n=number: uow.runs.get(run.id).rounds_done > n)  # type: ignore[misc]
    assert seen == [0, 1, 2]
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    answer = await judge.ask()
    assert answer.offer is None
    assert [notice.reason for notice in answer.notices] == [Reason.RUN_COMPLETED]
    scores = (await world.run()).scores
    assert [(s.version_number, s.rank, s.accuracy) for s in scores if s.rank == 4] == [
        (0, 4, 0.25),
        (1, 4, 0.5),
        (2, 4, 0.75),
    ]


async def test_an_evaluation_of_a_version_that_was_dropped_blocks_nobody(world: World) -> None:
    phone, judge = await world.phone("a"), await world.phone("judge", profile=EVALUATOR)
    run = await world.start_run(rounds=2, retention={"keep_versions": 1})
    stale = await judge.offer()
    for number in (1, 2):
        await phone.work()
        await world.until(run.id, lambda uow, n=number: uow.runs.get(run.id).rounds_done == n)  # type: ignore[misc]
    fresh = await judge.offer()
    assert (stale.version.number, fresh.version.number) == (0, 2)
    with pytest.raises(GloraError) as caught:
        await judge.pull(stale)
    assert caught.value.reason is Reason.ASSIGNMENT_CLOSED


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 0},
        {"accuracy": 1.5},
        {"accuracy": float("nan")},
        {"loss": float("inf")},
        {"rank": 0},
    ],
)
async def test_an_impossible_evaluation_is_refused(world: World, wrong: dict[str, float]) -> None:
    judge = await world.phone("judge", profile=EVALUATOR)
    await world.start_run()
    offer = await judge.offer()
    item = replace(evaluation(4), **wrong)  # type: ignore[arg-type]
    with pytest.raises(GloraError) as caught:
        await world.now.devices.measured(await judge.me(), offer.assignment.id, [item], complete=True)
    assert caught.value.reason is Reason.METRICS_INVALID
    assert (await judge.offer()).assignment.id == offer.assignment.id


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (replace(PROFILE, fingerprint="cd" * 32), Reason.BASE_MODEL_MISMATCH),
        (replace(PROFILE, fingerprint=""), Reason.BASE_MODEL_MISSING),
        (replace(PROFILE, task="causal_lm"), Reason.TASK_MISMATCH),
        (replace(PROFILE, training_rows=0), Reason.NO_TRAINING_DATA),
        (replace(PROFILE, trains=False), Reason.ROLE_MISMATCH),
    ],
)
async def test_a_device_that_does_not_fit_is_told_why(world: World, profile: object, reason: Reason) -> None:
    phone = await world.phone("a", profile=profile)  # type: ignore[arg-type]
    await world.start_run()
    answer = await phone.ask()
    assert answer.offer is None
    assert [(notice.run_name, notice.reason) for notice in answer.notices] == [("first", reason)]


async def test_a_device_that_wants_another_run_hears_nothing_of_this_one(world: World) -> None:
    phone = await world.phone("a", profile=replace(PROFILE, run_name="other"))
    await world.start_run()
    answer = await phone.ask()
    assert (answer.offer, answer.notices) == (None, ())


async def test_a_permanent_decline_lasts_until_the_device_says_something_new(world: World) -> None:
    phone, other = await world.phone("a"), await world.phone("b")
    await world.start_run(quorum=1, rounds=3)
    offer = await phone.offer()
    refusal = Refusal(reason=Reason.UNKNOWN_LABEL, message="The label 'maybe' is not one of the run's.")
    answer = await world.now.devices.declined(await phone.me(), offer.assignment.id, refusal, permanent=True)
    assert (answer.cancelled, answer.reason) == (True, "UNKNOWN_LABEL")
    assert (await other.work()).state == "accepted"
    world.clock.now += 30.0
    said = await phone.ask()
    assert said.offer is None
    assert [(n.reason, n.message) for n in said.notices] == [(refusal.reason, refusal.message)]
    assert (await world.run()).eligible_devices == 1
    phone.profile = replace(PROFILE, training_rows=99)
    assert (await other.work()).state == "accepted"
    assert (await phone.offer()).round_number >= 2


async def test_a_decline_for_now_is_asked_again_in_the_next_attempt(world: World) -> None:
    phone = await world.phone("a")
    run = await world.start_run()
    offer = await phone.offer()
    refusal = Refusal(reason=Reason.OUT_OF_MEMORY, message="Not now.")
    await world.now.devices.failed(await phone.me(), offer.assignment.id, refusal, permanent=False)
    again = await phone.offer()
    assert again.round_number == 1
    assert (await world.round(run)).attempt == 2


async def test_a_round_that_fails_too_often_ends_the_run_with_the_last_reason(world: World) -> None:
    phone = await world.phone("a")
    run = await world.start_run(max_attempts=2)
    for _ in range(2):
        offer = await phone.offer()
        refusal = Refusal(reason=Reason.TRAINING_FAILED, message="No.")
        await world.now.devices.failed(await phone.me(), offer.assignment.id, refusal, permanent=False)
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.FAILED)
    view = await world.run()
    assert view.run.reason is Reason.RETRIES_USED_UP
    assert view.waiting == view.run.message
    assert view.waiting.startswith("Round 1 failed 2 times; the last time: 0 of 1 needed updates")


async def test_a_failed_round_rests_before_it_is_tried_again(world: World) -> None:
    phone = await world.phone("a")
    run = await world.start_run(retry_seconds=60.0)
    offer = await phone.offer()
    refusal = Refusal(reason=Reason.TRAINING_FAILED, message="No.")
    await world.now.devices.failed(await phone.me(), offer.assignment.id, refusal, permanent=False)
    await world.until(run.id, lambda uow: (found := uow.rounds.latest(run.id)) is not None and found.attempt == 2)
    await world.quiet()
    assert (await world.round(run)).phase is RoundPhase.PLANNED
    assert "starts after a pause" in (await world.run()).waiting
    world.clock.now += 61.0
    world.now.opener.soon(run.id)
    assert (await phone.offer()).round_number == 1


async def test_a_worker_that_dies_three_times_fails_the_round_and_leaves_nothing(world: World) -> None:
    phone = await world.phone("a")
    run = await world.start_run()
    world.numerics.losses["aggregate"] = 3
    assert (await phone.work()).state == "accepted"
    await world.until(run.id, lambda uow: (found := uow.rounds.latest(run.id)) is not None and found.attempt == 2)
    await world.quiet()
    first = (await world.read(lambda uow: uow.rounds.list(run.id, Page()))).items[-1]
    assert (first.phase, first.reason) == (RoundPhase.FAILED, Reason.AGGREGATION_FAILED)
    with pytest.raises(GloraError, match="no version"):
        await world.read(lambda uow: uow.versions.get(first.id))  # type: ignore[arg-type]
    assert (await phone.work()).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 1)


async def test_a_worker_that_dies_twice_costs_nothing(world: World) -> None:
    phone = await world.phone("a")
    world.numerics.losses.update({"aggregate": 2, "check": 2, "render": 2, "initialise": 2})
    run = await world.start_run()
    assert (await phone.work()).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 1)


async def test_an_update_that_kills_every_worker_is_refused_and_the_round_goes_on(world: World) -> None:
    bad, good = await world.phone("bad"), await world.phone("good")
    run = await world.start_run(quorum=1, rounds=1, target_devices=2)
    offers = await asyncio.gather(bad.offer(), good.offer())
    world.numerics.losses["check"] = 3
    status = await bad.push(offers[0], bad.train(offers[0]))
    assert status.refusal is not None
    assert (status.state, status.refusal.reason) == ("rejected", Reason.AGGREGATION_FAILED)
    assert (await good.push(offers[1], good.train(offers[1]))).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)


async def test_updates_that_are_no_good_are_rejected_with_their_reason(world: World) -> None:
    names = ["nan", "norm", "rank", "scale", "config", "short"]
    phones = [await world.phone(name) for name in names]
    run = await world.start_run(quorum=1, rounds=1, max_attempts=1, target_devices=6, limits={"max_update_norm": 100.0})
    offers = dict(zip(names, await asyncio.gather(*(phone.offer() for phone in phones)), strict=True))
    phone = dict(zip(names, phones, strict=True))

    async def reason(name: str, **changes: Any) -> Reason | None:
        value = {"nan": float("nan"), "norm": 1e6}.get(name, 1.0)
        trained = phone[name].train(offers[name], value=value, **changes)
        status = await phone[name].push(offers[name], trained)
        assert status.state == "rejected"
        return status.refusal.reason if status.refusal else None

    assert await reason("nan") is Reason.NON_FINITE
    assert await reason("norm") is Reason.NORM_TOO_LARGE
    assert (
        await reason("rank", adapter_config_json='{"peft_type": "LORA", "r": 3, "lora_alpha": 6}') is Reason.RANK_WRONG
    )
    assert (
        await reason("scale", adapter_config_json='{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
        is Reason.SCALE_WRONG
    )
    assert await reason("config", adapter_config_json="{") is Reason.CONFIG_INVALID
    assert (await world.round(run)).phase is RoundPhase.COLLECTING
    cut = replace(offers["short"], assignment=replace(offers["short"].assignment, rank=1))
    trained = phone["short"].train(cut, adapter_config_json='{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    status = await phone["short"].push(offers["short"], trained)
    assert status.refusal is not None
    assert status.refusal.reason in {Reason.TENSOR_SHAPE_WRONG, Reason.RANK_WRONG}
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.FAILED)
    await world.quiet()
    rejected = (await world.round(run)).assignments
    assert all(a.phase is AssignmentPhase.REJECTED and a.message for a in rejected)
    assert {digest.text for digest in world.blobs.stored()} == await world.read(
        lambda uow: uow.versions.readout_digests()
    )


async def test_the_deadline_ends_a_round_without_those_who_are_late(world: World) -> None:
    fast, slow = await world.phone("fast"), await world.phone("slow")
    run = await world.start_run(quorum=1, target_devices=2, rounds=1)
    offers = await asyncio.gather(fast.offer(), slow.offer())
    assert (await fast.push(offers[0], fast.train(offers[0]))).state == "accepted"
    world.clock.now += 101.0
    await world.now.engine.apply((await world.round(run)).id, DeadlinePassed())
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    late = await world.now.devices.progress(
        await slow.me(), offers[1].assignment.id, phase="training", done=1, total=2, loss=0.1
    )
    assert (late.cancelled, late.reason) == (True, "DEADLINE_PASSED")
    said = await world.now.devices.accepted(await slow.me(), offers[1].assignment.id)
    assert said.cancelled


async def test_a_device_that_measures_what_it_sent_is_there_all_the_while(world: World) -> None:
    phone = await world.phone("a")
    run = await world.start_run(quorum=1, rounds=1)
    offer = await phone.offer()
    assert (await phone.push(offer, phone.train(offer))).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    for _ in range(3):
        world.clock.now += 50.0
        answer = await world.now.devices.progress(
            await phone.me(), offer.assignment.id, phase="evaluating", done=1, total=2, loss=0.0
        )
        assert not answer.cancelled
        view = await world.now.queries.device("a")
        assert (view.online, view.current, view.measuring) == (True, None, "first")
    await phone.ask()
    assert (await world.now.queries.device("a")).measuring == ""


def rounds_are_done(run_id: RunId, number: int, uow: UnitOfWork) -> bool:
    return uow.runs.get(run_id).rounds_done == number


async def test_a_device_that_still_measures_is_not_drawn_while_others_are_free(world: World) -> None:
    first = await world.phone("a")
    run = await world.start_run(quorum=1, target_devices=1, rounds=9)
    offer = await first.offer()
    await world.now.commands.pause_run(ADMIN, "first")
    assert (await first.push(offer, first.train(offer))).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 1)
    other = await world.phone("b")
    for done in range(2, 8):
        await world.now.devices.progress(
            await first.me(), offer.assignment.id, phase="evaluating", done=1, total=2, loss=0.0
        )
        question = asyncio.create_task(other.ask(5.0))
        await asyncio.sleep(0)
        await world.now.commands.resume_run(ADMIN, "first")
        work = (await question).offer
        assert work is not None
        await world.now.commands.pause_run(ADMIN, "first")
        assert (await other.push(work, other.train(work))).state == "accepted"
        await world.until(run.id, partial(rounds_are_done, run.id, done))


async def test_the_last_device_is_waited_for_as_long_as_the_policy_says(world: World) -> None:
    """Two of three wanted devices would do: the round waits for the third, but only as long as gather_seconds."""
    first, second = await world.phone("a"), await world.phone("b")
    run = await world.start_run(quorum=2, target_devices=3, gather_seconds=50.0)
    questions = asyncio.gather(first.ask(5.0), second.ask(5.0))
    await world.until(run.id, lambda _: "waiting 50 s for more" in world.now.hub.waiting.get(run.id, ""))
    assert (await world.run()).waiting == "2 devices are ready; waiting 50 s for more."
    world.clock.now += 51.0
    world.now.opener.soon(run.id)
    answers = await questions
    assert all(answer.offer is not None for answer in answers)


async def test_a_third_device_opens_the_round_at_once(world: World) -> None:
    phones = [await world.phone(name) for name in "abc"]
    await world.start_run(quorum=2, target_devices=3, gather_seconds=5000.0)
    offers: list[WorkOffer] = await asyncio.gather(*(phone.offer() for phone in phones))
    assert len({offer.assignment.id for offer in offers}) == 3


async def test_several_runs_do_not_share_a_device_at_a_time(world: World) -> None:
    phone = await world.phone("a")
    one = await world.start_run("one", rounds=1)
    two = await world.start_run("two", rounds=1)
    done = set()
    for _ in range(2):
        offer = await phone.offer()
        done.add(offer.run.name)
        me, run_id = offer.assignment.device_id, offer.run.id
        assert len(await world.read(partial(_open_for, me))) == 1
        await phone.push(offer, phone.train(offer))
        await world.until(run_id, partial(_is_complete, run_id))
    assert done == {one.name, two.name}


def _open_for(device_id: DeviceId, uow: UnitOfWork) -> tuple[Assignment, ...]:
    return uow.rounds.open_for(device_id)


def _is_complete(run_id: RunId, uow: UnitOfWork) -> bool:
    return uow.runs.get(run_id).phase is RunPhase.COMPLETED


async def test_a_manifest_of_another_task_is_refused(world: World) -> None:
    wrong = spec(model={"task": "causal_lm", "labels": []})
    with pytest.raises(GloraError) as caught:
        await world.now.commands.create_run(ADMIN, wrong, MANIFEST, start=False)
    assert caught.value.reason is Reason.MANIFEST_INVALID
    with pytest.raises(GloraError) as caught:
        await world.now.commands.create_run(ADMIN, spec(strategy={"name": "no"}), MANIFEST, start=False)
    assert caught.value.reason is Reason.STRATEGY_UNKNOWN
