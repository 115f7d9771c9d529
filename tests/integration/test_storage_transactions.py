"""What a transaction promises: alone or in a group, with rivals, when processes and connections die."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from sqlalchemy import event
from storage_gate import Gate, token_names
from storage_records import bound, stage, token

from glora_server.coordinator.model import Page
from glora_server.coordinator.ports import UnitOfWork
from glora_server.rounds.ids import RunId
from glora_server.storage.store import SqlStore
from glora_wire.errors import GloraError, Reason


def _commits(store: SqlStore) -> list[str]:
    seen: list[str] = []
    event.listen(store._database.writer, "commit", lambda _connection: seen.append("commit"))
    return seen


def _spend(uow: UnitOfWork, pause: float = 0.0) -> int:
    before = uow.runs.get(RunId("id-first"))
    time.sleep(pause)
    return uow.runs.save(replace(before, rounds_done=before.rounds_done + 1)).rounds_done


async def test_a_job_that_fails_is_rolled_back_alone(store: SqlStore) -> None:
    commits = _commits(store)
    gate = Gate(store)
    await gate.closed()

    def fails_late(uow: UnitOfWork) -> None:
        uow.tokens.add(token("bad"))
        raise ValueError("after its change")

    def fails_in_the_database(uow: UnitOfWork) -> None:
        uow.tokens.add(token("worse"))
        uow.tokens.add(token("worse"))

    jobs: list[Callable[[UnitOfWork], object]] = [
        bound(lambda uow, i: uow.tokens.add(token(f"good{i}")), i) for i in range(3)
    ]
    jobs[1:1] = [fails_late, fails_in_the_database]
    tasks = [asyncio.create_task(store.write(job)) for job in jobs]
    await gate.open()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert commits == ["commit", "commit"], "one for the gate, one for the group"
    assert [type(item).__name__ for item in results] == [
        "NoneType", "ValueError", "IntegrityError", "NoneType", "NoneType",
    ]  # fmt: skip
    assert await token_names(store) == ["good0", "good1", "good2"]


async def test_jobs_of_a_group_see_what_earlier_ones_did(store: SqlStore) -> None:
    await store.write(stage)
    gate = Gate(store)
    await gate.closed()
    tasks = [asyncio.create_task(store.write(_spend)) for _ in range(10)]
    await gate.open()
    assert await asyncio.gather(*tasks) == list(range(1, 11))
    assert (await store.read(lambda uow: uow.runs.get(RunId("id-first")))).rounds_done == 10


async def test_nobody_hears_before_the_commit(store: SqlStore) -> None:
    gate = Gate(store)
    await gate.closed()
    tasks = [
        asyncio.create_task(store.write(bound(lambda uow, i: uow.tokens.add(token(f"t{i}")), i))) for i in range(3)
    ]
    order: list[str] = []

    def committing(_connection: object) -> None:
        order.append(f"commit, {sum(task.done() for task in tasks)} told")

    event.listen(store._database.writer, "commit", committing)
    await gate.open()
    await asyncio.gather(*tasks)
    assert order[:2] == ["commit, 0 told", "commit, 0 told"]


async def test_a_caller_that_went_away_does_not_hurt_the_others(store: SqlStore) -> None:
    gate = Gate(store)
    await gate.closed()
    tasks = [
        asyncio.create_task(store.write(bound(lambda uow, i: uow.tokens.add(token(f"t{i}")), i))) for i in range(3)
    ]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await gate.open()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(item, asyncio.CancelledError) for item in results] == [False, True, False]
    assert await token_names(store) == ["t0", "t2"]


async def test_a_caller_that_leaves_while_its_job_runs_breaks_nothing(store: SqlStore) -> None:
    gate = Gate(store)
    await gate.closed()
    gate._task.cancel()
    gate._open.set()
    await store.write(lambda uow: uow.tokens.add(token("after")))
    assert await token_names(store) == ["after"]


async def test_more_jobs_than_a_group_takes_are_all_done(store: SqlStore) -> None:
    await asyncio.gather(*(store.write(bound(lambda uow, i: uow.tokens.add(token(f"t{i:03}")), i)) for i in range(150)))
    listed = (await store.read(lambda uow: uow.tokens.list(Page(size=1000)))).items
    assert [item.id for item in listed] == [f"t{i:03}" for i in reversed(range(150))]


async def test_a_read_must_not_change_anything(store: SqlStore) -> None:
    with pytest.raises(RuntimeError, match="must not change"):
        await store.read(lambda uow: uow.tokens.add(token("sneaky")))
    await store.write(lambda uow: uow.tokens.add(token("honest")))
    assert await token_names(store) == ["honest"]


async def test_after_close_nothing_is_taken_and_nothing_was_lost(shared_url: str) -> None:
    store = SqlStore.open(shared_url)
    tasks = [
        asyncio.create_task(store.write(bound(lambda uow, i: uow.tokens.add(token(f"t{i}")), i))) for i in range(5)
    ]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*tasks)
    with pytest.raises(GloraError) as raised:
        await store.write(lambda uow: uow.tokens.add(token("late")))
    assert raised.value.reason is Reason.SHUTTING_DOWN
    with pytest.raises(GloraError) as raised:
        await store.read(lambda uow: uow.tokens.list(Page()))
    assert raised.value.reason is Reason.SHUTTING_DOWN
    with pytest.raises(GloraError) as raised:
        await store.check()
    assert raised.value.reason is Reason.DATABASE_UNUSABLE
    again = SqlStore.open(shared_url, migrate=False)
    await again.check()
    assert len(await token_names(again)) == 5
    await again.close()


async def test_a_read_keeps_its_snapshot(shared_url: str) -> None:
    store = SqlStore.open(shared_url)
    begun, written = threading.Event(), threading.Event()

    def look(uow: UnitOfWork) -> tuple[int, int]:
        before = len(uow.tokens.list(Page()).items)
        begun.set()
        assert written.wait(20)
        return before, len(uow.tokens.list(Page()).items)

    looking = asyncio.create_task(store.read(look))
    await asyncio.to_thread(begun.wait)
    await store.write(lambda uow: uow.tokens.add(token("new")))
    written.set()
    assert await looking == (0, 0)
    assert await token_names(store) == ["new"]
    await store.close()


async def test_replicas_lose_no_increment(shared_url: str) -> None:
    """Two stores over one database: the row lock (PostgreSQL) or BEGIN IMMEDIATE (SQLite) puts them in line."""
    stores = [SqlStore.open(shared_url), SqlStore.open(shared_url)]
    await stores[0].write(stage)
    slowly = partial(_spend, pause=0.01)  # in between the other replica reads, if nothing keeps it
    results = await asyncio.gather(*(stores[i % 2].write(slowly) for i in range(20)))
    assert sorted(results) == list(range(1, 21))
    assert (await stores[1].read(lambda uow: uow.runs.get(RunId("id-first")))).rounds_done == 20
    for store in stores:
        await store.close()
