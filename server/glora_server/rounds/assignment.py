"""One device in one round, as a pure state machine.

    offered -> accepted -> delivered -> uploading -> received -> accepted_update
       \\          \\           \\            \\          \\-> rejected(reason)      the update is no good
        \\          \\           \\            \\-> failed(reason)                   the device could not
         \\          \\           \\-> declined(reason)                              the device would not
          \\----------\\------------\\-> expired(reason)                             the round went on without it
    (evaluate)  any open phase -> completed

Messages can be lost, repeated and overtaken (a device that was told twice, a pull before the word "accepted"), so
an event that says less than is known already changes nothing; one that contradicts what is known is refused.
What must not happen: a closed assignment never opens again, and only a received update is ever judged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_wire.errors import GloraError, Reason, Refusal


class AssignmentKind(StrEnum):
    """What the device is asked to do."""

    TRAIN = "train"
    EVALUATE = "evaluate"


class AssignmentPhase(StrEnum):
    """Where the assignment stands."""

    OFFERED = "offered"
    ACCEPTED = "accepted"
    DELIVERED = "delivered"
    UPLOADING = "uploading"
    RECEIVED = "received"
    ACCEPTED_UPDATE = "accepted_update"
    REJECTED = "rejected"
    DECLINED = "declined"
    FAILED = "failed"
    EXPIRED = "expired"
    COMPLETED = "completed"


_P = AssignmentPhase
OPEN: Final = frozenset({_P.OFFERED, _P.ACCEPTED, _P.DELIVERED, _P.UPLOADING, _P.RECEIVED})
"""Phases in which something is still expected."""
AWAITED: Final = OPEN - {_P.RECEIVED}
"""Phases in which something is still expected from the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One device in one round (train) or for one version (evaluate); times in Unix seconds."""

    id: AssignmentId
    run_id: RunId
    round_id: RoundId | None
    device_id: DeviceId
    kind: AssignmentKind
    rank: int
    """Granted rank; for evaluate the largest of `ranks`."""
    ranks: tuple[int, ...] = ()
    """Ranks to evaluate; empty for train."""
    version_id: VersionId
    phase: AssignmentPhase = AssignmentPhase.OFFERED
    reason: Reason | None = None
    message: str = ""
    permanent: bool = False
    """The device said that it can never do this for the run as it is started now."""
    offered_at: float
    accepted_at: float | None = None
    delivered_at: float | None = None
    upload_started_at: float | None = None
    received_at: float | None = None
    closed_at: float | None = None
    deadline_at: float
    training_rows: int = 0
    bytes_down: int = 0
    """Payload bytes that the adapters took to be delivered, repetitions included."""
    bytes_up: int = 0
    """Payload bytes that the update took to arrive, repetitions included."""

    @property
    def is_open(self) -> bool:
        """Something is still expected."""
        return self.phase in OPEN


@dataclass(frozen=True, slots=True)
class Accept:
    """The device took the work."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """The adapter was delivered whole, after `bytes_down` payload bytes."""

    bytes_down: int = 0


@dataclass(frozen=True, slots=True)
class StartUpload:
    """The first bytes of the update came in."""


@dataclass(frozen=True, slots=True)
class Receive:
    """All bytes of the update are stored and their digest is right."""

    training_rows: int
    bytes_up: int = 0


@dataclass(frozen=True, slots=True)
class AcceptUpdate:
    """The update passed validation."""


@dataclass(frozen=True, slots=True)
class RejectUpdate:
    """The update failed validation."""

    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Decline:
    """The device would not."""

    refusal: Refusal
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class Fail:
    """The device could not."""

    refusal: Refusal
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class Expire:
    """The round went on without it."""

    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Complete:
    """All evaluations came in."""


@dataclass(frozen=True, slots=True)
class Prolong:
    """The device's transfer is moving: it may take until `deadline_at` (Unix seconds)."""

    deadline_at: float


AssignmentEvent = (
    Accept
    | Deliver
    | StartUpload
    | Receive
    | AcceptUpdate
    | RejectUpdate
    | Decline
    | Fail
    | Expire
    | Complete
    | Prolong
)

_LEGAL: Final[dict[type, frozenset[AssignmentPhase]]] = {
    Accept: frozenset({_P.OFFERED}),
    Deliver: frozenset({_P.OFFERED, _P.ACCEPTED}),
    StartUpload: frozenset({_P.OFFERED, _P.ACCEPTED, _P.DELIVERED}),
    Receive: AWAITED,
    AcceptUpdate: frozenset({_P.RECEIVED}),
    RejectUpdate: frozenset({_P.RECEIVED}),
    Decline: AWAITED,
    Fail: AWAITED,
    Expire: OPEN,
    Complete: AWAITED,
    Prolong: AWAITED,
}
_ECHO: Final[dict[type, frozenset[AssignmentPhase]]] = {
    Accept: OPEN - {_P.OFFERED},
    Deliver: OPEN - {_P.OFFERED, _P.ACCEPTED},
    StartUpload: frozenset({_P.UPLOADING}),
}
"""Events that say nothing new in these phases."""


def advance(assignment: Assignment, event: AssignmentEvent, *, at: float) -> Assignment:
    """The assignment after `event` at time `at` (Unix seconds); raises ILLEGAL_TRANSITION and changes nothing."""
    kind = type(event)
    if assignment.phase in _ECHO.get(kind, ()):
        return assignment
    if assignment.phase not in _LEGAL[kind] or not _fits_kind(assignment.kind, event):
        raise GloraError(
            Reason.ILLEGAL_TRANSITION,
            f"Assignment {assignment.id} is {assignment.phase.value} and cannot take {kind.__name__}.",
            assignment=assignment.id,
            phase=assignment.phase.value,
            event=kind.__name__,
        )
    return _apply(assignment, event, at)


def _fits_kind(kind: AssignmentKind, event: AssignmentEvent) -> bool:
    if isinstance(event, Complete):
        return kind is AssignmentKind.EVALUATE
    if isinstance(event, StartUpload | Receive | AcceptUpdate | RejectUpdate):
        return kind is AssignmentKind.TRAIN
    return True


def _apply(a: Assignment, event: AssignmentEvent, at: float) -> Assignment:
    match event:
        case Accept():
            return replace(a, phase=_P.ACCEPTED, accepted_at=at)
        case Deliver(bytes_down=count):
            accepted = _first(a.accepted_at, at)
            return replace(a, phase=_P.DELIVERED, accepted_at=accepted, delivered_at=at, bytes_down=count)
        case StartUpload():
            return replace(a, phase=_P.UPLOADING, upload_started_at=at)
        case Receive(training_rows=rows, bytes_up=count):
            return replace(a, phase=_P.RECEIVED, received_at=at, training_rows=rows, bytes_up=count)
        case AcceptUpdate():
            return replace(a, phase=_P.ACCEPTED_UPDATE, closed_at=at)
        case RejectUpdate(refusal=refusal):
            return _close(a, _P.REJECTED, refusal, at)
        case Decline(refusal=refusal, permanent=permanent):
            return replace(_close(a, _P.DECLINED, refusal, at), permanent=permanent)
        case Fail(refusal=refusal, permanent=permanent):
            return replace(_close(a, _P.FAILED, refusal, at), permanent=permanent)
        case Expire(refusal=refusal):
            return _close(a, _P.EXPIRED, refusal, at)
        case Complete():
            return replace(a, phase=_P.COMPLETED, closed_at=at)
        case Prolong(deadline_at=deadline):
            return replace(a, deadline_at=max(a.deadline_at, deadline))


def _first(known: float | None, at: float) -> float:
    return at if known is None else known


def _close(a: Assignment, phase: AssignmentPhase, refusal: Refusal, at: float) -> Assignment:
    return replace(a, phase=phase, reason=refusal.reason, message=refusal.message, closed_at=at)
