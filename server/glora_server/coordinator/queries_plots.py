"""What plots and tables of a run are drawn from; points are left out evenly where there are too many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from glora_server.coordinator.model import Listing, MetricPhase, Page, Run, Version
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views_history import VersionScore
from glora_server.coordinator.views_plots import (
    Ancestor,
    Exportable,
    QualityPoint,
    RunSeries,
    SpectrumCell,
    SpectrumMap,
    VersionPoint,
)
from glora_server.rounds.ids import VersionId

MOST_POINTS: Final = 500
MOST_MAP_ROUNDS: Final = 60
MOST_MAP_MODULES: Final = 100
LARGEST_SHOWN: Final = 5
_TELLING: Final = (MetricPhase.VERSION, MetricPhase.BEFORE, MetricPhase.AFTER)
"""Which phase says most about a version: whoever evaluates measures it alone, whoever trains as it was received."""


def series(uow: UnitOfWork, run: Run) -> RunSeries:
    """Everything that is plotted over the rounds of a run."""
    last = uow.history.last_number(run.id)
    if last is None:
        return RunSeries(step=1, quality=(), versions=(), rounds=())
    numbers, step = evenly(0, last, MOST_POINTS)
    known = uow.history.scores(run.id, numbers)
    if not any(score.version_number == last for score in known):
        known += uow.history.fresh_scores(run.id, last)
    summaries = uow.history.summaries(run.id, numbers)
    return RunSeries(
        step=step,
        quality=_quality(known),
        versions=tuple(_point(number, values) for number, values in summaries.items() if number > 0),
        rounds=uow.history.rounds_of(run.id, numbers),
    )


def evenly(first: int, last: int, most: int) -> tuple[list[int], int]:
    """At most `most` numbers from `first` to `last`, which is among them, and the step between them."""
    step = max(1, math.ceil((last - first) / max(1, most - 1)))
    return sorted(range(last, first - 1, -step)), step


def _quality(scores: Sequence[VersionScore]) -> tuple[QualityPoint, ...]:
    largest: dict[tuple[int, MetricPhase], int] = {}
    for score in scores:
        key = score.version_number, score.phase
        largest[key] = max(largest.get(key, 0), score.rank)
    return tuple(_quality_point(score, largest[score.version_number, score.phase] == score.rank) for score in scores)


def _quality_point(score: VersionScore, largest: bool) -> QualityPoint:
    """Plots draw a spread around the curve of the largest rank only; those of the others would be most of the bytes."""
    return QualityPoint(score=score if largest else replace(score, accuracies=None, losses=None), largest=largest)


def _point(number: int, values: Mapping[str, float]) -> VersionPoint:
    return VersionPoint(
        number=number,
        captured_energy=values.get("captured_energy"),
        truncation_error=values.get("truncation_error"),
        mean_norm=values.get("mean_norm"),
        eigengap=values.get("eigengap"),
    )


def spectrum(uow: UnitOfWork, run: Run) -> SpectrumMap:
    """The consensus spectrum by module and round."""
    last = uow.history.last_number(run.id) or 0
    numbers, _ = evenly(1, last, MOST_MAP_ROUNDS)
    versions = uow.history.versions_of(run.id, numbers)
    names = [module.module for module in versions[-1].modules] if versions else []
    shown = _spread_over(names, MOST_MAP_MODULES)
    places = {name: place for place, name in enumerate(shown)}
    cells = [
        SpectrumCell(
            module=places[module.module],
            number=column,
            shares=module.spectrum,
            effective_rank=module.effective_rank,
            consensus=module.consensus,
            captured_energy=module.captured_energy,
        )
        for column, version in enumerate(versions)
        for module in version.modules
        if module.module in places
    ]
    return SpectrumMap(
        modules=tuple(shown),
        numbers=tuple(version.number for version in versions),
        cells=tuple(cells),
        modules_left_out=len(names) - len(shown),
    )


def _spread_over(names: Sequence[str], most: int) -> list[str]:
    """At most `most` of the names, evenly from the first to the last: layers follow one another."""
    if len(names) <= most:
        return list(names)
    return [names[place * (len(names) - 1) // (most - 1)] for place in range(most)]


def lineage(uow: UnitOfWork, run: Run, page: Page) -> Listing[Ancestor]:
    """Versions, newest first, with the devices that made them."""
    found = uow.versions.list(run.id, page)
    ids = [version.id for version in found.items]
    counts = uow.history.contributors(ids)
    numbers = {version.id: version.number for version in found.items}
    items = tuple(
        Ancestor(
            version=version,
            parent_number=_parent_number(uow, version, numbers),
            contributors=counts.get(version.id, 0),
            largest=uow.history.contributions(version.id, Page(size=LARGEST_SHOWN)).items
            if version.id in counts
            else (),
        )
        for version in found.items
    )
    return Listing(items=items, next_token=found.next_token)


def _parent_number(uow: UnitOfWork, version: Version, numbers: dict[VersionId, int]) -> int | None:
    if version.parent_id is None:
        return None
    if version.parent_id not in numbers:
        numbers[version.parent_id] = uow.versions.get(version.parent_id).number
    return numbers[version.parent_id]


def exports(uow: UnitOfWork, run: Run, page: Page) -> Listing[Exportable]:
    """Versions that can be exported, newest first, with how good they are at each rank."""
    found = uow.lists.kept_versions(run.id, page)
    numbers = [version.number for version in found.items]
    by_number: dict[int, list[VersionScore]] = {number: [] for number in numbers}
    for score in uow.history.scores(run.id, numbers):
        by_number[score.version_number].append(score)
    for version in found.items:
        if version.id == run.version_id and not by_number[version.number]:
            by_number[version.number] = list(uow.history.fresh_scores(run.id, version.number))
    largest = RunSpec.from_json(run.spec_json).lora.max_rank
    items = tuple(
        Exportable(version=version, max_rank=largest, scores=_telling(by_number[version.number]))
        for version in found.items
    )
    return Listing(items=items, next_token=found.next_token)


def _telling(scores: Sequence[VersionScore]) -> tuple[VersionScore, ...]:
    """One score per rank."""
    best: dict[int, VersionScore] = {}
    for score in sorted(scores, key=lambda score: _TELLING.index(score.phase), reverse=True):
        best[score.rank] = score
    return tuple(best[rank] for rank in sorted(best))
