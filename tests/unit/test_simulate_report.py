"""Tables and plots of known numbers: means and spreads over seeds, and what is not drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy import asarray
from simulated_rows import CONSENSUS, TOML, scored_rows

from glora_cli.failures import exit_code_of
from glora_cli.simulate_plots import draw_all, plot_consensus, plot_spectra, require_matplotlib
from glora_cli.simulate_report import Spread, cells, columns, markdown_table, spread, summaries, write_report
from glora_cli.simulate_results import Result
from glora_cli.simulate_spec import SimSpec, parse_sim_toml
from glora_wire.errors import GloraError


@pytest.fixture
def spec() -> SimSpec:
    return parse_sim_toml(TOML.format(model="demo"))


@pytest.fixture
def rows() -> tuple[Result, ...]:
    return scored_rows()


def test_a_summary_is_mean_and_deviation_over_seeds(spec: SimSpec, rows: tuple[Result, ...]) -> None:
    glora, fedit = summaries(spec, rows)
    _close(glora.server, mean=0.85, deviation=0.05 * 2**0.5)
    assert glora.own is not None
    assert glora.own.mean == pytest.approx((0.6 + 0.8 + 0.7 + 0.9) / 4)
    assert fedit.by_rank[1].mean == pytest.approx(0.45)
    # Seed by seed 0.7 - 0.8 and 0.6 - 0.9: the spread of the differences, not that of the scores.
    _close(fedit.ahead, mean=-0.2, deviation=0.1 * 2**0.5)
    assert (fedit.bytes_up, fedit.bytes_down, fedit.seconds, fedit.lost) == (1024, 2048, 3.0, 2)


def _close(found: Spread | None, *, mean: float, deviation: float) -> None:
    assert found is not None
    assert found.count == 2
    assert found.mean == pytest.approx(mean)
    assert found.deviation == pytest.approx(deviation)


def test_the_spread_of_nothing_and_of_one() -> None:
    assert spread([None]) is None
    assert spread([0.5, None]) == Spread(mean=0.5, deviation=None, count=1)


def test_tables_say_what_the_summaries_say(spec: SimSpec, rows: tuple[Result, ...]) -> None:
    found = summaries(spec, rows)
    table = dict(zip(columns(found), cells(found)[1], strict=True))
    assert table["strategy"] == "fedit (2 updates lost)"
    assert (table["at R"], table["r=1"], table["vs first"]) == ("65.0 ± 7.1", "45.0 ± 7.1", "-20.0 ± 14.1")
    lines = markdown_table(found).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


def test_plots_are_drawn_of_every_kind_of_row(spec: SimSpec, rows: tuple[Result, ...], tmp_path: Path) -> None:
    gap = replace(rows[0], accuracy=None, loss=None, truncation_error=None, sigma=())
    for found in (rows, (gap,)):
        plots = draw_all(spec, found, tmp_path)
        assert [path.name for _, path in plots] == ["accuracy.png", "ranks.png", "truncation.png", "spectra.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for _, path in plots)


def _axes(found: Sequence[Result], spec: SimSpec, plot: Callable[[SimSpec, Sequence[Result], Axes], None]) -> Axes:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plot(spec, found, axes)
    figure.canvas.draw()
    return axes


@pytest.mark.parametrize(("plot", "scale"), [(plot_spectra, "log"), (plot_consensus, "linear")])
def test_spectra_show_their_spread_over_seeds(
    spec: SimSpec, rows: tuple[Result, ...], plot: Callable[[SimSpec, Sequence[Result], Axes], None], scale: str
) -> None:
    """The second direction has 1.0 and 0.1; one deviation below their mean a log axis has no place."""
    found = [
        replace(
            row,
            sigma=(2.0 + row.seed, 1.0 - 0.9 * row.seed),
            consensus=replace(CONSENSUS, eigenvalues=(2.0 + row.seed, 1.0 - 0.9 * row.seed)),
        )
        for row in rows
        if row.rank == 2
    ]
    axes = _axes(found, spec, plot)
    assert [line.get_label() for line in axes.lines] == ["glora", "fedit"]
    assert len(axes.collections) == 2
    edges = asarray(axes.collections[0].get_paths()[0].vertices)[:, 1]
    assert edges.max() == pytest.approx(2.5 + 0.5**0.5)
    assert edges.min() >= axes.get_ylim()[0]
    assert axes.get_yscale() == scale
    assert axes.get_ylim()[0] == 0 or axes.get_ylim()[0] > 0.1


def test_eigenvalues_of_very_different_size_are_drawn_on_a_logarithmic_axis(
    spec: SimSpec, rows: tuple[Result, ...]
) -> None:
    seen = [replace(row, consensus=replace(CONSENSUS, eigenvalues=(1.0, 1e-4))) for row in rows if row.rank == 2]
    assert _axes(seen, spec, plot_consensus).get_yscale() == "log"


def test_the_consensus_is_drawn_where_a_strategy_has_one(
    spec: SimSpec, rows: tuple[Result, ...], tmp_path: Path
) -> None:
    """Strategies that nobody votes in have no line, and simulations without others no plot."""
    none = replace(CONSENSUS, eigenvalues=())
    seen = [
        replace(row, consensus=CONSENSUS if row.strategy == "glora" else none) if row.rank == 2 else row for row in rows
    ]
    assert [path.name for _, path in draw_all(spec, seen, tmp_path)][-1] == "consensus.png"
    assert [line.get_label() for line in _axes(seen, spec, plot_consensus).lines] == ["glora"]
    assert len(draw_all(spec, [replace(row, consensus=none) for row in rows], tmp_path)) == 4


def test_a_missing_matplotlib_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(GloraError, match=r"glora\[demo\].*--no-plots"):
        require_matplotlib()


def test_a_page_that_cannot_be_written_is_told_with_the_folder(
    spec: SimSpec, rows: tuple[Result, ...], tmp_path: Path
) -> None:
    for name in ("accuracy.png", "report.html"):
        folder = tmp_path / name.removesuffix(".png")
        (folder / name).mkdir(parents=True)
        with pytest.raises(GloraError, match=f"{folder} cannot be written .{name}: .*--out") as caught:
            write_report(spec, rows, folder, plots=True)
        assert exit_code_of(caught.value) == 2
