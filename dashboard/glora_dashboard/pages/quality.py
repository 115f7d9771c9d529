"""How good a run is, in one number a version."""

from __future__ import annotations

import math
from collections.abc import Sequence

from glora_server.coordinator.model import MetricPhase
from glora_server.coordinator.views import RunView


def best_by_version(view: RunView) -> Sequence[float]:
    """Accuracy at the largest rank that was measured, version by version; before devices trained on it."""
    best: dict[int, tuple[int, float]] = {}
    for score in view.scores:
        known = best.get(score.version_number, (0, 0.0))
        if score.phase is not MetricPhase.AFTER and math.isfinite(score.accuracy) and score.rank >= known[0]:
            best[score.version_number] = (score.rank, score.accuracy)
    return [accuracy for _, (_, accuracy) in sorted(best.items())]
