"""The store: `write` in the writer thread, `read` on snapshots in a few reader threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Self, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from glora_server.coordinator.model import Page
from glora_server.coordinator.ports import UnitOfWork
from glora_server.rounds.round import Round
from glora_server.storage import migrate as schema
from glora_server.storage.database import READERS, Database, connect
from glora_server.storage.errors import is_passing, is_read_only, kind_of, translated, unusable
from glora_server.storage.observer import NobodyCounts, StoreObserver
from glora_server.storage.recent_rounds import RecentRounds
from glora_server.storage.unit_of_work import SqlUnitOfWork
from glora_server.storage.writer import Writer
from glora_wire.errors import GloraError, Reason

T = TypeVar("T")

_READ_TRIES: Final = 3


class SqlStore:
    """A relational database behind the port `Store`; made by `open`, ended by `close`."""

    def __init__(self, database: Database, clock: Callable[[], float], observer: StoreObserver) -> None:
        self._database = database
        self._now = clock
        self._observer = observer
        self._writer = Writer(database.writer, database.url_for_log, observer)
        self._recent = RecentRounds()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="glora-reader")

    @classmethod
    def open(
        cls,
        url: str,
        *,
        migrate: bool = True,
        clock: Callable[[], float] = time.time,
        observer: StoreObserver | None = None,
    ) -> Self:
        """The store at `url`, with the schema brought up to date; raises DATABASE_UNUSABLE saying what to do.

        Without `migrate` an old schema is refused. `sqlite://` is a database in memory, for tests.
        """
        database = connect(url)
        try:
            with database.writer.begin() as connection:
                if migrate:
                    schema.upgrade(connection)
                else:
                    schema.require_head(connection)
        except (SQLAlchemyError, GloraError) as error:
            database.dispose()
            raise unusable(error, database.url_for_log) from error
        return cls(database, clock, observer or NobodyCounts())

    @property
    def url_for_log(self) -> str:
        """The database's URL, its password masked."""
        return self._database.url_for_log

    async def write(self, work: Callable[[UnitOfWork], T]) -> T:
        """Run `work` in the writer thread and commit durably; what it raises is raised here and rolls back.

        Called again after a deadlock or a lost connection, so `work` must do nothing but use its unit of work.
        """

        def job(connection: Connection) -> tuple[T, Collection[Round]]:
            uow = self._unit_of_work(connection, locks=True)
            return work(uow), uow.rounds.seen

        answer: Future[tuple[T, Collection[Round]]] = self._writer.submit(job)
        result, committed = await asyncio.wrap_future(answer)
        self._recent.learn(committed)
        return result

    async def read(self, work: Callable[[UnitOfWork], T]) -> T:
        """Run `work` on a consistent snapshot; raises RuntimeError when it tries to change anything."""
        if not self._writer.alive:
            raise GloraError(Reason.SHUTTING_DOWN, "The server is shutting down; ask again in a moment.")
        reader = self._database.reader
        if reader is None:
            answer: Future[T] = self._writer.submit(lambda connection: self._read_in_memory(connection, work))
            return await asyncio.wrap_future(answer)
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, reader, work)

    async def check(self) -> None:
        """Return when the database answers and changes are being taken; raises DATABASE_UNUSABLE."""
        if not self._writer.alive:
            raise GloraError(Reason.DATABASE_UNUSABLE, "The database is closed: the server is shutting down.")
        await self.read(lambda uow: uow.audit.list(Page(size=1)))

    @property
    def queued(self) -> int:
        """Changes that wait for the thread that writes."""
        return self._writer.queued

    async def close(self) -> None:
        """Finish what was submitted, then close all connections."""
        await asyncio.to_thread(self.close_now)

    def close_now(self) -> None:
        """The same as `close`, for code without a loop."""
        self._writer.close()
        self._readers.shutdown()
        self._database.dispose()

    def _read(self, reader: Engine, work: Callable[[UnitOfWork], T]) -> T:
        for attempt in range(1, _READ_TRIES + 1):
            try:
                with reader.begin() as connection:
                    return self._looked(connection, work)
            except DBAPIError as error:
                if is_read_only(error):
                    raise RuntimeError("work that was given to read() must not change anything") from error
                self._observer.failed(operation="read", kind=kind_of(error))
                if attempt == _READ_TRIES or not is_passing(error):
                    raise translated(error, self.url_for_log) from error
        raise AssertionError("the last try returns")

    def _looked(self, connection: Connection, work: Callable[[UnitOfWork], T]) -> T:
        uow = self._unit_of_work(connection, locks=False)
        result = work(uow)
        self._recent.learn(uow.rounds.seen)
        return result

    def _unit_of_work(self, connection: Connection, *, locks: bool) -> SqlUnitOfWork:
        return SqlUnitOfWork(connection, locks=locks, now=self._now, recent=self._recent)

    def _read_in_memory(self, connection: Connection, work: Callable[[UnitOfWork], T]) -> T:
        connection.exec_driver_sql("PRAGMA query_only = ON")
        try:
            return self._looked(connection, work)
        except DBAPIError as error:
            if is_read_only(error):
                raise RuntimeError("work that was given to read() must not change anything") from error
            raise
        finally:
            connection.exec_driver_sql("PRAGMA query_only = OFF")
