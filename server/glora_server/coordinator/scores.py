"""How good each version is, from what devices measured on their own rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from glora_server.coordinator.model import Measurement, MetricPhase
from glora_server.coordinator.views import RankScore
from glora_server.coordinator.views_history import Spread, VersionScore
from glora_server.rounds.ids import RunId


def version_scores(run_id: RunId, measurements: Iterable[Measurement]) -> tuple[VersionScore, ...]:
    """Means over devices weighted by rows, and how they spread; one per (version, phase, rank), in that order."""
    groups: dict[tuple[int, MetricPhase, int], list[Measurement]] = {}
    for item in measurements:
        groups.setdefault((item.version_number, item.phase, item.rank), []).append(item)
    return tuple(
        VersionScore(
            run_id=run_id,
            version_number=number,
            phase=phase,
            rank=rank,
            devices=len({item.device_id for item in items}),
            rows=sum(item.rows for item in items),
            accuracy=_mean([(item.accuracy, item.rows) for item in items]),
            loss=_mean([(item.loss, item.rows) for item in items]),
            accuracies=spread_of([item.accuracy for item in items]),
            losses=spread_of([item.loss for item in items]),
        )
        for (number, phase, rank), items in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1].value, g[0][2]))
    )


def rank_score(score: VersionScore) -> RankScore:
    """The same without the spreads."""
    return RankScore(
        version_number=score.version_number,
        rank=score.rank,
        phase=score.phase,
        accuracy=score.accuracy,
        loss=score.loss,
        rows=score.rows,
        devices=score.devices,
    )


def spread_of(values: Sequence[float]) -> Spread | None:
    """How the finite ones of the values lie, quartiles by linear interpolation; None when there is none."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return None
    return Spread(
        least=ordered[0],
        lower=quantile(ordered, 0.25),
        median=quantile(ordered, 0.5),
        upper=quantile(ordered, 0.75),
        greatest=ordered[-1],
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie, by linear interpolation; needs one value at least."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _mean(pairs: Sequence[tuple[float, int]]) -> float:
    """The mean of the finite values, weighted; NaN when there is none."""
    known = [(value, rows) for value, rows in pairs if math.isfinite(value)]
    total = sum(rows for _, rows in known)
    return math.fsum(value * rows for value, rows in known) / total if total else math.nan
