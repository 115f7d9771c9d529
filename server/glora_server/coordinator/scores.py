"""How good each version is, from what devices measured on their own rows."""

from __future__ import annotations

from collections.abc import Iterable

from glora_server.coordinator.model import Measurement, MetricPhase
from glora_server.coordinator.views import RankScore


def rank_scores(measurements: Iterable[Measurement]) -> tuple[RankScore, ...]:
    """Means over devices weighted by rows, one per (version, phase, rank), in that order."""
    groups: dict[tuple[int, MetricPhase, int], list[Measurement]] = {}
    for item in measurements:
        groups.setdefault((item.version_number, item.phase, item.rank), []).append(item)
    return tuple(
        _score(number, phase, rank, items)
        for (number, phase, rank), items in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1].value, g[0][2]))
    )


def _score(number: int, phase: MetricPhase, rank: int, items: list[Measurement]) -> RankScore:
    rows = sum(item.rows for item in items)
    return RankScore(
        version_number=number,
        rank=rank,
        phase=phase,
        accuracy=sum(item.accuracy * item.rows for item in items) / rows,
        loss=sum(item.loss * item.rows for item in items) / rows,
        rows=rows,
        devices=len({item.device_id for item in items}),
    )
