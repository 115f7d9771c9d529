"""What a store does when processes, connections, disks and databases fail it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, text
from storage_gate import Gate, connection_of, token_names
from storage_records import NOW, bound, device, run, stage, together, token

from glora_server.coordinator.model import Page
from glora_server.coordinator.ports import UnitOfWork
from glora_server.rounds.ids import DeviceId, TokenId
from glora_server.storage.store import SqlStore
from glora_wire.errors import GloraError, Reason

_PI, _NANO = DeviceId("id-pi"), DeviceId("id-nano")

_KILLED = """
import asyncio, os, sys, threading
from storage_records import bound, token
from glora_server.storage.store import SqlStore

async def main():
    store = SqlStore.open(sys.argv[1])
    await store.write(lambda uow: uow.tokens.add(token("whole")))
    gate = threading.Event()
    jobs = [store.write(lambda uow: gate.wait(20))]
    jobs += [store.write(bound(lambda uow, i: uow.tokens.add(token(f"half{i}")), i)) for i in range(3)]

    def die(uow):
        uow.tokens.add(token("last"))
        os._exit(9)

    jobs.append(store.write(die))
    tasks = [asyncio.create_task(job) for job in jobs]
    await asyncio.sleep(0.1)
    gate.set()
    await asyncio.gather(*tasks)

asyncio.run(main())
"""


async def test_a_process_killed_in_a_transaction_leaves_nothing_half_written(shared_url: str) -> None:
    helpers = str(Path(__file__).parent.parent / "helpers")
    code = f"import sys; sys.path.insert(0, {helpers!r})\n{_KILLED}"
    done = await asyncio.create_subprocess_exec(sys.executable, "-c", code, shared_url, stderr=subprocess.PIPE)
    _, errors = await asyncio.wait_for(done.communicate(), 60)
    assert done.returncode == 9, errors.decode()
    store = SqlStore.open(shared_url)
    assert await token_names(store) == ["whole"]
    await store.write(lambda uow: uow.tokens.add(token("next")))
    if shared_url.startswith("sqlite"):
        assert (
            await store.read(lambda uow: connection_of(uow).exec_driver_sql("PRAGMA integrity_check").scalar()) == "ok"
        )
    await store.close()


async def test_a_full_disk_is_named_and_survived(tmp_path: Path) -> None:
    """SQLite rolls back the whole transaction by itself; the rest of the group is done all the same."""
    store = SqlStore.open(f"sqlite:///{tmp_path}/glora.db")

    def set_pages(uow: UnitOfWork, pages: int) -> None:
        connection_of(uow).exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill(uow: UnitOfWork) -> None:
        uow.tokens.add(token("huge", description="x" * 5_000_000))

    await store.write(lambda uow: set_pages(uow, 1))  # SQLite takes the present size when that is larger
    jobs: list[Callable[[UnitOfWork], object]] = [lambda _: None, fill, lambda _: 7]
    gate = Gate(store)
    await gate.closed()
    tasks = [asyncio.create_task(store.write(work)) for work in jobs]
    await gate.open()
    nothing, full, seven = await asyncio.gather(*tasks, return_exceptions=True)
    assert (nothing, seven) == (None, 7)
    assert isinstance(full, GloraError)
    assert full.reason is Reason.STORAGE_FULL
    assert "glora.db" in full.message
    await store.write(lambda uow: set_pages(uow, 2**30))
    await store.write(fill)
    assert await token_names(store) == ["huge"]
    await store.close()


async def test_a_database_that_somebody_else_keeps_locked_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/glora.db"
    store, other = SqlStore.open(url), SqlStore.open(url)
    await store.write(lambda uow: connection_of(uow).exec_driver_sql("PRAGMA busy_timeout = 5"))
    gate = Gate(other)
    await gate.closed()
    with pytest.raises(GloraError, match="database is locked") as raised:
        await store.write(lambda uow: uow.tokens.add(token()))
    assert raised.value.reason is Reason.DATABASE_UNUSABLE
    await gate.open()
    await store.write(lambda uow: uow.tokens.add(token()))
    await store.close()
    await other.close()


async def test_a_deadlock_between_replicas_is_tried_again(postgres_url: str) -> None:
    stores = [SqlStore.open(postgres_url), SqlStore.open(postgres_url)]
    await stores[0].write(stage)
    both = threading.Barrier(2)

    def swap(uow: UnitOfWork, first: DeviceId, second: DeviceId) -> None:
        mine = uow.devices.get(first)
        if not both.broken:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(20)
            both.abort()
        uow.devices.save(replace(mine, granted_rank=mine.granted_rank + 1))
        theirs = uow.devices.get(second)
        uow.devices.save(replace(theirs, granted_rank=theirs.granted_rank + 1))

    await asyncio.gather(
        stores[0].write(lambda uow: swap(uow, _PI, _NANO)), stores[1].write(lambda uow: swap(uow, _NANO, _PI))
    )
    found = await stores[0].read(lambda uow: [uow.devices.get(name) for name in (_PI, _NANO)])
    assert [item.granted_rank for item in found] == [10, 10]
    for store in stores:
        await store.close()


async def test_a_lost_connection_is_made_again(postgres_url: str) -> None:
    store = SqlStore.open(postgres_url)
    tries = {"write": 0, "read": 0}

    def dies_once(uow: UnitOfWork, kind: str) -> int:
        tries[kind] += 1
        if tries[kind] == 1:
            connection_of(uow).execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return len(uow.tokens.list(Page()).items)

    gate = Gate(store)
    await gate.closed()
    jobs: list[Callable[[UnitOfWork], object]] = [
        bound(lambda uow, i: uow.tokens.add(token(f"t{i}")), i) for i in range(2)
    ]
    jobs.insert(1, lambda uow: dies_once(uow, "write"))
    tasks = [asyncio.create_task(store.write(job)) for job in jobs]
    await gate.open()
    assert await asyncio.gather(*tasks) == [None, 1, None]
    assert await store.read(lambda uow: dies_once(uow, "read")) == 2
    assert tries == {"write": 2, "read": 2}
    await store.close()


async def test_a_connection_lost_in_the_commit_is_not_tried_again(postgres_url: str) -> None:
    """Whether it was saved is not known, so the caller must look; doing it twice could be worse."""
    store = SqlStore.open(postgres_url)
    ran: list[int] = []
    killed: list[int] = []
    writer = store._database.writer

    def kill(connection: Any) -> None:
        if killed:
            return
        killed.append(1)
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        with psycopg.connect(postgres_url, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

    event.listen(writer, "commit", kill)
    with pytest.raises(GloraError, match="lost while it was saving") as raised:
        await store.write(together(lambda _: ran.append(1), lambda uow: uow.tokens.add(token())))
    assert raised.value.reason is Reason.DATABASE_UNUSABLE
    assert (ran, killed) == ([1], [1])
    await store.write(lambda uow: uow.devices.add(device("after", created_at=NOW)))
    await store.write(lambda uow: uow.runs.add(run()))
    assert await store.read(lambda uow: uow.tokens.list(Page())) is not None
    with pytest.raises(GloraError):
        await store.read(lambda uow: uow.tokens.get(TokenId("t")))
    await store.close()


async def test_a_database_that_went_away_is_named_and_found_again(postgres_url: str) -> None:
    store = SqlStore.open(postgres_url)
    server, _, name = postgres_url.rpartition("/")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        admin.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [name])
        for attempt in (store.write(lambda uow: uow.tokens.add(token())), store.check()):
            with pytest.raises(GloraError, match="does not answer") as raised:
                await attempt
            assert raised.value.reason is Reason.DATABASE_UNUSABLE
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
    await store.write(lambda uow: uow.tokens.add(token()))
    await store.check()
    await store.close()


def test_a_postgresql_database_that_is_not_there_is_named(postgres_server: str) -> None:
    with pytest.raises(GloraError, match=r"nothing_here.*Create it first") as raised:
        SqlStore.open(f"{postgres_server}/nothing_here")
    assert raised.value.reason is Reason.DATABASE_UNUSABLE


async def test_a_job_that_fails_only_at_the_commit_does_not_fail_its_group(tmp_path: Path) -> None:
    """A foreign key that is checked late breaks the COMMIT of the whole group; then each job is run alone."""
    store = SqlStore.open(f"sqlite:///{tmp_path}/glora.db")

    def breaks_late(uow: UnitOfWork) -> None:
        connection_of(uow).exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        uow.devices.add(device("orphan", token_id=TokenId("nobody's")))

    jobs: list[Callable[[UnitOfWork], object]] = [
        lambda uow: uow.tokens.add(token("before")),
        breaks_late,
        lambda uow: uow.tokens.add(token("behind")),
    ]
    gate = Gate(store)
    await gate.closed()
    tasks = [asyncio.create_task(store.write(job)) for job in jobs]
    await gate.open()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(item).__name__ for item in results] == ["NoneType", "IntegrityError", "NoneType"]
    assert await token_names(store) == ["before", "behind"]
    assert (await store.read(lambda uow: uow.devices.all())) == ()
    await store.close()
