"""What states are called, and the sign that each has besides its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from glora_server.coordinator.views_plots import Severity
from glora_server.rounds.assignment import Assignment, AssignmentKind, AssignmentPhase
from glora_server.rounds.round import RoundPhase
from glora_server.rounds.run import RunPhase

_A = AssignmentPhase
RUN_TONES: Final[Mapping[RunPhase, str]] = {
    RunPhase.CREATED: "idle",
    RunPhase.ACTIVE: "active",
    RunPhase.PAUSED: "wait",
    RunPhase.COMPLETED: "good",
    RunPhase.FAILED: "bad",
    RunPhase.ABORTED: "bad",
}
ROUND_TONES: Final[Mapping[RoundPhase, str]] = {
    RoundPhase.PLANNED: "wait",
    RoundPhase.COLLECTING: "active",
    RoundPhase.GRACE: "warn",
    RoundPhase.AGGREGATING: "active",
    RoundPhase.COMMITTED: "good",
    RoundPhase.FAILED: "bad",
    RoundPhase.ABORTED: "bad",
}
ASSIGNMENT_SIGNS: Final[Mapping[AssignmentPhase, tuple[str, str]]] = {
    _A.OFFERED: ("idle", "offered"),
    _A.ACCEPTED: ("active", "downloading"),
    _A.DELIVERED: ("active", "training"),
    _A.UPLOADING: ("active", "uploading"),
    _A.RECEIVED: ("active", "being judged"),
    _A.ACCEPTED_UPDATE: ("good", "accepted"),
    _A.REJECTED: ("bad", "rejected"),
    _A.DECLINED: ("warn", "declined"),
    _A.FAILED: ("bad", "failed"),
    _A.EXPIRED: ("wait", "expired"),
    _A.COMPLETED: ("good", "completed"),
}
SEVERITY_SIGNS: Final[Mapping[Severity, tuple[str, str]]] = {
    Severity.CRITICAL: ("bad", "Critical"),
    Severity.WARNING: ("warn", "Warning"),
    Severity.INFO: ("idle", "Note"),
}


def work_sign(assignment: Assignment) -> tuple[str, str]:
    """Tone and word of what a device does, or of how it ended."""
    if assignment.kind is AssignmentKind.EVALUATE and assignment.phase is _A.DELIVERED:
        return "active", "evaluating"
    return ASSIGNMENT_SIGNS[assignment.phase]
