"""Moves rounds forward: the only caller of the round machine.

A step is one transaction (transitions.step). After it was committed the engine performs what is owed: durable effects
wait in the outbox and are performed at least once, also after a crash; wake-ups are only a convenience. On start the
engine reads live rounds and the outbox and carries on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import structlog

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import Owed, OwedKind, Profile
from glora_server.coordinator.observer import Observer
from glora_server.coordinator.ports import Store, UnitOfWork
from glora_server.coordinator.transitions import Transition, step
from glora_server.rounds.assignment import Assignment
from glora_server.rounds.ids import DeviceId, RoundId
from glora_server.rounds.round import GATHERING, DeadlinePassed, Round, RoundEvent
from glora_wire.errors import GloraError, Reason

T = TypeVar("T")
log = structlog.get_logger(__name__)

Handler = Callable[[Owed], Awaitable[None]]
_RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SAVE_PRESENCE_SECONDS = 15.0
_LOOK_AGAIN_SECONDS = 30.0
"""How often the outbox is read without being asked to: the safety net below the wake-ups."""
_RING_AGAIN_SECONDS = 1.0
"""How long after a deadline that changed nothing (it rang early, or waits for a verdict) the next look is."""


class Engine:
    """Steps of every round, their deadlines, and the effects that they owe; one per database."""

    def __init__(self, *, store: Store, hub: Hub, observer: Observer, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._hub = hub
        self._observer = observer
        self.clock = clock
        self._handlers: dict[OwedKind, list[Handler]] = {}
        self._in_flight: set[int] = set()
        self._nudge = asyncio.Event()
        self._timers: dict[RoundId, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._commits: set[asyncio.Task[Any]] = set()

    def handle(self, kind: OwedKind, handler: Handler) -> None:
        """Say who performs effects of this kind, after those who said so before; before `start`."""
        self._handlers.setdefault(kind, []).append(handler)

    async def start(self) -> None:
        """Pick up everything that a former process left."""
        live = await self._store.read(lambda uow: uow.rounds.live())
        for round_ in live:
            self._arm(round_)
        self._spawn(self._pump_outbox())
        self._spawn(self._save_presence())
        self._nudge.set()
        log.info("engine_started", live_rounds=len(live))

    async def close(self) -> None:
        """Stop; whatever is owed stays owed."""
        for timer in self._timers.values():
            timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._commits, return_exceptions=True)

    async def apply(self, round_id: RoundId, event: RoundEvent) -> Round:
        """The round after `event`, committed; raises ILLEGAL_TRANSITION."""
        done = await self.commit(lambda uow: step(uow, round_id, event, at=self.clock()), moved=one)
        return done.after

    async def commit(self, work: Callable[[UnitOfWork], T], *, moved: Callable[[T], Iterable[Transition]]) -> T:
        """Run `work` in a transaction, then perform what follows from the steps that it took (`moved`).

        A caller that is cancelled meanwhile leaves both to the engine: what was committed is always followed up.
        """

        async def both() -> T:
            result = await self._store.write(work)
            for done in moved(result):
                self.committed(done)
            return result

        task = asyncio.create_task(both())
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return await asyncio.shield(task)

    def committed(self, done: Transition) -> None:
        """Perform what follows from a step that is in the database."""
        if done.after is done.before:
            return
        self._arm(done.after)
        self._observer.round_moved(done.before, done.after)
        if done.owes:
            self._nudge.set()
        before = {a.id: a for a in done.before.assignments}
        for assignment in done.after.assignments:
            known = before.get(assignment.id)
            if known is not assignment and known != assignment:
                self._assignment_moved(assignment, done.after)
        if done.before.phase is not done.after.phase:
            _log_round(done.after)
        self._hub.round_changed(done.after.run_id, done.after.id, done.after.number)

    def _assignment_moved(self, assignment: Assignment, round_: Round) -> None:
        log.info(
            "assignment_phase",
            run=assignment.run_id,
            round=round_.number,
            assignment=assignment.id,
            device=assignment.device_id,
            phase=assignment.phase.value,
            reason=str(assignment.reason or ""),
            message=assignment.message,
        )
        self._hub.signals.notify(("assignment", assignment.id))
        self._hub.wake_device(assignment.device_id)

    def _arm(self, round_: Round, *, least: float = 0.001) -> None:
        if (timer := self._timers.pop(round_.id, None)) is not None:
            timer.cancel()
        if round_.phase in GATHERING and round_.deadline_at is not None:
            self._deadline_in(round_.id, max(least, round_.deadline_at - self.clock() + 0.001))

    def _deadline_in(self, round_id: RoundId, delay: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[round_id] = loop.call_later(delay, lambda: self._spawn(self._deadline(round_id)))

    async def _deadline(self, round_id: RoundId) -> None:
        try:
            round_ = await self.apply(round_id, DeadlinePassed())
        except Exception as error:  # a deadline must come, also when the database was away at that moment
            if isinstance(error, GloraError) and error.reason is Reason.ILLEGAL_TRANSITION:
                return
            log.exception("deadline_not_kept", round=round_id)
            self._deadline_in(round_id, _RING_AGAIN_SECONDS)
            return
        self._arm(round_, least=_RING_AGAIN_SECONDS)

    async def _save_presence(self) -> None:
        while True:
            await asyncio.sleep(_SAVE_PRESENCE_SECONDS / 3)
            due = self._hub.unsaved(self.clock(), _SAVE_PRESENCE_SECONDS)
            if not due:
                continue
            try:
                await self._store.write(partial(_save_seen, due))
            except Exception:  # signs of life are not worth ending the task for
                log.exception("presence_not_saved")

    async def _pump_outbox(self) -> None:
        while True:
            # Not wait_for: before Python 3.12 it forgets that it was cancelled when the nudge comes at that moment.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                    await self._nudge.wait()
            self._nudge.clear()
            for owed in await self._pending():
                if owed.id not in self._in_flight:
                    self._in_flight.add(owed.id)
                    self._spawn(self._perform(owed))

    async def _pending(self) -> tuple[Owed, ...]:
        for attempt in itertools.count():
            try:
                return await self._store.read(lambda uow: uow.outbox.pending())
            except Exception:  # the engine outlives a database that is away for a while
                log.exception("outbox_not_read")
                await asyncio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
        raise AssertionError("unreachable")

    async def _perform(self, owed: Owed) -> None:
        for attempt in itertools.count():
            try:
                for handler in self._handlers.get(owed.kind, ()):
                    await handler(owed)
                await self._store.write(lambda uow: uow.outbox.done(owed.id))
                break
            except Exception:  # what is owed stays owed: log it and try again
                log.exception("effect_failed", kind=owed.kind.value, round=owed.round_id, attempt=attempt + 1)
                await asyncio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
        self._in_flight.discard(owed.id)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def one(done: Transition | None) -> tuple[Transition, ...]:
    """For `commit`: the work returns the one step that it took, or None."""
    return () if done is None else (done,)


def _save_seen(due: Mapping[DeviceId, tuple[float, Profile]], uow: UnitOfWork) -> None:
    uow.devices.seen(due)


def _log_round(round_: Round) -> None:
    log.info(
        "round_phase",
        run=round_.run_id,
        round=round_.number,
        attempt=round_.attempt,
        phase=round_.phase.value,
        accepted=round_.accepted,
        reason=str(round_.reason or ""),
        message=round_.message,
    )
