"""The relational database: repositories, a unit of work, the store.

A repository method answers with a record or raises GloraError with the reason that names what is missing; a broken
database is another exception. `save` compares `row_version` and raises STALE_STATE when somebody was faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from glora_server.coordinator.model import (
    AuditEntry,
    Device,
    Listing,
    Measurement,
    ModuleDiagnostics,
    Owed,
    Page,
    Profile,
    Readout,
    Run,
    StatePart,
    TokenRecord,
    Upload,
    Version,
)
from glora_server.coordinator.ports.history import Answers, History, Lists
from glora_server.coordinator.ports.people import ApiTokens, Sessions, Users
from glora_server.rounds.assignment import Assignment
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, TokenId, VersionId
from glora_server.rounds.round import Round
from glora_wire.errors import Refusal

T = TypeVar("T")


class Devices(Protocol):
    """Enrolled devices."""

    def add(self, device: Device) -> None:
        """Store a new device; raises NAME_TAKEN when another one that is not revoked has the name."""
        ...

    def get(self, device_id: DeviceId) -> Device:
        """The device; raises DEVICE_UNKNOWN."""
        ...

    def by_name(self, name: str) -> Device:
        """The device of that name or id, not revoked ones first; raises DEVICE_UNKNOWN."""
        ...

    def by_key(self, key_sha256: str) -> Device | None:
        """The device of that public key."""
        ...

    def save(self, device: Device) -> Device:
        """Store a change; returns it with its new row version; raises STALE_STATE."""
        ...

    def seen(self, seen: Mapping[DeviceId, tuple[float, Profile]]) -> None:
        """Store last signs of life and profiles, whatever the row version."""
        ...

    def all(self) -> tuple[Device, ...]:
        """Every device that is not revoked."""
        ...


class Tokens(Protocol):
    """Join tokens."""

    def add(self, token: TokenRecord) -> None:
        """Store a new token."""
        ...

    def get(self, token_id: TokenId) -> TokenRecord:
        """The token; raises TOKEN_UNKNOWN."""
        ...

    def save(self, token: TokenRecord) -> TokenRecord:
        """Store a change; raises STALE_STATE."""
        ...

    def list(self, page: Page) -> Listing[TokenRecord]:
        """Tokens, newest first."""
        ...


class Runs(Protocol):
    """Runs."""

    def add(self, run: Run) -> None:
        """Store a new run; raises NAME_TAKEN."""
        ...

    def get(self, run_id: RunId) -> Run:
        """The run; raises RUN_UNKNOWN."""
        ...

    def by_name(self, name: str) -> Run:
        """The run of that name or id; raises RUN_UNKNOWN naming some that exist."""
        ...

    def save(self, run: Run) -> Run:
        """Store a change; raises STALE_STATE."""
        ...

    def list(self, page: Page) -> Listing[Run]:
        """Runs, newest first."""
        ...

    def active(self) -> tuple[Run, ...]:
        """Runs that are active or paused, or ended within the last day, oldest first."""
        ...


class Rounds(Protocol):
    """Rounds with their assignments, and assignments that belong to no round (evaluations)."""

    def add(self, round_: Round) -> None:
        """Store a new round (and its assignments)."""
        ...

    def number(self, round_id: RoundId) -> int:
        """The round's number, without its assignments; raises ROUND_UNKNOWN."""
        ...

    def get(self, round_id: RoundId) -> Round:
        """The round with all assignments; raises ROUND_UNKNOWN."""
        ...

    def save(self, round_: Round) -> Round:
        """Store the round and those assignments that changed; raises STALE_STATE."""
        ...

    def latest(self, run_id: RunId) -> Round | None:
        """The newest round (highest number, then attempt) of the run."""
        ...

    def live(self) -> tuple[Round, ...]:
        """Every round that has not ended, of all runs."""
        ...

    def list(self, run_id: RunId, page: Page) -> Listing[Round]:
        """Rounds of the run with their assignments, newest first."""
        ...

    def assignment(self, assignment_id: AssignmentId) -> Assignment:
        """The assignment; raises ASSIGNMENT_UNKNOWN."""
        ...

    def add_assignment(self, assignment: Assignment) -> None:
        """Store an assignment that belongs to no round."""
        ...

    def save_assignment(self, assignment: Assignment) -> None:
        """Store a change of an assignment that belongs to no round."""
        ...

    def open_for(self, device_id: DeviceId) -> tuple[Assignment, ...]:
        """Open assignments of the device, oldest first."""
        ...

    def busy_devices(self) -> frozenset[DeviceId]:
        """Devices with an open TRAIN assignment."""
        ...

    def declined_for(self, run_id: RunId) -> Mapping[DeviceId, tuple[float, Refusal]]:
        """Devices that declined or failed for good in this run, with when and why (the newest word counts)."""
        ...

    def was_evaluated(self, device_id: DeviceId, version_id: VersionId) -> bool:
        """The device has an EVALUATE assignment for the version, in whatever phase."""
        ...


class Uploads(Protocol):
    """Whole updates; the database refuses a second one for an assignment."""

    def add(self, upload: Upload) -> None:
        """Store a received update; raises UPLOAD_CONFLICT when the assignment has one already."""
        ...

    def find(self, assignment_id: AssignmentId) -> Upload | None:
        """The update of the assignment."""
        ...

    def of_round(self, round_id: RoundId) -> tuple[Upload, ...]:
        """Updates of the round, in order of assignment id."""
        ...

    def judged(self, assignment_id: AssignmentId, update_norm: float | None, shrunk_rank: int | None = None) -> None:
        """Note the norm that validation measured, and the rank of an update that has a smaller one than granted."""
        ...

    def shrunk(self, run_id: RunId) -> Mapping[DeviceId, int]:
        """The smallest rank that each device shrank to in the run; devices that never did are absent."""
        ...

    def digests(self) -> frozenset[str]:
        """Digest.text of every blob that an upload row refers to (for clean-up)."""
        ...


class Versions(Protocol):
    """States. A version's parts may be written in earlier transactions; `publish` makes it the run's current one."""

    def add(self, version: Version) -> None:
        """Store an unpublished version without parts."""
        ...

    def get(self, version_id: VersionId) -> Version:
        """The version; raises VERSION_UNKNOWN."""
        ...

    def by_number(self, run_id: RunId, number: int) -> Version:
        """The published version; raises VERSION_UNKNOWN naming the ones that exist."""
        ...

    def put_parts(self, version_id: VersionId, *parts: StatePart) -> None:
        """Store parts; the same part again replaces it while the version is unpublished."""
        ...

    def parts(self, version_id: VersionId, names: Sequence[str]) -> tuple[StatePart, ...]:
        """The parts of these names with their tensors, in that order; raises VERSION_UNKNOWN."""
        ...

    def part_names(self, version_id: VersionId) -> tuple[str, ...]:
        """Names of the parts that are stored, in the order of their names."""
        ...

    def put_diagnostics(self, *diagnostics: ModuleDiagnostics) -> None:
        """Store or replace what was measured for modules."""
        ...

    def diagnostics(self, version_id: VersionId) -> tuple[ModuleDiagnostics, ...]:
        """What was measured for the version, by module name."""
        ...

    def publish(self, version_id: VersionId, summary_json: str) -> None:
        """Mark the version as published (the caller moves the run's pointer in the same transaction)."""
        ...

    def drop(self, version_id: VersionId) -> None:
        """Delete an unpublished version and its parts."""
        ...

    def list(self, run_id: RunId, page: Page) -> Listing[Version]:
        """Published versions, newest first."""
        ...

    def pin(self, version_id: VersionId, *, pinned: bool) -> None:
        """Keep the version's tensors for ever, or no longer."""
        ...

    def prune(self, run_id: RunId, *, keep: int) -> tuple[Readout, ...]:
        """Drop the tensors and readouts of all but the last `keep` and the pinned versions; returns the readouts."""
        ...

    def module_ranks(self, version_id: VersionId) -> Mapping[str, int]:
        """How many directions the state of each module holds, by name; reads no tensors."""
        ...

    def readout(self, version_id: VersionId, rank: int, dtype: str, variant: str = "train") -> Readout | None:
        """The rendered adapter, where there is one."""
        ...

    def put_readout(self, readout: Readout) -> None:
        """Note a rendered adapter; the same one again is harmless."""
        ...

    def readout_digests(self) -> frozenset[str]:
        """Digest.text of every blob that a readout row refers to (for clean-up)."""
        ...


class Measurements(Protocol):
    """Evaluations."""

    def put(self, measurements: Sequence[Measurement]) -> None:
        """Store or replace by (assignment, phase, rank)."""
        ...


class Audit(Protocol):
    """Who did what."""

    def add(self, entry: AuditEntry) -> None:
        """Append."""
        ...

    def list(self, page: Page) -> Listing[AuditEntry]:
        """Newest first."""
        ...


class Outbox(Protocol):
    """Effects that are owed."""

    def add(self, owed: Iterable[Owed]) -> None:
        """Store, in the same transaction as what they follow from."""
        ...

    def pending(self) -> tuple[Owed, ...]:
        """All that is owed, oldest first."""
        ...

    def done(self, owed_id: int) -> None:
        """Performed; doing it twice is harmless."""
        ...


class UnitOfWork(Protocol):
    """One transaction."""

    @property
    def devices(self) -> Devices: ...  # noqa: D102
    @property
    def tokens(self) -> Tokens: ...  # noqa: D102
    @property
    def runs(self) -> Runs: ...  # noqa: D102
    @property
    def rounds(self) -> Rounds: ...  # noqa: D102
    @property
    def uploads(self) -> Uploads: ...  # noqa: D102
    @property
    def versions(self) -> Versions: ...  # noqa: D102
    @property
    def measurements(self) -> Measurements: ...  # noqa: D102
    @property
    def audit(self) -> Audit: ...  # noqa: D102
    @property
    def users(self) -> Users: ...  # noqa: D102
    @property
    def sessions(self) -> Sessions: ...  # noqa: D102
    @property
    def api_tokens(self) -> ApiTokens: ...  # noqa: D102
    @property
    def outbox(self) -> Outbox: ...  # noqa: D102
    @property
    def lists(self) -> Lists: ...  # noqa: D102
    @property
    def history(self) -> History: ...  # noqa: D102
    @property
    def answers(self) -> Answers: ...  # noqa: D102


class Store(Protocol):
    """The relational database."""

    async def write(self, work: Callable[[UnitOfWork], T]) -> T:
        """Run `work` in a transaction of its own (it may be called again after a serialisation failure).

        Commits durably before it returns; rolls back when `work` raises.
        """
        ...

    async def read(self, work: Callable[[UnitOfWork], T]) -> T:
        """Run `work` on a consistent snapshot that it must not change."""
        ...
