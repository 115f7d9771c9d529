"""Lists, history and kept answers, on every database alike."""

from __future__ import annotations

import pytest
from storage_records import NOW, assignment, bound, device, evaluation, measurement, stage, stage_round
from synthetic_history import MAIN, Size, fill_store

from glora_server.coordinator.model import AuditEntry, Measurement, MetricPhase, Page
from glora_server.coordinator.ports import KeptAnswer, UnitOfWork
from glora_server.coordinator.queries_plots import exports, lineage, series, spectrum
from glora_server.coordinator.views_history import AuditFilter, Outcome
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.ids import DeviceId, RoundId, RunId, VersionId
from glora_server.storage.store import SqlStore
from glora_wire.errors import GloraError, Reason

PI, NANO = DeviceId("id-pi"), DeviceId("id-nano")
RUN = RunId("id-first")


async def test_a_whole_history_is_listed_and_plotted(store: SqlStore) -> None:
    await fill_store(store, Size(devices=24, rounds=4, per_round=8, live=12), at=NOW)

    def look(uow: UnitOfWork) -> None:
        run = uow.runs.by_name(MAIN)
        assert len(uow.lists.roster()) == 24
        listed = uow.lists.rounds(run.id, Page(size=2))
        assert [item.number for item in listed.items] == [5, 4]
        more = uow.lists.rounds(run.id, Page(size=10, token=listed.next_token))
        assert [item.number for item in more.items] == [3, 2, 1]
        live = uow.lists.round(run.id, 5)
        assert sum(uow.lists.phases([live.id])[live.id].values()) == 12
        open_ = uow.lists.open_assignments(live.id, 100)
        assert open_[0].phase is AssignmentPhase.UPLOADING
        assert open_[-1].phase is AssignmentPhase.OFFERED
        busy = uow.lists.open_of([item.device_id for item in open_])
        assert set(busy) == {item.device_id for item in open_}
        names = uow.lists.run_names({run.id})
        assert names == {run.id: MAIN}
        plotted = series(uow, run)
        assert [figures.number for figures in plotted.rounds] == [1, 2, 3, 4]
        assert {point.score.version_number for point in plotted.quality} == {0, 1, 2, 3, 4}
        assert len(spectrum(uow, run).cells) == 24 * 4
        assert lineage(uow, run, Page()).items[0].contributors > 0
        assert len(exports(uow, run, Page()).items) == 5
        assert uow.lists.size_bytes() > 100_000
        assert uow.history.rejections(0.0, 5)

    await store.read(look)


async def test_measurements_come_in_pages(store: SqlStore) -> None:
    await store.write(stage_round)
    every = [
        measurement(rank=rank, phase=phase, version_number=number)
        for number in (0,)
        for rank in (1, 2, 8)
        for phase in (MetricPhase.BEFORE, MetricPhase.AFTER)
    ]
    await store.write(lambda uow: uow.measurements.put(every))
    found: list[Measurement] = []
    token = ""
    for _ in range(3):
        part = await store.read(bound(lambda uow, at: uow.lists.measurements(RUN, Page(size=2, token=at)), token))
        found += part.items
        token = part.next_token
    assert token == ""
    assert [(item.rank, item.phase) for item in found] == [
        (rank, phase) for rank in (1, 2, 8) for phase in (MetricPhase.AFTER, MetricPhase.BEFORE)
    ]


async def test_outcomes_are_counted_on_top(store: SqlStore) -> None:
    await store.write(stage)
    for _ in range(2):
        await store.write(
            lambda uow: uow.history.count_outcomes(
                [(PI, Outcome.ACCEPTED), (PI, Outcome.ACCEPTED), (NANO, Outcome.FAILED)]
            )
        )
    assert await store.read(lambda uow: uow.lists.outcomes(PI)) == {Outcome.ACCEPTED: 4}
    roster = {entry.id: entry.outcomes for entry in await store.read(lambda uow: uow.lists.roster())}
    assert roster == {PI: {Outcome.ACCEPTED: 4}, NANO: {Outcome.FAILED: 2}}


async def test_fresh_scores_are_those_that_are_remembered_later(store: SqlStore) -> None:
    await store.write(stage_round)
    await store.write(lambda uow: uow.rounds.add_assignment(evaluation("e1", device_id=NANO)))
    measured = [
        measurement(rows=30, accuracy=1.0, loss=1.0),
        measurement("e1", device_id=NANO, rows=10, accuracy=0.0, loss=float("nan")),
    ]
    await store.write(lambda uow: uow.measurements.put(measured))
    (fresh,) = await store.read(lambda uow: uow.history.fresh_scores(RUN, 0))
    await store.write(lambda uow: uow.history.rescore(RUN, 0))
    (kept,) = await store.read(lambda uow: uow.history.scores(RUN, [0]))
    for score in (fresh, kept):
        assert (score.accuracy, score.loss, score.rows, score.devices) == (0.75, 1.0, 40, 2)
    assert fresh.accuracies is None
    assert kept.accuracies is not None
    assert kept.accuracies.median == 0.5
    assert await store.read(lambda uow: uow.history.fresh_scores(RUN, 7)) == ()


async def test_a_device_finds_the_oldest_version_that_it_has_not_seen(store: SqlStore) -> None:
    await store.write(stage)
    found = await store.read(lambda uow: uow.lists.unseen_version(RUN, PI))
    assert found is not None
    assert found.id == "v0"
    await store.write(lambda uow: uow.rounds.add_assignment(evaluation("e1")))
    assert await store.read(lambda uow: uow.lists.unseen_version(RUN, PI)) is None
    assert await store.read(lambda uow: uow.lists.unseen_version(RUN, NANO)) is not None
    (open_,) = await store.read(lambda uow: uow.lists.open_evaluations(RUN, 10))
    assert open_.id == "e1"


async def test_devices_of_a_thousand_ids_are_one_question(store: SqlStore) -> None:
    await store.write(stage)
    ids = [DeviceId(f"nobody{place}") for place in range(40_000)]
    found = await store.read(lambda uow: uow.lists.devices([*ids, PI]))
    assert found == {PI: device("pi")}


async def test_work_names_run_and_round(store: SqlStore) -> None:
    await store.write(stage_round)
    await store.write(lambda uow: uow.rounds.add_assignment(evaluation("e1", offered_at=NOW + 5)))
    found = (await store.read(lambda uow: uow.lists.work(PI, Page()))).items
    assert [(item.assignment.id, item.run_name, item.round_number, item.attempt) for item in found] == [
        ("e1", "first", None, None),
        ("a1", "first", 1, 1),
    ]
    assert found[1].assignment == assignment()
    with pytest.raises(GloraError) as raised:
        await store.read(lambda uow: uow.lists.round(RUN, 1, 2))
    assert raised.value.reason is Reason.ROUND_UNKNOWN
    phases = await store.read(lambda uow: uow.lists.phases([RoundId("r1"), RoundId("none")]))
    assert phases == {"r1": {AssignmentPhase.OFFERED: 1}, "none": {}}


async def test_actions_are_found_by_their_first_part(store: SqlStore) -> None:
    def write(uow: UnitOfWork) -> None:
        for place, action in enumerate(("run.pause", "run.resume", "runner.x", "device.approve")):
            uow.audit.add(AuditEntry(at=NOW + place, actor="maria", action=action, target="t"))

    await store.write(write)
    found = await store.read(lambda uow: uow.lists.audit(AuditFilter(action="run."), Page()))
    assert [entry.action for entry in found.items] == ["run.resume", "run.pause"]
    found = await store.read(lambda uow: uow.lists.audit(AuditFilter(since=NOW + 1, until=NOW + 3), Page()))
    assert [entry.action for entry in found.items] == ["runner.x", "run.resume"]


async def test_answers_are_kept_for_their_time(store: SqlStore) -> None:
    answer = KeptAnswer(request_sha256="ab", sealed=b"\x00\xff", created_at=NOW)
    await store.write(lambda uow: uow.answers.keep("maria", "key", answer, forget_before=0.0))
    assert await store.read(lambda uow: uow.answers.find("maria", "key", NOW - 10)) == answer
    assert await store.read(lambda uow: uow.answers.find("maria", "key", NOW + 10)) is None
    assert await store.read(lambda uow: uow.answers.find("jonas", "key", NOW - 10)) is None
    other = KeptAnswer(request_sha256="cd", sealed=b"x", created_at=NOW + 100)
    await store.write(lambda uow: uow.answers.keep("maria", "other", other, forget_before=NOW + 50))
    assert await store.read(lambda uow: uow.answers.find("maria", "key", 0.0)) is None


async def test_contributors_of_nothing_are_none(store: SqlStore) -> None:
    await store.write(stage)
    assert await store.read(lambda uow: uow.history.contributors([VersionId("v0")])) == {}
    assert await store.read(lambda uow: uow.history.contributors([])) == {}
    assert await store.read(lambda uow: uow.history.last_number(RUN)) == 0
