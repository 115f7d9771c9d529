"""How a run's rounds are staffed and timed; editable while the run is going on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Sampling(StrEnum):
    """How devices are drawn when more are there than wanted."""

    UNIFORM = "uniform"
    WEIGHTED = "weighted"
    """By training rows, without replacement."""
    RANK = "rank"
    """Largest granted rank first, ties drawn."""


class TooFew(StrEnum):
    """What a round does when its quorum was missed after the grace period."""

    WAIT = "wait"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPolicy:
    """Staffing and timing of a round; times in seconds."""

    rounds: int = 10
    """Rounds until the run is complete."""
    target_devices: int = 0
    """Updates that a round wants; 0 = every eligible device that is there when the round opens."""
    quorum: int = 1
    """Fewest accepted updates that a round may be aggregated from; a round opens with at least as many devices."""
    over_selection: float = 0.0
    """Share of extra devices to invite; the round closes when `target_devices` updates are in."""
    deadline_seconds: float = 3600.0
    """Time from opening to the deadline."""
    grace_seconds: float = 300.0
    """One extension when the quorum is missing at the deadline; 0 = none."""
    max_round_seconds: float = 0.0
    """A device whose transfer is moving may go on until then; 0 = three deadlines."""
    gather_seconds: float = 2.0
    """How long a round that could open waits for more devices before it does."""
    too_few: TooFew = TooFew.FAIL
    max_attempts: int = 3
    """Attempts of one round before the run fails."""
    retry_seconds: float = 10.0
    """Pause before the second attempt at a round; twice as long before each further one, an hour at most."""
    sampling: Sampling = Sampling.UNIFORM
    tags: tuple[str, ...] = ()
    """Only devices that carry all of these tags."""
    min_rank: int = 1
    """Only devices that were granted at least this rank."""

    @property
    def longest_seconds(self) -> float:
        """The latest that a round can be open, from its opening, without a grace period."""
        return self.max_round_seconds or 3.0 * self.deadline_seconds

    def pause_before(self, attempt: int) -> float:
        """Seconds between the failure of a round and its next attempt, so that devices which fail at once do not use
        all attempts up."""
        if attempt <= 1:
            return 0.0
        return min(self.retry_seconds * 2.0 ** min(attempt - 2, 32), max(self.retry_seconds, 3600.0))


def policy_problems(policy: RoundPolicy) -> list[tuple[str, str]]:
    """Every (field, sentence) that makes the policy unusable; empty when it is fine."""
    checks = [
        ("rounds", policy.rounds >= 1, "must be at least 1"),
        ("target_devices", policy.target_devices >= 0, "must be 0 (all) or more"),
        ("quorum", policy.quorum >= 1, "must be at least 1"),
        (
            "quorum",
            policy.target_devices <= 0 or policy.quorum <= policy.target_devices,
            f"must not be above target_devices ({policy.target_devices})",
        ),
        ("over_selection", 0.0 <= policy.over_selection <= 10.0, "must be between 0 and 10"),
        ("deadline_seconds", 1.0 <= policy.deadline_seconds <= 30 * 86400, "must be between 1 and 2592000"),
        ("grace_seconds", 0.0 <= policy.grace_seconds <= 30 * 86400, "must be between 0 and 2592000"),
        (
            "max_round_seconds",
            policy.max_round_seconds == 0.0 or policy.max_round_seconds >= policy.deadline_seconds,
            "must be 0 or at least deadline_seconds",
        ),
        ("gather_seconds", 0.0 <= policy.gather_seconds <= 86400, "must be between 0 and 86400"),
        ("max_attempts", policy.max_attempts >= 1, "must be at least 1"),
        ("retry_seconds", 0.0 <= policy.retry_seconds <= 86400, "must be between 0 and 86400"),
        ("min_rank", policy.min_rank >= 1, "must be at least 1"),
    ]
    return [(field, text) for field, fine, text in checks if not fine]
