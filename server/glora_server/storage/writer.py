"""The one thread that writes: jobs that wait together share a transaction, so that they share its fsync.

Each job of a group runs in a SAVEPOINT; one that raises is rolled back alone and its exception goes to its own caller.
Nobody is told anything before the COMMIT. When the group as a whole is lost (deadlock, lost connection, full disk), its
jobs are run again one by one, so that one of them can not fail the others.
What must not happen: a caller hears "done" for something that is not on the disk.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Engine, RootTransaction
from sqlalchemy.exc import DBAPIError, IntegrityError

from glora_server.storage.errors import is_full, is_lost, is_passing, kind_of, translated
from glora_server.storage.observer import StoreObserver
from glora_wire.errors import GloraError, Reason

Work = Callable[[Connection], Any]

_GROUP: Final = 64
_TRIES: Final = 5
_FIRST_PAUSE: Final = 0.02
"""Seconds before the second try; doubles with every further one."""
_PATIENCE: Final = 15.0
"""Seconds after which no further try begins: the jobs behind this one wait for it."""


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work
    answer: Future[Any]


@dataclass(frozen=True, slots=True)
class _Outcome:
    job: _Job
    result: Any = None
    error: Exception | None = None

    def tell(self) -> None:
        if self.error is None:
            self.job.answer.set_result(self.result)
        else:
            self.job.answer.set_exception(self.error)


class _GroupLostError(Exception):
    """Nothing of the group was committed; the cause says why."""


class _InDoubtError(Exception):
    """The connection was lost during COMMIT."""


class Writer:
    """A thread with a queue; `submit` from anywhere, `close` once."""

    def __init__(self, engine: Engine, where: str, observer: StoreObserver) -> None:
        self._engine = engine
        self._where = where
        self._observer = observer
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="glora-writer", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> Future[Any]:
        """The result of `work` once it is committed; raises SHUTTING_DOWN after `close`."""
        answer: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise GloraError(Reason.SHUTTING_DOWN, "The server is shutting down; ask again in a moment.")
            self._jobs.put(_Job(work, answer))
        return answer

    @property
    def alive(self) -> bool:
        """Whether jobs are still being taken."""
        return self._thread.is_alive() and not self._closed

    @property
    def queued(self) -> int:
        """Jobs that wait for the thread."""
        return self._jobs.qsize()

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while self._serve_group():
            pass

    def _serve_group(self) -> bool:
        """Wait for jobs and run them; False when the queue is at its end."""
        group: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            # A caller that went away before its job began takes it with it; one that goes later changes nothing.
            if job.answer.set_running_or_notify_cancel():
                group.append(job)
            if len(group) == _GROUP:
                break
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
        try:
            self._run(group)
        except BaseException as error:  # noqa: BLE001 (the thread must go on, and nobody may wait for ever)
            for waiting in group:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
        return job is not None

    def _run(self, group: list[_Job]) -> None:
        if len(group) > 1:
            try:
                outcomes = self._attempt(group)
            except _GroupLostError:
                for job in group:
                    self._alone(job).tell()
                return
            except _InDoubtError as error:
                outcomes = [_Outcome(job, error=self._in_doubt(error)) for job in group]
            for outcome in outcomes:
                outcome.tell()
        elif group:
            self._alone(group[0]).tell()

    def _alone(self, job: _Job) -> _Outcome:
        """Run one job in a transaction of its own, a few times where trying again can help."""
        pause = _FIRST_PAUSE
        begun = time.monotonic()
        for attempt in range(1, _TRIES + 1):
            try:
                return self._attempt([job])[0]
            except _InDoubtError as error:
                return _Outcome(job, error=self._in_doubt(error))
            except _GroupLostError as lost:
                cause = lost.__cause__
                if not isinstance(cause, DBAPIError):
                    raise
                impatient = time.monotonic() - begun > _PATIENCE
                if attempt == _TRIES or impatient or not is_passing(cause):
                    return _Outcome(job, error=self._translated(cause))
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 (jitter)
            pause *= 2
        raise AssertionError("the last try returns")

    def _attempt(self, group: list[_Job]) -> list[_Outcome]:
        """Run the group in one transaction and commit it; raises _GroupLostError when nothing was committed."""
        begun = time.perf_counter()
        try:
            with self._engine.connect() as connection:
                outer = connection.begin()
                try:
                    step = self._in_savepoint if len(group) > 1 else self._bare
                    outcomes = [step(connection, job) for job in group]
                except BaseException:
                    outer.close()
                    raise
                if all(outcome.error is not None for outcome in outcomes):
                    outer.rollback()
                else:
                    self._commit(outer)
                    self._observer.committed(seconds=time.perf_counter() - begun)
        except DBAPIError as error:
            self._observer.failed(operation="write", kind=kind_of(error))
            raise _GroupLostError from error
        return outcomes

    def _bare(self, connection: Connection, job: _Job) -> _Outcome:
        """Run a job that has the transaction for itself."""
        try:
            return _Outcome(job, result=job.work(connection))
        except Exception as error:  # noqa: BLE001 (it goes to the caller)
            self._raise_if_lost(error)
            return _Outcome(job, error=self._translated(error))

    def _in_savepoint(self, connection: Connection, job: _Job) -> _Outcome:
        nested = connection.begin_nested()
        try:
            result = job.work(connection)
            nested.commit()
        except Exception as error:  # noqa: BLE001 (it goes to the caller)
            self._raise_if_lost(error)
            nested.rollback()  # where SQLite has rolled back everything by itself, this raises: the group is lost
            return _Outcome(job, error=self._translated(error))
        return _Outcome(job, result=result)

    def _commit(self, outer: RootTransaction) -> None:
        try:
            outer.commit()
        except DBAPIError as error:
            outer.close()
            if is_lost(error):
                self._observer.failed(operation="write", kind=kind_of(error))
                raise _InDoubtError from error
            raise

    def _raise_if_lost(self, error: Exception) -> None:
        if not isinstance(error, DBAPIError):
            return
        if is_passing(error) or is_full(error):
            raise error
        if not isinstance(error, IntegrityError):  # which answers a question: is it there already
            self._observer.failed(operation="write", kind=kind_of(error))

    def _translated(self, error: Exception) -> Exception:
        if not isinstance(error, DBAPIError):
            return error
        instead = translated(error, self._where)
        instead.__cause__ = error if instead is not error else error.__cause__
        return instead

    def _in_doubt(self, error: _InDoubtError) -> GloraError:
        instead = GloraError(
            Reason.DATABASE_UNUSABLE,
            f"The connection to the database {self._where} was lost while it was saving; ask again to see what holds.",
        )
        instead.__cause__ = error.__cause__
        return instead
