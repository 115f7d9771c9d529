"""What the coordinator needs from the outside: a store, blobs, an engine for numerics, an authority, a clock.

A repository method answers with a record or raises GloraError with the reason that names what is missing; a broken
database or disk is another exception. `save` compares `row_version` and raises STALE_STATE when somebody was faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

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
from glora_server.rounds.assignment import Assignment
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, TokenId, VersionId
from glora_server.rounds.round import Round
from glora_wire.digests import Digest
from glora_wire.errors import Refusal
from glora_wire.payload import TensorSpec

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

    def list(self, page: Page) -> Listing[Device]:
        """Devices in order of enrolment."""
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
        """Runs that are active or paused, or completed within the last day, oldest first."""
        ...


class Rounds(Protocol):
    """Rounds with their assignments, and assignments that belong to no round (evaluations)."""

    def add(self, round_: Round) -> None:
        """Store a new round (and its assignments)."""
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

    def evaluated(self, run_id: RunId) -> frozenset[tuple[DeviceId, VersionId]]:
        """(device, version) pairs that have an EVALUATE assignment, in whatever phase."""
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

    def put_part(self, version_id: VersionId, part: StatePart) -> None:
        """Store one part; the same part again replaces it while the version is unpublished."""
        ...

    def part(self, version_id: VersionId, name: str) -> StatePart:
        """One part with its tensors; raises VERSION_UNKNOWN."""
        ...

    def part_names(self, version_id: VersionId) -> tuple[str, ...]:
        """Names of the parts that are stored, in the order of their names."""
        ...

    def put_diagnostics(self, diagnostics: ModuleDiagnostics) -> None:
        """Store or replace what was measured for one module."""
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

    def of_run(self, run_id: RunId) -> tuple[Measurement, ...]:
        """All of the run, by version number, rank, device."""
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
    def outbox(self) -> Outbox: ...  # noqa: D102


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


class Blobs(Protocol):
    """Files addressed by their content."""

    def adopt(self, path: Path, digest: Digest) -> None:
        """Move a finished, synced local file into the store; harmless when the content is there already."""
        ...

    def local(self, digest: Digest) -> AbstractContextManager[Path]:
        """A local path with the content while the context is open; raises FileNotFoundError."""
        ...

    def exists(self, digest: Digest) -> bool:
        """Whether the content is there."""
        ...

    def delete(self, digest: Digest) -> None:
        """Remove; harmless when it is not there."""
        ...

    def stored(self) -> Iterable[Digest]:
        """Every content that is there (for clean-up)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyChoice:
    """A strategy by name with its options, as numbers, strings and booleans."""

    name: str
    options: Mapping[str, str | float | int | bool]


Frozen = Literal["", "tail", "state"]

ReadoutVariant = Literal["train", "fresh", "tail", "state"]
"""What is cut from a state. "train": what the strategy hands out at a rank. "fresh": what it hands out of an empty
state. "tail": the directions beyond those of a smaller adapter. "state": the directions from the first one on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyInfo:
    """What a strategy wants of devices in a round (names as in types.proto, lower case) and what it promises.

    `frozen`: what of the state devices load beside the adapter that they train: nothing, the directions beyond its
    rank, or all of it. `needs_sent`: aggregation asks for the adapter that each device was sent. `may_shrink`: an
    update may have a smaller rank than was granted.
    """

    name: str
    summary: str
    train_mask: str
    init: str
    upload_set: str
    mixed_ranks: bool
    frozen: Frozen = ""
    needs_sent: bool = False
    reset_optimizer: bool = True
    may_shrink: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialiseJob:
    """Make the parts of version 0: empty module states, dense tensors drawn from (seed, name)."""

    strategy: StrategyChoice
    modules: tuple[tuple[str, int, int], ...]
    """(name, out_features, in_features)"""
    dense: tuple[tuple[str, tuple[int, ...], float], ...]
    """(name, shape, standard deviation; 0 = zeros)"""
    rank: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderJob:
    """Write the tensors of some parts into an adapter file of `rank` that `path` already holds the header of."""

    path: Path
    """A file of the final size; its safetensors header says where each tensor goes."""
    strategy: StrategyChoice
    parts: tuple[StatePart, ...]
    rank: int
    scale: float
    seed: int
    version_number: int
    style: str
    """"balanced" or "a_orthonormal"."""
    variant: ReadoutVariant = "train"
    first: int = 0
    """How many leading directions of the state a "tail" leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckJob:
    """Judge the numbers of an update whose header was checked: finite, and not absurdly large."""

    path: Path
    scales: Mapping[str, float]
    """s of every module."""
    expected: tuple[TensorSpec, ...]
    max_norm: float
    """Largest Frobenius norm of the whole ΔW; 0 = no limit."""
    sent_path: Path | None = None
    """The adapter file that the device started from: it has the factor that the device does not send."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The verdict; `norm` is ‖ΔW‖_F over all modules."""

    refusal: Refusal | None
    norm: float | None
    module_norms: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRef:
    """One accepted update, by file."""

    device_id: DeviceId
    path: Path
    scales: Mapping[str, float]
    """s of every module."""
    weight: float
    sent_path: Path | None
    """The adapter file that the device started from; its scale is `sent_scale` everywhere."""
    sent_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateJob:
    """Fold the updates of one shard of parts; parts share nothing."""

    strategy: StrategyChoice
    parts: tuple[StatePart, ...]
    """The previous state. A dense part without tensors was never aggregated before."""
    updates: tuple[UpdateRef, ...]
    rank: int
    round_index: int
    wire_dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatedPart:
    """The new state of one part and what was measured (JSON object; empty for dense parts)."""

    part: StatePart
    diagnostics_json: str


class NumericsEngine(Protocol):
    """Runs the numerics outside of the event loop, in a worker that may die: then WorkerLostError, and try again."""

    async def initialise(self, job: InitialiseJob) -> tuple[StatePart, ...]:
        """The parts of version 0."""
        ...

    async def render(self, job: RenderJob) -> None:
        """Write tensors into the file."""
        ...

    async def check(self, job: CheckJob) -> CheckResult:
        """Judge an update."""
        ...

    async def aggregate(self, job: AggregateJob) -> tuple[AggregatedPart, ...]:
        """The new parts, in the order of the job; raises GloraError for input that can not be aggregated."""
        ...

    async def strategies(self) -> tuple[StrategyInfo, ...]:
        """What can be chosen."""
        ...

    async def describe(self, choice: StrategyChoice, *, round_index: int) -> StrategyInfo:
        """What the strategy wants with these options in that round, from 0; raises STRATEGY_UNKNOWN or _OPTIONS.

        It differs between even and odd rounds at most.
        """
        ...

    async def check_strategy(self, choice: StrategyChoice, *, max_rank: int, mixed_ranks: bool) -> Refusal | None:
        """Why the strategy cannot serve a run with these options and ranks; None when it can."""
        ...


class WorkerLostError(Exception):
    """The worker process ended; the job can be given again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCertificate:
    """A certificate for a device, PEM."""

    pem: str
    serial: str
    expires_at: float


class Authority(Protocol):
    """The server's certificate authority."""

    @property
    def certificate_pem(self) -> str:
        """The CA certificate."""
        ...

    @property
    def pin(self) -> str:
        """Hex SHA-256 of the CA certificate (DER), for join tokens."""
        ...

    def key_of(self, certificate_request_pem: str) -> str:
        """Hex SHA-256 of the public key (DER) in the request; raises CSR_INVALID."""
        ...

    def issue(self, certificate_request_pem: str, device_id: DeviceId, name: str) -> IssuedCertificate:
        """A client certificate for the key in the request and nothing else of it; raises CSR_INVALID."""
        ...
