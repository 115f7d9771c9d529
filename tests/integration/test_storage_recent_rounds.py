"""A round is not read again as long as its row version is the same, and never taken for what it is not."""

from __future__ import annotations

import pytest
from sqlalchemy import event
from storage_records import assignment, round_, stage

from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.transitions import step
from glora_server.rounds.assignment import Accept, AssignmentPhase
from glora_server.rounds.ids import AssignmentId, RoundId
from glora_server.rounds.round import Moved, Opened, Round
from glora_server.storage.recent_rounds import RecentRounds
from glora_server.storage.store import SqlStore

ROUND = RoundId("r1")


def _opened(uow: UnitOfWork) -> None:
    stage(uow)
    uow.rounds.add(round_())
    step(uow, ROUND, Opened((assignment("a1"), assignment("a2")), target=2), at=1.0)


def _accept(name: str, uow: UnitOfWork) -> Round:
    return step(uow, ROUND, Moved(AssignmentId(name), Accept()), at=2.0).after


def _get(uow: UnitOfWork) -> Round:
    return uow.rounds.get(ROUND)


def _reads_of_assignments(store: SqlStore) -> list[str]:
    """Statements, as they are made, that read assignments of a round."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith("SELECT") and "FROM assignments" in statement:
            seen.append(statement)

    for engine in {store._database.writer, store._database.reader} - {None}:
        event.listen(engine, "before_cursor_execute", note)
    return seen


async def test_steps_do_not_read_the_assignments_again(store: SqlStore) -> None:
    await store.write(_opened)
    seen = _reads_of_assignments(store)
    await store.write(lambda uow: _accept("a1", uow))
    after = await store.write(lambda uow: _accept("a2", uow))
    assert await store.read(_get) == after
    assert seen == []
    assert {item.phase for item in after.assignments} == {AssignmentPhase.ACCEPTED}
    assert await store.read(lambda uow: uow.rounds.assignment(AssignmentId("a1"))) == after.assignments[0]


async def test_a_row_version_that_was_rolled_back_is_not_remembered(store: SqlStore) -> None:
    await store.write(_opened)

    def fails(uow: UnitOfWork) -> None:
        _accept("a1", uow)
        raise ValueError("after its change")

    with pytest.raises(ValueError, match="after its change"):
        await store.write(fails)
    after = await store.write(lambda uow: _accept("a2", uow))
    phases = {item.id: item.phase for item in (await store.read(_get)).assignments}
    assert phases == {"a1": AssignmentPhase.OFFERED, "a2": AssignmentPhase.ACCEPTED}
    assert await store.read(_get) == after


async def test_what_another_process_did_to_a_round_is_seen(shared_url: str) -> None:
    here, there = SqlStore.open(shared_url), SqlStore.open(shared_url)
    await here.write(_opened)
    await here.read(_get)
    after = await there.write(lambda uow: _accept("a1", uow))
    assert await here.read(_get) == after
    both = await here.write(lambda uow: _accept("a2", uow))
    assert [item.phase for item in both.assignments] == [AssignmentPhase.ACCEPTED] * 2
    assert await there.read(_get) == both
    await here.close()
    await there.close()


async def test_within_a_transaction_a_round_is_what_the_transaction_made_of_it(store: SqlStore) -> None:
    await store.write(_opened)

    def work(uow: UnitOfWork) -> tuple[Round, Round]:
        return _accept("a1", uow), uow.rounds.get(ROUND)

    saved, found = await store.write(work)
    assert saved == found


def test_few_rounds_are_remembered_and_never_an_older_one() -> None:
    recent = RecentRounds()
    old, new = round_(id=ROUND, row_version=4), round_(id=ROUND, row_version=5)
    recent.learn([new])
    recent.learn([old])
    assert recent.find(ROUND, 4) is None
    assert recent.find(ROUND, 5) is new
    recent.learn(round_(id=RoundId(f"other{i}")) for i in range(16))
    assert recent.find(ROUND, 5) is None
