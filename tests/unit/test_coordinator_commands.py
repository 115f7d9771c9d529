"""What operators do while devices work, what they are told, and what they take away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coordinator_world import EVALUATOR, MANIFEST, PATIENCE, PROFILE, World, a_world, eventually, spec
from people_cases import ADMIN, EVE
from tiny_numerics import read_tensors

from glora_server.coordinator.exports import Flavour
from glora_server.coordinator.model import DeviceState, Page
from glora_server.coordinator.views_history import DeviceFilter
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.round import DeadlinePassed, RoundPhase
from glora_server.rounds.run import RunPhase
from glora_wire.digests import digest_bytes
from glora_wire.errors import GloraError, Reason


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as made:
        yield made


async def test_a_revoked_device_is_out_at_once(world: World) -> None:
    phone, other = await world.phone("a"), await world.phone("b")
    run = await world.start_run(quorum=1, target_devices=2, rounds=1)
    offer, elsewhere = await asyncio.gather(phone.offer(), other.offer())
    await world.now.commands.revoke_device(ADMIN, "a")
    with pytest.raises(GloraError) as caught:
        await phone.me()
    assert caught.value.reason is Reason.DEVICE_REVOKED
    ended = (await world.round(run)).find(offer.assignment.id)
    assert (ended.phase, ended.reason) == (AssignmentPhase.FAILED, Reason.DEVICE_REVOKED)
    assert (await other.push(elsewhere, other.train(elsewhere))).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    with pytest.raises(GloraError, match="revoked for good"):
        await world.now.commands.approve_device(ADMIN, "a")


async def test_revoked_devices_are_listed_only_where_they_are_asked_for(world: World) -> None:
    for name in ("a", "b"):
        await world.phone(name)
    await world.now.commands.revoke_device(ADMIN, "a")

    async def names(state: DeviceState | None) -> list[str]:
        wanted = DeviceFilter(state=state)
        views = (await world.now.queries.devices(Page(), wanted)).items
        lines = (await world.now.queries.device_lines(Page(), wanted)).items
        assert [line.device.device.name for line in lines] == [view.device.name for view in views]
        return [view.device.name for view in views]

    assert await names(None) == ["b"]
    assert await names(DeviceState.APPROVED) == ["b"]
    assert await names(DeviceState.REVOKED) == ["a"]


async def test_a_run_cannot_have_the_name_of_a_page(world: World) -> None:
    with pytest.raises(GloraError, match="cannot be named 'new'") as caught:
        await world.now.commands.create_run(ADMIN, spec("new"), MANIFEST, start=False)
    assert caught.value.reason is Reason.SPEC_INVALID
    assert not (await world.now.queries.runs(Page())).items


async def test_an_open_question_of_a_revoked_device_ends_with_the_reason(world: World) -> None:
    phone = await world.phone("a", profile=replace(PROFILE, run_name="none"))
    asking = asyncio.create_task(phone.ask(60.0))
    await eventually(lambda: bool(world.now.hub.signals._waiters))
    await world.now.commands.revoke_device(ADMIN, "a")
    with pytest.raises(GloraError) as caught:
        await asyncio.wait_for(asking, PATIENCE)
    assert caught.value.reason is Reason.DEVICE_REVOKED


async def test_revoking_ends_an_evaluation_too(world: World) -> None:
    judge = await world.phone("judge", profile=EVALUATOR)
    await world.start_run()
    offer = await judge.offer()
    await world.now.commands.revoke_device(ADMIN, "judge")
    ended = await world.read(lambda uow: uow.rounds.assignment(offer.assignment.id))
    assert (ended.phase, ended.reason) == (AssignmentPhase.FAILED, Reason.DEVICE_REVOKED)


async def test_a_received_update_of_a_revoked_device_stays(world: World) -> None:
    phone, other = await world.phone("a"), await world.phone("b")
    run = await world.start_run(quorum=2, rounds=1)
    offer, elsewhere = await asyncio.gather(phone.offer(), other.offer())
    assert (await phone.push(offer, phone.train(offer))).state == "accepted"
    await world.now.commands.revoke_device(ADMIN, "a")
    assert (await other.push(elsewhere, other.train(elsewhere))).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)


async def test_a_suspended_device_comes_back_when_it_is_approved(world: World) -> None:
    phone = await world.phone("a")
    await world.now.commands.suspend_device(ADMIN, "a")
    with pytest.raises(GloraError) as caught:
        await phone.ask()
    assert caught.value.reason is Reason.DEVICE_SUSPENDED
    await world.start_run()
    await world.now.commands.approve_device(ADMIN, "a")
    assert (await phone.offer()).round_number == 1


async def test_another_rank_counts_from_the_next_assignment_on(world: World) -> None:
    phone = await world.phone("a", rank=2)
    await world.start_run()
    offer = await phone.offer()
    await world.now.commands.set_device_rank(ADMIN, "a", 3)
    assert (await phone.push(offer, phone.train(offer))).state == "accepted"
    assert (await phone.offer()).assignment.rank == 3
    with pytest.raises(GloraError, match="between 1 and 4096"):
        await world.now.commands.set_device_rank(ADMIN, "a", 0)


async def test_a_higher_rank_lets_a_waiting_round_open(world: World) -> None:
    phone = await world.phone("a", rank=1)
    await world.start_run(min_rank=2)
    asking = asyncio.create_task(phone.offer())
    await eventually(lambda: bool(world.now.hub.signals._waiters))
    await world.now.commands.set_device_rank(ADMIN, "a", 2)
    assert (await asking).assignment.rank == 2


async def test_a_device_that_waits_hears_at_once_that_its_run_was_aborted(world: World) -> None:
    phone = await world.phone("a", rank=1)
    await world.start_run(min_rank=2)
    assert [notice.reason for notice in (await phone.ask(30.0)).notices] == [Reason.RANK_TOO_SMALL]
    asking = asyncio.create_task(phone.ask(30.0))
    await eventually(lambda: bool(world.now.hub.signals._waiters))
    await world.now.commands.abort_run(ADMIN, "first", "wrong data")
    told = (await asking).notices
    assert [(notice.reason, notice.message) for notice in told] == [
        (Reason.RUN_ABORTED, "Run first was aborted. wrong data")
    ]


async def test_a_paused_run_finishes_its_round_and_opens_no_other(world: World) -> None:
    phone = await world.phone("a")
    run = await world.start_run(rounds=2)
    offer = await phone.offer()
    await world.now.commands.pause_run(ADMIN, "first")
    assert (await phone.push(offer, phone.train(offer))).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 1)
    answer = await phone.ask()
    assert [notice.reason for notice in answer.notices] == [Reason.RUN_PAUSED]
    assert (await world.run()).waiting == "The run is paused after 1 of 2 rounds."
    await world.now.commands.resume_run(ADMIN, "first")
    assert (await phone.offer()).round_number == 2
    with pytest.raises(GloraError, match="so it cannot resume"):
        await world.now.commands.resume_run(ADMIN, "first")


async def test_an_aborted_run_ends_its_round_and_says_why(world: World) -> None:
    phone = await world.phone("a")
    run = await world.start_run()
    offer = await phone.offer()
    await world.now.commands.abort_run(ADMIN, "first", "The data was wrong.")
    said = await world.now.devices.progress(
        await phone.me(), offer.assignment.id, phase="training", done=1, total=2, loss=0.5
    )
    assert said.cancelled
    view = await world.run()
    assert (view.run.phase, view.run.reason, view.waiting) == (
        RunPhase.ABORTED,
        Reason.RUN_ABORTED,
        "The data was wrong.",
    )
    assert (await world.round(run)).phase is RoundPhase.ABORTED


async def test_an_abort_during_aggregation_ends_it_quietly(world: World) -> None:
    phone = await world.phone("a")
    run = await world.start_run()
    world.numerics.crash_at["aggregate"] = 1
    await phone.work()
    await world.blown()
    await world.now.commands.abort_run(ADMIN, "first", "")
    await world.crash()
    await world.quiet()
    round_ = await world.round(run)
    assert round_.phase is RoundPhase.ABORTED
    with pytest.raises(GloraError, match="no version"):
        await world.read(lambda uow: uow.versions.get(round_.id))  # type: ignore[arg-type]


async def test_an_extended_round_gives_every_device_more_time(world: World) -> None:
    phone = await world.phone("a")
    await world.start_run()
    offer = await phone.offer()
    await world.now.commands.extend_round(ADMIN, "first", 500.0)
    assert (await phone.offer()).deadline_at == offer.deadline_at + 500.0
    world.clock.now = offer.deadline_at + 1.0
    round_ = await world.now.engine.apply(offer.assignment.round_id, DeadlinePassed())  # type: ignore[arg-type]
    assert round_.phase is RoundPhase.COLLECTING
    with pytest.raises(GloraError, match="seconds must be between"):
        await world.now.commands.extend_round(ADMIN, "first", 0.0)


async def test_there_is_no_round_to_extend_before_the_first(world: World) -> None:
    await world.start_run()
    with pytest.raises(GloraError, match="no round that collects"):
        await world.now.commands.extend_round(ADMIN, "first", 10.0)


async def test_an_edited_policy_counts_for_the_open_round(world: World) -> None:
    phone, other = await world.phone("a"), await world.phone("b")
    run = await world.start_run(quorum=2, rounds=2)
    offer, _ = await asyncio.gather(phone.offer(), other.offer())
    assert (await phone.push(offer, phone.train(offer))).state == "accepted"
    edited = await world.now.commands.edit_policy(ADMIN, "first", {"quorum": 1, "policy.rounds": 1})
    assert json.loads(edited.spec_json)["policy"]["quorum"] == 1
    world.clock.now += 101.0
    await world.now.engine.apply((await world.round(run)).id, DeadlinePassed())
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    with pytest.raises(GloraError, match="cannot be changed"):
        await world.now.commands.edit_policy(ADMIN, "first", {"seed": 3})


async def test_fewer_rounds_end_a_run_that_waits_for_the_next_one(world: World) -> None:
    phone = await world.phone("a", rank=2)
    run = await world.start_run(rounds=3)
    offer = await phone.offer()
    await world.now.commands.edit_policy(ADMIN, "first", {"min_rank": 4})
    await phone.push(offer, phone.train(offer))
    await world.until(run.id, lambda uow: (found := uow.rounds.latest(run.id)) is not None and found.number == 2)
    assert (await world.round(run)).phase is RoundPhase.PLANNED
    await world.now.commands.edit_policy(ADMIN, "first", {"rounds": 1})
    await world.until(run.id, lambda uow: uow.runs.get(run.id).phase is RunPhase.COMPLETED)
    await world.quiet()
    assert (await world.read(lambda uow: uow.rounds.latest(run.id).phase)) is RoundPhase.ABORTED  # type: ignore[union-attr]


async def test_every_command_leaves_an_audit_entry(world: World) -> None:
    await world.phone("a")
    await world.now.commands.create_run(EVE, spec(), MANIFEST, start=False)
    await world.now.commands.start_run(EVE, "first")
    await world.now.commands.pause_run(EVE, "first")
    await world.now.commands.resume_run(EVE, "first")
    await world.now.commands.edit_policy(EVE, "first", {"quorum": 2})
    await world.now.commands.abort_run(EVE, "first", "")
    await world.now.commands.set_device_rank(EVE, "a", 2)
    await world.now.commands.suspend_device(EVE, "a")
    entries = (await world.now.queries.audit(Page())).items
    assert [entry.action for entry in entries if entry.actor == "eve"][::-1] == [
        "run.create",
        "run.start",
        "run.pause",
        "run.resume",
        "run.edit",
        "run.abort",
        "device.set-rank",
        "device.suspend",
    ]


async def test_a_name_is_taken_once(world: World) -> None:
    await world.now.commands.create_run(EVE, spec(), MANIFEST, start=False)
    assert (await world.run()).waiting == "The run is not started: glora run start first"
    with pytest.raises(GloraError) as caught:
        await world.now.commands.create_run(EVE, spec(), MANIFEST, start=False)
    assert caught.value.reason is Reason.NAME_TAKEN


# --- exports and readouts


@pytest.mark.parametrize(("flavour", "rank", "shape", "pattern"), [("peft", 4, 1, True), ("serving", 4, 4, False)])
async def test_an_export_is_a_peft_folder(
    world: World, tmp_path: Path, flavour: Flavour, rank: int, shape: int, *, pattern: bool
) -> None:
    phone = await world.phone("a")
    run = await world.start_run(rounds=1)
    await phone.work(value=3.0)
    await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 1)
    record = await world.now.commands.export(
        EVE,
        "first",
        rank=rank,
        version_number=None,
        flavour=flavour,
        folder=tmp_path / "out",
    )
    assert sorted(path.name for path in record.folder.iterdir()) == sorted(record.files)
    config = json.loads((record.folder / "adapter_config.json").read_text())
    names = [module.name for module in MANIFEST.modules]
    assert config["rank_pattern"] == config["alpha_pattern"] == (dict.fromkeys(names, 1) if pattern else {})
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (rank, rank, ["classifier"])
    tensors = read_tensors(record.folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{names[0]}.lora_{factor}.weight"] for factor in "AB")
    assert a.shape == (shape, 6)
    expected = np.zeros((4, 6))
    expected[0, 0] = 3.0
    np.testing.assert_allclose(b @ a, expected, atol=1e-6)
    assert "| 1 | yes |" in (record.folder / "README.md").read_text()
    with pytest.raises(GloraError, match="holds an adapter already"):
        await world.now.commands.export(
            EVE, "first", rank=rank, version_number=None, flavour=flavour, folder=tmp_path / "out"
        )


@pytest.mark.parametrize(
    ("rank", "number", "reason"), [(0, None, "RANK_WRONG"), (5, None, "RANK_WRONG"), (4, 7, "VERSION_UNKNOWN")]
)
async def test_an_impossible_export_is_refused(
    world: World, tmp_path: Path, rank: int, number: int | None, reason: str
) -> None:
    await world.start_run()
    with pytest.raises(GloraError) as caught:
        await world.now.commands.export(
            EVE, "first", rank=rank, version_number=number, flavour="peft", folder=tmp_path / "out"
        )
    assert caught.value.reason == reason


async def test_a_dropped_version_cannot_be_exported_and_leaves_no_blobs(world: World, tmp_path: Path) -> None:
    phone = await world.phone("a")
    run = await world.start_run(rounds=2, retention={"keep_versions": 1})
    for number in (1, 2):
        await phone.work()
        await world.until(run.id, lambda uow, n=number: uow.runs.get(run.id).rounds_done == n)  # type: ignore[misc]
    await world.quiet()
    flavours: tuple[Flavour, ...] = ("peft", "serving")
    for flavour in flavours:
        with pytest.raises(GloraError) as caught:
            await world.now.commands.export(
                EVE,
                "first",
                rank=4,
                version_number=0,
                flavour=flavour,
                folder=tmp_path / "out",
            )
        assert caught.value.reason is Reason.VERSION_UNKNOWN
    await eventually(lambda: not list(world.blobs.stored()))


async def test_devices_that_ask_together_share_one_rendering(world: World) -> None:
    phones = [await world.phone(name) for name in "abcd"]
    await world.start_run(quorum=4)
    offers = await asyncio.gather(*(phone.offer() for phone in phones))
    await asyncio.gather(*(phone.pull(offer) for phone, offer in zip(phones, offers, strict=True)))
    assert world.numerics.jobs["render"] == 1
    assert world.now.readouts._making == {}
    for digest in list(world.blobs.stored()):
        world.blobs.delete(digest)
    await phones[0].pull(offers[0])
    assert world.numerics.jobs["render"] == 2, "a lost blob is rendered again"


async def test_a_download_goes_on_only_with_the_same_bytes(world: World) -> None:
    phone = await world.phone("a")
    await world.start_run()
    offer = await phone.offer()
    devices, me, assignment = world.now.devices, await phone.me(), offer.assignment.id
    adapter = await devices.open_adapter(me, assignment, key="train", offset=0, digest=None)
    await adapter.close()
    again = await devices.open_adapter(me, assignment, key="train", offset=5, digest=adapter.digest)
    await again.close()
    for offset, digest, reason in (
        (5, None, Reason.DIGEST_CHANGED),
        (5, digest_bytes(b"x"), Reason.DIGEST_CHANGED),
        (10**9, adapter.digest, Reason.OFFSET_INVALID),
        (-1, None, Reason.OFFSET_INVALID),
    ):
        with pytest.raises(GloraError) as caught:
            await devices.open_adapter(me, assignment, key="train", offset=offset, digest=digest)
        assert caught.value.reason is reason
    with pytest.raises(GloraError) as caught:
        await devices.open_adapter(me, assignment, key="r8", offset=0, digest=None)
    assert caught.value.reason is Reason.ADAPTER_UNKNOWN


# --- queries


async def test_the_views_say_who_does_what_and_why_it_waits(world: World) -> None:
    phone, _ = await world.phone("pi-7"), await world.phone("pi-8")
    run = await world.start_run(quorum=2, deadline_seconds=240.0)
    await phone.ask()
    await world.until(run.id, lambda _: "needed" in world.now.hub.waiting.get(run.id, ""))
    view = await world.run()
    assert view.waiting == "1 of 2 needed devices are online and eligible."
    assert (view.eligible_devices, view.online_devices, view.version_number) == (2, 1, 0)
    await world.now.commands.edit_policy(ADMIN, "first", {"quorum": 1})
    offer = await phone.offer()
    me = await phone.me()
    await world.now.devices.accepted(me, offer.assignment.id)
    await world.now.devices.progress(me, offer.assignment.id, phase="uploading", done=61, total=100, loss=float("nan"))
    view = await world.run()
    assert view.waiting == "0 of 1 updates are in (at least 1 needed); pi-7 uploading 61 %; deadline in 4 min."
    assert view.round is not None
    assert view.round.assignments[0].device_name == "pi-7"
    device = await world.now.queries.device("pi-7")
    assert (device.online, device.current_run) == (True, "first")
    assert {d.device.name for d in (await world.now.queries.devices(Page())).items} == {"pi-7", "pi-8"}
    assert not (await world.now.queries.device("pi-8")).online
    assert [v.run.name for v in (await world.now.queries.runs(Page())).items] == ["first"]
    assert len((await world.now.queries.rounds("first", Page())).items) == 1
    assert [s.name for s in await world.now.queries.strategies()] == ["glora"]


async def test_a_watch_ends_with_the_next_change(world: World) -> None:
    phone = await world.phone("a")
    await world.start_run()
    view = await world.run()
    watching = asyncio.create_task(world.now.queries.changed("first", view.revision, PATIENCE))
    await phone.offer()
    assert await watching > view.revision
    assert await world.now.queries.changed("first", view.revision, PATIENCE) > view.revision
    diagnostics = await world.now.queries.diagnostics("first", 0, Page())
    assert diagnostics.items == ()
