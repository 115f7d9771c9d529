"""The tables of what is remembered of rounds and versions that are over, and of answers that can be given again.

Each row is made once, when a round ends or a version is published (coordinator/history.py); pages read these instead
of the assignments, measurements and diagnostics that they come from.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ForeignKey, Index, Integer, LargeBinary, text
from sqlalchemy.orm import InstrumentedAttribute, Mapped, mapped_column

from glora_server.coordinator.model import MetricPhase
from glora_server.coordinator.views_history import Outcome
from glora_server.storage.column_types import Words, choice
from glora_server.storage.models import (
    IS_OPEN,
    AssignmentRow,
    AuditRow,
    Base,
    MaybeNaN,
    RankKey,
    RunRef,
    VersionKey,
)


class RoundFiguresRow(Base):
    """What one attempt at a round came to."""

    __tablename__ = "round_figures"
    __table_args__ = (Index("ix_round_figures_run_id_number_attempt", "run_id", "number", "attempt"),)

    round_id: Mapped[str] = mapped_column(Words, ForeignKey("rounds.id"), primary_key=True)
    run_id: Mapped[RunRef]
    number: Mapped[int]
    attempt: Mapped[int]
    figures_json: Mapped[str]


class VersionFiguresRow(Base):
    """The modules of a version, in few numbers."""

    __tablename__ = "version_figures"
    __table_args__ = (Index("ix_version_figures_run_id_number", "run_id", "number"),)

    version_id: Mapped[VersionKey]
    run_id: Mapped[RunRef]
    number: Mapped[int]
    modules_json: Mapped[str]


class ContributionRow(Base):
    """One device's part in one version."""

    __tablename__ = "contributions"
    __table_args__ = (
        Index("ix_contributions_device_id_at", "device_id", "at"),
        Index("ix_contributions_version_id_share", "version_id", "share", "device_id"),
    )

    version_id: Mapped[VersionKey]
    device_id: Mapped[str] = mapped_column(Words, ForeignKey("devices.id"), primary_key=True)
    run_id: Mapped[RunRef]
    number: Mapped[int]
    at: Mapped[float]
    share: Mapped[float]
    rows: Mapped[int]
    update_norm: Mapped[float | None]
    capture: Mapped[float | None]
    cosine: Mapped[float | None]
    deviation: Mapped[float | None]
    outlier: Mapped[bool]


class OutcomeRow(Base):
    """How often a device's part in a round ended in one way."""

    __tablename__ = "device_outcomes"

    device_id: Mapped[str] = mapped_column(Words, ForeignKey("devices.id"), primary_key=True)
    outcome: Mapped[Outcome] = mapped_column(choice(Outcome, "outcome"), primary_key=True)
    number: Mapped[int]


class ScoreRow(Base):
    """What devices measured of one version at one rank."""

    __tablename__ = "version_scores"

    run_id: Mapped[str] = mapped_column(Words, ForeignKey("runs.id"), primary_key=True)
    version_number: Mapped[int] = mapped_column(Integer, primary_key=True)
    phase: Mapped[MetricPhase] = mapped_column(choice(MetricPhase, "phase"), primary_key=True)
    rank: Mapped[RankKey]
    devices: Mapped[int]
    rows: Mapped[int]
    accuracy: Mapped[MaybeNaN]
    loss: Mapped[MaybeNaN]
    spreads_json: Mapped[str]


class AnswerRow(Base):
    """An answer to a request with an Idempotency-Key, readable only with that key."""

    __tablename__ = "answers"
    __table_args__ = (Index("ix_answers_created_at", "created_at"),)

    principal: Mapped[str] = mapped_column(Words, primary_key=True)
    key_sha256: Mapped[str] = mapped_column(Words, primary_key=True)
    request_sha256: Mapped[str]
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[float]


def _on(name: str, *columns: InstrumentedAttribute[Any], where: str | None = None) -> Index:
    """An index that lists of operators need, on a table of models.py; `where` (SQL) selects its rows."""
    if where is None:
        return Index(name, *columns)
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


READING_INDEXES: Final = (
    _on("ix_assignments_device_id_offered_at_id", AssignmentRow.device_id, AssignmentRow.offered_at, AssignmentRow.id),
    _on("ix_assignments_round_id_phase", AssignmentRow.round_id, AssignmentRow.phase),
    _on("ix_assignments_rejected", AssignmentRow.closed_at, AssignmentRow.device_id, where="phase = 'rejected'"),
    _on(
        "ix_assignments_open_evaluations",
        AssignmentRow.run_id,
        AssignmentRow.offered_at,
        where=f"round_id IS NULL AND {IS_OPEN}",
    ),
    _on("ix_audit_actor_id", AuditRow.actor, AuditRow.id),
    _on("ix_audit_action_id", AuditRow.action, AuditRow.id),
    _on("ix_audit_target_id", AuditRow.target, AuditRow.id),
    _on("ix_audit_at", AuditRow.at),
)
