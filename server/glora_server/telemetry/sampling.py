"""Gauges that are looked up every few seconds, because nobody reports them."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import Counter as Tally
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import structlog

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import DeviceState, Run
from glora_server.coordinator.ports import Store, UnitOfWork
from glora_server.coordinator.quality import Quality, quality_of
from glora_server.coordinator.upload_session import Places
from glora_server.coordinator.views_history import RosterEntry
from glora_server.rounds.assignment import OPEN
from glora_server.rounds.ids import RunId, VersionId
from glora_server.rounds.round import GATHERING, LIVE, Round, RoundPhase
from glora_server.rounds.run import RunPhase
from glora_server.telemetry import names
from glora_server.telemetry.instruments import Instruments
from glora_server.telemetry.memory import memory_size, resident_bytes
from glora_server.telemetry.runs import PhaseScore, RunGauges, RunSample, newest_scores
from glora_wire.errors import GloraError

_LAG_EVERY_SECONDS: Final = 0.5
_STATES_EVERY_SECONDS: Final = 10.0
_GOING_ON: Final = (RunPhase.ACTIVE, RunPhase.PAUSED)
_log = structlog.get_logger("glora.telemetry")


class WorkerCounters(Protocol):
    """What the aggregation worker counts."""

    @property
    def pid(self) -> int: ...  # noqa: D102
    @property
    def jobs(self) -> int: ...  # noqa: D102
    @property
    def queued(self) -> int: ...  # noqa: D102
    @property
    def busy_seconds(self) -> float: ...  # noqa: D102
    @property
    def peak_bytes(self) -> int: ...  # noqa: D102
    @property
    def restarts(self) -> int: ...  # noqa: D102


class Worker(Protocol):
    """The aggregation worker."""

    def stats(self) -> WorkerCounters:
        """Its counters so far."""
        ...


class WatchedStore(Store, Protocol):
    """The database, with what it knows about itself."""

    @property
    def queued(self) -> int:
        """Changes that wait for the thread that writes."""
        ...


class Certificates(Protocol):
    """Of the authority and the server."""

    @property
    def expires_at(self) -> float: ...  # noqa: D102
    @property
    def server_expires_at(self) -> float: ...  # noqa: D102
    @property
    def renewal_overdue_seconds(self) -> float: ...  # noqa: D102


class Watched(Protocol):
    """The parts that are looked at."""

    @property
    def store(self) -> WatchedStore: ...  # noqa: D102
    @property
    def hub(self) -> Hub: ...  # noqa: D102
    @property
    def numerics(self) -> Worker: ...  # noqa: D102
    @property
    def places(self) -> Places: ...  # noqa: D102
    @property
    def authority(self) -> Certificates: ...  # noqa: D102
    @property
    def data_dir(self) -> Path: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What the database says."""

    devices: tuple[RosterEntry, ...]
    rounds: tuple[Round, ...]
    runs: tuple[Run, ...]
    """Active or paused."""
    owed: int
    size_bytes: int
    scores: Mapping[RunId, tuple[PhaseScore, ...]]
    new_versions: tuple[tuple[VersionId, int, Quality | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    number: int
    quality: Quality | None


class Sampler:
    """Keeps the gauges fresh; a database that is away leaves its own as they were."""

    def __init__(self, instruments: Instruments, watched: Watched) -> None:
        self._instruments = instruments
        self._runs = RunGauges(instruments)
        self._watched = watched
        self._set(names.MEMORY_SIZE_BYTES, memory_size())
        self._worker_before: dict[names.Metric, float] = {}
        self._versions: dict[VersionId, _Seen] = {}
        """Current versions, which never change."""

    async def run(self) -> None:
        """Sample until cancelled."""
        lag = self._instruments.histogram(names.LOOP_LAG)
        next_states = 0.0
        while True:
            now = time.monotonic()
            if now >= next_states:
                next_states = now + _STATES_EVERY_SECONDS
                await self._sample()
            before = time.monotonic()
            await asyncio.sleep(_LAG_EVERY_SECONDS)
            lag.observe(max(0.0, time.monotonic() - before - _LAG_EVERY_SECONDS))

    async def _sample(self) -> None:
        self._sample_worker()
        self._sample_queues()
        self._sample_certificates()
        try:
            await self._sample_disk()
            await self._sample_rows()
        except (GloraError, OSError) as error:
            _log.warning("metrics_not_sampled", message=str(error))

    def _set(self, metric: names.Metric, value: float, **labels: str) -> None:
        gauge = self._instruments.gauge(metric)
        (gauge.labels(**labels) if labels else gauge).set(value)

    def _sample_worker(self) -> None:
        stats = self._watched.numerics.stats()
        self._set(names.WORKER_UP, stats.pid > 0)
        self._set(names.WORKER_QUEUE, stats.queued)
        self._set(names.WORKER_RESIDENT_BYTES, resident_bytes(stats.pid))
        self._set(names.WORKER_PEAK_BYTES, stats.peak_bytes)
        self._raise_to(names.WORKER_RESTARTS, stats.restarts)
        self._raise_to(names.WORKER_JOBS, stats.jobs)
        self._raise_to(names.WORKER_BUSY_SECONDS, stats.busy_seconds)

    def _raise_to(self, metric: names.Metric, value: float) -> None:
        """Let a counter follow one that is kept elsewhere."""
        self._instruments.counter(metric).inc(max(0.0, value - self._worker_before.get(metric, 0.0)))
        self._worker_before[metric] = value

    def _sample_queues(self) -> None:
        watched, places = self._watched, self._watched.places
        self._set(names.UPLOAD_PLACES, places.total)
        self._set(names.USED_UPLOAD_PLACES, places.used)
        self._set(names.WAITING_UPLOADS, places.waiting)
        self._set(names.WAITING_DEVICES, len(watched.hub.available(time.time())))
        self._set(names.OPEN_POLLS, watched.hub.open_polls)
        self._set(names.DATABASE_QUEUE, watched.store.queued)

    def _sample_certificates(self) -> None:
        now, authority = time.time(), self._watched.authority
        self._set(names.CERTIFICATE_SECONDS, authority.expires_at - now, certificate="authority")
        self._set(names.CERTIFICATE_SECONDS, authority.server_expires_at - now, certificate="server")

    async def _sample_disk(self) -> None:
        disk = await asyncio.to_thread(shutil.disk_usage, self._watched.data_dir)
        self._set(names.DISK_FREE_BYTES, disk.free)
        self._set(names.DISK_SIZE_BYTES, disk.total)

    async def _sample_rows(self) -> None:
        rows = await self._watched.store.read(partial(_read, frozenset(self._versions)))
        self._versions |= {key: _Seen(number=number, quality=quality) for key, number, quality in rows.new_versions}
        current = {run.version_id for run in rows.runs}
        self._versions = {key: seen for key, seen in self._versions.items() if key in current}
        self._show_devices(rows.devices)
        self._show_rounds(rows)
        self._runs.show(tuple(self._run_samples(rows)))

    def _show_devices(self, devices: tuple[RosterEntry, ...]) -> None:
        now, hub = time.time(), self._watched.hub
        tally = Tally(device.state for device in devices)
        for state in DeviceState:
            # Revoked devices are history, which grows for ever; nobody counts them.
            if state is not DeviceState.REVOKED:
                self._set(names.DEVICES, tally[state], state=state.value)
        self._set(names.ONLINE_DEVICES, sum(hub.is_online(device.id, now) for device in devices))
        approved = (device for device in devices if device.state is DeviceState.APPROVED)
        soon = now + self._watched.authority.renewal_overdue_seconds
        self._set(names.EXPIRING_DEVICES, sum(device.certificate_expires_at < soon for device in approved))

    def _show_rounds(self, rows: _Rows) -> None:
        rounds = Tally(round_.phase for round_ in rows.rounds)
        for round_phase in sorted(LIVE):
            self._set(names.ACTIVE_ROUNDS, rounds[round_phase], phase=round_phase.value)
        open_ = Tally(item.phase for round_ in rows.rounds for item in round_.assignments)
        for phase in sorted(OPEN):
            self._set(names.OPEN_ASSIGNMENTS, open_[phase], phase=phase.value)
        runs = Tally(run.phase for run in rows.runs)
        for run_phase in _GOING_ON:
            self._set(names.ACTIVE_RUNS, runs[run_phase], phase=run_phase.value)
        self._set(names.OWED_EFFECTS, rows.owed)
        self._set(names.DATABASE_BYTES, rows.size_bytes)

    def _run_samples(self, rows: _Rows) -> Iterator[RunSample]:
        live: dict[RunId, Round] = {round_.run_id: round_ for round_ in rows.rounds}
        now = time.time()
        for run in rows.runs:
            round_ = live.get(run.id)
            seen = self._versions.get(run.version_id) if run.version_id else None
            active = run.phase is RunPhase.ACTIVE
            yield RunSample(
                name=run.name,
                version_number=seen.number if seen else 0,
                wait_seconds=_wait(round_, now) if active else 0.0,
                overdue_seconds=_overdue(round_, now),
                updates=round_.accepted if round_ else 0,
                quorum=round_.policy.quorum if round_ else 0,
                quality=seen.quality if seen else None,
                scores=rows.scores.get(run.id, ()),
            )


def _read(known: frozenset[VersionId], uow: UnitOfWork) -> _Rows:
    runs = tuple(run for run in uow.runs.active() if run.phase in _GOING_ON)
    new = [run.version_id for run in runs if run.version_id is not None and run.version_id not in known]
    return _Rows(
        devices=uow.lists.roster(),
        rounds=uow.rounds.live(),
        runs=runs,
        owed=len(uow.outbox.pending()),
        size_bytes=uow.lists.size_bytes(),
        scores={run.id: _scores(uow, run) for run in runs},
        new_versions=tuple((key, uow.versions.get(key).number, _quality(uow, key)) for key in new),
    )


def _scores(uow: UnitOfWork, run: Run) -> tuple[PhaseScore, ...]:
    """Of the run's version, or of the one before it: while a round goes on, its devices are still measuring."""
    return newest_scores(uow.history.scores(run.id, (run.rounds_done, run.rounds_done - 1)))


def _quality(uow: UnitOfWork, version_id: VersionId) -> Quality | None:
    """What was measured when the version was made; None of a first one, which nothing was folded into."""
    measured = [json.loads(item.values_json) for item in uow.versions.diagnostics(version_id)]
    return quality_of(measured) if measured else None


def _wait(round_: Round | None, now: float) -> float:
    return max(0.0, now - round_.created_at) if round_ is not None and round_.phase is RoundPhase.PLANNED else 0.0


def _overdue(round_: Round | None, now: float) -> float:
    """Also while it is aggregated: its deadline may lie ahead then, which is not late."""
    if round_ is None or round_.deadline_at is None or round_.phase not in GATHERING | {RoundPhase.AGGREGATING}:
        return 0.0
    return max(0.0, now - round_.deadline_at)
