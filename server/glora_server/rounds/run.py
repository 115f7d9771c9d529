"""A run, as a pure state machine.

    created -> active <-> paused
                 |          |
                 +----------+--> completed | failed(reason) | aborted(reason)

A paused run opens no new round; a round that is open goes on, so that no device's work is lost.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from glora_wire.errors import GloraError, Reason


class RunPhase(StrEnum):
    """Where the run stands."""

    CREATED = "created"
    ACTIVE = "active"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"


class RunEvent(StrEnum):
    """What operators and the engine do to a run."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    COMPLETE = "complete"
    FAIL = "fail"
    ABORT = "abort"


_NEXT: Final[dict[tuple[RunPhase, RunEvent], RunPhase]] = {
    (RunPhase.CREATED, RunEvent.START): RunPhase.ACTIVE,
    (RunPhase.ACTIVE, RunEvent.PAUSE): RunPhase.PAUSED,
    (RunPhase.PAUSED, RunEvent.RESUME): RunPhase.ACTIVE,
    (RunPhase.ACTIVE, RunEvent.COMPLETE): RunPhase.COMPLETED,
    (RunPhase.PAUSED, RunEvent.COMPLETE): RunPhase.COMPLETED,
    (RunPhase.ACTIVE, RunEvent.FAIL): RunPhase.FAILED,
    (RunPhase.PAUSED, RunEvent.FAIL): RunPhase.FAILED,
    (RunPhase.CREATED, RunEvent.ABORT): RunPhase.ABORTED,
    (RunPhase.ACTIVE, RunEvent.ABORT): RunPhase.ABORTED,
    (RunPhase.PAUSED, RunEvent.ABORT): RunPhase.ABORTED,
}


def advance(phase: RunPhase, event: RunEvent) -> RunPhase:
    """The phase after `event`; raises ILLEGAL_TRANSITION naming what would be possible."""
    try:
        return _NEXT[phase, event]
    except KeyError:
        possible = sorted(str(e) for p, e in _NEXT if p is phase)
        hint = f"possible now: {', '.join(possible)}" if possible else "nothing more can be done with it"
        raise GloraError(
            Reason.ILLEGAL_TRANSITION,
            f"The run is {phase.value}, so it cannot {event.value}; {hint}.",
            phase=phase.value,
            event=event.value,
        ) from None
