"""Fills a store with a federation that never was, through the store's own interface; see synthetic_records.

`fill` writes; `Crowd` makes a running server believe that the devices are there and at work.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from synthetic_records import (
    MAX_RANK,
    RANKS,
    contribution,
    device,
    diagnostics,
    ended_assignment,
    figures,
    manifest,
    measurements,
    parts,
    spec,
    summary,
)

from glora_server.coordinator.history import outcome_of, round_figures, with_outliers
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import (
    AuditEntry,
    Device,
    DeviceState,
    MetricPhase,
    ModuleDiagnostics,
    Run,
    TokenRecord,
    Version,
)
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.views import LiveProgress
from glora_server.coordinator.views_history import Contribution, VersionFigures
from glora_server.rounds.assignment import Assignment, AssignmentPhase
from glora_server.rounds.ids import DeviceId, RoundId, RunId, TokenId, VersionId
from glora_server.rounds.policy import RoundPolicy
from glora_server.rounds.round import Round, RoundPhase
from glora_server.rounds.run import RunPhase
from glora_server.storage.store import SqlStore
from glora_wire.errors import Reason

MAIN = "news-topics"
"""The run with the long history, whose last round goes on."""
DATABASE = "glora.sqlite3"
_ROUND_SECONDS = 660.0
_KEPT = 5
_MEASURED_WHOLE = 3
"""Newest versions that every device measured; the older ones a few."""
_FEW = 8
_BUSY = (
    AssignmentPhase.ACCEPTED_UPDATE,
    AssignmentPhase.UPLOADING,
    AssignmentPhase.DELIVERED,
    AssignmentPhase.DELIVERED,
    AssignmentPhase.ACCEPTED,
    AssignmentPhase.OFFERED,
    AssignmentPhase.REJECTED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much history there is."""

    devices: int = 1000
    rounds: int = 1000
    per_round: int = 50
    """Devices in each round that is over."""
    live: int = 1000
    """Devices in the round that goes on."""


def fill(
    data_dir: Path, *, devices: int = 1000, rounds: int = 1000, per_round: int = 50, live: int | None = None
) -> None:
    """Fill the database that a server with this data folder opens."""
    size = Size(devices=devices, rounds=rounds, per_round=per_round, live=devices if live is None else live)
    store = SqlStore.open(f"sqlite:///{data_dir / DATABASE}")
    try:
        asyncio.run(fill_store(store, size, at=time.time()))
    finally:
        store.close_now()


async def fill_store(store: SqlStore, size: Size, *, at: float) -> None:
    """Fill a store; the newest of it happened at `at` (Unix seconds)."""
    crowd = [device(place, at=at) for place in range(size.devices)]
    await store.write(partial(_people, crowd, at))
    able = [item for item in crowd if item.state is DeviceState.APPROVED]
    main = _Filler(MAIN, RunPhase.ACTIVE, rounds=size.rounds, per_round=size.per_round, crowd=able, until=at - 120.0)
    await main.fill(store)
    await store.write(partial(_live_round, main, able[: size.live], at))
    for name, phase, rounds in (
        ("sentiment", RunPhase.COMPLETED, 12),
        ("intent-pilot", RunPhase.PAUSED, 5),
        ("spam-small", RunPhase.FAILED, 3),
    ):
        filler = _Filler(name, phase, rounds=min(rounds, size.rounds), per_round=6, crowd=able, until=at - 86400.0 * 2)
        await filler.fill(store)
    await store.write(lambda uow: uow.runs.add(_run("support-tickets", RunPhase.CREATED, 20, at)))


def _people(crowd: Sequence[Device], at: float, uow: UnitOfWork) -> None:
    for item in crowd:
        uow.devices.add(item)
    for place, approve in enumerate((True, False, True)):
        uow.tokens.add(
            TokenRecord(
                id=TokenId(f"syntoken{place}"),
                secret_sha256="5e" * 32,
                description=("berlin lab", "field trial", "used up")[place],
                created_at=at - 86400 * place,
                expires_at=at + 86400 * (3 - place),
                max_uses=100,
                uses=(12, 0, 100)[place],
                max_rank=16,
                tags=("berlin",) if place == 0 else (),
                approve=approve,
            )
        )
    for place in range(300):
        action = ("device.approve", "run.pause", "run.resume", "token.create", "run.edit", "device.set-rank")[place % 6]
        target = crowd[place % len(crowd)].name if action.startswith("device") else MAIN
        uow.audit.add(
            AuditEntry(
                at=at - 7200.0 * (300 - place),
                actor=("maria", "admin", "jonas")[place % 3],
                origin="192.0.2.7",
                action=action,
                target=target,
                before_json='{"state": "pending"}' if action == "device.approve" else "null",
                after_json='{"state": "approved"}' if action == "device.approve" else "null",
            )
        )


def _run(name: str, phase: RunPhase, rounds: int, at: float) -> Run:
    message = "Round 4 failed 3 times; the last time: 1 of 3 needed updates were accepted when the deadline passed."
    failed = phase is RunPhase.FAILED
    ended = phase in {RunPhase.FAILED, RunPhase.COMPLETED}
    return Run(
        id=RunId(f"run-{name}"),
        name=name,
        phase=phase,
        spec_json=spec(name, rounds).to_json(),
        manifest=manifest(),
        version_id=None,
        reason=Reason.RETRIES_USED_UP if failed else None,
        message=message if failed else "",
        created_at=at,
        started_at=None if phase is RunPhase.CREATED else at + 5.0,
        ended_at=at + 3600.0 if ended else None,
    )


class _Filler:
    """Writes one run: all of its rounds, versions, what was measured, and what is remembered of them."""

    def __init__(
        self, name: str, phase: RunPhase, *, rounds: int, per_round: int, crowd: Sequence[Device], until: float
    ) -> None:
        self.rounds = rounds
        self.until = until
        begun = until - _ROUND_SECONDS * (rounds + 1)
        self.run = _run(name, phase, rounds + (0 if phase is RunPhase.COMPLETED else 200), begun)
        self._per_round = min(per_round, len(crowd))
        self._crowd = crowd
        self._policy = RoundPolicy(rounds=rounds, quorum=3)

    async def fill(self, store: SqlStore) -> None:
        """Write it in transactions of a few rounds each."""
        await store.write(self._begin)
        group = max(1, 2000 // self._per_round)
        for first in range(1, self.rounds + 1, group):
            numbers = range(first, min(first + group, self.rounds + 1))
            await store.write(partial(self._some, numbers))
        await store.write(self._end)

    def version_id(self, number: int) -> VersionId:
        """Id of a version of the run."""
        return VersionId(f"{self.run.id}-v{number}")

    def _begin(self, uow: UnitOfWork) -> None:
        uow.runs.add(self.run)
        self._version(uow, 0, self.run.created_at)

    def _end(self, uow: UnitOfWork) -> None:
        run = uow.runs.get(self.run.id)
        uow.runs.save(replace(run, version_id=self.version_id(self.rounds), rounds_done=self.rounds))
        uow.versions.prune(run.id, keep=_KEPT)

    def _version(self, uow: UnitOfWork, number: int, at: float) -> None:
        uow.versions.add(
            Version(
                id=self.version_id(number),
                run_id=self.run.id,
                number=number,
                round_id=RoundId(f"{self.run.id}-r{number}") if number else None,
                parent_id=self.version_id(number - 1) if number else None,
                strategy="glora",
                published=False,
                created_at=at,
            )
        )
        if number == 0 or number > self.rounds - _KEPT:
            for part in parts():
                uow.versions.put_parts(self.version_id(number), part)
        uow.versions.publish(self.version_id(number), json.dumps(summary(number)))

    def _some(self, numbers: Sequence[int], uow: UnitOfWork) -> None:
        for number in numbers:
            self._round(number, uow)

    def _round(self, number: int, uow: UnitOfWork) -> None:
        at = self.until - _ROUND_SECONDS * (self.rounds - number + 1)
        round_id = RoundId(f"{self.run.id}-r{number}")
        draw = random.Random(f"{self.run.name} {number}")
        taken = sorted(draw.sample(range(len(self._crowd)), self._per_round))
        done = tuple(
            ended_assignment(
                self._crowd[place],
                run_id=self.run.id,
                round_id=round_id,
                version_id=self.version_id(number - 1),
                number=number,
                place=place,
                at=at,
            )
            for place in taken
        )
        closed = max(item.closed_at or at for item in done) + draw.uniform(0.5, 3.0)
        round_ = Round(
            id=round_id,
            run_id=self.run.id,
            number=number,
            version_id=self.version_id(number - 1),
            policy=self._policy,
            phase=RoundPhase.COMMITTED,
            assignments=done,
            created_at=at - 1.0,
            opened_at=at,
            deadline_at=at + 600.0,
            closed_at=closed,
        )
        uow.rounds.add(round_)
        self._remember(uow, round_, closed)
        self._measure(uow, round_)

    def _remember(self, uow: UnitOfWork, round_: Round, closed: float) -> None:
        accepted = [item for item in round_.assignments if item.phase is AssignmentPhase.ACCEPTED_UPDATE]
        self._version(uow, round_.number, closed)
        whole = sum(item.training_rows for item in accepted) or 1
        made = [
            contribution(item, self.version_id(round_.number), round_.number, item.training_rows / whole)
            for item in accepted
        ]
        uow.history.count_outcomes(
            [(item.device_id, out) for item in round_.assignments if (out := outcome_of(item)) is not None]
        )
        uow.history.put_round(round_figures(round_, [item.update_norm or 0.0 for item in made]))
        uow.history.put_contributions(with_outliers(made))
        uow.history.put_version(
            VersionFigures(
                version_id=self.version_id(round_.number),
                run_id=self.run.id,
                number=round_.number,
                modules=figures(round_.number),
            )
        )
        if round_.number > self.rounds - _KEPT:
            self._diagnose(uow, round_.number, made)

    def _diagnose(self, uow: UnitOfWork, number: int, made: Sequence[Contribution]) -> None:
        for module in self.run.manifest.modules:
            text = diagnostics(number, module.name, made)
            uow.versions.put_diagnostics(
                ModuleDiagnostics(version_id=self.version_id(number), module=module.name, values_json=text)
            )

    def _measure(self, uow: UnitOfWork, round_: Round) -> None:
        number = round_.number - 1
        whole = number > self.rounds - _MEASURED_WHOLE
        measuring = round_.assignments if whole else round_.assignments[:_FEW]
        at = round_.opened_at or round_.created_at
        for phase, ranks in ((MetricPhase.BEFORE, RANKS), (MetricPhase.AFTER, (MAX_RANK,))):
            for item in measuring:
                own = [rank for rank in ranks if rank <= max(item.rank, 1)] or [item.rank]
                uow.measurements.put(measurements(item, version_number=number, ranks=own, phase=phase, at=at))
        uow.history.rescore(self.run.id, number)


def _live_round(filler: _Filler, crowd: Sequence[Device], at: float, uow: UnitOfWork) -> None:
    """A round that was opened two minutes ago: some are done, most train, the last have not answered."""
    number = filler.rounds + 1
    round_id = RoundId(f"{filler.run.id}-r{number}")
    opened = at - 110.0
    assignments = tuple(
        _at_work(
            ended_assignment(
                item,
                run_id=filler.run.id,
                round_id=round_id,
                version_id=filler.version_id(filler.rounds),
                number=number,
                place=place,
                at=opened,
            ),
            _BUSY[place % len(_BUSY)],
            at,
        )
        for place, item in enumerate(crowd)
    )
    round_ = Round(
        id=round_id,
        run_id=filler.run.id,
        number=number,
        version_id=filler.version_id(filler.rounds),
        policy=RoundPolicy(rounds=filler.rounds + 200, quorum=3, deadline_seconds=86400.0),
        phase=RoundPhase.COLLECTING,
        assignments=assignments,
        created_at=opened - 2.0,
        opened_at=opened,
        deadline_at=opened + 86400.0,
    )
    uow.rounds.add(round_)
    measuring = [item for item in assignments if item.phase is not AssignmentPhase.OFFERED][:40]
    for item in measuring:
        ranks = [rank for rank in RANKS if rank <= item.rank]
        found = measurements(item, version_number=filler.rounds, ranks=ranks, phase=MetricPhase.BEFORE, at=at)
        uow.measurements.put(found)


def _hurried(item: Assignment, at: float) -> Assignment:
    """The same with its times squeezed, so that all of it happened five seconds before `at`."""
    last = max(mark for mark in (item.offered_at, item.delivered_at, item.received_at) if mark is not None)
    pace = min(1.0, max(0.0, at - 5.0 - item.offered_at) / max(last - item.offered_at, 1e-6))

    def moved(mark: float | None) -> float | None:
        return None if mark is None else item.offered_at + pace * (mark - item.offered_at)

    return replace(
        item,
        accepted_at=moved(item.accepted_at),
        delivered_at=moved(item.delivered_at),
        upload_started_at=moved(item.upload_started_at),
        received_at=moved(item.received_at),
    )


def _at_work(whole: Assignment, phase: AssignmentPhase, at: float) -> Assignment:
    """The same assignment as it stands in the middle of the round."""
    open_ = _hurried(replace(whole, phase=phase, closed_at=None, reason=None, message="", deadline_at=at + 86400.0), at)
    moved = at - 5.0 if open_.received_at is None else open_.received_at
    match phase:
        case AssignmentPhase.ACCEPTED_UPDATE:
            return replace(open_, received_at=moved, closed_at=moved + 0.2)
        case AssignmentPhase.REJECTED:
            message = "The update's norm is 41.7; this run allows 25 at most."
            return replace(
                open_, received_at=moved, closed_at=moved + 0.2, reason=Reason.NORM_TOO_LARGE, message=message
            )
        case AssignmentPhase.UPLOADING:
            return replace(open_, upload_started_at=at - 6.0, received_at=None)
        case AssignmentPhase.DELIVERED:
            return replace(open_, upload_started_at=None, received_at=None, bytes_up=0)
        case AssignmentPhase.ACCEPTED:
            return replace(open_, delivered_at=None, upload_started_at=None, received_at=None, bytes_down=0, bytes_up=0)
        case _:
            return replace(
                open_,
                accepted_at=None,
                delivered_at=None,
                upload_started_at=None,
                received_at=None,
                bytes_down=0,
                bytes_up=0,
            )


class Crowd:
    """Keeps four of five devices online in a hub, and moves those that work on; `tick` is to be called now and then."""

    def __init__(self, hub: Hub, devices: Sequence[Device], busy: Sequence[Assignment]) -> None:
        self._hub = hub
        self._devices = [item for place, item in enumerate(devices) if item.state is DeviceState.APPROVED and place % 5]
        self._busy = [item for item in busy if item.is_open and item.phase is not AssignmentPhase.OFFERED]
        self._begun = time.time()

    @classmethod
    async def of(cls, hub: Hub, store: SqlStore) -> Crowd:
        """The devices and the live round of the store."""
        devices, live = await store.read(lambda uow: (uow.devices.all(), uow.rounds.live()))
        return cls(hub, devices, [item for round_ in live for item in round_.assignments])

    def tick(self) -> None:
        """Let every device give a sign of life, and those that work report a step."""
        now = time.time()
        for item in self._devices:
            self._hub.arrive(item.id, item.profile, now)
            self._hub.leave(item.id, now, lost=False)
        for place, work in enumerate(self._busy):
            self._hub.progress[work.id] = _progress(work, place, now - self._begun, now)
        for run_id in {work.run_id for work in self._busy}:
            self._hub.run_changed(run_id)

    async def stay(self, seconds: float = 2.0) -> None:
        """Tick for ever."""
        while True:
            self.tick()
            await asyncio.sleep(seconds)


def _progress(item: Assignment, place: int, elapsed: float, now: float) -> LiveProgress:
    phase, total = {
        AssignmentPhase.ACCEPTED: ("downloading", 400_000),
        AssignmentPhase.DELIVERED: ("training", 200),
        AssignmentPhase.UPLOADING: ("uploading", 400_000),
    }.get(item.phase, ("training", 200))
    share = (0.1 + 0.07 * (place % 11) + elapsed / 300.0) % 1.0
    return LiveProgress(phase=phase, done=int(total * share), total=total, loss=1.4 - share, at=now)


def device_id(place: int) -> DeviceId:
    """Id of a device that `fill` made."""
    return device(place, at=0.0).id
