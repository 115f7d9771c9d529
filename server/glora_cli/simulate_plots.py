"""Plots of a simulation as PNG files; matplotlib is imported when something is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final

from glora_cli.simulate_folder import writing
from glora_cli.simulate_report import Spread, spread
from glora_cli.simulate_results import Result
from glora_cli.simulate_spec import SimSpec
from glora_wire.errors import GloraError, Reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Plot = Callable[[SimSpec, Sequence[Result], Axes], None]

_SIZE: Final = (10.0, 5.5)
_DPI: Final = 110
_LINES: Final = ("-", "--", ":", "-.")
_COLOURS: Final = 10
"""Of matplotlib's own cycle; a new line style starts after them."""
_WIDE: Final = 100
"""Largest eigenvalue by smallest one, from which on a linear axis would hide the small ones."""
_SPECTRA: Final = "after the last round, mean over modules with the spread over seeds"


def require_matplotlib() -> None:
    """Raise SETTINGS_INVALID saying what to do when there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise GloraError(
            Reason.SETTINGS_INVALID,
            "Plots need matplotlib, which is not installed here: pip install 'glora[demo]', or leave them out with "
            "--no-plots.",
        )


def draw_all(spec: SimSpec, rows: Sequence[Result], folder: Path) -> list[tuple[str, Path]]:
    """Write every plot into the folder; (title, file) of each.

    Raises REQUEST_INVALID when the folder cannot be written.
    """
    plots: list[tuple[str, str, Plot]] = [
        ("accuracy", "Accuracy at the server's rank by round, with the spread over seeds", _accuracy),
        ("ranks", "Accuracy after the last round by the rank that is read out", _by_rank),
        ("truncation", "Truncation error of the mean update by round", _truncation),
        ("spectra", f"Singular values of the state {_SPECTRA}", plot_spectra),
    ]
    if any(_eigenvalues(row) for row in rows if row.round == spec.rounds):
        plots.append(("consensus", f"Eigenvalues of the devices' consensus K {_SPECTRA}", plot_consensus))
    return [(title, _draw(spec, rows, folder / f"{name}.png", title, plot)) for name, title, plot in plots]


def _draw(spec: SimSpec, rows: Sequence[Result], path: Path, title: str, plot: Plot) -> Path:
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
    with writing(path):
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


def plot_spectra(spec: SimSpec, rows: Sequence[Result], axes: Axes) -> None:
    """Draw the singular values of the last state of every strategy."""
    axes.set_ylabel("σ of direction j")
    axes.set_yscale("log")
    _falling(spec, _by_direction(spec, rows, lambda row: row.sigma), axes)


def plot_consensus(spec: SimSpec, rows: Sequence[Result], axes: Axes) -> None:
    """Draw the eigenvalues of K in the last round of every strategy that has one.

    Votes are between 0 and 1 and often near one another, energies (of a subspace that sees sizes) are not.
    """
    axes.set_ylabel("λ of direction j")
    curves = _by_direction(spec, [row for row in rows if row.consensus is not None], _eigenvalues)
    means = [one.mean for found in curves.values() for one in found]
    if means and min(means) < max(means) / _WIDE:
        axes.set_yscale("log")
    _falling(spec, curves, axes)


def _eigenvalues(row: Result) -> tuple[float, ...]:
    return () if row.consensus is None else row.consensus.eigenvalues


def _by_direction(
    spec: SimSpec, rows: Sequence[Result], values: Callable[[Result], Sequence[float]]
) -> dict[str, list[Spread]]:
    """By strategy the spreads over seeds after the last round, down to the last direction that is not zero."""
    curves: dict[str, list[Spread]] = {}
    for entry in spec.strategies:
        last = [row for row in rows if row.strategy == entry.title and row.round == spec.rounds]
        spectra = {row.seed: values(row) for row in last}.values()
        # A short one ends in zeros.
        found = [spread(items) for items in zip_longest(*spectra, fillvalue=0.0)]
        curves[entry.title] = [one for one in found if one is not None and one.mean > 0]
    return curves


def _falling(spec: SimSpec, curves: Mapping[str, Sequence[Spread]], axes: Axes) -> None:
    """A line for each strategy that has a curve, over the directions, and a band."""
    axes.set_xlabel("j")
    _whole_numbers(axes)
    drawn = [(number, curves[entry.title]) for number, entry in enumerate(spec.strategies) if curves[entry.title]]
    for number, found in drawn:
        places, means = range(1, len(found) + 1), [one.mean for one in found]
        title = spec.strategies[number].title
        axes.plot(places, means, label=title, color=_colour(number), ls=_line(number), marker=".")
    # A band that reaches zero, which a logarithmic axis lacks, ends at the frame that the lines ask for.
    bottom = axes.get_ylim()[0] if axes.get_yscale() == "log" else 0.0
    for number, found in drawn:
        _band(axes, range(1, len(found) + 1), found, number, bottom=bottom)
    if drawn:
        axes.set_ylim(bottom=bottom)


def _over_rounds(spec: SimSpec, rows: Sequence[Result], axes: Axes, value: Callable[[Result], float | None]) -> None:
    """A line for each strategy, mean over seeds by round, and a band of one standard deviation to both sides."""
    _whole_numbers(axes)
    for number, entry in enumerate(spec.strategies):
        ours = {(row.seed, row.round): row for row in rows if row.strategy == entry.title}
        points = {
            round_: found
            for round_ in range(1, spec.rounds + 1)
            if (found := spread(value(row) for (_, at), row in ours.items() if at == round_)) is not None
        }
        if points:
            means = [found.mean for found in points.values()]
            axes.plot(list(points), means, label=entry.title, color=_colour(number), ls=_line(number), marker=".")
            _band(axes, list(points), list(points.values()), number)


def _band(
    axes: Axes, places: Sequence[int], found: Sequence[Spread], number: int, *, bottom: float = float("-inf")
) -> None:
    """One standard deviation to both sides, nowhere below `bottom`."""
    low = [max(bottom, one.mean - (one.deviation or 0.0)) for one in found]
    high = [one.mean + (one.deviation or 0.0) for one in found]
    axes.fill_between(places, low, high, color=_colour(number), alpha=0.12, linewidth=0)


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
