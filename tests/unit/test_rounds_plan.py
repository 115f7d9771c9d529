"""Who may train, who is drawn, at which rank; what a policy must look like."""

from __future__ import annotations

from dataclasses import replace

import pytest
from round_cases import candidate

from glora_server.rounds.ids import DeviceId
from glora_server.rounds.plan import (
    Candidate,
    Requirements,
    Staffing,
    Waiting,
    rank_for,
    refusal_for,
    staff,
    training_refusal,
)
from glora_server.rounds.policy import RoundPolicy, Sampling, policy_problems
from glora_wire.errors import Reason, Refusal

NEEDS = Requirements(
    run_name="first", fingerprint="ab" * 32, task="causal_lm", max_rank=16, min_rank=4, tags=frozenset({"lab"})
)
DECLINED = Refusal(reason=Reason.UNKNOWN_LABEL, message="It has a label that the run does not know.")


def devices(count: int) -> list[Candidate]:
    return [
        candidate(f"d{number:02}", granted_rank=1 + number, training_rows=10 * number + 1) for number in range(count)
    ]


@pytest.mark.parametrize(
    ("granted", "declared", "most", "rank"), [(8, 0, 16, 8), (8, 4, 16, 4), (8, 32, 16, 8), (64, 0, 16, 16)]
)
def test_the_rank_is_the_smallest_that_anyone_allows(granted: int, declared: int, most: int, rank: int) -> None:
    assert rank_for(candidate("a", granted_rank=granted, declared_rank=declared), most) == rank


def test_a_device_that_fits_is_not_refused() -> None:
    assert refusal_for(candidate("a"), NEEDS) is None
    assert training_refusal(candidate("a"), NEEDS) is None


@pytest.mark.parametrize(
    ("changes", "reason", "word"),
    [
        ({"declined": DECLINED}, Reason.UNKNOWN_LABEL, "label"),
        ({"fingerprint": ""}, Reason.BASE_MODEL_MISSING, "--model"),
        ({"fingerprint": "cd" * 32}, Reason.BASE_MODEL_MISMATCH, "cdcdcdcdcdcd"),
        ({"task": "sequence_classification"}, Reason.TASK_MISMATCH, "sequence_classification"),
        ({"tags": frozenset({"attic"})}, Reason.TAGS_MISMATCH, "lab"),
    ],
)
def test_what_keeps_a_device_out_altogether(changes: dict[str, object], reason: Reason, word: str) -> None:
    refusal = refusal_for(candidate("a", **changes), NEEDS)
    assert refusal is not None
    assert refusal.reason is reason
    assert word in refusal.message
    assert training_refusal(candidate("a", **changes), NEEDS) == refusal


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trains": False}, Reason.ROLE_MISMATCH),
        ({"training_rows": 0}, Reason.NO_TRAINING_DATA),
        ({"granted_rank": 3}, Reason.RANK_TOO_SMALL),
        ({"declared_rank": 2}, Reason.RANK_TOO_SMALL),
    ],
)
def test_what_keeps_a_device_from_training_only(changes: dict[str, object], reason: Reason) -> None:
    refusal = training_refusal(candidate("a", **changes), NEEDS)
    assert refusal is not None
    assert refusal.reason is reason
    assert refusal_for(candidate("a", **changes), NEEDS) is None


def test_too_few_devices_wait_and_say_for_what() -> None:
    answer = staff(devices(2), RoundPolicy(quorum=3), max_rank=16, seed=1)
    assert answer == Waiting(message="2 of 3 needed devices are online and eligible.", eligible=2)


def test_without_a_target_everyone_is_invited_and_waited_for() -> None:
    answer = staff(devices(5), RoundPolicy(), max_rank=4, seed=1)
    assert isinstance(answer, Staffing)
    assert [(p.device_id, p.rank) for p in answer.picks] == [(f"d{n:02}", min(4, n + 1)) for n in range(5)]
    assert answer.target == 0


@pytest.mark.parametrize(
    ("target", "share", "invited"),
    [(10, 0.0, 10), (10, 0.1, 11), (10, 0.11, 12), (30, 0.1, 33), (10, 0.01, 11), (49, 1.0, 50)],
)
def test_over_selection_invites_exactly_that_share_more(target: int, share: float, invited: int) -> None:
    """10 * (1 + 0.1) is 11.000000000000002 in floating point: that is no twelfth device."""
    policy = RoundPolicy(target_devices=target, over_selection=share)
    answer = staff(devices(50), policy, max_rank=16, seed=1)
    assert isinstance(answer, Staffing)
    assert (len(answer.picks), answer.target) == (invited, target)


@pytest.mark.parametrize("sampling", list(Sampling))
@pytest.mark.parametrize(("target", "busy"), [(4, 6), (4, 8), (8, 6)])
def test_devices_with_something_left_to_do_come_after_the_others(sampling: Sampling, target: int, busy: int) -> None:
    later = {device.device_id for device in devices(busy)}
    for seed in range(5):
        policy = RoundPolicy(target_devices=target, sampling=sampling)
        answer = staff(devices(10), policy, max_rank=16, seed=seed, later=later)
        assert isinstance(answer, Staffing)
        picked = [pick.device_id for pick in answer.picks]
        assert len(picked) == len(set(picked)) == target
        assert len(later.intersection(picked)) == max(0, target - (10 - busy))


def test_fewer_devices_than_the_target_lower_the_target() -> None:
    answer = staff(devices(3), RoundPolicy(target_devices=5, quorum=2), max_rank=16, seed=1)
    assert isinstance(answer, Staffing)
    assert (len(answer.picks), answer.target) == (3, 3)


@pytest.mark.parametrize("sampling", list(Sampling))
def test_the_draw_depends_on_the_seed_and_not_on_the_order(sampling: Sampling) -> None:
    policy = RoundPolicy(target_devices=4, sampling=sampling)
    draws = [staff(devices(20), policy, max_rank=64, seed=seed) for seed in range(8)]
    assert draws == [staff(reversed(devices(20)), policy, max_rank=64, seed=seed) for seed in range(8)]
    if sampling is not Sampling.RANK:
        assert len({str(draw) for draw in draws}) > 1


def test_sampling_by_rank_takes_the_largest_and_draws_among_equals() -> None:
    pool = [*devices(6), *(candidate(f"e{n}", granted_rank=6) for n in range(5))]
    policy = RoundPolicy(target_devices=2, sampling=Sampling.RANK)
    seen = set()
    for seed in range(20):
        answer = staff(pool, policy, max_rank=64, seed=seed)
        assert isinstance(answer, Staffing)
        assert {pick.rank for pick in answer.picks} == {6}
        seen |= {pick.device_id for pick in answer.picks}
    assert len(seen) > 2


def test_weighted_sampling_prefers_rows_without_excluding_anyone() -> None:
    pool = [
        candidate("big", training_rows=900),
        candidate("mid", training_rows=90),
        candidate("tiny", training_rows=10),
    ]
    policy = RoundPolicy(target_devices=1, sampling=Sampling.WEIGHTED)
    drawn: dict[DeviceId, int] = {}
    for seed in range(600):
        answer = staff(pool, policy, max_rank=64, seed=seed)
        assert isinstance(answer, Staffing)
        first = answer.picks[0].device_id
        drawn[first] = drawn.get(first, 0) + 1
    shares = {name: count / 600 for name, count in drawn.items()}
    assert 0.85 < shares[DeviceId("big")] < 0.95
    assert 0.05 < shares[DeviceId("mid")] < 0.14
    assert 0.0 < shares[DeviceId("tiny")] < 0.04


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 0),
        ("target_devices", -1),
        ("quorum", 0),
        ("over_selection", -0.1),
        ("over_selection", float("nan")),
        ("deadline_seconds", 0.5),
        ("grace_seconds", -1.0),
        ("max_round_seconds", 10.0),
        ("gather_seconds", float("nan")),
        ("max_attempts", 0),
        ("retry_seconds", -1.0),
        ("min_rank", 0),
    ],
)
def test_every_unusable_value_of_a_policy_is_named(field: str, value: float) -> None:
    found = policy_problems(replace(RoundPolicy(), **{field: value}))  # type: ignore[arg-type]
    assert [name for name, _ in found] == [field]


def test_the_pause_before_an_attempt_doubles_up_to_an_hour() -> None:
    policy = RoundPolicy(retry_seconds=10.0)
    assert [policy.pause_before(attempt) for attempt in (1, 2, 3, 4)] == [0.0, 10.0, 20.0, 40.0]
    assert policy.pause_before(1000) == 3600.0
    assert RoundPolicy(retry_seconds=7200.0).pause_before(3) == 7200.0
    assert RoundPolicy(retry_seconds=0.0).pause_before(5) == 0.0


def test_a_policy_that_is_fine_has_no_problems() -> None:
    assert policy_problems(RoundPolicy()) == []


def test_a_quorum_above_the_target_could_never_be_met() -> None:
    assert policy_problems(RoundPolicy(target_devices=2, quorum=3)) == [
        ("quorum", "must not be above target_devices (2)")
    ]
