"""Answers of the REST API about devices, tokens, versions and the server; times in Unix seconds, sizes in bytes."""

from __future__ import annotations

import json
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from glora_dashboard.ports import HealthCheck
from glora_server.coordinator.model import AuditEntry, Device, Measurement, ModuleDiagnostics, TokenRecord, Version
from glora_server.coordinator.ports import StrategyInfo
from glora_server.coordinator.views import AssignmentView, DeviceView, SystemView

T = TypeVar("T")
Json = dict[str, Any]
"""A JSON object that the server stores as it is."""


class Answer(BaseModel):
    """Read from the attributes of a record; attributes that a model does not name stay inside."""

    model_config = ConfigDict(from_attributes=True, frozen=True)


class PageAnswer(Answer, Generic[T]):
    """A part of a list."""

    items: list[T]
    next_page_token: str = Field(default="", description="page_token of the next part; empty when this is the last.")


class ProgressAnswer(Answer):
    """What a device last reported."""

    phase: str
    done: int
    total: int
    loss: float | None
    at: float


class AssignmentAnswer(Answer):
    """One device in one round, or evaluating one version."""

    id: str
    device: str
    kind: str
    rank: int
    ranks: list[int]
    phase: str
    reason: str | None
    message: str
    offered_at: float
    accepted_at: float | None
    delivered_at: float | None
    upload_started_at: float | None
    received_at: float | None
    closed_at: float | None
    deadline_at: float
    training_rows: int
    progress: ProgressAnswer | None
    bytes_down: int
    bytes_up: int

    @classmethod
    def of(cls, view: AssignmentView) -> Self:
        """The answer for a view."""
        assignment = view.assignment
        return cls(
            id=assignment.id,
            device=view.device_name,
            kind=assignment.kind.value,
            rank=assignment.rank,
            ranks=list(assignment.ranks),
            phase=assignment.phase.value,
            reason=assignment.reason and assignment.reason.value,
            message=assignment.message,
            offered_at=assignment.offered_at,
            accepted_at=assignment.accepted_at,
            delivered_at=assignment.delivered_at,
            upload_started_at=assignment.upload_started_at,
            received_at=assignment.received_at,
            closed_at=assignment.closed_at,
            deadline_at=assignment.deadline_at,
            training_rows=assignment.training_rows,
            progress=None if view.progress is None else ProgressAnswer.model_validate(view.progress),
            bytes_down=view.bytes_down,
            bytes_up=view.bytes_up,
        )


class ProfileAnswer(Answer):
    """What a device last said about itself."""

    software_version: str
    platform: str
    cpu_count: int
    memory_bytes: int
    accelerators: list[str]
    max_rank: int
    trains: bool
    evaluates: bool
    fingerprint: str
    task: str
    training_rows: int
    evaluation_rows: int
    run_name: str


class DeviceRecordAnswer(Answer):
    """An enrolled device."""

    id: str
    name: str
    state: str
    declared_rank: int
    granted_rank: int
    tags: list[str]
    token_id: str | None
    certificate_serial: str
    certificate_expires_at: float
    created_at: float
    last_seen_at: float | None
    row_version: int = Field(description="Grows with every change; If-Match takes it.")
    profile: ProfileAnswer

    @classmethod
    def of_device(cls, device: Device) -> Self:
        """The answer for a record."""
        return cls.model_validate(device)


class DeviceAnswer(DeviceRecordAnswer):
    """An enrolled device, and what it is doing."""

    online: bool
    run: str
    current: AssignmentAnswer | None
    measuring: str = Field(description="The run for which it still measures what it has sent; empty if it does not.")

    @classmethod
    def of(cls, view: DeviceView) -> Self:
        """The answer for a view."""
        return cls(
            **DeviceRecordAnswer.of_device(view.device).model_dump(),
            online=view.online,
            run=view.current_run,
            current=None if view.current is None else AssignmentAnswer.of(view.current),
            measuring=view.measuring,
        )


class TokenAnswer(Answer):
    """A join token; its secret is shown only when it is made."""

    id: str
    description: str
    created_at: float
    expires_at: float
    max_uses: int
    uses: int
    max_rank: int
    tags: list[str]
    approve: bool
    revoked: bool

    @classmethod
    def of(cls, token: TokenRecord) -> Self:
        """The answer for a record."""
        return cls.model_validate(token)


class NewTokenAnswer(TokenAnswer):
    """A join token with the text that a device joins with; it is not shown again."""

    join_token: str


class VersionAnswer(Answer):
    """An immutable state of a run."""

    id: str
    number: int
    strategy: str
    created_at: float
    pinned: bool
    pruned: bool
    summary: Json

    @classmethod
    def of(cls, version: Version) -> Self:
        """The answer for a record."""
        return cls(
            id=version.id,
            number=version.number,
            strategy=version.strategy,
            created_at=version.created_at,
            pinned=version.pinned,
            pruned=version.pruned,
            summary=json.loads(version.summary_json),
        )


class MeasurementAnswer(Answer):
    """An evaluation on a device's own held-out rows."""

    assignment_id: str
    device_id: str
    version_number: int
    phase: str
    rank: int
    loss: float | None
    accuracy: float | None
    rows: int
    seconds: float
    measured_at: float

    @classmethod
    def of(cls, measurement: Measurement) -> Self:
        """The answer for a record."""
        return cls.model_validate(measurement)


class DiagnosticsAnswer(Answer):
    """What aggregation measured for one module of one version."""

    module: str
    values: Json

    @classmethod
    def of(cls, diagnostics: ModuleDiagnostics) -> Self:
        """The answer for a record."""
        return cls(module=diagnostics.module, values=json.loads(diagnostics.values_json))


class AuditAnswer(Answer):
    """Who did what."""

    id: int
    at: float
    actor: str
    action: str
    target: str
    origin: str = Field(description="Address that the request came from; empty: the server itself.")
    before: JsonValue = Field(description="What the change changed, as it was; null where nothing was.")
    after: JsonValue = Field(description="The same, as it is now.")
    details: Json

    @classmethod
    def of(cls, entry: AuditEntry) -> Self:
        """The answer for a record."""
        return cls(
            id=entry.id,
            at=entry.at,
            actor=entry.actor,
            action=entry.action,
            target=entry.target,
            origin=entry.origin,
            before=json.loads(entry.before_json),
            after=json.loads(entry.after_json),
            details=json.loads(entry.details_json),
        )


class StrategyAnswer(Answer):
    """A strategy that a run can choose."""

    name: str
    summary: str
    train_mask: str
    init: str
    upload_set: str
    mixed_ranks: bool

    @classmethod
    def of(cls, info: StrategyInfo) -> Self:
        """The answer for a record."""
        return cls.model_validate(info)


class SystemAnswer(Answer):
    """The server itself."""

    version: str
    started_at: float
    now: float
    grpc_port: int
    enrolment_port: int
    http_port: int
    database: str
    database_revision: str
    worker_device: str
    authority_pin: str
    authority_expires_at: float
    devices: int
    online_devices: int
    active_runs: int
    free_disk_bytes: int
    disk_bytes: int = 0
    database_bytes: int = 0
    worker_restarts: int = 0

    @classmethod
    def of(cls, view: SystemView) -> Self:
        """The answer for a view."""
        return cls.model_validate(view)


class HealthAnswer(Answer):
    """Whether the server can do its work, part by part."""

    status: str
    checks: list[CheckAnswer]

    @classmethod
    def of(cls, checks: tuple[HealthCheck, ...]) -> Self:
        """The answer for the checks of a probe."""
        status = "ready" if all(check.ok for check in checks) else "not ready"
        return cls(status=status, checks=[CheckAnswer.model_validate(check) for check in checks])


class CheckAnswer(Answer):
    """One part of the server."""

    name: str
    ok: bool
    message: str
