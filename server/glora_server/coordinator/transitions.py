"""One step of a round inside a transaction: load, advance, save, note what is owed."""

from __future__ import annotations

from dataclasses import dataclass

from glora_server.coordinator.history import note_round
from glora_server.coordinator.model import Owed, OwedKind
from glora_server.coordinator.ports import UnitOfWork
from glora_server.rounds import round as machine
from glora_server.rounds.ids import RoundId
from glora_server.rounds.round import Effect, Round, RoundEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A round before and after a step; the durable effects are in the outbox already."""

    before: Round
    after: Round
    effects: tuple[Effect, ...]

    @property
    def owes(self) -> bool:
        """Something was put into the outbox."""
        return any(_durable(effect) for effect in self.effects)


def step(uow: UnitOfWork, round_id: RoundId, event: RoundEvent, *, at: float) -> Transition:
    """Advance the stored round by `event`; raises ILLEGAL_TRANSITION and changes nothing."""
    before = uow.rounds.get(round_id)
    after, effects = machine.advance(before, event, at=at)
    if after is before:
        return Transition(before=before, after=before, effects=())
    saved = uow.rounds.save(after)
    note_round(uow, before, saved)
    uow.outbox.add(owed for effect in effects if (owed := _owed(effect, saved, at)) is not None)
    return Transition(before=before, after=saved, effects=effects)


def _durable(effect: Effect) -> bool:
    return not isinstance(effect, machine.Wake)


def _owed(effect: Effect, round_: Round, at: float) -> Owed | None:
    match effect:
        case machine.Validate(assignment_id=assignment_id):
            return Owed(
                kind=OwedKind.VALIDATE,
                run_id=round_.run_id,
                round_id=round_.id,
                assignment_id=assignment_id,
                created_at=at,
            )
        case machine.Aggregate():
            return Owed(kind=OwedKind.AGGREGATE, run_id=round_.run_id, round_id=round_.id, created_at=at)
        case machine.Closed():
            return Owed(kind=OwedKind.CLOSED, run_id=round_.run_id, round_id=round_.id, created_at=at)
        case machine.Wake():
            return None
