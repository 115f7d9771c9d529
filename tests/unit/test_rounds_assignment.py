"""One device in one round: what is legal, what is an echo, what never happens."""

from __future__ import annotations

import pytest
from round_cases import BAD, BUSY, offered

from glora_server.rounds.assignment import (
    AWAITED,
    OPEN,
    Accept,
    AcceptUpdate,
    Assignment,
    AssignmentEvent,
    AssignmentKind,
    AssignmentPhase,
    Complete,
    Decline,
    Deliver,
    Expire,
    Fail,
    Prolong,
    Receive,
    RejectUpdate,
    StartUpload,
    advance,
)
from glora_wire.errors import GloraError, Reason

EVENTS: tuple[AssignmentEvent, ...] = (
    Accept(),
    Deliver(),
    StartUpload(),
    Receive(7),
    AcceptUpdate(),
    RejectUpdate(BAD),
    Decline(BUSY),
    Fail(BUSY, permanent=True),
    Expire(BAD),
    Complete(),
    Prolong(500.0),
)
CLOSED = tuple(phase for phase in AssignmentPhase if phase not in OPEN)


def after(assignment: Assignment, *events: AssignmentEvent) -> Assignment:
    for at, event in enumerate(events, start=1):
        assignment = advance(assignment, event, at=float(at))
    return assignment


def test_the_usual_way_notes_the_time_of_every_step() -> None:
    done = after(offered("a"), Accept(), Deliver(), StartUpload(), Receive(7), AcceptUpdate())
    assert done.phase is AssignmentPhase.ACCEPTED_UPDATE
    times = (done.accepted_at, done.delivered_at, done.upload_started_at, done.received_at, done.closed_at)
    assert times == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert done.training_rows == 7


def test_a_pull_before_the_word_accepted_counts_as_both() -> None:
    done = after(offered("a"), Deliver())
    assert (done.phase, done.accepted_at, done.delivered_at) == (AssignmentPhase.DELIVERED, 1.0, 1.0)


@pytest.mark.parametrize("event", [Accept(), Deliver(), StartUpload()])
def test_what_is_known_already_changes_nothing(event: AssignmentEvent) -> None:
    uploading = after(offered("a"), Accept(), Deliver(), StartUpload())
    assert advance(uploading, event, at=9.0) is uploading


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("phase", CLOSED)
def test_a_closed_assignment_never_opens_again(phase: AssignmentPhase, event: AssignmentEvent) -> None:
    with pytest.raises(GloraError) as caught:
        advance(offered("a", phase=phase), event, at=1.0)
    assert caught.value.reason is Reason.ILLEGAL_TRANSITION
    assert type(event).__name__ in caught.value.message


@pytest.mark.parametrize("event", [AcceptUpdate(), RejectUpdate(BAD)])
@pytest.mark.parametrize("phase", sorted(AWAITED))
def test_only_a_received_update_is_judged(phase: AssignmentPhase, event: AssignmentEvent) -> None:
    with pytest.raises(GloraError, match="cannot take"):
        advance(offered("a", phase=phase), event, at=1.0)


@pytest.mark.parametrize("event", [Decline(BUSY), Fail(BUSY), Prolong(500.0), Receive(9)])
def test_a_device_cannot_take_a_received_update_back(event: AssignmentEvent) -> None:
    with pytest.raises(GloraError, match="received"):
        advance(after(offered("a"), Receive(7)), event, at=9.0)


@pytest.mark.parametrize("event", [StartUpload(), Receive(1), AcceptUpdate(), RejectUpdate(BAD)])
def test_an_evaluation_has_no_update(event: AssignmentEvent) -> None:
    evaluation = offered("a", kind=AssignmentKind.EVALUATE, ranks=(1, 8))
    with pytest.raises(GloraError, match="cannot take"):
        advance(evaluation, event, at=1.0)


def test_only_an_evaluation_completes() -> None:
    assert after(offered("a", kind=AssignmentKind.EVALUATE), Complete()).phase is AssignmentPhase.COMPLETED
    with pytest.raises(GloraError, match="Complete"):
        after(offered("a"), Complete())


@pytest.mark.parametrize(
    ("event", "phase", "permanent"),
    [
        (Decline(BUSY, permanent=True), AssignmentPhase.DECLINED, True),
        (Decline(BUSY), AssignmentPhase.DECLINED, False),
        (Fail(BUSY, permanent=True), AssignmentPhase.FAILED, True),
        (Expire(BUSY), AssignmentPhase.EXPIRED, False),
    ],
)
def test_an_end_keeps_its_reason(event: AssignmentEvent, phase: AssignmentPhase, *, permanent: bool) -> None:
    ended = after(offered("a"), event)
    assert (ended.phase, ended.reason, ended.message) == (phase, BUSY.reason, BUSY.message)
    assert ended.permanent is permanent
    assert ended.closed_at == 1.0
    assert not ended.is_open


def test_a_deadline_is_never_moved_back() -> None:
    assert after(offered("a", deadline_at=100.0), Prolong(50.0)).deadline_at == 100.0
    assert after(offered("a", deadline_at=100.0), Prolong(130.0)).deadline_at == 130.0
