"""Says in a sentence why a run does not go on at this moment."""

from __future__ import annotations

from glora_server.coordinator.model import Run
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views import AssignmentView, RoundView
from glora_server.rounds.assignment import OPEN
from glora_server.rounds.round import GATHERING, RoundPhase
from glora_server.rounds.run import RunPhase

_SHOWN = 3


def why_it_waits(run: Run, spec: RunSpec, view: RoundView | None, planning: str, *, now: float) -> str:
    """For people; empty when there is nothing to wait for. `planning` is what opening the next round waits for."""
    match run.phase:
        case RunPhase.CREATED:
            return f"The run is not started: glora run start {run.name}"
        case RunPhase.PAUSED if view is None or view.round.phase not in GATHERING:
            return f"The run is paused after {run.rounds_done} of {spec.policy.rounds} rounds."
        case RunPhase.COMPLETED | RunPhase.FAILED | RunPhase.ABORTED:
            return run.message
        case _:
            return _active(view, planning, now)


def _active(view: RoundView | None, planning: str, now: float) -> str:
    if view is None or view.round.phase is RoundPhase.PLANNED:
        return planning or "The next round is being planned."
    if view.round.phase in GATHERING:
        return _gathering(view, now)
    if view.round.phase is RoundPhase.AGGREGATING:
        return f"{view.accepted} {'update is' if view.accepted == 1 else 'updates are'} being aggregated."
    return planning


def _gathering(view: RoundView, now: float) -> str:
    round_ = view.round
    wanted = round_.target or view.devices
    parts = [f"{view.accepted} of {wanted} updates are in (at least {round_.policy.quorum} needed)"]
    busy = [_doing(item) for item in view.assignments if item.assignment.is_open]
    if busy:
        left = sum(number for phase, number in view.counts.items() if phase in OPEN) - min(len(busy), _SHOWN)
        parts.append(", ".join(busy[:_SHOWN]) + (f" and {left} more" if left > 0 else ""))
    if round_.deadline_at is not None:
        parts.append(f"deadline in {span(round_.deadline_at - now)}")
    return "; ".join(parts) + "."


def _doing(view: AssignmentView) -> str:
    progress = view.progress
    if progress is None:
        return f"{view.device_name} {view.assignment.phase.value}"
    share = f" {100 * progress.done // progress.total} %" if progress.total else ""
    return f"{view.device_name} {progress.phase}{share}"


def span(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 0:
        return "no time"
    for size, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
