"""Gauges that are looked up every few seconds, because nobody reports them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
from prometheus_client import Counter, Gauge, Histogram

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import Device, DeviceState
from glora_server.coordinator.ports import Store, UnitOfWork
from glora_wire.errors import GloraError

_LAG_EVERY_SECONDS: Final = 0.5
_STATES_EVERY_SECONDS: Final = 10.0
_log = structlog.get_logger("glora.telemetry")


class WorkerCounters(Protocol):
    """What the aggregation worker counts."""

    @property
    def peak_bytes(self) -> int: ...  # noqa: D102
    @property
    def restarts(self) -> int: ...  # noqa: D102


class Worker(Protocol):
    """The aggregation worker."""

    def stats(self) -> WorkerCounters:
        """Its counters so far."""
        ...


class Watched(Protocol):
    """The parts that are looked at."""

    @property
    def store(self) -> Store: ...  # noqa: D102
    @property
    def hub(self) -> Hub: ...  # noqa: D102
    @property
    def numerics(self) -> Worker: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The metrics that this module sets."""

    active_rounds: Gauge
    devices: Gauge
    online_devices: Gauge
    worker_peak_bytes: Gauge
    worker_restarts: Counter
    loop_lag: Histogram


async def sample_for_ever(samples: Samples, watched: Watched) -> None:
    """Keep the gauges fresh until cancelled; a database that is away leaves them as they were."""
    restarts, next_states = 0, 0.0
    while True:
        now = time.monotonic()
        if now >= next_states:
            next_states = now + _STATES_EVERY_SECONDS
            restarts = _sample_worker(samples, watched.numerics, restarts)
            try:
                await sample_states(samples, watched)
            except GloraError as error:
                _log.warning("metrics_not_sampled", reason=error.reason.value, message=error.message)
        before = time.monotonic()
        await asyncio.sleep(_LAG_EVERY_SECONDS)
        samples.loop_lag.observe(max(0.0, time.monotonic() - before - _LAG_EVERY_SECONDS))


async def sample_states(samples: Samples, watched: Watched) -> None:
    """Set the gauges of devices and rounds; raises GloraError when the database cannot be read."""
    devices, rounds = await watched.store.read(_states)
    tally = Tally(device.state for device in devices)
    for state in DeviceState:
        # Revoked devices are history, which grows for ever; nobody counts them.
        if state is not DeviceState.REVOKED:
            samples.devices.labels(state=state.value).set(tally[state])
    now = time.time()
    samples.online_devices.set(sum(watched.hub.is_online(device.id, now) for device in devices))
    samples.active_rounds.set(rounds)


def _states(uow: UnitOfWork) -> tuple[tuple[Device, ...], int]:
    return uow.devices.all(), len(uow.rounds.live())


def _sample_worker(samples: Samples, worker: Worker, known_restarts: int) -> int:
    stats = worker.stats()
    samples.worker_peak_bytes.set(stats.peak_bytes)
    samples.worker_restarts.inc(max(0, stats.restarts - known_restarts))
    return stats.restarts
