"""Opens rounds and ends runs: looks at a run whenever something changed that could let it go on."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace

import structlog

from glora_server.coordinator.engine import Engine
from glora_server.coordinator.hub import Available, Hub
from glora_server.coordinator.model import Owed, OwedKind, Page, Run, new_id
from glora_server.coordinator.ports import Store, UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.staffing import candidates, requirements
from glora_server.rounds import run as run_machine
from glora_server.rounds.assignment import Assignment, AssignmentKind
from glora_server.rounds.ids import AssignmentId, RoundId, RunId
from glora_server.rounds.plan import Staffing, Waiting, staff, training_refusal
from glora_server.rounds.round import LIVE, Opened, Round, RoundPhase
from glora_server.rounds.run import RunEvent, RunPhase
from glora_wire.errors import GloraError, Reason

log = structlog.get_logger(__name__)
_TRY_AGAIN_SECONDS = 5.0


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
        if latest is None or latest.phase not in LIVE:
            latest = await self._store.write(lambda uow: self._next_round(uow, run_id))
            self._hub.run_changed(run_id)
        if latest is not None and latest.phase is RoundPhase.PLANNED:
            await self._try_open(run_id, latest.id)

    def _next_round(self, uow: UnitOfWork, run_id: RunId) -> Round | None:
        """Plans the next round or attempt, or ends the run."""
        run, latest = uow.runs.get(run_id), uow.rounds.latest(run_id)
        if run.phase is not RunPhase.ACTIVE or run.version_id is None:
            return None
        if latest is not None and latest.phase in LIVE:
            return latest
        policy = RunSpec.from_json(run.spec_json).policy
        if run.rounds_done >= policy.rounds:
            self._end(uow, run, RunEvent.COMPLETE, None, "")
            return None
        number, attempt = run.rounds_done + 1, 1
        if latest is not None and latest.number == number:
            attempt = latest.attempt + 1
            if attempt > policy.max_attempts:
                message = f"Round {number} failed {latest.attempt} times; the last time: {latest.message}"
                self._end(uow, run, RunEvent.FAIL, Reason.RETRIES_USED_UP, message)
                return None
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
        return planned

    def _end(self, uow: UnitOfWork, run: Run, event: RunEvent, reason: Reason | None, message: str) -> None:
        phase = run_machine.advance(run.phase, event)
        uow.runs.save(replace(run, phase=phase, reason=reason, message=message, ended_at=self._engine.clock()))
        self._hub.waiting.pop(run.id, None)
        log.info("run_phase", run=run.name, phase=phase.value, reason=str(reason or ""), message=message)

    async def _try_open(self, run_id: RunId, round_id: RoundId) -> None:
        available = self._hub.available(self._engine.clock())
        staffed = await self._store.read(lambda uow: self._staff(uow, run_id, round_id, available))
        if isinstance(staffed, Waiting):
            self._could_open_at.pop(run_id, None)
            self._wait(run_id, staffed.message)
            return
        opened, pause = staffed
        if pause > 0:
            self._wait(run_id, f"{len(opened.assignments)} devices are ready; waiting {pause:.0f} s for more.")
            self._later(run_id, pause)
            return
        self._hub.waiting.pop(run_id, None)
        self._could_open_at.pop(run_id, None)
        await self._engine.apply(round_id, opened)

    def _wait(self, run_id: RunId, message: str) -> None:
        if self._hub.waiting.get(run_id) != message:
            self._hub.waiting[run_id] = message
            self._hub.run_changed(run_id)
            log.info("round_waits", run=run_id, message=message)

    def _staff(
        self, uow: UnitOfWork, run_id: RunId, round_id: RoundId, available: Available
    ) -> Waiting | tuple[Opened, float]:
        run, round_ = uow.runs.get(run_id), uow.rounds.get(round_id)
        spec = RunSpec.from_json(run.spec_json)
        needs, busy = requirements(run, spec), uow.rounds.busy_devices()
        pool = [
            device
            for device in candidates(uow, run, available)
            if device.device_id not in busy and training_refusal(device, needs) is None
        ]
        seed = seed_of(spec.seed, run.id, round_.number, round_.attempt)
        staffing = staff(pool, round_.policy, max_rank=spec.lora.max_rank, seed=seed)
        if isinstance(staffing, Waiting):
            return staffing
        opened = Opened(self._offers(run, round_, staffing), staffing.target)
        return opened, self._pause(uow, round_, len(pool), staffing)

    def _pause(self, uow: UnitOfWork, round_: Round, pool: int, staffing: Staffing) -> float:
        """Seconds to wait for more devices: none once as many are there as are wanted or answered last time."""
        wanted = staffing.target or _last_turnout(uow, round_.run_id)
        if wanted and pool >= wanted:
            return 0.0
        now = self._engine.clock()
        return self._could_open_at.setdefault(round_.run_id, now) + round_.policy.gather_seconds - now

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


def _last_turnout(uow: UnitOfWork, run_id: RunId) -> int:
    """How many devices answered in the last round that had any."""
    for earlier in uow.rounds.list(run_id, Page(size=2)).items:
        if earlier.assignments:
            return sum(a.reason is not Reason.DEADLINE_PASSED for a in earlier.assignments)
    return 0


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
