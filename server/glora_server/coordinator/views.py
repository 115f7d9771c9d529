"""What queries answer: records joined with what people want to know about them; times in Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glora_server.coordinator.model import Device, MetricPhase, Run
from glora_server.coordinator.run_spec import RunSpec
from glora_server.rounds.assignment import Assignment, AssignmentPhase
from glora_server.rounds.round import Round


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveProgress:
    """What a device last reported about its work; kept in memory only."""

    phase: str
    """"downloading", "evaluating", "training" or "uploading"."""
    done: int
    total: int
    """Steps or bytes, by phase; 0 = not known."""
    loss: float
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentView:
    """An assignment with the device's name and what it is doing."""

    assignment: Assignment
    device_name: str
    progress: LiveProgress | None = None
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundView:
    """A round with its devices, or with the first of them."""

    round: Round
    """Its `assignments` are those that are shown; `counts` knows all of them."""
    assignments: tuple[AssignmentView, ...]
    counts: Mapping[AssignmentPhase, int]
    """How many assignments stand in each phase."""
    seconds: float | None = None
    """From opening to the end, or until now; None before it was opened."""

    @property
    def devices(self) -> int:
        """How many devices are in the round."""
        return sum(self.counts.values())

    @property
    def accepted(self) -> int:
        """Updates that were accepted so far."""
        return self.counts.get(AssignmentPhase.ACCEPTED_UPDATE, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankScore:
    """How good a version is at one rank: means over devices, weighted by their rows."""

    version_number: int
    rank: int
    phase: MetricPhase
    accuracy: float
    loss: float
    rows: int
    devices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run, where it stands and why it waits."""

    run: Run
    spec: RunSpec
    round: RoundView | None
    """The newest round; None before the first."""
    waiting: str
    """Why nothing moves, a sentence; empty when it does."""
    version_number: int | None
    """The current version; None before the run was started."""
    eligible_devices: int = 0
    """Devices that may train in the run."""
    online_devices: int = 0
    """Those of them that are there."""
    evaluations: tuple[AssignmentView, ...] = ()
    """Open assignments that belong to no round; the first hundred."""
    scores: tuple[RankScore, ...] = ()
    """Of the newest versions; queries.series has all of them."""
    revision: int = 0
    """Grows with every change of the run; for waiting on the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """A device and what it is doing."""

    device: Device
    online: bool
    current: AssignmentView | None = None
    current_run: str = ""
    """Name of the run that `current` belongs to."""
    measuring: str = ""
    """Name of the run for which it still measures what it has sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemView:
    """The server itself."""

    version: str
    started_at: float
    now: float
    grpc_port: int
    enrolment_port: int
    http_port: int
    database: str
    """"sqlite" or "postgresql"."""
    database_revision: str
    worker_device: str
    """Where numerics run: "cpu", "cuda:0"; empty before the worker answered."""
    authority_pin: str
    """Hex SHA-256 of the CA certificate."""
    authority_expires_at: float
    renewal_overdue_seconds: float
    """A device whose certificate has less left should have renewed it."""
    devices: int
    online_devices: int
    active_runs: int
    free_disk_bytes: int
    disk_bytes: int = 0
    """All of the disk that the data folder lies on."""
    database_bytes: int = 0
    worker_restarts: int = 0
    """How often the worker had to be started again since the server started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """An adapter that was written to the server's disk."""

    folder: Path
    files: tuple[str, ...]
    """Names in the folder."""
    version_number: int
    rank: int
    flavour: str
    """"peft" or "serving"."""
    modules: int
