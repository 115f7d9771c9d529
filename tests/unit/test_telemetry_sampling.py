import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio
from storage_records import assignment, device, round_, run, together, version

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import DeviceState, MetricPhase, ModuleDiagnostics, Profile
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.quality import quality_of
from glora_server.coordinator.upload_session import Places
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.ids import DeviceId, RunId, VersionId
from glora_server.rounds.round import RoundPhase
from glora_server.rounds.run import RunPhase
from glora_server.storage.store import SqlStore
from glora_server.telemetry import memory
from glora_server.telemetry import runs as runs_module
from glora_server.telemetry.metrics import Metrics
from glora_wire.errors import GloraError, Reason

T = TypeVar("T")
DAY = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    pid: int = field(default_factory=os.getpid)
    jobs: int = 7
    queued: int = 3
    busy_seconds: float = 1.5
    peak_bytes: int = 1000
    restarts: int = 2


@dataclass(slots=True)
class FakeWorker:
    counters: Stats = field(default_factory=Stats)

    def stats(self) -> Stats:
        return self.counters


@dataclass(frozen=True, slots=True)
class FakeAuthority:
    expires_at: float
    server_expires_at: float
    renewal_overdue_seconds: float = 30 * DAY


@dataclass(slots=True)
class Away:
    """A database that does not answer."""

    queued: int = 5

    async def read(self, work: Callable[[UnitOfWork], T]) -> T:
        raise GloraError(Reason.DATABASE_UNUSABLE, f"It is away, so {work} can not be asked.")

    async def write(self, work: Callable[[UnitOfWork], T]) -> T:
        raise AssertionError(f"sampling writes nothing, but it called {work}")


@dataclass(slots=True)
class Server:
    store: SqlStore | Away
    data_dir: Path
    hub: Hub = field(default_factory=Hub)
    numerics: FakeWorker = field(default_factory=FakeWorker)
    places: Places = field(default_factory=lambda: Places(4))
    authority: FakeAuthority = field(default_factory=lambda: FakeAuthority(time.time() + 9 * DAY, time.time() + DAY))


@pytest_asyncio.fixture
async def store() -> AsyncIterator[SqlStore]:
    opened = SqlStore.open("sqlite://")
    yield opened
    await opened.close()


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, f"{name}{labels} is not exported"
    return found


async def sampled_again(metrics: Metrics) -> None:
    """Return when states were looked at anew, however busy the machine is."""
    until = value(metrics, "glora_event_loop_lag_seconds_count") + 10
    async with asyncio.timeout(30):
        while value(metrics, "glora_event_loop_lag_seconds_count") < until:  # noqa: ASYNC110 - a counter tells nobody
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def watching(metrics: Metrics, server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Sampling goes on, and has been done a few times."""
    monkeypatch.setattr("glora_server.telemetry.sampling._LAG_EVERY_SECONDS", 0.001)
    monkeypatch.setattr("glora_server.telemetry.sampling._STATES_EVERY_SECONDS", 0.002)
    task = asyncio.create_task(metrics.watch(server))
    await sampled_again(metrics)
    yield
    assert not task.done(), "it ended by itself"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def watch_briefly(metrics: Metrics, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watching(metrics, server, monkeypatch):
        pass


def put_devices(uow: UnitOfWork) -> None:
    now = time.time()
    uow.devices.add(device("pi", state=DeviceState.APPROVED, certificate_expires_at=now + 20 * DAY))
    uow.devices.add(device("away", state=DeviceState.APPROVED, certificate_expires_at=now + 60 * DAY))
    uow.devices.add(device("new", state=DeviceState.PENDING, certificate_expires_at=now + 2 * DAY))


def put_run(uow: UnitOfWork) -> None:
    """A run that is active, with version 1 and a round that is open and late."""
    now = time.time()
    uow.runs.add(run())
    for number in (0, 1):
        uow.versions.add(version(number))
    uow.versions.put_diagnostics(
        ModuleDiagnostics(version_id=VersionId("v1"), module="m", values_json=json.dumps({"captured_energy": 0.75}))
    )
    for number in (0, 1):
        uow.versions.publish(VersionId(f"v{number}"), "{}")
    active = replace(uow.runs.get(RunId("id-first")), phase=RunPhase.ACTIVE, version_id=VersionId("v1"), rounds_done=1)
    uow.runs.save(active)
    late = round_(
        2,
        phase=RoundPhase.COLLECTING,
        created_at=now - 200,
        opened_at=now - 100,
        deadline_at=now - 50,
        assignments=(assignment("a1", round_id="r2", phase=AssignmentPhase.UPLOADING),),
    )
    uow.rounds.add(late)


def end_run(uow: UnitOfWork) -> None:
    uow.runs.save(replace(uow.runs.get(RunId("id-first")), phase=RunPhase.COMPLETED))


async def test_what_stands_is_sampled(store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(store, tmp_path)
    await store.write(put_devices)
    server.hub.arrive(DeviceId("id-pi"), Profile(), time.time())
    await server.places.acquire()
    metrics = Metrics()
    await watch_briefly(metrics, server, monkeypatch)
    assert value(metrics, "glora_devices", state="approved") == 2
    assert value(metrics, "glora_devices", state="pending") == 1
    assert value(metrics, "glora_devices", state="suspended") == 0
    assert value(metrics, "glora_online_devices") == 1
    assert value(metrics, "glora_waiting_devices") == 1
    assert value(metrics, "glora_open_polls") == 1
    assert value(metrics, "glora_expiring_devices") == 1, "those that wait for approval do not matter"
    assert value(metrics, "glora_upload_places") == 4
    assert value(metrics, "glora_used_upload_places") == 1
    assert value(metrics, "glora_waiting_uploads") == 0
    assert value(metrics, "glora_certificate_remaining_seconds", certificate="server") == pytest.approx(DAY, abs=60)
    assert value(metrics, "glora_certificate_remaining_seconds", certificate="authority") > 8 * DAY
    assert 0 < value(metrics, "glora_disk_free_bytes") < value(metrics, "glora_disk_size_bytes")
    assert value(metrics, "glora_database_bytes") > 0
    assert value(metrics, "glora_event_loop_lag_seconds_count") >= 2


async def test_counters_of_the_worker_are_followed_and_never_added_twice(
    store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, metrics = Server(store, tmp_path), Metrics()
    await watch_briefly(metrics, server, monkeypatch)
    assert value(metrics, "glora_worker_up") == 1
    assert value(metrics, "glora_worker_restarts_total") == 2
    assert value(metrics, "glora_worker_jobs_total") == 7
    assert value(metrics, "glora_worker_busy_seconds_total") == 1.5
    assert value(metrics, "glora_worker_queued_jobs") == 3
    assert value(metrics, "glora_worker_peak_bytes") == 1000
    assert 1_000_000 < value(metrics, "glora_worker_resident_bytes") < value(metrics, "glora_memory_size_bytes")


async def test_a_run_is_shown_while_it_goes_on_and_then_removed(
    store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, metrics = Server(store, tmp_path), Metrics()
    await store.write(together(put_devices, put_run))
    async with watching(metrics, server, monkeypatch):
        assert value(metrics, "glora_run_version", run="first") == 1
        assert value(metrics, "glora_active_runs", phase="active") == 1
        assert value(metrics, "glora_active_rounds", phase="collecting") == 1
        assert value(metrics, "glora_open_assignments", phase="uploading") == 1
        assert value(metrics, "glora_round_overdue_seconds", run="first") == pytest.approx(50, abs=5)
        assert value(metrics, "glora_round_wait_seconds", run="first") == 0
        assert value(metrics, "glora_round_quorum", run="first") == round_().policy.quorum
        assert value(metrics, "glora_captured_energy_ratio", run="first", stat="min") == 0.75
        assert "glora_consensus_ratio{" not in metrics.text()[0].decode(), "nothing measured is no number"
        await store.write(end_run)
        await sampled_again(metrics)
        assert 'run="first"' not in metrics.text()[0].decode()


async def test_a_round_that_waits_to_open_says_how_long(
    store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(uow: UnitOfWork) -> None:
        put_devices(uow)
        uow.runs.add(run())
        uow.versions.add(version(0))
        uow.versions.publish(VersionId("v0"), "{}")
        known = uow.runs.get(RunId("id-first"))
        uow.runs.save(replace(known, phase=RunPhase.ACTIVE, version_id=VersionId("v0"), rounds_done=0))
        uow.rounds.add(round_(1, created_at=time.time() - 300))

    server, metrics = Server(store, tmp_path), Metrics()
    await store.write(planned)
    await watch_briefly(metrics, server, monkeypatch)
    assert value(metrics, "glora_round_wait_seconds", run="first") == pytest.approx(300, abs=5)
    assert value(metrics, "glora_round_overdue_seconds", run="first") == 0


def test_no_more_runs_than_the_bound_have_series_and_the_newest_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "MAX_RUNS", 2)
    metrics = Metrics()
    gauges = runs_module.RunGauges(metrics._instruments)
    samples = [
        runs_module.RunSample(
            name=name, version_number=1, wait_seconds=0, overdue_seconds=0, updates=0, quorum=1, quality=None
        )
        for name in ("old", "newer", "newest")
    ]
    gauges.show(samples)
    text = metrics.text()[0].decode()
    assert 'run="old"' not in text
    assert 'run="newer"' in text
    assert 'run="newest"' in text


def test_what_was_not_measured_of_the_newest_version_is_not_shown_of_an_older_one() -> None:
    metrics = Metrics()
    gauges = runs_module.RunGauges(metrics._instruments)
    measured = runs_module.RunSample(
        name="first",
        version_number=1,
        wait_seconds=0,
        overdue_seconds=0,
        updates=0,
        quorum=1,
        quality=quality_of([{"captured_energy": 0.75}]),
        scores=(
            runs_module.PhaseScore(phase=MetricPhase.BEFORE, loss=1.5, accuracy=0.25),
            runs_module.PhaseScore(phase=MetricPhase.VERSION, loss=1.0, accuracy=0.5),
        ),
    )
    gauges.show([measured])
    assert value(metrics, "glora_model_loss", run="first", phase="version") == 1.0
    assert value(metrics, "glora_captured_energy_ratio", run="first", stat="mean") == 0.75
    gauges.show([replace(measured, version_number=2, quality=quality_of([{}]), scores=measured.scores[:1])])
    text = metrics.text()[0].decode()
    assert value(metrics, "glora_model_accuracy_ratio", run="first", phase="before") == 0.25
    assert 'phase="version"' not in text
    assert "glora_captured_energy_ratio{" not in text
    gauges.show([])
    assert 'run="first"' not in metrics.text()[0].decode()


async def test_sampling_outlives_a_database_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    await watch_briefly(metrics, Server(Away(), tmp_path), monkeypatch)
    assert value(metrics, "glora_worker_peak_bytes") == 1000
    assert value(metrics, "glora_database_queued_jobs") == 5
    assert value(metrics, "glora_database_bytes") == 0


def test_a_container_has_the_memory_that_it_is_limited_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (limit, tmp_path / "nowhere"))
    machine = memory.memory_size()
    limit.write_text("max\n")
    assert memory.memory_size() == machine
    limit.write_text("1048576\n")
    assert memory.memory_size() == 1048576
    assert (memory.resident_bytes(0), memory.resident_bytes(2**22 + 1)) == (0, 0)
