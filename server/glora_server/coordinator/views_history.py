"""What is remembered of rounds and versions that are over, and how queries show it; times in Unix seconds.

These records are made once, when a round ends or a version is published, so that no page has to read a history again
to say what it came to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from glora_server.coordinator.model import DeviceState, MetricPhase, Profile
from glora_server.coordinator.views import AssignmentView, DeviceView
from glora_server.rounds.assignment import Assignment
from glora_server.rounds.ids import DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.round import RoundPhase


class Outcome(StrEnum):
    """How a device's part in a round ended."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    DECLINED = "declined"
    FAILED = "failed"
    EXPIRED = "expired"
    """It did not answer in time."""
    NOT_NEEDED = "not_needed"
    """The round had enough updates or was ended; says nothing about the device."""


class Stage(StrEnum):
    """What a device's time in a round went into."""

    ACCEPTING = "accepting"
    DOWNLOADING = "downloading"
    TRAINING = "training"
    UPLOADING = "uploading"
    JUDGING = "judging"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How numbers of several devices lie: the least, the quartiles, the greatest."""

    least: float
    lower: float
    median: float
    upper: float
    greatest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFigures:
    """What one attempt at a round came to."""

    round_id: RoundId
    run_id: RunId
    number: int
    attempt: int
    phase: RoundPhase
    outcomes: Mapping[Outcome, int]
    bytes_down: int
    bytes_up: int
    seconds: float
    """From opening to the end; 0 where it never opened."""
    aggregating_seconds: float
    """From the last word of a device to the end."""
    stages: Mapping[Stage, Spread]
    """Seconds of the devices that went through the stage."""
    update_norms: Spread | None
    """Frobenius norms of the accepted updates; None without any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFigures:
    """One module of one version, in few numbers; None where the strategy does not measure it."""

    module: str
    spectrum: tuple[float, ...]
    """The largest eigenvalues of the consensus, as shares of all that were kept: they sum to 1 (empty: none)."""
    captured_energy: float | None
    truncation_error: float | None
    mean_norm: float | None
    effective_rank: float | None
    """exp of the entropy of the spectrum: 1 = one direction has it all."""
    consensus: float | None = None
    """Mean cosine between a device's change and the mean change: 1 = all pull the same way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFigures:
    """All modules of one version."""

    version_id: VersionId
    run_id: RunId
    number: int
    modules: tuple[ModuleFigures, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One device's part in one version, and how far it agreed with the others.

    `capture` and `cosine` are means over modules, each weighted with the square of the norm that the device's update
    has in it; None where the strategy does not measure them. `deviation` says how far the worse of the two lies below
    the round's median, in robust standard deviations (1.4826 times the median absolute deviation).
    """

    version_id: VersionId
    run_id: RunId
    number: int
    device_id: DeviceId
    at: float
    share: float
    """Its weight in the mean, 0 to 1."""
    rows: int
    update_norm: float | None
    capture: float | None
    cosine: float | None
    deviation: float | None
    outlier: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionScore:
    """What devices measured of one version at one rank; `accuracy` and `loss` are means weighted with rows."""

    run_id: RunId
    version_number: int
    phase: MetricPhase
    rank: int
    devices: int
    rows: int
    accuracy: float
    loss: float
    accuracies: Spread | None
    """Over devices; None where no device measured a finite number."""
    losses: Spread | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterEntry:
    """The few things about a device that lists and planning's forecasts need."""

    id: DeviceId
    name: str
    state: DeviceState
    granted_rank: int
    tags: tuple[str, ...]
    created_at: float
    last_seen_at: float | None
    certificate_expires_at: float
    profile: Profile
    outcomes: Mapping[Outcome, int]


class DeviceOrder(StrEnum):
    """How a list of devices is ordered."""

    ENROLMENT = "enrolment"
    NAME = "name"
    LAST_SEEN = "last_seen"
    """Newest sign of life first; those that were never seen last."""
    RELIABILITY = "reliability"
    """Least reliable first; those that never worked last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFilter:
    """Which devices are wanted; what is left out does not matter."""

    state: DeviceState | None = None
    tag: str = ""
    text: str = ""
    """Part of the name, the id or the platform, in whatever case."""
    online: bool | None = None
    order: DeviceOrder = DeviceOrder.ENROLMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which rows of the audit are wanted; empty = all."""

    actor: str = ""
    action: str = ""
    """The action ("run.pause"), or its first part with a dot ("run.")."""
    target: str = ""
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounts:
    """How many devices there are."""

    total: int
    """Without the revoked ones."""
    online: int
    by_state: Mapping[DeviceState, int]
    tags: tuple[str, ...]
    """All tags in use, sorted; 200 at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An assignment as its device's history has it."""

    assignment: Assignment
    run_name: str
    round_number: int | None
    """None: an evaluation that belongs to no round."""
    attempt: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkView:
    """The same with what is going on right now."""

    view: AssignmentView
    run_name: str
    round_number: int | None
    attempt: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDetail:
    """A device with what its history says about it."""

    device: DeviceView
    outcomes: Mapping[Outcome, int]
    reliability: float | None
    """Accepted updates of all rounds that waited for it; None before the first."""
    agreement: tuple[Contribution, ...]
    """Its newest contributions, newest first."""
    run_names: Mapping[RunId, str]
    """Names of the runs that they belong to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLine:
    """A device as a list shows it."""

    device: DeviceView
    reliability: float | None
    """Accepted updates of all rounds that waited for it; None before the first."""
    agreement: Contribution | None
    """Its newest contribution; None before the first."""


def reliability(outcomes: Mapping[Outcome, int]) -> float | None:
    """Accepted updates as a share of the rounds that waited for the device; None when none did."""
    counted = sum(number for outcome, number in outcomes.items() if outcome is not Outcome.NOT_NEEDED)
    return outcomes.get(Outcome.ACCEPTED, 0) / counted if counted else None
