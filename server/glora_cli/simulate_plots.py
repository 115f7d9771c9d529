"""Plots of a simulation as PNG files; matplotlib is imported when something is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from glora_cli.simulate_report import spread
from glora_cli.simulate_results import Result
from glora_cli.simulate_spec import SimSpec
from glora_wire.errors import GloraError, Reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE: Final = (10.0, 5.5)
_DPI: Final = 110
_LINES: Final = ("-", "--", ":", "-.")
_COLOURS: Final = 10
"""Of matplotlib's own cycle; a new line style starts after them."""


def require_matplotlib() -> None:
    """Raise SETTINGS_INVALID saying what to do when there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise GloraError(
            Reason.SETTINGS_INVALID,
            "Plots need matplotlib, which is not installed here: pip install 'glora[demo]', or leave them out with "
            "--no-plots.",
        )


def draw_all(spec: SimSpec, rows: Sequence[Result], folder: Path) -> list[tuple[str, Path]]:
    """Write every plot into the folder; (title, file) of each."""
    plots: tuple[tuple[str, str, Callable[[SimSpec, Sequence[Result], Axes], None]], ...] = (
        ("accuracy", "Accuracy at the server's rank by round, with the spread over seeds", _accuracy),
        ("ranks", "Accuracy after the last round by the rank that is read out", _by_rank),
        ("truncation", "Truncation error of the mean update by round", _truncation),
        ("spectra", "Singular values of the state after the last round, means over modules and seeds", _spectra),
    )
    return [(title, _draw(spec, rows, folder / f"{name}.png", title, plot)) for name, title, plot in plots]


def _draw(
    spec: SimSpec,
    rows: Sequence[Result],
    path: Path,
    title: str,
    plot: Callable[[SimSpec, Sequence[Result], Axes], None],
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plot(spec, rows, axes)
    axes.set_title(f"{spec.name}: {title[0].lower()}{title[1:]}", fontsize="medium")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=_DPI)
    return path


def _accuracy(spec: SimSpec, rows: Sequence[Result], axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy, %")
    _over_rounds(spec, [row for row in rows if row.rank == row.server_rank], axes, _percent_of)


def _truncation(spec: SimSpec, rows: Sequence[Result], axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.set_ylabel("‖S − M‖ / ‖M‖")
    _over_rounds(spec, rows, axes, lambda row: row.truncation_error)


def _by_rank(spec: SimSpec, rows: Sequence[Result], axes: Axes) -> None:
    axes.set_xlabel("rank")
    axes.set_ylabel("accuracy, %")
    axes.set_xscale("log", base=2)
    for number, entry in enumerate(spec.strategies):
        last = [row for row in rows if row.strategy == entry.title and row.round == spec.rounds]
        points = [
            (rank, found.mean, found.deviation or 0.0)
            for rank in sorted({row.rank for row in last})
            if (found := spread(_percent_of(row) for row in last if row.rank == rank)) is not None
        ]
        if points:
            ranks, means, deviations = zip(*points, strict=True)
            axes.errorbar(
                ranks, means, yerr=deviations, label=entry.title, color=_colour(number), ls=_line(number), capsize=3
            )
    ticks = sorted({row.rank for row in rows if row.round == spec.rounds})
    axes.set_xticks(ticks, [str(rank) for rank in ticks], minor=False)


def _spectra(spec: SimSpec, rows: Sequence[Result], axes: Axes) -> None:
    axes.set_xlabel("j")
    _whole_numbers(axes)
    axes.set_ylabel("σ of direction j")
    axes.set_yscale("log")
    for number, entry in enumerate(spec.strategies):
        last = [row for row in rows if row.strategy == entry.title and row.round == spec.rounds]
        spectra = list({row.seed: row.sigma for row in last}.values())
        longest = max(map(len, spectra), default=0)
        means = [sum(s[j] if j < len(s) else 0.0 for s in spectra) / len(spectra) for j in range(longest)]
        if any(mean > 0 for mean in means):
            axes.plot(
                range(1, longest + 1),
                [mean if mean > 0 else float("nan") for mean in means],
                label=entry.title,
                color=_colour(number),
                ls=_line(number),
                marker=".",
            )


def _over_rounds(spec: SimSpec, rows: Sequence[Result], axes: Axes, value: Callable[[Result], float | None]) -> None:
    """A line for each strategy, mean over seeds by round, and a band of one standard deviation to both sides."""
    _whole_numbers(axes)
    for number, entry in enumerate(spec.strategies):
        ours = {(row.seed, row.round): row for row in rows if row.strategy == entry.title}
        points = [
            (round_, found.mean, found.deviation or 0.0)
            for round_ in range(1, spec.rounds + 1)
            if (found := spread(value(row) for (_, at), row in ours.items() if at == round_)) is not None
        ]
        if points:
            rounds, means, deviations = zip(*points, strict=True)
            colour = _colour(number)
            axes.plot(rounds, means, label=entry.title, color=colour, ls=_line(number), marker=".")
            low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
            high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
            axes.fill_between(rounds, low, high, color=colour, alpha=0.12, linewidth=0)


def _whole_numbers(axes: Axes) -> None:
    """Let the horizontal axis have ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _percent_of(row: Result) -> float | None:
    return None if row.accuracy is None else 100 * row.accuracy


def _colour(number: int) -> str:
    return f"C{number % _COLOURS}"


def _line(number: int) -> str:
    return _LINES[number // _COLOURS % len(_LINES)]
