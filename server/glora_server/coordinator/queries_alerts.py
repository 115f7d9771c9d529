"""What somebody should look at, as sentences that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from glora_server.coordinator.model import DeviceState, Run
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.queries_rounds import Present, eligible
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views import SystemView
from glora_server.coordinator.views_plots import Alert, Severity
from glora_server.coordinator.waiting import span
from glora_server.rounds.round import RoundPhase
from glora_server.rounds.run import RunPhase

_LOOK_BACK: Final = 3
"""Rounds in a row that have to fail before it is an alert."""
_DAY: Final = 86400.0
_OFTEN: Final = 3
"""Rejected updates of one device in a day."""
_NAMED: Final = 5
_LITTLE_SHARE: Final = 0.05
_LITTLE_BYTES: Final = 2 * 1024**3
_ORDER: Final = (Severity.CRITICAL, Severity.WARNING, Severity.INFO)
_AUTHORITY_DAYS: Final = 60


def alerts(uow: UnitOfWork, present: Present, system: SystemView) -> tuple[Alert, ...]:
    """Everything that is wrong now, the worst first."""
    found = [*_server(system), *_devices(uow, present, system.renewal_overdue_seconds)]
    for run in uow.runs.active():
        if run.phase is RunPhase.ACTIVE:
            found += _run(uow, present, run)
        elif run.phase is RunPhase.FAILED:
            found.append(_alert(Severity.CRITICAL, "run_failed", f"Run {run.name} failed: {run.message}", run.name))
    return tuple(sorted(found, key=lambda alert: _ORDER.index(alert.severity)))


def _server(system: SystemView) -> Iterator[Alert]:
    free, whole = system.free_disk_bytes, system.disk_bytes
    if free < _LITTLE_BYTES or (whole and free < _LITTLE_SHARE * whole):
        severity = Severity.CRITICAL if free < _LITTLE_BYTES // 4 else Severity.WARNING
        message = f"The data folder's disk has {free / 1024**3:.1f} GiB left; make room, or lower retention."
        yield _alert(severity, "disk_low", message)
    left = system.authority_expires_at - system.now
    if left < _AUTHORITY_DAYS * _DAY:
        message = f"The authority's certificate expires in {span(left)}; devices cannot connect after that."
        yield _alert(Severity.CRITICAL if left < 7 * _DAY else Severity.WARNING, "authority_expires", message)
    if not system.worker_device and system.now - system.started_at > 60:
        message = "The worker that computes is not running: no round can be aggregated; the server's log says why."
        yield _alert(Severity.CRITICAL, "worker_down", message)
    if system.worker_restarts:
        message = f"The worker that computes was started again {system.worker_restarts} times; see the server's log."
        yield _alert(Severity.WARNING, "worker_restarts", message)


def _devices(uow: UnitOfWork, present: Present, overdue_seconds: float) -> Iterator[Alert]:
    pending = sorted(entry.name for entry in present.entries.values() if entry.state is DeviceState.PENDING)
    if pending:
        verb = "waits" if len(pending) == 1 else "wait"
        yield _alert(Severity.INFO, "devices_pending", f"{_listed(pending)} {verb} for approval.")
    soon = present.now + overdue_seconds
    old = sorted(
        entry.name
        for entry in present.entries.values()
        if entry.certificate_expires_at < soon and entry.state is DeviceState.APPROVED
    )
    if old:
        which, these = ("certificate", "this device") if len(old) == 1 else ("certificates", "these devices")
        verb = "expires" if len(old) == 1 else "expire"
        message = f"The {which} of {_listed(old)} {verb} within {span(overdue_seconds)}: start {these} once."
        yield _alert(Severity.WARNING, "certificates_expire", message)
    rejected = uow.history.rejections(present.now - _DAY, _NAMED)
    names = present.names(uow, rejected)
    for device_id, number in rejected.items():
        if number >= _OFTEN:
            name = names.get(device_id, device_id)
            message = f"{number} updates of {name} were rejected within a day; its history says why."
            yield _alert(Severity.WARNING, "device_rejected", message, name)


def _run(uow: UnitOfWork, present: Present, run: Run) -> Iterator[Alert]:
    ended = [
        item
        for item in uow.lists.last_rounds([run.id], _LOOK_BACK + 1)
        if item.phase in {RoundPhase.FAILED, RoundPhase.COMMITTED}
    ][:_LOOK_BACK]
    failed = [item for item in ended if item.phase is RoundPhase.FAILED]
    if failed and len(failed) == len(ended):
        times = "its last attempt at a round" if len(failed) == 1 else f"its last {len(failed)} attempts at a round"
        severity = Severity.CRITICAL if len(failed) == _LOOK_BACK else Severity.WARNING
        yield _alert(severity, "rounds_failing", f"Run {run.name} lost {times}: {failed[0].message}", run.name)
    fit, online = eligible(uow, present, run, RunSpec.from_json(run.spec_json))
    if online == 0:
        message = (
            f"Run {run.name} has no device: none is enrolled that fits it; make a join token."
            if fit == 0
            else f"Run {run.name} waits: none of its {fit} devices is online."
            if fit > 1
            else f"Run {run.name} waits: its only device is not online."
        )
        yield _alert(Severity.WARNING, "no_devices", message, run.name)


def _listed(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if len(names) <= _NAMED:
        return f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"


def _alert(severity: Severity, code: str, message: str, target: str = "") -> Alert:
    return Alert(severity=severity, code=code, message=message, target=target)
