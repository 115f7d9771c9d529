"""Rounds for tests of the pure machines: a round with some devices, and a driver that feeds it events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from glora_server.rounds.assignment import Assignment, AssignmentEvent, AssignmentKind, AssignmentPhase
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.plan import Candidate
from glora_server.rounds.policy import RoundPolicy
from glora_server.rounds.round import Effect, Moved, Opened, Round, RoundEvent, RoundPhase, advance
from glora_wire.errors import Reason, Refusal

BAD = Refusal(reason=Reason.NON_FINITE, message="The update holds NaN.")
BUSY = Refusal(reason=Reason.OUT_OF_MEMORY, message="The device has no memory left.")


def planned(**policy: Any) -> Round:
    """A round that was planned at time 0 with quorum 2, a deadline after 100 s and 50 s of grace."""
    plain: dict[str, Any] = {"quorum": 2, "deadline_seconds": 100.0, "grace_seconds": 50.0} | policy
    return Round(
        id=RoundId("r1"),
        run_id=RunId("run"),
        number=1,
        version_id=VersionId("v0"),
        policy=RoundPolicy(**plain),
        created_at=0.0,
    )


def offered(device: str, *, deadline_at: float = 100.0, **changes: Any) -> Assignment:
    """An assignment whose id is the device's name."""
    plain: dict[str, Any] = {
        "id": AssignmentId(device),
        "run_id": RunId("run"),
        "round_id": RoundId("r1"),
        "device_id": DeviceId(device),
        "kind": AssignmentKind.TRAIN,
        "rank": 8,
        "version_id": VersionId("v0"),
        "offered_at": 0.0,
        "deadline_at": deadline_at,
    }
    return Assignment(**(plain | changes))


@dataclass
class Driver:
    """A round and its clock; every event goes through `advance`."""

    round: Round
    now: float = 0.0
    effects: list[Effect] = field(default_factory=list)

    def give(self, event: RoundEvent, *, at: float | None = None) -> tuple[Effect, ...]:
        """The effects that `event` owes, at time `at` (default: now)."""
        self.now = self.now if at is None else at
        self.round, effects = advance(self.round, event, at=self.now)
        self.effects += effects
        return effects

    def open(self, *devices: str, target: int = 0) -> Driver:
        """Offer the round to these devices now."""
        deadline = self.now + self.round.policy.deadline_seconds
        self.give(Opened(tuple(offered(name, deadline_at=deadline) for name in devices), target))
        return self

    def move(self, device: str, *events: AssignmentEvent, at: float | None = None) -> tuple[Effect, ...]:
        """Let something happen to one device; the effects of all events together."""
        owed: tuple[Effect, ...] = ()
        for event in events:
            owed += self.give(Moved(AssignmentId(device), event), at=at)
        return owed

    def stands(self) -> RoundPhase:
        """Where the round stands."""
        return self.round.phase

    def phase_of(self, device: str) -> AssignmentPhase:
        """Where the device's assignment stands."""
        return self.round.find(AssignmentId(device)).phase


def candidate(name: str, **changes: Any) -> Candidate:
    """A device that trains at rank 8 and fits the run of `needs`."""
    plain: dict[str, Any] = {
        "device_id": DeviceId(name),
        "granted_rank": 8,
        "declared_rank": 0,
        "fingerprint": "ab" * 32,
        "task": "causal_lm",
        "run_name": "",
        "tags": frozenset({"lab"}),
        "training_rows": 100,
        "evaluation_rows": 0,
        "trains": True,
        "evaluates": False,
    }
    return Candidate(**(plain | changes))
