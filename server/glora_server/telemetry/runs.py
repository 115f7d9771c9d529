"""Gauges with the name of a run: there while the run goes on, gone when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import Gauge

from glora_server.coordinator.model import MetricPhase
from glora_server.coordinator.quality import Quality, quality_of
from glora_server.coordinator.views_history import VersionScore
from glora_server.telemetry import names
from glora_server.telemetry.instruments import Instruments

MAX_RUNS: Final = 100
"""Runs with series of their own: with more, the newest."""
_NOTHING: Final = quality_of(())
_STATS: Final = {"mean": "mean", "least": "min", "largest": "max"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseScore:
    """What devices measured of a version, a mean by rows over devices and ranks."""

    phase: MetricPhase
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSample:
    """How a run stands; seconds as in the gauges of the same names."""

    name: str
    version_number: int
    wait_seconds: float
    overdue_seconds: float
    updates: int
    quorum: int
    quality: Quality | None
    """None: nothing was aggregated yet."""
    scores: tuple[PhaseScore, ...] = ()


class RunGauges:
    """Shows runs, and forgets those that are over."""

    def __init__(self, instruments: Instruments) -> None:
        gauge = instruments.gauge
        self._numbers: Final[dict[str, Gauge]] = {
            "version_number": gauge(names.RUN_VERSION),
            "wait_seconds": gauge(names.ROUND_WAIT_SECONDS),
            "overdue_seconds": gauge(names.ROUND_OVERDUE_SECONDS),
            "updates": gauge(names.ROUND_UPDATES),
            "quorum": gauge(names.ROUND_QUORUM),
        }
        self._qualities: Final[dict[str, Gauge]] = {
            "captured_energy": gauge(names.CAPTURED_ENERGY),
            "truncation_error": gauge(names.TRUNCATION_ERROR),
            "aggregation_bias": gauge(names.AGGREGATION_BIAS),
            "mean_norm": gauge(names.MEAN_NORM),
            "eigengap": gauge(names.EIGENGAP),
            "angle": gauge(names.PRINCIPAL_ANGLE),
            "coverage": gauge(names.COVERAGE),
            "consensus": gauge(names.CONSENSUS),
            "capture": gauge(names.CAPTURE),
            "influence": gauge(names.INFLUENCE),
            "effective_rank": gauge(names.EFFECTIVE_RANK),
        }
        self._loss = gauge(names.MODEL_LOSS)
        self._accuracy = gauge(names.MODEL_ACCURACY)
        self._shown: set[str] = set()

    def show(self, runs: Sequence[RunSample]) -> None:
        """Set the gauges of these runs (oldest first), and remove those of all others."""
        chosen = runs[-MAX_RUNS:]
        now = {run.name for run in chosen}
        for name in self._shown - now:
            self._remove(name)
        self._shown = now
        for run in chosen:
            self._show(run)

    def _show(self, run: RunSample) -> None:
        for name, gauge in self._numbers.items():
            gauge.labels(run=run.name).set(getattr(run, name))
        self._show_measured(run.name, run.quality or _NOTHING, run.scores)

    def _show_measured(self, name: str, quality: Quality, scores: Sequence[PhaseScore]) -> None:
        for measure, gauge in self._qualities.items():
            spread = getattr(quality, measure)
            for item, stat in _STATS.items():
                _put(gauge, (name, stat), getattr(spread, item))
        by_phase = {score.phase: score for score in scores}
        for phase in MetricPhase:
            score = by_phase.get(phase)
            _put(self._loss, (name, phase.value), score.loss if score else math.nan)
            _put(self._accuracy, (name, phase.value), score.accuracy if score else math.nan)

    def _remove(self, name: str) -> None:
        for gauge in self._numbers.values():
            gauge.remove(name)
        self._show_measured(name, _NOTHING, ())


def _put(gauge: Gauge, labels: tuple[str, str], value: float) -> None:
    """Set a series; one that would say NaN goes, so that alerts need not mind it and nothing old is taken for new."""
    if math.isnan(value):
        gauge.remove(*labels)
    else:
        gauge.labels(*labels).set(value)


def newest_scores(scores: Sequence[VersionScore]) -> tuple[PhaseScore, ...]:
    """Of the newest version among them, one for each phase in which it was measured."""
    newest = max((score.version_number for score in scores), default=0)
    return tuple(
        PhaseScore(phase=phase, loss=_mean(of_phase, "loss"), accuracy=_mean(of_phase, "accuracy"))
        for phase in MetricPhase
        if (of_phase := [item for item in scores if item.version_number == newest and item.phase is phase])
    )


def _mean(scores: Sequence[VersionScore], name: Literal["loss", "accuracy"]) -> float:
    rows = sum(score.rows for score in scores)
    return math.fsum(getattr(score, name) * score.rows for score in scores) / rows if rows else math.nan
