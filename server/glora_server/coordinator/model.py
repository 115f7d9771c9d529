"""What the coordinator remembers, as immutable records; times in Unix seconds, sizes in bytes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, TokenId, VersionId
from glora_server.rounds.run import RunPhase
from glora_wire.digests import Digest
from glora_wire.errors import Reason
from glora_wire.manifest import Manifest

T = TypeVar("T")
_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"


def new_id(length: int = 12) -> str:
    """A fresh identifier of letters and digits that people can read aloud."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


class DeviceState(StrEnum):
    """Whether a device may work."""

    PENDING = "pending"
    APPROVED = "approved"
    SUSPENDED = "suspended"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a device last said about itself (CapabilityProfile)."""

    software_version: str = ""
    platform: str = ""
    cpu_count: int = 0
    memory_bytes: int = 0
    accelerators: tuple[str, ...] = ()
    max_rank: int = 0
    trains: bool = True
    evaluates: bool = False
    fingerprint: str = ""
    task: str = ""
    training_rows: int = 0
    evaluation_rows: int = 0
    run_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An enrolled device."""

    id: DeviceId
    name: str
    state: DeviceState
    declared_rank: int
    granted_rank: int
    tags: tuple[str, ...] = ()
    token_id: TokenId | None
    key_sha256: str
    """Hex SHA-256 of the DER public key; unique: a device is its key."""
    certificate_pem: str
    certificate_serial: str
    certificate_expires_at: float
    created_at: float
    last_seen_at: float | None = None
    profile: Profile = field(default_factory=Profile)
    row_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """A join token as the server remembers it: the secret only as a hash."""

    id: TokenId
    secret_sha256: str
    description: str
    created_at: float
    expires_at: float
    max_uses: int
    uses: int = 0
    max_rank: int
    tags: tuple[str, ...] = ()
    approve: bool = True
    """Devices that join with it may work at once."""
    revoked: bool = False
    row_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A federated fine-tuning of one base model."""

    id: RunId
    name: str
    phase: RunPhase
    spec_json: str
    """The RunSpec as it was given (policy edits included)."""
    manifest: Manifest
    version_id: VersionId | None
    """The current state; None before the run was started."""
    rounds_done: int = 0
    reason: Reason | None = None
    message: str = ""
    """Why it waits, failed or was aborted; a sentence."""
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    row_version: int = 0


class TensorKind(StrEnum):
    """What a part of a state is."""

    MODULE = "module"
    DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorData:
    """A tensor as bytes, row-major, little-endian."""

    dtype: str
    """"float32" or "float64"."""
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePart:
    """The state of one adapted module (tensors u, a, sigma and extra.NAME) or of one dense tensor (tensor value)."""

    name: str
    kind: TensorKind
    tensors: Mapping[str, TensorData]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """An immutable state of a run; number 0 is the start, number n the result of round n."""

    id: VersionId
    run_id: RunId
    number: int
    round_id: RoundId | None
    parent_id: VersionId | None
    strategy: str
    published: bool
    created_at: float
    summary_json: str = "{}"
    """Diagnostics of the whole version, a JSON object of numbers."""
    pinned: bool = False
    pruned: bool = False
    """Its tensors were dropped by retention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDiagnostics:
    """What aggregation measured for one module of one version; a JSON object of numbers and lists of numbers."""

    version_id: VersionId
    module: str
    values_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A whole, digest-checked update of an assignment; at most one per assignment."""

    assignment_id: AssignmentId
    round_id: RoundId
    device_id: DeviceId
    version_id: VersionId
    """The version that the device started from."""
    digest: Digest
    adapter_config_json: str
    training_rows: int
    completed_steps: int
    stopped_early: bool
    training_loss: float
    training_seconds: float
    received_at: float
    update_norm: float | None = None
    """Frobenius norm of the whole update, once it was judged."""
    shrunk_rank: int | None = None
    """Its rank where that is smaller than what was granted, once it was accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readout:
    """A rendered adapter in the blob store; `variant` says what was cut from the state (ports.ReadoutVariant)."""

    version_id: VersionId
    rank: int
    dtype: str
    digest: Digest
    created_at: float
    variant: str = "train"


class MetricPhase(StrEnum):
    """When a device measured."""

    BEFORE = "before"
    AFTER = "after"
    VERSION = "version"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """An evaluation on a device's own held-out rows; one per (assignment, phase, rank)."""

    assignment_id: AssignmentId
    run_id: RunId
    device_id: DeviceId
    version_id: VersionId
    version_number: int
    phase: MetricPhase
    rank: int
    loss: float
    accuracy: float
    rows: int
    seconds: float
    measured_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """Who did what, from where, and what it was before and after; holds no secrets."""

    id: int = 0
    at: float
    actor: str
    origin: str = ""
    """Address that the request came from; empty for what the server or a device did."""
    action: str
    target: str
    before_json: str = "null"
    """What the action changed, as it was: a JSON object, or null where there was nothing."""
    after_json: str = "null"
    """The same as it is now."""
    details_json: str = "{}"


class OwedKind(StrEnum):
    """Effects that must be performed at least once, also after a crash."""

    VALIDATE = "validate"
    AGGREGATE = "aggregate"
    CLOSED = "closed"
    WAKE = "wake"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owed:
    """A row of the outbox."""

    id: int = 0
    kind: OwedKind
    run_id: RunId
    round_id: RoundId
    assignment_id: AssignmentId | None = None
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which part of a list: at most `size` items after the opaque `token`."""

    size: int = 100
    token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing(Generic[T]):
    """A part of a list and the token of the next part (empty: there is none)."""

    items: tuple[T, ...]
    next_token: str = ""
