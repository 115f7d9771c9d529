"""Tools for tests of transactions."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from glora_server.coordinator.model import Page
from glora_server.coordinator.ports import UnitOfWork
from glora_server.storage.store import SqlStore
from glora_server.storage.unit_of_work import SqlUnitOfWork


class Gate:
    """A job that keeps the writer busy until it is opened, so that what is submitted meanwhile becomes one group."""

    def __init__(self, store: SqlStore) -> None:
        self._open = threading.Event()
        self._entered = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(store.write(self._wait))

    def _wait(self, _uow: UnitOfWork) -> None:
        self._loop.call_soon_threadsafe(self._entered.set)
        assert self._open.wait(20)

    async def closed(self) -> None:
        await self._entered.wait()

    async def open(self) -> None:
        await asyncio.sleep(0)  # let the tasks that were just made submit their jobs
        self._open.set()
        await self._task


async def token_names(store: SqlStore) -> list[str]:
    """Ids of the stored join tokens, sorted."""
    return sorted(item.id for item in (await store.read(lambda uow: uow.tokens.list(Page()))).items)


def connection_of(uow: UnitOfWork) -> Any:
    """The connection below a unit of work."""
    assert isinstance(uow, SqlUnitOfWork)
    return uow.connection
