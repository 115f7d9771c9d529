"""What plots and tables of a run are drawn from, and the alerts; bounded whatever the length of the run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from glora_server.coordinator.model import Version
from glora_server.coordinator.views_history import Contribution, RoundFigures, VersionScore


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityPoint:
    """How good one version is at one rank, and how that spreads over devices."""

    score: VersionScore
    largest: bool
    """This is the largest rank that was measured for the version: what people mean by "the" accuracy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPoint:
    """Means over the modules of one version; None where nothing was measured."""

    number: int
    captured_energy: float | None
    truncation_error: float | None
    mean_norm: float | None
    eigengap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeries:
    """Everything about a run that is plotted over its rounds, oldest first; at most 500 version numbers."""

    step: int
    """Every `step`-th version is here, and the newest (1: all of them)."""
    quality: tuple[QualityPoint, ...]
    versions: tuple[VersionPoint, ...]
    rounds: tuple[RoundFigures, ...]
    """The last attempt at each round that is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumCell:
    """The consensus spectrum of one module after one round."""

    module: int
    """Place in `SpectrumMap.modules`."""
    number: int
    """Place in `SpectrumMap.numbers`."""
    shares: tuple[float, ...]
    effective_rank: float | None
    consensus: float | None
    captured_energy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumMap:
    """A heat map of modules by rounds, at most 100 by 60."""

    modules: tuple[str, ...]
    numbers: tuple[int, ...]
    cells: tuple[SpectrumCell, ...]
    modules_left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """A version and the devices that made it."""

    version: Version
    parent_number: int | None
    contributors: int
    largest: tuple[Contribution, ...]
    """The contributions with the largest shares, at most five."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exportable:
    """A version that can be exported at once, and how good it is at each rank that was measured."""

    version: Version
    max_rank: int
    scores: tuple[VersionScore, ...]
    """By rank; of the phases the most telling one: measured by evaluators, else as devices received it."""


class Severity(StrEnum):
    """How bad something is."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something that somebody should look at, as a sentence."""

    severity: Severity
    code: str
    """A stable name, for scripts: "rounds_failing"."""
    message: str
    target: str = ""
    """Name of the run or device that it is about; empty: the server."""
