"""Any order of events: what a round promises holds after each of them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from round_cases import BAD, BUSY, offered, planned

from glora_server.rounds.assignment import (
    AWAITED,
    Accept,
    AcceptUpdate,
    Assignment,
    AssignmentEvent,
    AssignmentPhase,
    Complete,
    Decline,
    Deliver,
    Fail,
    Prolong,
    Receive,
    RejectUpdate,
    StartUpload,
)
from glora_server.rounds.ids import AssignmentId
from glora_server.rounds.policy import RoundPolicy, TooFew, policy_problems
from glora_server.rounds.round import (
    GATHERING,
    Aborted,
    Aggregate,
    AggregationDone,
    AggregationFailed,
    Closed,
    DeadlinePassed,
    Effect,
    Extended,
    Moved,
    Opened,
    PolicyChanged,
    Round,
    RoundEvent,
    RoundPhase,
    Validate,
    advance,
)
from glora_wire.errors import GloraError, Reason

P = AssignmentPhase
NAMES = tuple("abcdefg")
ENDED = {RoundPhase.COMMITTED, RoundPhase.FAILED, RoundPhase.ABORTED}
EVENTS = st.sampled_from(
    (
        Accept(),
        Deliver(),
        StartUpload(),
        Receive(3),
        AcceptUpdate(),
        RejectUpdate(BAD),
        Decline(BUSY),
        Fail(BUSY, permanent=True),
        Complete(),
        Prolong(260.0),
    )
)
POLICIES = st.builds(
    RoundPolicy,
    quorum=st.integers(1, 5),
    target_devices=st.just(0),
    deadline_seconds=st.sampled_from((50.0, 100.0)),
    grace_seconds=st.sampled_from((0.0, 30.0)),
    too_few=st.sampled_from(TooFew),
)


class RoundMachine(RuleBasedStateMachine):
    """A round and its clock, and who was received and who was accepted when the window closed."""

    def __init__(self) -> None:
        super().__init__()
        self.round = planned()
        self.now = 0.0
        self.received: set[AssignmentId] = set()
        self.at_the_window: frozenset[AssignmentId] | None = None

    @initialize(policy=POLICIES, devices=st.integers(1, len(NAMES)), wanted=st.integers(0, 5))
    def opens(self, policy: RoundPolicy, devices: int, wanted: int) -> None:
        assert policy_problems(policy) == []
        self.round = replace(planned(), policy=policy)
        offers = tuple(offered(name, deadline_at=policy.deadline_seconds) for name in NAMES[:devices])
        self.give(Opened(offers, min(wanted, devices)))

    def give(self, event: RoundEvent) -> None:
        """Feeds the event; checks the step against what every step promises."""
        before = self.round
        try:
            after, effects = advance(before, event, at=self.now)
        except GloraError as error:
            if error.reason not in {Reason.ILLEGAL_TRANSITION, Reason.ASSIGNMENT_UNKNOWN}:
                raise
            assert before == self.round
            return
        assert advance(before, event, at=self.now) == (after, effects), "same input, same output"
        self._check_assignments(before, after, event)
        self._check_effects(before, after, effects)
        self.round = after

    def _check_assignments(self, before: Round, after: Round, event: RoundEvent) -> None:
        for old in before.assignments:
            new = after.find(old.id)
            assert old.is_open or new == old, "a closed assignment never changes again"
            if old.phase is P.RECEIVED and new.phase is P.EXPIRED:
                self._check_expiry_of_a_received_update(before, after, event, new)
            if new.phase is P.RECEIVED:
                self.received.add(new.id)
        if self.at_the_window is not None:
            assert accepted(after) == self.at_the_window, "no update joins or leaves after the window"
        elif after.phase is RoundPhase.AGGREGATING:
            self.at_the_window = accepted(after)

    @staticmethod
    def _check_expiry_of_a_received_update(before: Round, after: Round, event: RoundEvent, expired: Assignment) -> None:
        if isinstance(event, Aborted):
            return
        assert after.phase is RoundPhase.FAILED, f"{expired.id} could have been aggregated"
        assert before.accepted + before.count(P.RECEIVED) < after.policy.quorum

    def _check_effects(self, before: Round, after: Round, effects: tuple[Effect, ...]) -> None:
        assert effects.count(Aggregate()) == int(before.phase in GATHERING and after.phase is RoundPhase.AGGREGATING)
        if Aggregate() in effects:
            assert after.accepted >= after.policy.quorum, "never aggregated below the quorum"
        assert effects.count(Closed()) == int(before.phase not in ENDED and after.phase in ENDED)
        fresh = {a.id for a in after.assignments if a.phase is P.RECEIVED} - {
            a.id for a in before.assignments if a.phase is P.RECEIVED
        }
        for assignment_id in fresh:
            assert Validate(assignment_id) in effects

    @rule(name=st.sampled_from(NAMES), event=EVENTS)
    def something_happens_to_a_device(self, name: str, event: AssignmentEvent) -> None:
        self.give(Moved(AssignmentId(name), event))

    @rule(name=st.sampled_from(NAMES), verdict=st.sampled_from((AcceptUpdate(), RejectUpdate(BAD), None)))
    def a_whole_update_comes(self, name: str, verdict: AssignmentEvent | None) -> None:
        self.give(Moved(AssignmentId(name), Receive(3)))
        if verdict is not None:
            self.give(Moved(AssignmentId(name), verdict))

    @rule(seconds=st.sampled_from((0.0, 1.0, 30.0, 100.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.give(DeadlinePassed())

    @rule(seconds=st.sampled_from((1.0, 100.0)))
    def an_operator_extends(self, seconds: float) -> None:
        self.give(Extended(max(self.round.deadline_at or 0.0, self.now) + seconds))

    @rule(quorum=st.integers(1, 7))
    def an_operator_edits_the_quorum(self, quorum: int) -> None:
        self.give(PolicyChanged(replace(self.round.policy, quorum=quorum)))

    @precondition(lambda self: self.round.phase is RoundPhase.AGGREGATING)
    @rule(event=st.sampled_from((AggregationDone(), AggregationFailed(BAD))))
    def the_numerics_answer(self, event: RoundEvent) -> None:
        self.give(event)

    @rule(dice=st.integers(0, 30))
    def an_operator_aborts(self, dice: int) -> None:
        if dice == 0:
            self.give(Aborted(BUSY))

    @invariant()
    def a_closed_window_leaves_nothing_open(self) -> None:
        if self.round.phase not in GATHERING:
            assert not any(a.is_open for a in self.round.assignments)

    @invariant()
    def a_gathering_round_has_somebody_to_wait_for_and_a_deadline(self) -> None:
        if self.round.phase in GATHERING:
            assert any(a.is_open for a in self.round.assignments)
            assert self.round.deadline_at is not None

    @invariant()
    def every_received_update_has_exactly_one_fate(self) -> None:
        if self.round.phase not in GATHERING:
            for assignment_id in self.received:
                assert self.round.find(assignment_id).phase in {P.ACCEPTED_UPDATE, P.REJECTED, P.EXPIRED}

    @invariant()
    def a_deadline_that_passed_waits_for_a_verdict_only(self) -> None:
        if self.round.phase in GATHERING and self.round.deadline_at is not None and self.now >= self.round.deadline_at:
            after, _ = advance(self.round, DeadlinePassed(), at=self.now)
            if after is self.round:
                assert self.round.count(P.RECEIVED) > 0
                assert self.round.accepted + self.round.count(P.RECEIVED) >= self.round.policy.quorum

    @invariant()
    def only_the_awaited_have_no_end(self) -> None:
        for assignment in self.round.assignments:
            assert (assignment.closed_at is None) == (assignment.phase in AWAITED or assignment.phase is P.RECEIVED)


def accepted(round_: Round) -> frozenset[AssignmentId]:
    return frozenset(a.id for a in round_.assignments if a.phase is P.ACCEPTED_UPDATE)


TestRoundMachine = RoundMachine.TestCase
TestRoundMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)
