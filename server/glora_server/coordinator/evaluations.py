"""Gives versions to devices that evaluate.

A device that only evaluates gets every version, one after the other, the last one included. A device that also trains
measures what it receives in each round anyway; it gets the last version once the run is complete, so that nobody waits
for its measurements in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from glora_server.coordinator.model import Device, Profile, Run, Version, new_id
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.staffing import candidate, requirements
from glora_server.rounds.assignment import Assignment, AssignmentKind, Expire, advance
from glora_server.rounds.ids import AssignmentId
from glora_server.rounds.plan import refusal_for
from glora_server.rounds.run import RunPhase
from glora_wire.errors import Reason, Refusal


def next_evaluation(uow: UnitOfWork, device: Device, profile: Profile, *, at: float) -> Assignment | None:
    """A stored offer for the oldest version that the device has not evaluated yet; None when there is none."""
    if not profile.evaluates or profile.evaluation_rows < 1:
        return None
    for run in uow.runs.active():
        version = _unseen_version(uow, run, device, profile)
        if version is not None:
            assignment = _offer(run, version, device, at=at)
            uow.rounds.add_assignment(assignment)
            return assignment
    return None


def has_unseen_version(device: Device, profile: Profile) -> Callable[[UnitOfWork], bool]:
    """A question for the store: is there a version that the device could evaluate."""

    def ask(uow: UnitOfWork) -> bool:
        return any(_unseen_version(uow, run, device, profile) is not None for run in uow.runs.active())

    return ask


def without_pruned(open_: Sequence[Assignment], uow: UnitOfWork, *, at: float) -> list[Assignment]:
    """Those of the open assignments that can still be done; evaluations of versions that were dropped expire."""
    left = []
    for assignment in open_:
        version = uow.versions.get(assignment.version_id)
        if assignment.kind is AssignmentKind.EVALUATE and version.pruned:
            gone = Refusal(
                reason=Reason.VERSION_UNKNOWN, message=f"Version {version.number} was dropped before it was evaluated."
            )
            uow.rounds.save_assignment(advance(assignment, Expire(gone), at=at))
        else:
            left.append(assignment)
    return left


def _unseen_version(uow: UnitOfWork, run: Run, device: Device, profile: Profile) -> Version | None:
    if run.phase not in {RunPhase.ACTIVE, RunPhase.PAUSED, RunPhase.COMPLETED}:
        return None
    if profile.run_name and profile.run_name not in {run.name, run.id}:
        return None
    spec = RunSpec.from_json(run.spec_json)
    needs = replace(requirements(run, spec), tags=frozenset())
    if refusal_for(candidate(device, profile, None), needs) is not None:
        return None
    if profile.trains and profile.training_rows > 0:
        if run.phase is not RunPhase.COMPLETED or run.version_id is None:
            return None
        last = uow.versions.get(run.version_id)
        return None if uow.rounds.was_evaluated(device.id, last.id) else last
    return uow.lists.unseen_version(run.id, device.id)


def _offer(run: Run, version: Version, device: Device, *, at: float) -> Assignment:
    spec = RunSpec.from_json(run.spec_json)
    ranks = spec.evaluation_ranks
    return Assignment(
        id=AssignmentId(new_id(16)),
        run_id=run.id,
        round_id=None,
        device_id=device.id,
        kind=AssignmentKind.EVALUATE,
        rank=max(ranks),
        ranks=ranks,
        version_id=version.id,
        offered_at=at,
        deadline_at=at + spec.policy.longest_seconds,
    )
