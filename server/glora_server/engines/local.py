"""The engine of one machine: a worker process that owns torch and the GPU, fed by a thread that never imports it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Final, cast

from glora_server.coordinator.model import StatePart
from glora_server.coordinator.ports import (
    AggregatedPart,
    AggregateJob,
    CheckJob,
    CheckResult,
    InitialiseJob,
    NumericsEngine,
    RenderJob,
    StrategyChoice,
    StrategyInfo,
    WorkerLostError,
)
from glora_server.engines.process import WorkerProcess
from glora_server.engines.protocol import (
    CheckStrategy,
    DescribeStrategy,
    Job,
    ListStrategies,
    Result,
)
from glora_wire.errors import GloraError, Refusal

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """The worker so far: pid and device are of the present process (0 and "" when none runs), the rest is of all.

    `peak_bytes` is the largest resident size that any of them reported.
    """

    pid: int = 0
    device: str = ""
    jobs: int = 0
    restarts: int = 0
    busy_seconds: float = 0.0
    peak_bytes: int = 0
    queued: int = 0
    """Jobs that wait for it."""


class EngineClosedError(Exception):
    """The engine was closed before the job was done.

    Not a GloraError, which would be a verdict on the job: whoever owed it owes it still, after the next start.
    """


@dataclass(frozen=True, slots=True)
class _Request:
    """A job and the place for its result; job None only starts the worker."""

    job: Job | None
    result: Future[Result]


class LocalEngine(NumericsEngine):
    """Jobs run one at a time, in the order in which they were given.

    A caller that is cancelled leaves its job behind: it is dropped when it has not begun, and else finished and
    forgotten, so that requests and answers stay in step. When the worker ends, the job in flight raises
    WorkerLostError and the next one starts another worker.
    """

    def __init__(self, *, device: str = "auto", threads: int = 0, max_waiting: int = 64) -> None:
        """`threads` of torch in the worker, 0 = as it likes; beyond `max_waiting` jobs callers wait unqueued."""
        self._choice = device
        self._threads = threads
        self._places = asyncio.Semaphore(max_waiting)
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._worker: WorkerProcess | None = None
        self._closed = False
        self._guard = threading.Lock()
        """Over `_worker`, `_closed` and `_stats`, which the thread changes and others read."""
        self._starts = 0
        self._stats = WorkerStats()

    @property
    def device(self) -> str:
        """Where the worker computes ("cpu", "cuda:0 (NVIDIA …)"); empty while no worker runs."""
        return self.stats().device

    def stats(self) -> WorkerStats:
        """Counters for the metrics page."""
        with self._guard:
            found, worker = replace(self._stats, queued=self._requests.qsize()), self._worker
            # One that ended while it had nothing to do is still here: the next job notices and starts another.
            if worker is None or not worker.alive:
                return found
            return replace(found, pid=worker.hello.pid, device=worker.hello.device)

    async def start(self) -> None:
        """Start the worker now (2 to 5 s) instead of with the first job; raises GloraError when it cannot serve."""
        await self._submit(None)

    async def close(self) -> None:
        """End the worker, also in the middle of a job; it and those that wait raise EngineClosedError."""
        with self._guard:
            self._closed = True
            worker = self._worker
        if worker is not None:
            worker.kill()
        if self._thread is not None:
            self._requests.put(None)
            await asyncio.to_thread(self._thread.join)

    async def initialise(self, job: InitialiseJob) -> tuple[StatePart, ...]:  # noqa: D102 (see the port)
        return cast("tuple[StatePart, ...]", await self._submit(job))

    async def render(self, job: RenderJob) -> None:  # noqa: D102
        await self._submit(job)

    async def check(self, job: CheckJob) -> CheckResult:  # noqa: D102
        return cast("CheckResult", await self._submit(job))

    async def aggregate(self, job: AggregateJob) -> tuple[AggregatedPart, ...]:  # noqa: D102
        return cast("tuple[AggregatedPart, ...]", await self._submit(job))

    async def strategies(self) -> tuple[StrategyInfo, ...]:  # noqa: D102
        return cast("tuple[StrategyInfo, ...]", await self._submit(ListStrategies()))

    async def describe(self, choice: StrategyChoice, *, round_index: int) -> StrategyInfo:  # noqa: D102
        return cast("StrategyInfo", await self._submit(DescribeStrategy(choice=choice, round_index=round_index)))

    async def check_strategy(  # noqa: D102
        self, choice: StrategyChoice, *, min_rank: int, max_rank: int
    ) -> Refusal | None:
        question = CheckStrategy(choice=choice, min_rank=min_rank, max_rank=max_rank)
        return cast("Refusal | None", await self._submit(question))

    async def _submit(self, job: Job | None) -> Result:
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        request = _Request(job, Future())
        # The place is held until the job has ended, not its caller: a cancelled one may still occupy the worker.
        request.result.add_done_callback(lambda _: _call_in(loop, self._places.release))
        self._enqueue(request)
        return await asyncio.wrap_future(request.result)

    def _enqueue(self, request: _Request) -> None:
        with self._guard:
            if self._closed:
                request.result.set_exception(_closed())
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._feed, name="glora-engine", daemon=True)
                self._thread.start()
            self._requests.put(request)

    # ---- in the thread ----

    def _feed(self) -> None:
        while self._feed_one():
            pass
        if self._worker is not None:
            self._worker.close()
            self._forget_worker()

    def _feed_one(self) -> bool:
        """Do one request; False when there will be no more. No reference to it stays behind: states are large."""
        request = self._requests.get()
        if request is None:
            return False
        if request.result.set_running_or_notify_cancel():
            try:
                request.result.set_result(self._perform(request.job))
            except Exception as error:  # noqa: BLE001 (the caller gets it; the thread lives on)
                request.result.set_exception(error)
        return True

    def _perform(self, job: Job | None) -> Result:
        try:
            worker = self._ready_worker()
            if job is None:
                return None
            answer = worker.exchange(job)
        except WorkerLostError as error:
            if self._forget_worker():
                raise _closed() from error
            _log.warning("worker_lost", extra={"job": type(job).__name__, "cause": str(error)})
            raise
        with self._guard:
            self._stats = replace(
                self._stats,
                jobs=self._stats.jobs + 1,
                busy_seconds=self._stats.busy_seconds + answer.seconds,
                peak_bytes=max(self._stats.peak_bytes, answer.peak_bytes),
            )
        if isinstance(answer.outcome, GloraError):
            raise answer.outcome
        return answer.outcome

    def _ready_worker(self) -> WorkerProcess:
        if self._worker is not None and self._worker.alive:
            return self._worker
        if self._worker is not None:
            self._worker.close()
            self._forget_worker()
        self._refuse_when_closed()
        worker = WorkerProcess(self._choice, self._threads)
        self._starts += 1
        with self._guard:
            self._worker = worker
            self._stats = replace(
                self._stats,
                restarts=self._starts - 1,
                peak_bytes=max(self._stats.peak_bytes, worker.hello.peak_bytes),
            )
        # From here on close() kills the worker; before, it did not know of it.
        self._refuse_when_closed()
        return worker

    def _refuse_when_closed(self) -> None:
        with self._guard:
            if self._closed:
                raise _closed()

    def _forget_worker(self) -> bool:
        """Note that no worker runs; whether the engine is closed."""
        with self._guard:
            self._worker = None
            return self._closed


def _call_in(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody waits for a place
        loop.call_soon_threadsafe(action)


def _closed() -> EngineClosedError:
    return EngineClosedError("The server is shutting down; the job was not done and stays owed.")
