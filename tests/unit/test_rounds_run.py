"""A run: what may follow what."""

from __future__ import annotations

import pytest

from glora_server.rounds.run import RunEvent, RunPhase, advance
from glora_wire.errors import GloraError, Reason

ENDED = (RunPhase.COMPLETED, RunPhase.FAILED, RunPhase.ABORTED)


@pytest.mark.parametrize(
    ("phase", "event", "after"),
    [
        (RunPhase.CREATED, RunEvent.START, RunPhase.ACTIVE),
        (RunPhase.ACTIVE, RunEvent.PAUSE, RunPhase.PAUSED),
        (RunPhase.PAUSED, RunEvent.RESUME, RunPhase.ACTIVE),
        (RunPhase.ACTIVE, RunEvent.COMPLETE, RunPhase.COMPLETED),
        (RunPhase.PAUSED, RunEvent.FAIL, RunPhase.FAILED),
        (RunPhase.CREATED, RunEvent.ABORT, RunPhase.ABORTED),
    ],
)
def test_a_run_goes_on(phase: RunPhase, event: RunEvent, after: RunPhase) -> None:
    assert advance(phase, event) is after


@pytest.mark.parametrize("event", list(RunEvent))
@pytest.mark.parametrize("phase", ENDED)
def test_nothing_follows_an_end(phase: RunPhase, event: RunEvent) -> None:
    with pytest.raises(GloraError, match="nothing more can be done with it") as caught:
        advance(phase, event)
    assert caught.value.reason is Reason.ILLEGAL_TRANSITION


def test_a_refusal_says_what_is_possible() -> None:
    with pytest.raises(GloraError, match=r"cannot resume; possible now: abort, complete, fail, pause"):
        advance(RunPhase.ACTIVE, RunEvent.RESUME)
