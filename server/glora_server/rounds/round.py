"""One attempt at one round, as a pure state machine over its assignments.

    planned -> collecting -> (grace) -> aggregating -> committed
       |            |           |            |
       +------------+-----------+------------+---> failed(reason) | aborted(reason)

    planned      waits for enough devices; checks nothing; publishes why it waits; goes on with Opened.
    collecting   publishes the assignments; every update is accepted, rejected or expired with a reason; goes to
                 aggregating when all targeted devices have answered and the quorum is there, when the target is
                 met, or at the deadline with the quorum; to grace at the deadline without it. Where a verdict is
                 still owed that could matter, the end of the window waits for it.
    grace        as collecting, once, with a deadline of its own; ends in aggregating, failed, or (policy "wait")
                 another grace period.
    aggregating  the set of accepted updates is fixed; every other assignment is closed. Leaves by
                 AggregationDone or AggregationFailed.
What must not happen: an update joins after aggregating began; a received update that could be aggregated is
expired while its validation is still owed; a round is aggregated below its quorum.

Time is an event, the policy and the picks come from the caller: same input, same output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from glora_server.rounds import assignment as machine
from glora_server.rounds.assignment import Assignment, AssignmentEvent, AssignmentPhase, Expire, Prolong
from glora_server.rounds.ids import AssignmentId, RoundId, RunId, VersionId
from glora_server.rounds.policy import RoundPolicy, TooFew
from glora_wire.errors import GloraError, Reason, Refusal


class RoundPhase(StrEnum):
    """Where the round stands."""

    PLANNED = "planned"
    COLLECTING = "collecting"
    GRACE = "grace"
    AGGREGATING = "aggregating"
    COMMITTED = "committed"
    FAILED = "failed"
    ABORTED = "aborted"


GATHERING: Final = frozenset({RoundPhase.COLLECTING, RoundPhase.GRACE})
"""Phases in which updates come in."""
LIVE: Final = frozenset({RoundPhase.PLANNED, RoundPhase.COLLECTING, RoundPhase.GRACE, RoundPhase.AGGREGATING})
"""Phases that are not the end."""
PROLONG_SECONDS: Final = 30.0
"""How long a moving transfer keeps its device in the round beyond the deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One attempt at one round of a run; times in Unix seconds."""

    id: RoundId
    run_id: RunId
    number: int
    attempt: int = 1
    version_id: VersionId
    """The state that the adapters of this round are read out from."""
    policy: RoundPolicy
    phase: RoundPhase = RoundPhase.PLANNED
    assignments: tuple[Assignment, ...] = ()
    created_at: float
    opened_at: float | None = None
    deadline_at: float | None = None
    closed_at: float | None = None
    target: int = 0
    """Updates that close the round early; fixed when it opens."""
    reason: Reason | None = None
    message: str = ""
    row_version: int = 0
    """Counts saves; storage refuses to save over a newer one."""

    def count(self, *phases: AssignmentPhase) -> int:
        """How many assignments stand in one of `phases`."""
        return sum(a.phase in phases for a in self.assignments)

    @property
    def accepted(self) -> int:
        """Updates that will be aggregated."""
        return self.count(AssignmentPhase.ACCEPTED_UPDATE)

    def find(self, assignment_id: AssignmentId) -> Assignment:
        """The assignment of that id; raises ASSIGNMENT_UNKNOWN."""
        for item in self.assignments:
            if item.id == assignment_id:
                return item
        raise GloraError(
            Reason.ASSIGNMENT_UNKNOWN,
            f"Round {self.number} has no assignment {assignment_id}.",
            assignment=assignment_id,
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """Devices were chosen; `assignments` are all offered. `target` updates close the round early."""

    assignments: tuple[Assignment, ...]
    target: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Something happened to one assignment."""

    assignment_id: AssignmentId
    event: AssignmentEvent


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The clock reached the round's deadline."""


@dataclass(frozen=True, slots=True)
class Extended:
    """An operator moved the deadline (Unix seconds)."""

    deadline_at: float


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """An operator edited the run's policy."""

    policy: RoundPolicy


@dataclass(frozen=True, slots=True)
class AggregationDone:
    """The new version is stored."""


@dataclass(frozen=True, slots=True)
class AggregationFailed:
    """The updates could not be aggregated; trying again would not help."""

    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Aborted:
    """An operator ended it."""

    refusal: Refusal


RoundEvent = Opened | Moved | DeadlinePassed | Extended | PolicyChanged | AggregationDone | AggregationFailed | Aborted


@dataclass(frozen=True, slots=True)
class Validate:
    """Owed: judge the received update of this assignment."""

    assignment_id: AssignmentId


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Owed: fold the accepted updates into a new version."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Owed: the round is over; decide what the run does next."""


@dataclass(frozen=True, slots=True)
class Wake:
    """Owed: tell the devices that their work changed (repeating it is harmless)."""


Effect = Validate | Aggregate | Closed | Wake

_LEGAL: Final[dict[type, frozenset[RoundPhase]]] = {
    Opened: frozenset({RoundPhase.PLANNED}),
    Moved: GATHERING,
    DeadlinePassed: GATHERING,
    Extended: GATHERING,
    PolicyChanged: LIVE,
    AggregationDone: frozenset({RoundPhase.AGGREGATING}),
    AggregationFailed: frozenset({RoundPhase.AGGREGATING}),
    Aborted: LIVE,
}

Step = tuple[Round, tuple[Effect, ...]]


def advance(round_: Round, event: RoundEvent, *, at: float) -> Step:
    """Next round and the effects that its caller owes; raises ILLEGAL_TRANSITION and changes nothing."""
    if round_.phase not in _LEGAL[type(event)]:
        raise GloraError(
            Reason.ILLEGAL_TRANSITION,
            f"Round {round_.number} is {round_.phase.value} and cannot take {type(event).__name__}.",
            round=round_.number,
            phase=round_.phase.value,
            event=type(event).__name__,
        )
    match event:
        case Opened(assignments=assignments, target=target):
            return _open(round_, assignments, target, at)
        case Moved(assignment_id=assignment_id, event=inner):
            return _move(round_, assignment_id, inner, at)
        case DeadlinePassed():
            return _deadline(round_, at)
        case Extended(deadline_at=deadline_at):
            return _prolong_open(replace(round_, deadline_at=deadline_at), deadline_at, at), (Wake(),)
        case PolicyChanged(policy=policy):
            return _settle(replace(round_, policy=policy), at)
        case AggregationDone():
            return replace(round_, phase=RoundPhase.COMMITTED, closed_at=at), (Closed(), Wake())
        case AggregationFailed(refusal=refusal):
            return _end(round_, RoundPhase.FAILED, refusal, at)
        case Aborted(refusal=refusal):
            return _end(round_, RoundPhase.ABORTED, refusal, at)


def _open(round_: Round, assignments: tuple[Assignment, ...], target: int, at: float) -> Step:
    opened = replace(
        round_,
        phase=RoundPhase.COLLECTING,
        assignments=assignments,
        target=target,
        opened_at=at,
        deadline_at=at + round_.policy.deadline_seconds,
        reason=None,
        message="",
    )
    return opened, (Wake(),)


def _move(round_: Round, assignment_id: AssignmentId, event: AssignmentEvent, at: float) -> Step:
    before = round_.find(assignment_id)
    if isinstance(event, Prolong) and round_.opened_at is not None:
        event = Prolong(min(event.deadline_at, round_.opened_at + round_.policy.longest_seconds))
    after = machine.advance(before, event, at=at)
    if after is before:
        return round_, ()
    moved = replace(round_, assignments=tuple(after if a is before else a for a in round_.assignments))
    owed: tuple[Effect, ...] = (Validate(after.id),) if after.phase is AssignmentPhase.RECEIVED else ()
    settled, effects = _settle(moved, at)
    return settled, owed + effects


def _settle(round_: Round, at: float) -> Step:
    """Applies the joint rules of the two machines: enough answers, or the last verdict, close the window."""
    if round_.phase not in GATHERING:
        return round_, ()
    enough = round_.accepted >= round_.policy.quorum
    if enough and round_.target and round_.accepted >= round_.target:
        return _enough(round_, at)
    if not any(a.is_open for a in round_.assignments):
        if enough:
            return _close_window(round_, Reason.ROUND_CLOSED, "The round had enough updates.", at)
        return _end(round_, RoundPhase.FAILED, _missed(round_, "every device has answered"), at)
    return _deadline(round_, at)


def _enough(round_: Round, at: float) -> Step:
    """The target is met: nobody is waited for any more, but what was received whole still gets its verdict."""
    if not round_.count(AssignmentPhase.RECEIVED):
        return _close_window(round_, Reason.ROUND_CLOSED, "The round had enough updates.", at)
    if not any(a.phase in machine.AWAITED for a in round_.assignments):
        return round_, ()
    late = Refusal(reason=Reason.ROUND_CLOSED, message="The round had enough updates.")
    return _expire(round_, lambda a: a.phase in machine.AWAITED, at, late), (Wake(),)


def _deadline(round_: Round, at: float) -> Step:
    """What the deadline means at `at`; a verdict that is owed and could matter is waited for, and asks again."""
    if round_.deadline_at is None or at < round_.deadline_at:
        return round_, ()
    received = round_.count(AssignmentPhase.RECEIVED)
    if received and round_.accepted + received >= round_.policy.quorum:
        return round_, ()
    moving = [a.deadline_at for a in round_.assignments if a.phase is AssignmentPhase.UPLOADING and a.deadline_at > at]
    if moving:
        return replace(round_, deadline_at=max(moving)), ()
    if round_.accepted >= round_.policy.quorum:
        return _close_window(round_, Reason.DEADLINE_PASSED, "The deadline of the round passed.", at)
    return _too_late(round_, at)


def _too_late(round_: Round, at: float) -> Step:
    policy = round_.policy
    refusal = _missed(round_, "the deadline passed")
    first = round_.phase is RoundPhase.COLLECTING
    if (first and policy.grace_seconds > 0) or policy.too_few is TooFew.WAIT:
        pause = policy.grace_seconds or policy.deadline_seconds
        graced = replace(
            round_, phase=RoundPhase.GRACE, deadline_at=at + pause, reason=refusal.reason, message=refusal.message
        )
        return _prolong_open(graced, at + pause, at), (Wake(),)
    return _end(round_, RoundPhase.FAILED, refusal, at)


def _close_window(round_: Round, reason: Reason, message: str, at: float) -> Step:
    refusal = Refusal(reason=reason, message=message)
    closed = _expire(round_, lambda a: a.is_open, at, refusal)
    return replace(closed, phase=RoundPhase.AGGREGATING, reason=None, message=""), (Aggregate(), Wake())


def _end(round_: Round, phase: RoundPhase, refusal: Refusal, at: float) -> Step:
    ended = _expire(round_, lambda a: a.is_open, at, Refusal(reason=Reason.ROUND_CLOSED, message=refusal.message))
    return (
        replace(ended, phase=phase, reason=refusal.reason, message=refusal.message, closed_at=at),
        (Closed(), Wake()),
    )


def _expire(round_: Round, which: Callable[[Assignment], bool], at: float, late: Refusal) -> Round:
    return replace(
        round_,
        assignments=tuple(machine.advance(a, Expire(late), at=at) if which(a) else a for a in round_.assignments),
    )


def _prolong_open(round_: Round, deadline_at: float, at: float) -> Round:
    return replace(
        round_,
        assignments=tuple(
            machine.advance(a, Prolong(deadline_at), at=at) if a.phase in machine.AWAITED else a
            for a in round_.assignments
        ),
    )


def _missed(round_: Round, when: str) -> Refusal:
    return Refusal(
        reason=Reason.QUORUM_MISSED,
        message=f"{round_.accepted} of {round_.policy.quorum} needed updates were accepted when {when}.",
    )
