"""The joint rules of round and assignments: when the window closes, and with whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
from round_cases import BAD, BUSY, Driver, planned

from glora_server.rounds.assignment import (
    Accept,
    AcceptUpdate,
    AssignmentPhase,
    Decline,
    Fail,
    Prolong,
    Receive,
    RejectUpdate,
    StartUpload,
)
from glora_server.rounds.ids import AssignmentId
from glora_server.rounds.policy import TooFew
from glora_server.rounds.round import (
    Aborted,
    Aggregate,
    AggregationDone,
    AggregationFailed,
    Closed,
    DeadlinePassed,
    Extended,
    Moved,
    PolicyChanged,
    RoundPhase,
    Validate,
    Wake,
    advance,
)
from glora_wire.errors import GloraError, Reason, Refusal

P = AssignmentPhase


def opened(*devices: str, target: int = 0, **policy: object) -> Driver:
    return Driver(planned(**policy)).open(*devices, target=target)


def test_opening_sets_the_deadline_and_wakes_the_devices() -> None:
    driver = Driver(planned(), now=7.0)
    driver.open("a", "b")
    assert (driver.round.phase, driver.round.opened_at, driver.round.deadline_at) == (RoundPhase.COLLECTING, 7.0, 107.0)
    assert driver.effects == [Wake()]


def test_a_received_update_owes_its_validation() -> None:
    driver = opened("a", "b")
    assert driver.move("a", Receive(5)) == (Validate(AssignmentId("a")),)


def test_the_last_answer_closes_the_window() -> None:
    driver = opened("a", "b", "c")
    driver.move("a", Receive(5), AcceptUpdate())
    driver.move("b", Decline(BUSY))
    assert driver.stands() is RoundPhase.COLLECTING
    assert driver.move("c", Receive(5), AcceptUpdate())[-2:] == (Aggregate(), Wake())
    assert driver.stands() is RoundPhase.AGGREGATING
    assert driver.give(AggregationDone()) == (Closed(), Wake())
    assert (driver.round.phase, driver.round.closed_at) == (RoundPhase.COMMITTED, driver.now)


def test_a_round_that_everyone_left_fails_at_once() -> None:
    driver = opened("a", "b", "c")
    driver.move("a", Receive(5), AcceptUpdate())
    driver.move("b", Fail(BUSY))
    assert driver.move("c", Receive(5), RejectUpdate(BAD))[-2:] == (Closed(), Wake())
    assert (driver.round.phase, driver.round.reason) == (RoundPhase.FAILED, Reason.QUORUM_MISSED)
    assert driver.round.message == "1 of 2 needed updates were accepted when every device has answered."


def test_the_target_closes_the_window_for_those_who_are_late() -> None:
    driver = opened("a", "b", "c", target=2)
    driver.move("c", StartUpload())
    for name in "ab":
        driver.move(name, Receive(5), AcceptUpdate())
    assert driver.stands() is RoundPhase.AGGREGATING
    late = driver.round.find(AssignmentId("c"))
    assert (late.phase, late.reason) == (P.EXPIRED, Reason.ROUND_CLOSED)


def test_a_met_target_still_waits_for_the_verdict_on_what_was_received() -> None:
    driver = opened("a", "b", "c", "d", target=2)
    driver.move("c", Receive(5))
    for name in "ab":
        driver.move(name, Receive(5), AcceptUpdate())
    assert driver.stands() is RoundPhase.COLLECTING
    assert (driver.phase_of("c"), driver.phase_of("d")) == (P.RECEIVED, P.EXPIRED)
    assert driver.move("c", AcceptUpdate())[-2:] == (Aggregate(), Wake())
    assert driver.round.accepted == 3


def test_a_target_below_an_edited_quorum_does_not_close_the_window() -> None:
    driver = opened("a", "b", "c", target=2)
    driver.give(PolicyChanged(replace(driver.round.policy, quorum=3)))
    for name in "ab":
        driver.move(name, Receive(5), AcceptUpdate())
    assert driver.stands() is RoundPhase.COLLECTING
    driver.move("c", Receive(5), AcceptUpdate())
    assert driver.stands() is RoundPhase.AGGREGATING


def test_the_deadline_with_a_quorum_expires_the_rest() -> None:
    driver = opened("a", "b", "c")
    for name in "ab":
        driver.move(name, Receive(5), AcceptUpdate())
    assert driver.give(DeadlinePassed(), at=100.0) == (Aggregate(), Wake())
    assert driver.round.find(AssignmentId("c")).reason is Reason.DEADLINE_PASSED


def test_a_clock_that_rings_early_changes_nothing() -> None:
    driver = opened("a", "b")
    before = driver.round
    assert driver.give(DeadlinePassed(), at=99.0) == ()
    assert driver.round is before


def test_the_deadline_waits_for_a_verdict_without_a_step_of_its_own() -> None:
    """Otherwise a timer that rings again would write to the database until the verdict comes."""
    driver = opened("a", "b", "c")
    driver.move("a", Receive(5), AcceptUpdate())
    driver.move("b", Receive(5))
    before = driver.round
    assert driver.give(DeadlinePassed(), at=100.0) == ()
    assert driver.round is before
    assert driver.move("b", AcceptUpdate(), at=101.0) == (Aggregate(), Wake())
    assert driver.round.find(AssignmentId("c")).reason is Reason.DEADLINE_PASSED


def test_a_bad_verdict_after_the_deadline_leads_to_grace_with_everyone_in_it() -> None:
    driver = opened("a", "b", "c")
    driver.move("a", Receive(5), AcceptUpdate())
    driver.move("b", Receive(5))
    driver.give(DeadlinePassed(), at=100.0)
    driver.move("b", RejectUpdate(BAD), at=101.0)
    assert (driver.round.phase, driver.round.deadline_at) == (RoundPhase.GRACE, 151.0)
    assert driver.phase_of("c") is P.OFFERED
    driver.move("c", Receive(5), AcceptUpdate(), at=120.0)
    assert driver.stands() is RoundPhase.AGGREGATING


def test_a_received_update_that_cannot_reach_the_quorum_does_not_hold_the_deadline() -> None:
    driver = opened("a", "b", "c", quorum=3, grace_seconds=0.0)
    driver.move("a", Receive(5))
    driver.give(DeadlinePassed(), at=100.0)
    assert driver.stands() is RoundPhase.FAILED
    assert driver.phase_of("a") is P.EXPIRED


def test_grace_comes_once_and_then_the_round_fails() -> None:
    driver = opened("a", "b")
    assert driver.give(DeadlinePassed(), at=100.0) == (Wake(),)
    assert driver.stands() is RoundPhase.GRACE
    assert [a.deadline_at for a in driver.round.assignments] == [150.0, 150.0]
    assert driver.give(DeadlinePassed(), at=150.0) == (Closed(), Wake())
    assert driver.stands() is RoundPhase.FAILED


@pytest.mark.parametrize(("grace", "pause"), [(50.0, 50.0), (0.0, 100.0)])
def test_the_policy_wait_goes_on_for_ever(grace: float, pause: float) -> None:
    driver = opened("a", "b", grace_seconds=grace, too_few=TooFew.WAIT)
    for turn in range(1, 5):
        at = 100.0 + (turn - 1) * pause
        driver.give(DeadlinePassed(), at=at)
        assert (driver.round.phase, driver.round.deadline_at) == (RoundPhase.GRACE, at + pause)


def test_a_moving_transfer_moves_the_deadline_up_to_the_longest_round() -> None:
    driver = opened("a", "b", "c", max_round_seconds=120.0)
    for name in "ab":
        driver.move(name, Receive(5), AcceptUpdate())
    driver.move("c", StartUpload(), Prolong(125.0), at=95.0)
    driver.give(DeadlinePassed(), at=100.0)
    assert (driver.round.phase, driver.round.deadline_at) == (RoundPhase.COLLECTING, 120.0)
    driver.move("c", Prolong(149.0), at=119.0)
    driver.give(DeadlinePassed(), at=120.0)
    assert driver.stands() is RoundPhase.AGGREGATING


def test_a_device_that_only_trains_does_not_move_the_deadline() -> None:
    driver = opened("a", "b", "c")
    for name in "ab":
        driver.move(name, Receive(5), AcceptUpdate())
    driver.move("c", Accept(), Prolong(130.0), at=99.0)
    driver.give(DeadlinePassed(), at=100.0)
    assert driver.stands() is RoundPhase.AGGREGATING


def test_extending_gives_every_awaited_device_the_new_deadline() -> None:
    driver = opened("a", "b")
    driver.move("a", Receive(5))
    assert driver.give(Extended(400.0), at=50.0) == (Wake(),)
    assert driver.round.deadline_at == 400.0
    assert driver.round.find(AssignmentId("b")).deadline_at == 400.0


def test_a_lower_quorum_ends_a_wait_that_is_over() -> None:
    driver = opened("a", "b", "c")
    driver.move("a", Receive(5), AcceptUpdate())
    driver.give(DeadlinePassed(), at=100.0)
    driver.give(PolicyChanged(replace(driver.round.policy, quorum=1)), at=110.0)
    assert driver.stands() is RoundPhase.GRACE, "the grace period goes on: more may come"
    driver.give(DeadlinePassed(), at=150.0)
    assert driver.stands() is RoundPhase.AGGREGATING


def test_a_policy_can_be_edited_before_and_after_the_window() -> None:
    driver = Driver(planned())
    driver.give(PolicyChanged(replace(driver.round.policy, deadline_seconds=10.0)))
    driver.open("a")
    assert driver.round.deadline_at == 10.0
    driver.give(PolicyChanged(replace(driver.round.policy, quorum=1)))
    driver.move("a", Receive(5), AcceptUpdate())
    assert driver.give(PolicyChanged(replace(driver.round.policy, quorum=9))) == ()
    assert driver.stands() is RoundPhase.AGGREGATING


@pytest.mark.parametrize("phase", [RoundPhase.PLANNED, RoundPhase.COLLECTING, RoundPhase.AGGREGATING])
def test_a_live_round_can_be_aborted(phase: RoundPhase) -> None:
    driver = Driver(planned(quorum=1))
    if phase is not RoundPhase.PLANNED:
        driver.open("a", "b", target=1)
    if phase is RoundPhase.AGGREGATING:
        driver.move("a", Receive(5), AcceptUpdate())
    assert driver.stands() is phase
    refusal = Refusal(reason=Reason.RUN_ABORTED, message="Enough.")
    assert driver.give(Aborted(refusal)) == (Closed(), Wake())
    assert (driver.round.phase, driver.round.reason) == (RoundPhase.ABORTED, Reason.RUN_ABORTED)
    assert not any(a.is_open for a in driver.round.assignments)
    with pytest.raises(GloraError, match="aborted"):
        driver.give(Aborted(refusal))


def test_a_failed_aggregation_ends_the_round_with_its_reason() -> None:
    driver = opened("a", quorum=1)
    driver.move("a", Receive(5), AcceptUpdate())
    driver.give(AggregationFailed(BAD))
    assert (driver.round.phase, driver.round.reason) == (RoundPhase.FAILED, BAD.reason)


def test_an_update_cannot_join_after_the_window() -> None:
    driver = opened("a", "b", quorum=1, target=1)
    driver.move("a", Receive(5), AcceptUpdate())
    before = driver.round
    with pytest.raises(GloraError) as caught:
        driver.move("b", Receive(5))
    assert caught.value.reason is Reason.ILLEGAL_TRANSITION
    assert driver.round is before


def test_an_unknown_assignment_is_named() -> None:
    with pytest.raises(GloraError) as caught:
        advance(opened("a").round, Moved(AssignmentId("x"), Accept()), at=1.0)
    assert caught.value.reason is Reason.ASSIGNMENT_UNKNOWN
