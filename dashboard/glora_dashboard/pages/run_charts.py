"""What is plotted of a run: pure functions from the series that queries answer to options of charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.charts import PALETTE, Options, Points, band, bars, finite, heat_map, line, plot
from glora_server.coordinator.model import MetricPhase
from glora_server.coordinator.views_history import RoundFigures, Spread, Stage, VersionScore
from glora_server.coordinator.views_plots import RunSeries, SpectrumCell, SpectrumMap

_STAGE_WORDS: Final[Mapping[Stage, str]] = {
    Stage.ACCEPTING: "accepting",
    Stage.DOWNLOADING: "downloading",
    Stage.TRAINING: "training",
    Stage.UPLOADING: "uploading",
    Stage.JUDGING: "judging",
}
_STAGE_COLOURS: Final[Mapping[Stage, str]] = {
    Stage.ACCEPTING: "var(--c6)",
    Stage.DOWNLOADING: "var(--c4)",
    Stage.TRAINING: "var(--c1)",
    Stage.UPLOADING: "var(--c2)",
    Stage.JUDGING: "var(--c5)",
}
_MEGA: Final = 1e6


def telling_phase(series: RunSeries) -> MetricPhase:
    """The measurement that says most: by evaluating devices where there are any, else as trainers received it."""
    measured = {point.score.phase for point in series.quality}
    return MetricPhase.VERSION if MetricPhase.VERSION in measured else MetricPhase.BEFORE


def quality_options(series: RunSeries, *, loss: bool) -> Options:
    """Accuracy (or loss) by version: the largest rank with its spread over devices, and every other rank."""
    phase = telling_phase(series)
    points = [point for point in series.quality if point.score.phase is phase]
    best = [point.score for point in points if point.largest]
    ranks = sorted({point.score.rank for point in points}, reverse=True)
    always = ranks[0] if ranks and all(score.rank == ranks[0] for score in best) else None
    drawn: list[Options] = [*_spread(best, loss=loss)]
    name = "largest rank" if always is None else f"rank {always}"
    drawn.append(line(name, _scores(best, loss=loss), colour=PALETTE[0]))
    for index, rank in enumerate(ranks[1 : len(PALETTE)]):
        scores = [point.score for point in points if point.score.rank == rank]
        drawn.append(line(f"rank {rank}", _scores(scores, loss=loss), colour=PALETTE[index + 1], thin=True))
    return plot(drawn, percent=not loss)


def _scores(scores: Sequence[VersionScore], *, loss: bool) -> Points:
    return [(score.version_number, finite(score.loss if loss else score.accuracy)) for score in scores]


def _spread(scores: Sequence[VersionScore], *, loss: bool) -> Sequence[Options]:
    spreads = [(score.version_number, score.losses if loss else score.accuracies) for score in scores]
    return _band("middle half of devices", spreads, colour=PALETTE[0])


def _band(name: str, spreads: Sequence[tuple[int, Spread | None]], *, colour: str) -> Sequence[Options]:
    if not any(spread for _, spread in spreads):
        return ()
    low = [(number, spread.lower if spread else None) for number, spread in spreads]
    high = [(number, spread.upper if spread else None) for number, spread in spreads]
    return band(name, low, high, colour=colour)


def energy_options(series: RunSeries) -> Options:
    """What the state kept of the devices' mean update, and how far it is from it, by version."""
    captured = [(point.number, finite(point.captured_energy)) for point in series.versions if point.number]
    truncated = [(point.number, finite(point.truncation_error)) for point in series.versions if point.number]
    return plot(
        [
            line("captured energy", captured, colour=PALETTE[0]),
            line("truncation error", truncated, colour=PALETTE[2], dashed=True),
        ],
        percent=True,
    )


def norm_options(series: RunSeries) -> Options:
    """Norms of the accepted updates by round: median, and the middle half."""
    spreads = [(figures.number, figures.update_norms) for figures in series.rounds]
    median = [(number, spread.median if spread else None) for number, spread in spreads]
    return plot(
        [*_band("middle half of devices", spreads, colour=PALETTE[3]), line("median", median, colour=PALETTE[3])]
    )


def bytes_options(series: RunSeries) -> Options:
    """Megabytes that each round moved."""

    def mega(count_of: Callable[[RoundFigures], int]) -> Points:
        return [(figures.number, count_of(figures) / _MEGA) for figures in series.rounds]

    return plot(
        [
            bars("to devices", mega(lambda f: f.bytes_down), colour="var(--c4)", stack="bytes"),
            bars("from devices", mega(lambda f: f.bytes_up), colour="var(--c2)", stack="bytes"),
        ],
        zero=True,
    )


def seconds_options(series: RunSeries) -> Options:
    """Seconds of each stage by round: medians over devices, and the aggregation."""

    def spent(stage: Stage) -> Points:
        return [(f.number, f.stages[stage].median if stage in f.stages else 0.0) for f in series.rounds]

    drawn = [
        bars(_STAGE_WORDS[stage], spent(stage), colour=_STAGE_COLOURS[stage], stack="seconds")
        for stage in Stage
        if any(stage in figures.stages for figures in series.rounds)
    ]
    folding: Points = [(figures.number, figures.aggregating_seconds) for figures in series.rounds]
    return plot([*drawn, bars("aggregating", folding, colour="var(--c3)", stack="seconds")], zero=True)


def spectrum_options(spectrum: SpectrumMap) -> Options:
    """How far the devices' changes agree, by module and version, with the spectrum of the consensus."""
    names = short_names(spectrum.modules)
    cells = [
        (cell.number, cell.module, round(cell.consensus, 3), _cell_words(spectrum, cell))
        for cell in spectrum.cells
        if cell.consensus is not None
    ]
    low = min((value for _, _, value, _ in cells), default=0.0)
    numbers = [str(number) for number in spectrum.numbers]
    return heat_map(numbers, names, cells, low=min(low, 0.0), high=1.0, words=("devices disagree", "agree"))


def _cell_words(spectrum: SpectrumMap, cell: SpectrumCell) -> str:
    shares = ", ".join(fmt.percent(share, 0) for share in cell.shares[:5])
    directions = (
        Markup("<br>{} effective directions<br>largest shares: {}").format(fmt.number(cell.effective_rank), shares)
        if cell.effective_rank is not None
        else ""
    )
    return str(
        Markup("<b>{}</b><br>version {}: mean cosine {}{}<br>captured energy: {}").format(
            spectrum.modules[cell.module],
            spectrum.numbers[cell.number],
            fmt.number(cell.consensus),
            directions,
            fmt.percent(cell.captured_energy),
        )
    )


def short_names(modules: Sequence[str]) -> list[str]:
    """The modules' names without what all of them begin or end with, cut at dots; long ones lose their middle."""
    if len(modules) < 2:
        return [name.rpartition("base_model.model.")[2] for name in modules]
    paths = [name.split(".") for name in modules]
    shortest = min(map(len, paths)) - 1
    begin = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest)
    end = next((i for i in range(shortest - begin) if len({path[-1 - i] for path in paths}) > 1), shortest - begin)
    cut = [".".join(path[begin : len(path) - end]) for path in paths]
    return [name if len(name) <= 30 else f"{name[:12]}…{name[-16:]}" for name in cut]
