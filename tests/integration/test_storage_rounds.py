"""What every store does with rounds, assignments, uploads and measurements (the same on each database)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from storage_records import (
    NOW,
    assignment,
    bound,
    device,
    digest,
    evaluation,
    measurement,
    round_,
    run,
    stage,
    stage_round,
    together,
    upload,
    version,
)

from glora_server.coordinator.model import MetricPhase, Owed, OwedKind, Page
from glora_server.coordinator.ports import UnitOfWork
from glora_server.rounds import round as machine
from glora_server.rounds.assignment import AssignmentPhase, Decline
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.round import Moved, Opened, Round, RoundPhase
from glora_server.storage.store import SqlStore
from glora_wire.errors import GloraError, Reason, Refusal

_REFUSAL = Refusal(reason=Reason.OUT_OF_MEMORY, message="The device has 1 GB.")


async def test_a_round_comes_back_with_its_assignments_in_their_order(store: SqlStore) -> None:
    await store.write(stage)
    stored = round_(
        assignments=(assignment("z"), assignment("a", device_id=DeviceId("id-nano"), deadline_at=NOW + 0.125)),
        reason=Reason.QUORUM_MISSED,
        message="1 of 2",
        deadline_at=NOW + 1,
    )
    await store.write(lambda uow: uow.rounds.add(stored))
    assert await store.read(lambda uow: uow.rounds.get(RoundId("r1"))) == stored
    assert await store.read(lambda uow: uow.rounds.live()) == (stored,)
    assert await store.read(lambda uow: uow.rounds.assignment(AssignmentId("a"))) == stored.assignments[1]


async def test_unknown_rounds_and_assignments_are_named(store: SqlStore) -> None:
    with pytest.raises(GloraError, match="'r9'") as raised:
        await store.read(lambda uow: uow.rounds.get(RoundId("r9")))
    assert raised.value.reason is Reason.ROUND_UNKNOWN
    for work in (
        lambda uow: uow.rounds.assignment(AssignmentId("a9")),
        lambda uow: uow.rounds.save_assignment(evaluation("a9")),
    ):
        with pytest.raises(GloraError, match="'a9'") as raised:
            await store.write(work)
        assert raised.value.reason is Reason.ASSIGNMENT_UNKNOWN


async def test_saving_a_round_follows_the_state_machine(store: SqlStore) -> None:
    """Opened, then one device declines: both saves come back exactly as the pure function made them."""
    await store.write(stage)
    await store.write(lambda uow: uow.rounds.add(round_()))
    offers = (assignment("a1"), assignment("a2", device_id=DeviceId("id-nano")))
    planned = await store.read(lambda uow: uow.rounds.get(RoundId("r1")))
    opened, _ = machine.advance(planned, Opened(offers, 2), at=NOW)
    saved = await store.write(lambda uow: uow.rounds.save(opened))
    assert saved == replace(opened, row_version=1)
    moved, _ = machine.advance(saved, Moved(AssignmentId("a2"), Decline(_REFUSAL, permanent=True)), at=NOW + 2)
    again = await store.write(lambda uow: uow.rounds.save(moved))
    assert await store.read(lambda uow: uow.rounds.get(RoundId("r1"))) == again == replace(moved, row_version=2)
    with pytest.raises(GloraError) as raised:
        await store.write(lambda uow: uow.rounds.save(moved))
    assert raised.value.reason is Reason.STALE_STATE
    assert await store.read(lambda uow: uow.rounds.declined_for(RunId("id-first"))) == {
        DeviceId("id-nano"): (NOW + 2, _REFUSAL)
    }


async def test_a_round_can_be_saved_more_than_once_in_a_transaction(store: SqlStore) -> None:
    await store.write(stage_round)
    done = assignment(phase=AssignmentPhase.ACCEPTED, accepted_at=NOW)

    def work(uow: UnitOfWork) -> Round:
        found = uow.rounds.get(RoundId("r1"))
        grown = uow.rounds.save(replace(found, assignments=(*found.assignments, assignment("a2"))))
        again = uow.rounds.save(replace(grown, assignments=(done, grown.assignments[1]), target=2))
        uow.rounds.save_assignment(assignment("a2", message="said in passing"))
        return uow.rounds.save(again)

    saved = await store.write(work)
    assert saved.assignments == (done, assignment("a2"))
    assert await store.read(lambda uow: uow.rounds.get(RoundId("r1"))) == saved
    assert saved.row_version == 3


async def test_a_save_that_is_refused_changes_no_assignment(store: SqlStore) -> None:
    await store.write(stage_round)
    stale = round_(assignments=(assignment(phase=AssignmentPhase.ACCEPTED),), row_version=7)
    with pytest.raises(GloraError):
        await store.write(lambda uow: uow.rounds.save(stale))
    assert (await store.read(lambda uow: uow.rounds.assignment(AssignmentId("a1")))).phase is AssignmentPhase.OFFERED


async def test_the_same_attempt_at_a_round_exists_once(store: SqlStore) -> None:
    await store.write(stage_round)
    with pytest.raises(GloraError) as raised:
        await store.write(lambda uow: uow.rounds.add(round_(id=RoundId("twin"))))
    assert raised.value.reason is Reason.STALE_STATE
    await store.write(lambda uow: uow.rounds.add(round_(id=RoundId("second"), attempt=2)))
    latest = await store.read(lambda uow: uow.rounds.latest(RunId("id-first")))
    assert latest is not None
    assert latest.id == "second"


async def test_rounds_are_listed_newest_first_and_live_ones_found(store: SqlStore) -> None:
    await store.write(stage)
    assert await store.read(lambda uow: uow.rounds.latest(RunId("id-first"))) is None
    rounds = [
        round_(1, phase=RoundPhase.FAILED, assignments=(assignment("a1"),)),
        round_(1, id=RoundId("r1b"), attempt=2, phase=RoundPhase.COMMITTED),
        round_(2, phase=RoundPhase.GRACE, assignments=(assignment("a3", round_id=RoundId("r2")),)),
    ]
    await store.write(together(*(bound(lambda uow, item: uow.rounds.add(item), item) for item in rounds)))
    first = await store.read(lambda uow: uow.rounds.list(RunId("id-first"), Page(size=2)))
    rest = await store.read(lambda uow: uow.rounds.list(RunId("id-first"), Page(size=2, token=first.next_token)))
    assert (*first.items, *rest.items) == tuple(reversed(rounds))
    assert rest.next_token == ""
    assert await store.read(lambda uow: uow.rounds.live()) == (rounds[2],)


async def test_a_device_finds_its_open_assignments_oldest_first(store: SqlStore) -> None:
    await store.write(stage_round)
    await store.write(lambda uow: uow.rounds.add_assignment(evaluation("e1", offered_at=NOW - 5)))
    nano = evaluation("e2", device_id=DeviceId("id-nano"))
    await store.write(lambda uow: uow.rounds.add_assignment(nano))
    found = await store.read(lambda uow: uow.rounds.open_for(DeviceId("id-pi")))
    assert found == (evaluation("e1", offered_at=NOW - 5), assignment("a1"))
    assert await store.read(lambda uow: uow.rounds.busy_devices()) == {"id-pi"}
    done = replace(nano, phase=AssignmentPhase.COMPLETED, closed_at=NOW)
    await store.write(lambda uow: uow.rounds.save_assignment(done))
    assert await store.read(lambda uow: uow.rounds.open_for(DeviceId("id-nano"))) == ()
    for device_id in ("id-pi", "id-nano"):
        asked = bound(lambda uow, who: uow.rounds.was_evaluated(who, VersionId("v0")), DeviceId(device_id))
        assert await store.read(asked)
    assert not await store.read(lambda uow: uow.rounds.was_evaluated(DeviceId("id-pi"), VersionId("v1")))


async def test_the_newest_word_of_a_device_counts(store: SqlStore) -> None:
    await store.write(stage)
    said = {"permanent": True, "phase": AssignmentPhase.DECLINED}
    items = (
        assignment("a1", closed_at=NOW + 9, reason=_REFUSAL.reason, message=_REFUSAL.message, **said),
        assignment("a2", closed_at=NOW + 1, reason=Reason.DATA_EMPTY, message="none", **said),
        assignment("a3", device_id=DeviceId("id-nano"), closed_at=NOW, **said | {"permanent": False}),
    )
    await store.write(lambda uow: uow.rounds.add(round_(assignments=items)))
    assert await store.read(lambda uow: uow.rounds.declined_for(RunId("id-first"))) == {"id-pi": (NOW + 9, _REFUSAL)}
    assert await store.read(lambda uow: uow.rounds.declined_for(RunId("other"))) == {}


async def test_an_assignment_takes_one_upload_and_the_database_sees_to_it(store: SqlStore) -> None:
    await store.write(stage_round)
    assert await store.read(lambda uow: uow.uploads.find(AssignmentId("a1"))) is None
    await store.write(lambda uow: uow.uploads.add(upload()))
    with pytest.raises(GloraError, match="first one counts") as raised:
        await store.write(lambda uow: uow.uploads.add(upload(digest=digest("another"))))
    assert raised.value.reason is Reason.UPLOAD_CONFLICT
    assert await store.read(lambda uow: uow.uploads.find(AssignmentId("a1"))) == upload()
    await store.write(lambda uow: uow.uploads.judged(AssignmentId("a1"), 3.5))
    assert await store.read(lambda uow: uow.uploads.of_round(RoundId("r1"))) == (upload(update_norm=3.5),)
    assert await store.read(lambda uow: uow.uploads.digests()) == {digest("a1").text}
    with pytest.raises(GloraError) as raised:
        await store.write(lambda uow: uow.uploads.judged(AssignmentId("a9"), None))
    assert raised.value.reason is Reason.ASSIGNMENT_UNKNOWN


async def test_the_smallest_rank_of_a_device_that_shrank_is_known(store: SqlStore) -> None:
    await store.write(stage_round)
    await store.write(lambda uow: uow.uploads.add(upload()))
    assert await store.read(lambda uow: uow.uploads.shrunk(RunId("id-first"))) == {}
    await store.write(lambda uow: uow.uploads.judged(AssignmentId("a1"), 3.5, 2))
    assert await store.read(lambda uow: uow.uploads.shrunk(RunId("id-first"))) == {"id-pi": 2}
    assert await store.read(lambda uow: uow.uploads.shrunk(RunId("other"))) == {}


async def test_uploads_of_a_round_come_in_order_of_their_assignments(store: SqlStore) -> None:
    """Capitals first: the order of bytes, whatever the locale of the database."""
    await store.write(stage)
    names = ("b", "B", "a", "_", "é", "Z")
    await store.write(lambda uow: uow.rounds.add(round_(assignments=tuple(assignment(name) for name in names))))
    await store.write(together(*(bound(lambda uow, name: uow.uploads.add(upload(name)), name) for name in names)))
    found = await store.read(lambda uow: uow.uploads.of_round(RoundId("r1")))
    assert [item.assignment_id for item in found] == sorted(names)


async def test_an_upload_needs_its_assignment(store: SqlStore) -> None:
    await store.write(stage_round)
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        await store.write(lambda uow: uow.uploads.add(upload("nobody's")))
    assert await store.read(lambda uow: uow.uploads.digests()) == frozenset()


async def test_a_measurement_that_is_not_a_number_stays_one(store: SqlStore) -> None:
    await store.write(stage_round)
    await store.write(lambda uow: uow.uploads.add(upload(training_loss=math.nan)))
    await store.write(lambda uow: uow.measurements.put([measurement(loss=math.nan, accuracy=math.inf)]))
    found = await store.read(lambda uow: uow.uploads.find(AssignmentId("a1")))
    assert found is not None
    assert math.isnan(found.training_loss)
    (one,) = (await store.read(lambda uow: uow.lists.measurements(RunId("id-first"), Page()))).items
    assert math.isnan(one.loss)
    assert one.accuracy == math.inf


async def test_measurements_replace_the_same_and_come_sorted(store: SqlStore) -> None:
    await store.write(stage_round)
    first = [
        measurement(rank=rank, phase=phase) for rank in (8, 2) for phase in (MetricPhase.BEFORE, MetricPhase.AFTER)
    ]
    await store.write(lambda uow: uow.measurements.put(first))
    newer = measurement(rank=2, accuracy=0.9)
    await store.write(lambda uow: uow.measurements.put([newer]))
    await store.write(lambda uow: uow.measurements.put([]))
    found = (await store.read(lambda uow: uow.lists.measurements(RunId("id-first"), Page()))).items
    assert [item.rank for item in found] == [2, 2, 8, 8]
    assert newer in found
    assert len(set(found)) == 4
    assert (await store.read(lambda uow: uow.lists.measurements(RunId("other"), Page()))).items == ()


async def test_what_is_owed_is_kept_until_it_is_done(store: SqlStore) -> None:
    await store.write(stage_round)
    run_id, round_id = RunId("id-first"), RoundId("r1")
    owed = [
        Owed(
            kind=OwedKind.VALIDATE, run_id=run_id, round_id=round_id, assignment_id=AssignmentId("a1"), created_at=NOW
        ),
        Owed(kind=OwedKind.AGGREGATE, run_id=run_id, round_id=round_id, created_at=NOW),
    ]
    await store.write(lambda uow: uow.outbox.add(owed))
    await store.write(lambda uow: uow.outbox.add([]))
    pending = await store.read(lambda uow: uow.outbox.pending())
    assert [replace(item, id=0) for item in pending] == owed
    last = pending[-1].id
    for _ in range(2):
        await store.write(lambda uow: uow.outbox.done(last))
    await store.write(lambda uow: uow.outbox.add(owed[:1]))
    ids = [item.id for item in await store.read(lambda uow: uow.outbox.pending())]
    assert ids[0] == pending[0].id
    assert ids[1] > last, "an id that was used again could be marked as done by a late repeat"


async def test_records_of_other_runs_stay_out(store: SqlStore) -> None:
    await store.write(stage_round)
    other = run("other")
    await store.write(lambda uow: uow.runs.add(other))
    await store.write(lambda uow: uow.versions.add(version(id=VersionId("o0"), run_id=other.id)))
    await store.write(lambda uow: uow.devices.add(device("third")))
    moved = evaluation("x", run_id=other.id, version_id=VersionId("o0"), device_id=DeviceId("id-third"))
    await store.write(lambda uow: uow.rounds.add_assignment(moved))
    assert await store.read(lambda uow: uow.rounds.was_evaluated(DeviceId("id-third"), VersionId("o0")))
    assert not await store.read(lambda uow: uow.rounds.was_evaluated(DeviceId("id-third"), VersionId("v0")))
    assert await store.read(lambda uow: uow.rounds.latest(other.id)) is None
