"""The part of the database that answers operators: lists in pages, and what was remembered of what is over.

No method reads more rows than its page or its bound says; where a whole table is read, the method says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from glora_server.coordinator.model import AuditEntry, Device, Listing, Measurement, ModuleDiagnostics, Page, Version
from glora_server.coordinator.views_history import (
    AuditFilter,
    Contribution,
    Outcome,
    RosterEntry,
    RoundFigures,
    VersionFigures,
    VersionScore,
    Work,
)
from glora_server.rounds.assignment import Assignment, AssignmentPhase
from glora_server.rounds.ids import DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.round import Round


class Lists(Protocol):
    """Parts of long lists."""

    def roster(self, *, revoked: bool = False) -> tuple[RosterEntry, ...]:
        """Every device that is not revoked (or that is), without certificates, in order of enrolment.

        Reads the whole table; coordinator/roster.py remembers the answer.
        """
        ...

    def devices(self, ids: Collection[DeviceId]) -> Mapping[DeviceId, Device]:
        """The devices of these ids; those that are not there are absent."""
        ...

    def outcomes(self, device_id: DeviceId) -> Mapping[Outcome, int]:
        """How the device's parts in rounds ended."""
        ...

    def rounds(self, run_id: RunId, page: Page) -> Listing[Round]:
        """Rounds of the run without their assignments, newest first."""
        ...

    def round(self, run_id: RunId, number: int, attempt: int | None = None) -> Round:
        """A round without its assignments (no attempt: the last one); raises ROUND_UNKNOWN."""
        ...

    def newest_round(self, run_id: RunId) -> Round | None:
        """The newest round of the run without its assignments."""
        ...

    def phases(self, round_ids: Collection[RoundId]) -> Mapping[RoundId, Mapping[AssignmentPhase, int]]:
        """How many assignments of each round stand in each phase."""
        ...

    def assignments(self, round_id: RoundId, page: Page) -> Listing[Assignment]:
        """Assignments of a round, in their order."""
        ...

    def open_assignments(self, round_id: RoundId, limit: int) -> tuple[Assignment, ...]:
        """Open assignments of a round, the furthest phases first; at most `limit`."""
        ...

    def open_evaluations(self, run_id: RunId, limit: int) -> tuple[Assignment, ...]:
        """Open assignments of the run that belong to no round; at most `limit`."""
        ...

    def open_of(self, device_ids: Collection[DeviceId]) -> Mapping[DeviceId, Assignment]:
        """The oldest open assignment of each of these devices that has one."""
        ...

    def work(self, device_id: DeviceId, page: Page) -> Listing[Work]:
        """Assignments of the device, newest first."""
        ...

    def audit(self, wanted: AuditFilter, page: Page) -> Listing[AuditEntry]:
        """Rows of the audit, newest first."""
        ...

    def measurements(self, run_id: RunId, page: Page) -> Listing[Measurement]:
        """Evaluations of the run, by version number, rank, device."""
        ...

    def diagnostics(self, version_id: VersionId, page: Page) -> Listing[ModuleDiagnostics]:
        """What aggregation measured for the version, by module name."""
        ...

    def kept_versions(self, run_id: RunId, page: Page) -> Listing[Version]:
        """Published versions whose tensors are still there, newest first."""
        ...

    def run_names(self, run_ids: Collection[RunId]) -> Mapping[RunId, str]:
        """Names of these runs."""
        ...

    def unseen_version(self, run_id: RunId, device_id: DeviceId) -> Version | None:
        """The oldest version with tensors that the device has no evaluation of."""
        ...

    def last_rounds(self, run_ids: Collection[RunId], limit: int) -> tuple[Round, ...]:
        """The newest `limit` rounds of each of these runs, without assignments."""
        ...

    def size_bytes(self) -> int:
        """How large the database is."""
        ...


class History(Protocol):
    """What was remembered of rounds and versions; every `put` replaces what was there."""

    def count_outcomes(self, ended: Iterable[tuple[DeviceId, Outcome]]) -> None:
        """Count how devices' parts in a round ended."""
        ...

    def put_round(self, figures: RoundFigures) -> None:
        """Store what a round came to."""
        ...

    def put_version(self, figures: VersionFigures) -> None:
        """Store what a version looks like."""
        ...

    def put_contributions(self, contributions: Sequence[Contribution]) -> None:
        """Store who made a version."""
        ...

    def rescore(self, run_id: RunId, version_number: int) -> None:
        """Store anew what devices measured of the version; reads its measurements, in the order of devices."""
        ...

    def norms(self, round_id: RoundId) -> tuple[float, ...]:
        """Norms of the round's judged updates."""
        ...

    def rounds_of(self, run_id: RunId, numbers: Collection[int]) -> tuple[RoundFigures, ...]:
        """What the last attempt at each of these rounds came to, by number."""
        ...

    def figures_of(self, round_ids: Collection[RoundId]) -> Mapping[RoundId, RoundFigures]:
        """What these rounds came to; those that are not over are absent."""
        ...

    def versions_of(self, run_id: RunId, numbers: Collection[int]) -> tuple[VersionFigures, ...]:
        """What these versions look like, by number."""
        ...

    def summaries(self, run_id: RunId, numbers: Collection[int]) -> Mapping[int, Mapping[str, float]]:
        """Version.summary_json of these published versions, by number."""
        ...

    def last_number(self, run_id: RunId) -> int | None:
        """The number of the newest published version."""
        ...

    def scores(self, run_id: RunId, numbers: Collection[int]) -> tuple[VersionScore, ...]:
        """What was measured of these versions, by number, phase, rank."""
        ...

    def fresh_scores(self, run_id: RunId, version_number: int) -> tuple[VersionScore, ...]:
        """The same from the measurements themselves, without spreads: for the version that is being measured."""
        ...

    def contributions(self, version_id: VersionId, page: Page) -> Listing[Contribution]:
        """Who made the version, the largest share first."""
        ...

    def contributors(self, version_ids: Collection[VersionId]) -> Mapping[VersionId, int]:
        """How many devices made each of these versions."""
        ...

    def contributions_of(self, device_id: DeviceId, limit: int) -> tuple[Contribution, ...]:
        """The device's newest contributions, newest first."""
        ...

    def rejections(self, since: float, limit: int) -> Mapping[DeviceId, int]:
        """How many updates of each device were rejected since then; the `limit` most rejected."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAnswer:
    """An answer that can be given again; `sealed` is readable only with the request's key."""

    request_sha256: str
    sealed: bytes
    created_at: float


class Answers(Protocol):
    """Answers to requests that may be repeated."""

    def find(self, principal: str, key_sha256: str, since: float) -> KeptAnswer | None:
        """The answer that was kept since then."""
        ...

    def keep(self, principal: str, key_sha256: str, answer: KeptAnswer, *, forget_before: float) -> None:
        """Keep an answer, and forget those that are older than `forget_before`."""
        ...
