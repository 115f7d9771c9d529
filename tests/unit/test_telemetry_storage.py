"""What the store tells its observer: commits that changed something, and trouble of the database itself."""

import asyncio
from pathlib import Path

import pytest
from storage_gate import Gate, connection_of
from storage_records import bound, stage, token

from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.upload_session import Place, Places
from glora_server.storage.store import SqlStore
from glora_server.telemetry.metrics import Metrics
from glora_wire.errors import GloraError, Reason


def commits(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("glora_database_commit_seconds_count") or 0.0


def errors(metrics: Metrics, kind: str, operation: str = "write") -> float | None:
    return metrics.registry.get_sample_value("glora_database_errors_total", {"operation": operation, "kind": kind})


def open_store(folder: Path, metrics: Metrics) -> SqlStore:
    return SqlStore.open(f"sqlite:///{folder}/glora.db", observer=metrics)


def add_token(uow: UnitOfWork, name: str) -> None:
    uow.tokens.add(token(name))


async def test_a_commit_is_timed_and_a_read_or_a_refusal_is_none(tmp_path: Path) -> None:
    metrics = Metrics()
    store = open_store(tmp_path, metrics)
    await store.write(stage)
    assert commits(metrics) == 1
    await store.read(lambda uow: uow.lists.size_bytes())
    with pytest.raises(GloraError):
        await store.write(stage)  # the names are taken
    assert commits(metrics) == 1
    assert [errors(metrics, kind) for kind in ("full", "lost", "busy", "other")] == [0, 0, 0, 0]
    await store.close()


async def test_writes_that_wait_are_seen_and_share_a_commit(tmp_path: Path) -> None:
    metrics = Metrics()
    store = open_store(tmp_path, metrics)
    gate = Gate(store)
    await gate.closed()
    before = commits(metrics)
    tasks = [asyncio.create_task(store.write(bound(add_token, f"t{number}"))) for number in range(3)]
    await asyncio.sleep(0.05)
    assert store.queued == 3
    await gate.open()
    await asyncio.gather(*tasks)
    assert store.queued == 0
    assert commits(metrics) <= before + 2, "that of the gate and that of the group"
    await store.close()


async def test_a_full_disk_is_an_error_of_the_database(tmp_path: Path) -> None:
    def fill(uow: UnitOfWork) -> None:
        uow.tokens.add(token("huge", description="x" * 5_000_000))

    metrics = Metrics()
    store = open_store(tmp_path, metrics)
    await store.write(lambda uow: connection_of(uow).exec_driver_sql("PRAGMA max_page_count = 1"))
    with pytest.raises(GloraError) as full:
        await store.write(fill)
    assert full.value.reason is Reason.STORAGE_FULL
    assert errors(metrics, "full") == 1
    await store.close()


async def test_places_know_who_holds_and_who_waits() -> None:
    places = Places(1)
    first, second, third = Place(places), Place(places), Place(places)
    await first.take()
    waiting = asyncio.create_task(second.take())
    gone = asyncio.create_task(third.take())
    await asyncio.sleep(0)
    assert (places.total, places.used, places.waiting) == (1, 1, 2)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert (places.used, places.waiting) == (1, 1)
    first.give_back()
    first.give_back()
    await waiting
    assert (places.used, places.waiting) == (1, 0)
    second.give_back()
    assert (places.used, places.waiting) == (0, 0)
