"""A state read shard by shard: one ahead, in order, and nothing left behind when the reader stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import text
from storage_records import NOW, part, run, together, version

from glora_server.coordinator.model import TensorKind
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.shards import read_shards
from glora_server.rounds.ids import VersionId
from glora_server.storage.store import SqlStore
from glora_server.storage.unit_of_work import SqlUnitOfWork
from glora_wire.errors import GloraError, Reason

T = TypeVar("T")
_V1 = VersionId("v1")
_NAME = part().name


class _Counting(SqlStore):
    """Counts the reads that were begun."""

    begun = 0

    async def read(self, work: Callable[[UnitOfWork], T]) -> T:
        self.begun += 1
        return await super().read(work)


@pytest.fixture
async def store(tmp_path: Path) -> _Counting:
    store = _Counting.open(f"sqlite:///{tmp_path}/glora.db", clock=lambda: NOW)
    await store.write(
        together(
            lambda uow: uow.runs.add(run()),
            lambda uow: uow.versions.add(version(1)),
            lambda uow: uow.versions.put_parts(_V1, part()),
        )
    )
    return store


async def test_the_next_shard_is_read_while_one_is_worked_on(store: _Counting) -> None:
    found = []
    async with aclosing(read_shards(store, _V1, [[_NAME], ["classifier.bias"], [_NAME]])) as groups:
        async for parts in groups:
            found += [(item.name, item.kind, bool(item.tensors)) for item in parts]
            await asyncio.sleep(0)  # the read that was begun gets its turn
            assert store.begun == min(len(found) + 1, 3)
    assert found == [
        (_NAME, TensorKind.MODULE, True),
        ("classifier.bias", TensorKind.DENSE, False),  # never aggregated
        (_NAME, TensorKind.MODULE, True),
    ]
    await store.close()


async def test_a_reader_that_stops_leaves_no_read_behind(store: _Counting) -> None:
    async with aclosing(read_shards(store, _V1, [[_NAME]] * 5)) as groups:
        await anext(groups)
    assert store.begun <= 2
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await store.close()


async def test_what_is_damaged_is_raised_in_its_turn(store: _Counting) -> None:
    def damage(uow: UnitOfWork) -> None:
        uow.versions.put_parts(_V1, replace(part(), name="layer.9"))
        assert isinstance(uow, SqlUnitOfWork)
        statement = "UPDATE version_tensors SET data = x'00' WHERE part = 'layer.9' AND tensor = 'u'"
        uow.connection.execute(text(statement))

    await store.write(damage)
    async with aclosing(read_shards(store, _V1, [[_NAME], ["layer.9"]])) as groups:
        assert [item.name for item in await anext(groups)] == [_NAME]
        with pytest.raises(GloraError) as raised:
            await anext(groups)
    assert raised.value.reason is Reason.DIGEST_MISMATCH
    await store.close()
