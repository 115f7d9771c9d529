"""Turns stored devices and live presence into what planning works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from glora_server.coordinator.hub import Available
from glora_server.coordinator.model import Device, DeviceState, Profile, Run
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views_history import RosterEntry
from glora_server.rounds.ids import DeviceId
from glora_server.rounds.plan import Candidate, Requirements
from glora_wire.errors import Refusal


def requirements(run: Run, spec: RunSpec) -> Requirements:
    """What the run asks of every device."""
    return Requirements(
        run_name=run.name,
        fingerprint=run.manifest.base_model_fingerprint,
        task=run.manifest.task,
        max_rank=spec.lora.max_rank,
        min_rank=spec.policy.min_rank,
        tags=frozenset(spec.policy.tags),
    )


def candidate(device: Device | RosterEntry, profile: Profile, declined: Refusal | None) -> Candidate:
    """The device as planning sees it."""
    return Candidate(
        device_id=device.id,
        granted_rank=device.granted_rank,
        declared_rank=profile.max_rank,
        fingerprint=profile.fingerprint,
        task=profile.task,
        run_name=profile.run_name,
        tags=frozenset(device.tags),
        training_rows=profile.training_rows,
        evaluation_rows=profile.evaluation_rows,
        trains=profile.trains,
        evaluates=profile.evaluates,
        declined=declined,
    )


def candidates(uow: UnitOfWork, run: Run, available: Available) -> list[Candidate]:
    """Approved devices that would take work now (profile, and since when it says so) and may work for the run.

    A device that declined for good counts again once it was restarted with something new to say. One that shrank its
    rank in this run keeps the smaller one, though never less than the run's smallest.
    """
    declined = uow.rounds.declined_for(run.id)
    shrunk = uow.uploads.shrunk(run.id)
    smallest = RunSpec.from_json(run.spec_json).policy.min_rank
    found = []
    for device in uow.devices.all():
        present = available.get(device.id)
        if present is None or device.state is not DeviceState.APPROVED:
            continue
        profile, since = present
        if profile.run_name and profile.run_name not in {run.name, run.id}:
            continue
        there = candidate(device, profile, standing_refusal(declined, device.id, since))
        own = max(shrunk.get(device.id, device.granted_rank), smallest)
        found.append(replace(there, granted_rank=min(there.granted_rank, own)))
    return found


def standing_refusal(
    declined: Mapping[DeviceId, tuple[float, Refusal]], device_id: DeviceId, since: float | None
) -> Refusal | None:
    """What the device declined for good with, unless it was restarted with something new to say after that."""
    at, refusal = declined.get(device_id, (0.0, None))
    return refusal if since is None or at >= since else None
