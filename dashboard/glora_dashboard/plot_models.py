"""Answers of the REST API that plots and tables of a run are drawn from, and alerts; times in Unix seconds."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from glora_dashboard.device_models import ContributionAnswer
from glora_dashboard.models import Answer, VersionAnswer
from glora_server.coordinator.views_history import RoundFigures, VersionScore
from glora_server.coordinator.views_plots import Alert, Ancestor, Exportable, RunSeries, SpectrumMap
from glora_server.rounds.ids import DeviceId


class SpreadAnswer(Answer):
    """How numbers of several devices lie: the least, the quartiles, the greatest."""

    least: float
    lower: float
    median: float
    upper: float
    greatest: float


class VersionScoreAnswer(Answer):
    """What devices measured of one version at one rank; means are weighted with rows."""

    version_number: int
    phase: str
    rank: int
    devices: int
    rows: int
    accuracy: float | None
    loss: float | None
    accuracies: SpreadAnswer | None = Field(description="Over devices; null while the version is being measured.")
    losses: SpreadAnswer | None

    @classmethod
    def of(cls, score: VersionScore) -> Self:
        """The answer for a record."""
        return cls.model_validate(score)


class QualityAnswer(VersionScoreAnswer):
    """The same as a point of a plot."""

    largest: bool = Field(description="The largest rank that was measured: what people mean by the accuracy.")


class VersionPointAnswer(Answer):
    """Means over the modules of one version."""

    number: int
    captured_energy: float | None
    truncation_error: float | None
    mean_norm: float | None
    eigengap: float | None


class RoundFiguresAnswer(Answer):
    """What one attempt at a round came to."""

    number: int
    attempt: int
    phase: str
    outcomes: dict[str, int]
    bytes_down: int
    bytes_up: int
    seconds: float
    aggregating_seconds: float
    stages: dict[str, SpreadAnswer] = Field(description="Seconds of the devices that went through each stage.")
    update_norms: SpreadAnswer | None

    @classmethod
    def of(cls, figures: RoundFigures) -> Self:
        """The answer for a record."""
        return cls(
            number=figures.number,
            attempt=figures.attempt,
            phase=figures.phase.value,
            outcomes={outcome.value: number for outcome, number in figures.outcomes.items()},
            bytes_down=figures.bytes_down,
            bytes_up=figures.bytes_up,
            seconds=figures.seconds,
            aggregating_seconds=figures.aggregating_seconds,
            stages={stage.value: SpreadAnswer.model_validate(spread) for stage, spread in figures.stages.items()},
            update_norms=None if figures.update_norms is None else SpreadAnswer.model_validate(figures.update_norms),
        )


class SeriesAnswer(Answer):
    """What is plotted over the rounds of a run, oldest first."""

    step: int = Field(description="Every step-th version is here, and the newest; there are at most 500.")
    quality: list[QualityAnswer]
    versions: list[VersionPointAnswer]
    rounds: list[RoundFiguresAnswer]

    @classmethod
    def of(cls, series: RunSeries) -> Self:
        """The answer for a view."""
        return cls(
            step=series.step,
            quality=[
                QualityAnswer(**VersionScoreAnswer.of(point.score).model_dump(), largest=point.largest)
                for point in series.quality
            ],
            versions=[VersionPointAnswer.model_validate(point) for point in series.versions],
            rounds=[RoundFiguresAnswer.of(figures) for figures in series.rounds],
        )


class SpectrumCellAnswer(Answer):
    """The consensus spectrum of one module after one round; `module` and `number` are places in the lists."""

    module: int
    number: int
    shares: list[float] = Field(description="The largest eigenvalues as shares of all that were kept.")
    effective_rank: float | None = Field(
        description="exp of the entropy of the shares: how many directions devices agree on. (The metric "
        "glora_effective_rank is of the state's singular values.)"
    )
    consensus: float | None = Field(description="Mean cosine between a device's change and the mean change.")
    captured_energy: float | None


class SpectrumAnswer(Answer):
    """A heat map of modules by rounds, at most 100 by 60."""

    modules: list[str]
    numbers: list[int]
    cells: list[SpectrumCellAnswer]
    modules_left_out: int

    @classmethod
    def of(cls, spectrum: SpectrumMap) -> Self:
        """The answer for a view."""
        return cls.model_validate(spectrum)


class AncestorAnswer(Answer):
    """A version and the devices that made it."""

    version: VersionAnswer
    parent_number: int | None
    contributors: int
    largest: list[ContributionAnswer] = Field(description="The five largest shares.")

    @classmethod
    def of(cls, ancestor: Ancestor, *, run: str, names: dict[DeviceId, str]) -> Self:
        """The answer for a view."""
        return cls(
            version=VersionAnswer.of(ancestor.version),
            parent_number=ancestor.parent_number,
            contributors=ancestor.contributors,
            largest=[
                ContributionAnswer.of(item, run=run, device=names.get(item.device_id, item.device_id))
                for item in ancestor.largest
            ],
        )


class ExportableAnswer(Answer):
    """A version that can be exported, and how good it is at each rank that was measured."""

    version: VersionAnswer
    max_rank: int
    scores: list[VersionScoreAnswer]

    @classmethod
    def of(cls, exportable: Exportable) -> Self:
        """The answer for a view."""
        return cls(
            version=VersionAnswer.of(exportable.version),
            max_rank=exportable.max_rank,
            scores=[VersionScoreAnswer.of(score) for score in exportable.scores],
        )


class AlertAnswer(Answer):
    """Something that somebody should look at."""

    severity: str = Field(description="info, warning or critical.")
    code: str = Field(description="Stable name, for scripts.")
    message: str
    target: str = Field(description="Name of the run or device; empty: the server.")

    @classmethod
    def of(cls, alert: Alert) -> Self:
        """The answer for a record."""
        return cls.model_validate(alert)
