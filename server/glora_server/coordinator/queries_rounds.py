"""Rounds and runs as pages show them; what is read is bounded, however many devices and rounds there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import DeviceState, Listing, Page, Run
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.scores import rank_score
from glora_server.coordinator.staffing import candidate, requirements, standing_refusal
from glora_server.coordinator.views import AssignmentView, RankScore, RoundView, RunView
from glora_server.coordinator.views_history import Outcome, RosterEntry
from glora_server.coordinator.waiting import why_it_waits
from glora_server.rounds.assignment import Assignment, AssignmentPhase
from glora_server.rounds.ids import DeviceId, RoundId, RunId
from glora_server.rounds.plan import training_refusal
from glora_server.rounds.round import LIVE, Round
from glora_server.rounds.run import RunPhase

SHOWN_ASSIGNMENTS: Final = 200
"""Assignments that a round carries by itself; the rest comes in pages."""
SHOWN_EVALUATIONS: Final = 100
SCORED_VERSIONS: Final = 50
"""Versions whose scores a run carries by itself."""
SCORED_IN_LISTS: Final = 20
"""The same for a run in a list."""
_ENDED: Final = frozenset({RunPhase.COMPLETED, RunPhase.FAILED, RunPhase.ABORTED})
_PHASES: Final = {
    Outcome.ACCEPTED: AssignmentPhase.ACCEPTED_UPDATE,
    Outcome.REJECTED: AssignmentPhase.REJECTED,
    Outcome.DECLINED: AssignmentPhase.DECLINED,
    Outcome.FAILED: AssignmentPhase.FAILED,
    Outcome.EXPIRED: AssignmentPhase.EXPIRED,
    Outcome.NOT_NEEDED: AssignmentPhase.EXPIRED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """What is known beside the database at the moment of a question."""

    hub: Hub
    now: float
    entries: Mapping[DeviceId, RosterEntry]

    def names(self, uow: UnitOfWork, ids: Iterable[DeviceId]) -> Mapping[DeviceId, str]:
        """Names of these devices; the revoked ones are asked for."""
        wanted = set(ids)
        names = {id_: self.entries[id_].name for id_ in wanted if id_ in self.entries}
        missing = wanted - names.keys()
        names |= {id_: device.name for id_, device in uow.lists.devices(missing).items()}
        return names

    def assignment_views(self, uow: UnitOfWork, assignments: Iterable[Assignment]) -> tuple[AssignmentView, ...]:
        """The assignments with names and what their devices are doing."""
        listed = tuple(assignments)
        names = self.names(uow, (item.device_id for item in listed))
        return tuple(self._view(item, names.get(item.device_id, item.device_id)) for item in listed)

    def _view(self, assignment: Assignment, name: str) -> AssignmentView:
        traffic = self.hub.traffic_of(assignment.id)
        return AssignmentView(
            assignment=assignment,
            device_name=name,
            progress=self.hub.progress.get(assignment.id) if assignment.is_open else None,
            bytes_down=max(traffic.down, assignment.bytes_down),
            bytes_up=max(traffic.up, assignment.bytes_up),
        )


def round_views(uow: UnitOfWork, present: Present, rounds: Iterable[Round]) -> tuple[RoundView, ...]:
    """Rounds without their assignments, with how many there are in each phase."""
    listed = tuple(rounds)
    counts = _counts(uow, listed)
    return tuple(
        RoundView(round=item, assignments=(), counts=counts[item.id], seconds=_seconds(item, present.now))
        for item in listed
    )


def round_view(uow: UnitOfWork, present: Present, round_: Round) -> RoundView:
    """A round with the assignments that say most: those that are open, then the first ones."""
    plain = round_views(uow, present, (round_,))[0]
    shown = uow.lists.open_assignments(round_.id, SHOWN_ASSIGNMENTS) if round_.phase in LIVE else ()
    if len(shown) < min(SHOWN_ASSIGNMENTS, plain.devices):
        known = {item.id for item in shown}
        first = uow.lists.assignments(round_.id, Page(size=SHOWN_ASSIGNMENTS)).items
        shown += tuple(item for item in first if item.id not in known)[: SHOWN_ASSIGNMENTS - len(shown)]
    whole = replace(round_, assignments=shown)
    return replace(plain, round=whole, assignments=present.assignment_views(uow, shown))


def assignments(uow: UnitOfWork, present: Present, round_id: RoundId, page: Page) -> Listing[AssignmentView]:
    """A part of a round's assignments, in their order."""
    found = uow.lists.assignments(round_id, page)
    return Listing(items=present.assignment_views(uow, found.items), next_token=found.next_token)


def run_view(uow: UnitOfWork, present: Present, run: Run) -> RunView:
    """A run with its newest round and the devices in it."""
    newest = uow.lists.newest_round(run.id)
    round_ = None if newest is None else round_view(uow, present, newest)
    evaluations = uow.lists.open_evaluations(run.id, SHOWN_EVALUATIONS)
    view = _run(uow, present, run, round_, SCORED_VERSIONS)
    return replace(_staffed(uow, present, view), evaluations=present.assignment_views(uow, evaluations))


def run_line(uow: UnitOfWork, present: Present, run: Run) -> RunView:
    """A run for a list: its round without devices, but for the few that are named in what it waits for."""
    newest = uow.lists.newest_round(run.id)
    round_ = None
    if newest is not None:
        plain = round_views(uow, present, (newest,))[0]
        shown = uow.lists.open_assignments(newest.id, 3) if newest.phase in LIVE else ()
        whole = replace(newest, assignments=shown)
        round_ = replace(plain, round=whole, assignments=present.assignment_views(uow, shown))
    view = _run(uow, present, run, round_, SCORED_IN_LISTS)
    return view if run.phase in _ENDED else _staffed(uow, present, view)


def _run(uow: UnitOfWork, present: Present, run: Run, round_: RoundView | None, scored: int) -> RunView:
    spec = RunSpec.from_json(run.spec_json)
    number = uow.versions.get(run.version_id).number if run.version_id else None
    waiting = why_it_waits(run, spec, round_, present.hub.waiting.get(run.id, ""), now=present.now)
    return RunView(
        run=run,
        spec=spec,
        round=round_,
        waiting=waiting,
        version_number=number,
        scores=scores(uow, run.id, number, scored),
        revision=present.hub.signals.revision(("run", run.id)),
    )


def _staffed(uow: UnitOfWork, present: Present, view: RunView) -> RunView:
    fit, online = eligible(uow, present, view.run, view.spec)
    return replace(view, eligible_devices=fit, online_devices=online)


def scores(uow: UnitOfWork, run_id: RunId, newest: int | None, most: int = SCORED_VERSIONS) -> tuple[RankScore, ...]:
    """How good the newest versions are; of the newest itself what has come in so far."""
    if newest is None:
        return ()
    known = uow.history.scores(run_id, range(max(0, newest - most + 1), newest))
    return tuple(rank_score(score) for score in (*known, *uow.history.fresh_scores(run_id, newest)))


def eligible(uow: UnitOfWork, present: Present, run: Run, spec: RunSpec) -> tuple[int, int]:
    """How many devices may train in the run, and how many of them are there."""
    needs, declined = requirements(run, spec), uow.rounds.declined_for(run.id)
    hub = present.hub
    fit = [
        entry
        for entry in present.entries.values()
        if entry.state is DeviceState.APPROVED
        and training_refusal(
            candidate(entry, entry.profile, standing_refusal(declined, entry.id, hub.since(entry.id))), needs
        )
        is None
    ]
    return len(fit), sum(hub.is_online(entry.id, present.now) for entry in fit)


def _counts(uow: UnitOfWork, rounds: tuple[Round, ...]) -> Mapping[RoundId, Mapping[AssignmentPhase, int]]:
    """Phases by round: remembered of those that are over, counted of the others."""
    over = uow.history.figures_of([item.id for item in rounds if item.phase not in LIVE])
    counted = uow.lists.phases([item.id for item in rounds if item.id not in over])
    found: dict[RoundId, Mapping[AssignmentPhase, int]] = dict(counted)
    for round_id, figures in over.items():
        phases: dict[AssignmentPhase, int] = {}
        for outcome, number in figures.outcomes.items():
            phases[_PHASES[outcome]] = phases.get(_PHASES[outcome], 0) + number
        found[round_id] = phases
    return found


def _seconds(round_: Round, now: float) -> float | None:
    return None if round_.opened_at is None else (round_.closed_at or now) - round_.opened_at
