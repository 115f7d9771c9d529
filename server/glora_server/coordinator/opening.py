"""Opens rounds and ends runs: looks at a run whenever something changed that could let it go on."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import structlog

from glora_server.coordinator.engine import Engine, one
from glora_server.coordinator.hub import Available, Hub
from glora_server.coordinator.model import Owed, OwedKind, Page, Run, new_id
from glora_server.coordinator.ports import Store, UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.staffing import candidates, requirements
from glora_server.coordinator.transitions import Transition, step
from glora_server.rounds import run as run_machine
from glora_server.rounds.assignment import Assignment, AssignmentKind
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId
from glora_server.rounds.plan import Staffing, Waiting, staff, training_refusal
from glora_server.rounds.round import LIVE, Aborted, Opened, Round, RoundPhase
from glora_server.rounds.run import RunEvent, RunPhase
from glora_wire.errors import GloraError, Reason, Refusal

log = structlog.get_logger(__name__)
_TRY_AGAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Staffed:
    """How a round would open now."""

    opened: Opened
    complete: bool
    """Nobody else needs to be waited for."""
    gather_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _There:
    """The devices that would take work, and which of them still measure what they have sent."""

    available: Available
    measuring: frozenset[DeviceId]


class Opener:
    """Plans the next round of every run; many requests to look at a run become one look."""

    def __init__(self, *, store: Store, hub: Hub, engine: Engine) -> None:
        self._store = store
        self._hub = hub
        self._engine = engine
        self._dirty: set[RunId] = set()
        self._nudge = asyncio.Event()
        self._timers: dict[RunId, asyncio.TimerHandle] = {}
        self._could_open_at: dict[RunId, float] = {}
        self._task: asyncio.Task[None] | None = None
        engine.handle(OwedKind.CLOSED, self._round_closed)

    async def start(self) -> None:
        """Look at every run that is going on, then whenever `soon` asks."""
        for run in await self._store.read(lambda uow: uow.runs.active()):
            self.soon(run.id)
        self._task = asyncio.create_task(self._pump())

    async def close(self) -> None:
        """Stop looking."""
        for timer in self._timers.values():
            timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def soon(self, run_id: RunId) -> None:
        """Look soon whether the run can go on."""
        self._dirty.add(run_id)
        self._nudge.set()

    async def device_arrived(self) -> None:
        """Look at every run: a device may be what one of them waits for."""
        for run in await self._store.read(lambda uow: uow.runs.active()):
            if run.phase is RunPhase.ACTIVE:
                self.soon(run.id)

    async def _round_closed(self, owed: Owed) -> None:
        round_ = await self._store.read(lambda uow: uow.rounds.get(owed.round_id))
        self._hub.drop_assignments(a.id for a in round_.assignments)
        self.soon(owed.run_id)

    async def _pump(self) -> None:
        while True:
            await self._nudge.wait()
            self._nudge.clear()
            while self._dirty:
                await self._look(self._dirty.pop())

    async def _look(self, run_id: RunId) -> None:
        try:
            await self._tend(run_id)
        except GloraError as error:
            if error.reason is Reason.STALE_STATE:
                self.soon(run_id)
                return
            log.exception("run_cannot_go_on", run=run_id, reason=str(error.reason))
            self._later(run_id, _TRY_AGAIN_SECONDS)
        except Exception:  # a broken database must not end the engine: it is logged and tried again
            log.exception("run_cannot_go_on", run=run_id)
            self._later(run_id, _TRY_AGAIN_SECONDS)

    async def _tend(self, run_id: RunId) -> None:
        run, latest = await self._store.read(lambda uow: (uow.runs.get(run_id), uow.rounds.latest(run_id)))
        if run.phase is not RunPhase.ACTIVE:
            self._hub.waiting.pop(run_id, None)
            return
        if latest is None or latest.phase not in LIVE or _is_one_too_many(run, latest):
            latest = await self._go_on(run_id)
        if latest is not None and latest.phase is RoundPhase.PLANNED:
            await self._try_open(run_id, latest.id)

    async def _go_on(self, run_id: RunId) -> Round | None:
        """The next round, planned, or None: the run is over."""
        run, latest, _ = await self._engine.commit(partial(self._next_round, run_id), moved=lambda made: made[2])
        if run.phase is not RunPhase.ACTIVE:
            self._hub.waiting.pop(run_id, None)
            log.info(
                "run_phase", run=run.name, phase=run.phase.value, reason=str(run.reason or ""), message=run.message
            )
            self._hub.wake_all()
        self._hub.run_changed(run_id)
        return latest if run.phase is RunPhase.ACTIVE else None

    def _next_round(self, run_id: RunId, uow: UnitOfWork) -> tuple[Run, Round | None, tuple[Transition, ...]]:
        """Plans the next round or attempt, or ends the run."""
        run, latest = uow.runs.get(run_id), uow.rounds.latest(run_id)
        if run.phase is not RunPhase.ACTIVE or run.version_id is None:
            return run, latest, ()
        policy = RunSpec.from_json(run.spec_json).policy
        if run.rounds_done >= policy.rounds and (latest is None or latest.phase not in LIVE - {RoundPhase.PLANNED}):
            dropped = one(self._drop_planned(uow, latest))
            return self._end(uow, run, RunEvent.COMPLETE, None, ""), None, dropped
        if latest is not None and latest.phase in LIVE:
            return run, latest, ()
        number, attempt = run.rounds_done + 1, 1
        if latest is not None and latest.number == number:
            attempt = latest.attempt + 1
            if latest.attempt >= policy.max_attempts:
                message = f"Round {number} failed {latest.attempt} times; the last time: {latest.message}"
                return self._end(uow, run, RunEvent.FAIL, Reason.RETRIES_USED_UP, message), None, ()
        planned = Round(
            id=RoundId(new_id()),
            run_id=run_id,
            number=number,
            attempt=attempt,
            version_id=run.version_id,
            policy=policy,
            created_at=self._engine.clock(),
        )
        uow.rounds.add(planned)
        return run, planned, ()

    def _drop_planned(self, uow: UnitOfWork, latest: Round | None) -> Transition | None:
        """Ends a round that was planned before the operator asked for fewer of them."""
        if latest is None or latest.phase is not RoundPhase.PLANNED:
            return None
        refusal = Refusal(reason=Reason.RUN_COMPLETED, message="The run is complete without this round.")
        return step(uow, latest.id, Aborted(refusal), at=self._engine.clock())

    def _end(self, uow: UnitOfWork, run: Run, event: RunEvent, reason: Reason | None, message: str) -> Run:
        phase = run_machine.advance(run.phase, event)
        return uow.runs.save(replace(run, phase=phase, reason=reason, message=message, ended_at=self._engine.clock()))

    async def _try_open(self, run_id: RunId, round_id: RoundId) -> None:
        if (pause := await self._store.read(lambda uow: self._rest(uow.rounds.get(round_id)))) > 0:
            self._wait(run_id, "The last attempt at this round failed; the next one starts after a pause.")
            self._later(run_id, pause)
            return
        now = self._engine.clock()
        there = _There(available=self._hub.available(now), measuring=self._hub.measuring(now))
        staffed = await self._store.read(lambda uow: self._staff(uow, run_id, round_id, there))
        if isinstance(staffed, Waiting):
            self._could_open_at.pop(run_id, None)
            self._wait(run_id, staffed.message)
            return
        pause = self._pause(run_id, staffed)
        if pause > 0:
            ready = len(staffed.opened.assignments)
            are = "device is" if ready == 1 else "devices are"
            self._wait(run_id, f"{ready} {are} ready; waiting {pause:.0f} s for more.")
            self._later(run_id, pause)
            return
        self._hub.waiting.pop(run_id, None)
        self._could_open_at.pop(run_id, None)
        work = partial(self._open, run_id=run_id, round_id=round_id, there=there)
        if await self._engine.commit(work, moved=one) is None:
            self.soon(run_id)

    def _open(self, uow: UnitOfWork, *, run_id: RunId, round_id: RoundId, there: _There) -> Transition | None:
        """Opens the round with what is true now: run, policy and devices may have changed since they were looked at."""
        if (
            uow.runs.get(run_id).phase is not RunPhase.ACTIVE
            or uow.rounds.get(round_id).phase is not RoundPhase.PLANNED
        ):
            return None
        staffed = self._staff(uow, run_id, round_id, there)
        if isinstance(staffed, Waiting):
            return None
        return step(uow, round_id, staffed.opened, at=self._engine.clock())

    def _wait(self, run_id: RunId, message: str) -> None:
        if self._hub.waiting.get(run_id) != message:
            self._hub.waiting[run_id] = message
            self._hub.run_changed(run_id)
            log.info("round_waits", run=run_id, message=message)

    def _staff(self, uow: UnitOfWork, run_id: RunId, round_id: RoundId, there: _There) -> Waiting | _Staffed:
        run, round_ = uow.runs.get(run_id), uow.rounds.get(round_id)
        spec = RunSpec.from_json(run.spec_json)
        needs, busy = requirements(run, spec), uow.rounds.busy_devices()
        pool = [
            device
            for device in candidates(uow, run, there.available)
            if device.device_id not in busy and training_refusal(device, needs) is None
        ]
        seed = seed_of(spec.seed, run.id, round_.number, round_.attempt)
        staffing = staff(pool, round_.policy, max_rank=spec.lora.max_rank, seed=seed, later=there.measuring)
        if isinstance(staffing, Waiting):
            return staffing
        wanted = round_.policy.target_devices or _last_turnout(uow, run_id)
        return _Staffed(
            opened=Opened(self._offers(run, round_, staffing), staffing.target),
            complete=0 < wanted <= len(pool),
            gather_seconds=round_.policy.gather_seconds,
        )

    def _rest(self, round_: Round) -> float:
        """Seconds until a further attempt at a round may open."""
        return round_.created_at + round_.policy.pause_before(round_.attempt) - self._engine.clock()

    def _pause(self, run_id: RunId, staffed: _Staffed) -> float:
        """Seconds to wait for more devices: none once as many are there as are wanted or answered last time."""
        if staffed.complete:
            return 0.0
        now = self._engine.clock()
        return self._could_open_at.setdefault(run_id, now) + staffed.gather_seconds - now

    def _offers(self, run: Run, round_: Round, staffing: Staffing) -> tuple[Assignment, ...]:
        now = self._engine.clock()
        return tuple(
            Assignment(
                id=AssignmentId(new_id(16)),
                run_id=run.id,
                round_id=round_.id,
                device_id=pick.device_id,
                kind=AssignmentKind.TRAIN,
                rank=pick.rank,
                version_id=round_.version_id,
                offered_at=now,
                deadline_at=now + round_.policy.deadline_seconds,
            )
            for pick in staffing.picks
        )

    def _later(self, run_id: RunId, delay: float) -> None:
        if (timer := self._timers.pop(run_id, None)) is not None:
            timer.cancel()
        look: Callable[[], None] = lambda: self.soon(run_id)  # noqa: E731 - call_later wants a plain callable
        self._timers[run_id] = asyncio.get_running_loop().call_later(delay, look)


def _is_one_too_many(run: Run, latest: Round) -> bool:
    """The round was planned, and then the operator asked for fewer rounds."""
    return latest.phase is RoundPhase.PLANNED and run.rounds_done >= RunSpec.from_json(run.spec_json).policy.rounds


def _last_turnout(uow: UnitOfWork, run_id: RunId) -> int:
    """How many devices answered in the last round that had any."""
    for earlier in uow.rounds.list(run_id, Page(size=2)).items:
        if earlier.assignments:
            return sum(a.reason is not Reason.DEADLINE_PASSED for a in earlier.assignments)
    return 0


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
