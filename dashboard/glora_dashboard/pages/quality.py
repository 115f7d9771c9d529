"""How good a run is, in one number a version."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glora_server.coordinator.model import MetricPhase
from glora_server.coordinator.views import RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Accuracy of one version at the largest rank that was measured."""

    version_number: int
    accuracy: float


def best_by_version(view: RunView) -> Sequence[Quality]:
    """Of each of the newest versions, oldest first; never what devices measured after their own training."""
    best: dict[int, tuple[int, float]] = {}
    for score in view.scores:
        known = best.get(score.version_number, (0, 0.0))
        if score.phase is not MetricPhase.AFTER and math.isfinite(score.accuracy) and score.rank >= known[0]:
            best[score.version_number] = (score.rank, score.accuracy)
    return [Quality(version_number=number, accuracy=value) for number, (_, value) in sorted(best.items())]


def newest_words(points: Sequence[Quality], newest: int | None) -> str:
    """Of which version the last accuracy is, where that is not the newest one, and how much was gained."""
    return ", ".join(filter(None, (late_words(points, newest), gain_words(points))))


def late_words(points: Sequence[Quality], newest: int | None) -> str:
    """The version that the last accuracy is of, where that is not the newest one; else empty."""
    late = bool(points) and points[-1].version_number != newest
    return f"version {points[-1].version_number:,}" if late else ""


def gain_words(points: Sequence[Quality]) -> str:
    """ "+12.1 points since the start", or since the oldest version that is known here; empty below two versions."""
    if len(points) < 2:
        return ""
    since = "the start" if points[0].version_number == 0 else f"version {points[0].version_number:,}"
    return f"{100 * (points[-1].accuracy - points[0].accuracy):+.1f} points since {since}"
