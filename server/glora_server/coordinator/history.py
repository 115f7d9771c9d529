"""What is remembered when a round ends and when a version is published, in the transaction that ends or publishes it.

Pages show these few numbers; nobody reads a thousand rounds with a thousand assignments each to draw a curve.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from glora_server.coordinator.model import Upload
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.quality import Values, consensus_of, effective_rank
from glora_server.coordinator.scores import spread_of
from glora_server.coordinator.views_history import (
    Contribution,
    ModuleFigures,
    Outcome,
    RoundFigures,
    Spread,
    Stage,
    VersionFigures,
)
from glora_server.rounds.assignment import Assignment, AssignmentPhase
from glora_server.rounds.ids import DeviceId, VersionId
from glora_server.rounds.round import LIVE, Round
from glora_wire.errors import Reason

SPECTRUM: Final = 16
"""Eigenvalues that are remembered of each module."""
OUTLIER_DEVIATION: Final = 3.5
"""Robust standard deviations below the median (Iglewicz and Hoaglin, 1993)."""
OUTLIER_DISTANCE: Final = 0.05
"""And at least so far below it: devices that agree to the third digit have no outliers."""
_FEW: Final = 4
"""With fewer devices there is no majority to be an outlier of."""
_MAD_TO_SIGMA: Final = 1.4826
_ENDS: Final = {
    AssignmentPhase.ACCEPTED_UPDATE: Outcome.ACCEPTED,
    AssignmentPhase.REJECTED: Outcome.REJECTED,
    AssignmentPhase.DECLINED: Outcome.DECLINED,
    AssignmentPhase.FAILED: Outcome.FAILED,
    AssignmentPhase.EXPIRED: Outcome.EXPIRED,
}
_MARKS: Final = ("offered_at", "accepted_at", "delivered_at", "upload_started_at", "received_at")
_STAGES: Final = (Stage.ACCEPTING, Stage.DOWNLOADING, Stage.TRAINING, Stage.UPLOADING)


def note_round(uow: UnitOfWork, before: Round, after: Round) -> None:
    """Remember what a step of a round ended: devices' parts in it, and the round itself."""
    was = {item.id: item for item in before.assignments}
    ended = [
        (item.device_id, outcome)
        for item in after.assignments
        if (item.id not in was or was[item.id].is_open) and (outcome := outcome_of(item)) is not None
    ]
    uow.history.count_outcomes(ended)
    if before.phase in LIVE and after.phase not in LIVE:
        uow.history.put_round(round_figures(after, uow.history.norms(after.id)))
        uow.history.rescore(after.run_id, uow.versions.get(after.version_id).number)


def note_version(
    uow: UnitOfWork,
    round_: Round,
    uploads: Sequence[Upload],
    shares: Sequence[float],
    measured: Mapping[str, Values],
    *,
    at: float,
) -> None:
    """Remember what a version looks like and who made it; `measured` is what aggregation told, by module."""
    version_id = VersionId(round_.id)
    modules = tuple(module_figures(name, values) for name, values in sorted(measured.items()))
    uow.history.put_version(
        VersionFigures(version_id=version_id, run_id=round_.run_id, number=round_.number, modules=modules)
    )
    agreed = agreement(measured.values())
    made = [
        Contribution(
            version_id=version_id,
            run_id=round_.run_id,
            number=round_.number,
            device_id=upload.device_id,
            at=at,
            share=share,
            rows=upload.training_rows,
            update_norm=upload.update_norm if _finite(upload.update_norm) is not None else None,
            capture=agreed.get(upload.device_id, (None, None))[0],
            cosine=agreed.get(upload.device_id, (None, None))[1],
            deviation=None,
            outlier=False,
        )
        for upload, share in zip(uploads, shares, strict=True)
    ]
    uow.history.put_contributions(with_outliers(made))


def outcome_of(assignment: Assignment) -> Outcome | None:
    """How the device's part in the round ended; None while it is open, and for evaluations."""
    if assignment.phase is AssignmentPhase.EXPIRED and assignment.reason is not Reason.DEADLINE_PASSED:
        return Outcome.NOT_NEEDED
    return _ENDS.get(assignment.phase)


def round_figures(round_: Round, norms: Sequence[float]) -> RoundFigures:
    """What a round that is over came to; `norms` of its accepted updates."""
    closed = round_.closed_at or round_.created_at
    last_word = max((item.closed_at for item in round_.assignments if item.closed_at is not None), default=closed)
    outcomes = Counter(outcome for item in round_.assignments if (outcome := outcome_of(item)) is not None)
    return RoundFigures(
        round_id=round_.id,
        run_id=round_.run_id,
        number=round_.number,
        attempt=round_.attempt,
        phase=round_.phase,
        outcomes=dict(outcomes),
        bytes_down=sum(item.bytes_down for item in round_.assignments),
        bytes_up=sum(item.bytes_up for item in round_.assignments),
        seconds=0.0 if round_.opened_at is None else max(0.0, closed - round_.opened_at),
        aggregating_seconds=max(0.0, closed - last_word),
        stages=_stages(round_.assignments),
        update_norms=spread_of(norms),
    )


def _stages(assignments: Iterable[Assignment]) -> dict[Stage, Spread]:
    seconds: dict[Stage, list[float]] = {stage: [] for stage in Stage}
    for item in assignments:
        for stage, spent in stage_seconds(item).items():
            seconds[stage].append(spent)
    return {stage: spread for stage, values in seconds.items() if (spread := spread_of(values)) is not None}


def stage_seconds(assignment: Assignment) -> dict[Stage, float]:
    """Seconds of the stages that the device went through; one that it skipped is absent."""
    marks = [getattr(assignment, name) for name in _MARKS]
    spent = {}
    for stage, begun, ended in zip(_STAGES, marks, marks[1:], strict=False):
        if begun is not None and ended is not None:
            spent[stage] = max(0.0, ended - begun)
    if assignment.received_at is not None and assignment.closed_at is not None:
        spent[Stage.JUDGING] = max(0.0, assignment.closed_at - assignment.received_at)
    return spent


def module_figures(name: str, values: Values) -> ModuleFigures:
    """One module in few numbers; `values` are its diagnostics."""
    stored = values.get("eigenvalues")
    known = [_finite(value) or 0.0 for value in stored] if isinstance(stored, list) else []
    eigenvalues = [max(0.0, value) for value in known]
    total = math.fsum(eigenvalues)
    shares = [value / total for value in eigenvalues] if total > 0 else []
    return ModuleFigures(
        module=name,
        spectrum=tuple(round(share, 6) for share in shares[:SPECTRUM]),
        captured_energy=_finite(values.get("captured_energy")),
        truncation_error=_finite(values.get("truncation_error")),
        mean_norm=_finite(values.get("mean_norm")),
        effective_rank=_finite(effective_rank(eigenvalues)),
        consensus=_finite(consensus_of(values)),
    )


def agreement(modules: Iterable[Values]) -> dict[DeviceId, tuple[float | None, float | None]]:
    """Capture and cosine of each device, as means over modules weighted with its squared update norm there."""
    sums: dict[DeviceId, list[tuple[float, float, float]]] = {}
    for values in modules:
        clients = values.get("clients")
        for client in clients if isinstance(clients, list) else ():
            norm, capture, cosine = (_finite(client.get(key)) for key in ("update_norm", "capture", "cosine"))
            if norm is not None and capture is not None and cosine is not None:
                sums.setdefault(DeviceId(str(client.get("device_id"))), []).append((norm * norm, capture, cosine))
    return {device_id: _weighted(entries) for device_id, entries in sums.items()}


def _weighted(entries: Sequence[tuple[float, float, float]]) -> tuple[float | None, float | None]:
    total = math.fsum(weight for weight, _, _ in entries)
    if total <= 0:  # an update of nothing agrees and disagrees with nobody
        return None, None
    capture = math.fsum(weight * value for weight, value, _ in entries) / total
    return capture, math.fsum(weight * value for weight, _, value in entries) / total


def with_outliers(made: Sequence[Contribution]) -> list[Contribution]:
    """The same with how far each lies below the others; see Contribution."""
    below = [_below(made, lambda c: c.capture), _below(made, lambda c: c.cosine)]
    marked = []
    for place, item in enumerate(made):
        found = [column[place] for column in below if column[place] is not None]
        if not found:
            marked.append(item)
            continue
        deviation, distance = max(pair for pair in found if pair is not None)
        outlier = deviation >= OUTLIER_DEVIATION and distance >= OUTLIER_DISTANCE
        marked.append(replace(item, deviation=deviation, outlier=outlier))
    return marked


def _below(
    made: Sequence[Contribution], value_of: Callable[[Contribution], float | None]
) -> list[tuple[float, float] | None]:
    """How far each value lies below the median: in robust standard deviations, and as it is."""
    known = [value for item in made if (value := value_of(item)) is not None]
    if len(known) < _FEW:
        return [None] * len(made)
    middle = statistics.median(known)
    # Where more than half are equal the deviation is 0; a thousandth stands for what measuring cannot tell apart.
    sigma = max(_MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in known), 1e-3)
    return [None if (value := value_of(item)) is None else ((middle - value) / sigma, middle - value) for item in made]


def _finite(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
