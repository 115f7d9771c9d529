"""Tells a device why it gets no work, run by run."""

from __future__ import annotations

from glora_server.coordinator.messages import NoticeRecord
from glora_server.coordinator.model import Device, Profile, Run
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.staffing import candidate, requirements, standing_refusal
from glora_server.rounds.plan import refusal_for, training_refusal
from glora_server.rounds.run import RunPhase
from glora_wire.errors import Reason, Refusal

_PHASES = {
    RunPhase.PAUSED: (Reason.RUN_PAUSED, "is paused"),
    RunPhase.COMPLETED: (Reason.RUN_COMPLETED, "is complete"),
    RunPhase.FAILED: (Reason.RUN_FAILED, "has failed"),
    RunPhase.ABORTED: (Reason.RUN_ABORTED, "was aborted"),
}


def notices_for(device: Device, profile: Profile, since: float | None, uow: UnitOfWork) -> tuple[NoticeRecord, ...]:
    """Why the device gets no work, run by run."""
    notices = []
    for run in uow.runs.active():
        if profile.run_name and profile.run_name not in {run.name, run.id}:
            continue
        refusal = _notice(uow, run, device, profile, since)
        if refusal is not None:
            notices.append(NoticeRecord(run_name=run.name, reason=refusal.reason, message=refusal.message))
    return tuple(notices)


def _notice(uow: UnitOfWork, run: Run, device: Device, profile: Profile, since: float | None) -> Refusal | None:
    if run.phase in _PHASES:
        reason, what = _PHASES[run.phase]
        return Refusal(reason=reason, message=f"Run {run.name} {what}.{f' {run.message}' if run.message else ''}")
    spec = RunSpec.from_json(run.spec_json)
    there = candidate(device, profile, standing_refusal(uow.rounds.declined_for(run.id), device.id, since))
    needs = requirements(run, spec)
    return refusal_for(there, needs) if profile.evaluates and not profile.trains else training_refusal(there, needs)
