"""The tables. Columns are named like the fields of the records in coordinator/model.py and rounds/.

Ids are made by the coordinator. Times are Unix seconds. What must be unique is refused by the database. The two
pointers that would close a circle of foreign keys (runs.version_id, versions.round_id) carry none: SQLite cannot add
one to a table that exists.
"""

from __future__ import annotations

from typing import Annotated, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from glora_server.coordinator.model import DeviceState, MetricPhase, OwedKind, Profile, TensorKind
from glora_server.rounds.assignment import OPEN, AssignmentKind, AssignmentPhase
from glora_server.rounds.policy import RoundPolicy
from glora_server.rounds.round import LIVE, RoundPhase
from glora_server.rounds.run import RunPhase
from glora_server.storage.column_types import (
    DigestText,
    ManifestText,
    Measured,
    NumbersTuple,
    PolicyText,
    ProfileText,
    ReasonText,
    Words,
    WordsTuple,
    choice,
)
from glora_wire.digests import Digest
from glora_wire.errors import Reason
from glora_wire.manifest import Manifest

Id = Annotated[str, mapped_column(Words, primary_key=True)]
Counted = Annotated[int, mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)]
RunRef = Annotated[str, mapped_column(Words, ForeignKey("runs.id"))]
RoundRef = Annotated[str, mapped_column(Words, ForeignKey("rounds.id"))]
DeviceRef = Annotated[str, mapped_column(Words, ForeignKey("devices.id"))]
VersionRef = Annotated[str, mapped_column(Words, ForeignKey("versions.id"))]
VersionKey = Annotated[str, mapped_column(Words, ForeignKey("versions.id"), primary_key=True)]
Key = Annotated[str, mapped_column(Words, primary_key=True)]
RankKey = Annotated[int, mapped_column(Integer, primary_key=True)]
Why = Annotated[Reason | None, mapped_column(ReasonText)]
DigestColumn = Annotated[Digest, mapped_column(DigestText)]
Tags = Annotated[tuple[str, ...], mapped_column(WordsTuple)]
MaybeNaN = Annotated[float | None, mapped_column(Measured)]


def _one_of(column: str, values: frozenset[AssignmentPhase] | frozenset[RoundPhase]) -> str:
    return f"{column} IN ({', '.join(sorted(repr(value.value) for value in values))})"


IS_OPEN: Final = _one_of("phase", OPEN)
"""SQL: the assignment is open."""
IS_LIVE: Final = _one_of("phase", LIVE)
"""SQL: the round has not ended."""


def _only(name: str, columns: tuple[str, ...], where: str, *, unique: bool = False) -> Index:
    """An index over the rows that `where` (SQL) selects."""
    return Index(name, *columns, unique=unique, sqlite_where=text(where), postgresql_where=text(where))


class Base(DeclarativeBase):
    """What all tables share."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {str: Words, float: Double, int: BigInteger}  # noqa: RUF012 (read by DeclarativeBase)


class TokenRow(Base):
    """A join token."""

    __tablename__ = "tokens"
    __table_args__ = (
        CheckConstraint("uses >= 0 AND uses <= max_uses", name="uses"),
        Index("ix_tokens_created_at_id", "created_at", "id"),
    )

    id: Mapped[Id]
    secret_sha256: Mapped[str]
    description: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float]
    max_uses: Mapped[int]
    uses: Mapped[int]
    max_rank: Mapped[int]
    tags: Mapped[Tags]
    approve: Mapped[bool]
    revoked: Mapped[bool]
    row_version: Mapped[int]


class DeviceRow(Base):
    """An enrolled device."""

    __tablename__ = "devices"
    __table_args__ = (
        UniqueConstraint("key_sha256"),
        _only("uq_devices_name_active", ("name",), "state != 'revoked'", unique=True),
        Index("ix_devices_name", "name"),
        Index("ix_devices_created_at_id", "created_at", "id"),
    )

    id: Mapped[Id]
    name: Mapped[str]
    state: Mapped[DeviceState] = mapped_column(choice(DeviceState, "state"))
    declared_rank: Mapped[int]
    granted_rank: Mapped[int]
    tags: Mapped[Tags]
    token_id: Mapped[str | None] = mapped_column(Words, ForeignKey("tokens.id"))
    key_sha256: Mapped[str]
    certificate_pem: Mapped[str]
    certificate_serial: Mapped[str]
    certificate_expires_at: Mapped[float]
    created_at: Mapped[float]
    last_seen_at: Mapped[float | None]
    profile: Mapped[Profile] = mapped_column(ProfileText)
    row_version: Mapped[int]


class RunRow(Base):
    """A run; `version_id` points at the current state."""

    __tablename__ = "runs"
    __table_args__ = (UniqueConstraint("name"), Index("ix_runs_created_at_id", "created_at", "id"))

    id: Mapped[Id]
    name: Mapped[str]
    phase: Mapped[RunPhase] = mapped_column(choice(RunPhase, "phase"))
    spec_json: Mapped[str]
    manifest: Mapped[Manifest] = mapped_column(ManifestText)
    version_id: Mapped[str | None]
    rounds_done: Mapped[int]
    reason: Mapped[Why]
    message: Mapped[str]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    row_version: Mapped[int]


class VersionRow(Base):
    """A state of a run; its tensors lie in version_tensors."""

    __tablename__ = "versions"
    __table_args__ = (_only("uq_versions_run_id_number_published", ("run_id", "number"), "published", unique=True),)

    id: Mapped[Id]
    run_id: Mapped[RunRef]
    number: Mapped[int]
    round_id: Mapped[str | None]
    parent_id: Mapped[str | None] = mapped_column(Words, ForeignKey("versions.id"))
    strategy: Mapped[str]
    published: Mapped[bool]
    created_at: Mapped[float]
    summary_json: Mapped[str]
    pinned: Mapped[bool]
    pruned: Mapped[bool]


class PartRow(Base):
    """One part of a version."""

    __tablename__ = "version_parts"

    version_id: Mapped[VersionKey]
    name: Mapped[Key]
    kind: Mapped[TensorKind] = mapped_column(choice(TensorKind, "kind"))


class TensorRow(Base):
    """One tensor of a part; never updated in place once its version is published."""

    __tablename__ = "version_tensors"
    __table_args__ = (ForeignKeyConstraint(["version_id", "part"], ["version_parts.version_id", "version_parts.name"]),)

    version_id: Mapped[Key]
    part: Mapped[Key]
    tensor: Mapped[Key]
    dtype: Mapped[str]
    shape: Mapped[tuple[int, ...]] = mapped_column(NumbersTuple)
    sha256: Mapped[str]
    data: Mapped[bytes] = mapped_column(LargeBinary)


class DiagnosticsRow(Base):
    """What aggregation measured for one module."""

    __tablename__ = "version_diagnostics"

    version_id: Mapped[VersionKey]
    module: Mapped[Key]
    values_json: Mapped[str]


class ReadoutRow(Base):
    """A rendered adapter in the blob store."""

    __tablename__ = "readouts"
    __table_args__ = (Index("ix_readouts_digest", "digest"),)

    version_id: Mapped[VersionKey]
    rank: Mapped[RankKey]
    dtype: Mapped[Key]
    variant: Mapped[Key]
    digest: Mapped[DigestColumn]
    created_at: Mapped[float]


class RoundRow(Base):
    """One attempt at one round."""

    __tablename__ = "rounds"
    __table_args__ = (UniqueConstraint("run_id", "number", "attempt"), _only("ix_rounds_live", ("run_id",), IS_LIVE))

    id: Mapped[Id]
    run_id: Mapped[RunRef]
    number: Mapped[int]
    attempt: Mapped[int]
    version_id: Mapped[VersionRef]
    policy: Mapped[RoundPolicy] = mapped_column(PolicyText)
    phase: Mapped[RoundPhase] = mapped_column(choice(RoundPhase, "phase"))
    created_at: Mapped[float]
    opened_at: Mapped[float | None]
    deadline_at: Mapped[float | None]
    closed_at: Mapped[float | None]
    target: Mapped[int]
    reason: Mapped[Why]
    message: Mapped[str]
    row_version: Mapped[int]


class AssignmentRow(Base):
    """One device in one round, or for one version."""

    __tablename__ = "assignments"
    __table_args__ = (
        Index("ix_assignments_round_id_position", "round_id", "position"),
        _only("ix_assignments_open", ("device_id", "offered_at"), IS_OPEN),
        _only("ix_assignments_permanent", ("run_id", "device_id"), "permanent"),
        _only("ix_assignments_evaluate", ("run_id", "device_id", "version_id"), "kind = 'evaluate'"),
    )

    id: Mapped[Id]
    position: Mapped[int]
    """Where it stands among the assignments of its round."""
    run_id: Mapped[RunRef]
    round_id: Mapped[str | None] = mapped_column(Words, ForeignKey("rounds.id"))
    device_id: Mapped[DeviceRef]
    kind: Mapped[AssignmentKind] = mapped_column(choice(AssignmentKind, "kind"))
    rank: Mapped[int]
    ranks: Mapped[tuple[int, ...]] = mapped_column(NumbersTuple)
    version_id: Mapped[VersionRef]
    phase: Mapped[AssignmentPhase] = mapped_column(choice(AssignmentPhase, "phase"))
    reason: Mapped[Why]
    message: Mapped[str]
    permanent: Mapped[bool]
    offered_at: Mapped[float]
    accepted_at: Mapped[float | None]
    delivered_at: Mapped[float | None]
    upload_started_at: Mapped[float | None]
    received_at: Mapped[float | None]
    closed_at: Mapped[float | None]
    deadline_at: Mapped[float]
    training_rows: Mapped[int]
    bytes_down: Mapped[int]
    bytes_up: Mapped[int]


class UploadRow(Base):
    """The update of an assignment: the primary key refuses a second one."""

    __tablename__ = "uploads"
    __table_args__ = (Index("ix_uploads_round_id", "round_id"), Index("ix_uploads_digest", "digest"))

    assignment_id: Mapped[str] = mapped_column(Words, ForeignKey("assignments.id"), primary_key=True)
    round_id: Mapped[RoundRef]
    device_id: Mapped[DeviceRef]
    version_id: Mapped[VersionRef]
    digest: Mapped[DigestColumn]
    adapter_config_json: Mapped[str]
    training_rows: Mapped[int]
    completed_steps: Mapped[int]
    stopped_early: Mapped[bool]
    training_loss: Mapped[MaybeNaN]
    training_seconds: Mapped[float]
    received_at: Mapped[float]
    update_norm: Mapped[float | None]
    shrunk_rank: Mapped[int | None]


class MeasurementRow(Base):
    """An evaluation on a device's own rows."""

    __tablename__ = "measurements"
    __table_args__ = (Index("ix_measurements_run_id", "run_id", "version_number", "rank", "device_id"),)

    assignment_id: Mapped[str] = mapped_column(Words, ForeignKey("assignments.id"), primary_key=True)
    run_id: Mapped[RunRef]
    device_id: Mapped[DeviceRef]
    version_id: Mapped[VersionRef]
    version_number: Mapped[int]
    phase: Mapped[MetricPhase] = mapped_column(choice(MetricPhase, "phase"), primary_key=True)
    rank: Mapped[RankKey]
    loss: Mapped[MaybeNaN]
    accuracy: Mapped[MaybeNaN]
    rows: Mapped[int]
    seconds: Mapped[float]
    measured_at: Mapped[float]


class AuditRow(Base):
    """Who did what."""

    __tablename__ = "audit"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012 (read by DeclarativeBase)

    id: Mapped[Counted]
    at: Mapped[float]
    actor: Mapped[str]
    origin: Mapped[str] = mapped_column(Words, server_default="")
    action: Mapped[str]
    target: Mapped[str]
    before_json: Mapped[str] = mapped_column(Words, server_default="null")
    after_json: Mapped[str] = mapped_column(Words, server_default="null")
    details_json: Mapped[str]


class OwedRow(Base):
    """The outbox; ids are never used again, so that doing "done" twice can not hit a newer row."""

    __tablename__ = "outbox"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012 (read by DeclarativeBase)

    id: Mapped[Counted]
    kind: Mapped[OwedKind] = mapped_column(choice(OwedKind, "kind"))
    run_id: Mapped[RunRef]
    round_id: Mapped[RoundRef]
    assignment_id: Mapped[str | None] = mapped_column(Words, ForeignKey("assignments.id"))
    created_at: Mapped[float]
