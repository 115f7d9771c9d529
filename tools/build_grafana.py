"""Write the Grafana dashboards of deploy/grafana/dashboards; `--check` says whether the committed files are these.

.venv/bin/python tools/build_grafana.py
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from grafana_federation import FEDERATION
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)
from grafana_panels import Chart, Number, Query, Section
from grafana_server import SERVER

FOLDER: Final = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards"
_SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")


def build() -> dict[str, str]:
    """The text of each dashboard's file, by its name."""
    return {
        "federation.json": _dashboard("glora-federation", "glora: federation", FEDERATION, with_runs=True),
        "server.json": _dashboard("glora-server", "glora: server", SERVER, with_runs=False),
    }


def _dashboard(uid: str, title: str, sections: Sequence[Section], *, with_runs: bool) -> str:
    builder = (
        dashboard.Dashboard(title)
        .uid(uid)
        .tags(["glora"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    if with_runs:
        builder.with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(_SOURCE)
            .query("label_values(glora_run_version, run)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(selected=True, text="All", value="$__all"))
        )
    ids = itertools.count(1)
    for section in sections:
        builder.with_row(dashboard.Row(section.title).id(next(ids)))
        for panel in section.panels:
            made = _chart(panel) if isinstance(panel, Chart) else _number(panel)
            builder.with_panel(made.id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def _query(query: Query, letter: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(letter).expr(query.expr).legend_format(query.legend).range()


def _chart(chart: Chart) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True)
    panel = (
        timeseries.Panel()
        .title(chart.title)
        .description(chart.about)
        .datasource(_SOURCE)
        .unit(chart.unit)
        .min(chart.bottom)
        .span(12)
        .height(8)
        .fill_opacity(30 if chart.stacked else 5)
        .legend(legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM))
    )
    if chart.top is not None:
        panel.max(chart.top)
    if chart.stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for number, query in enumerate(chart.queries):
        panel.with_target(_query(query, chr(ord("A") + number)))
    return panel


def _number(number: Number) -> stat.Panel:
    panel = (
        stat.Panel()
        .title(number.title)
        .description(number.about)
        .datasource(_SOURCE)
        .unit(number.unit)
        .span(4)
        .height(4)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(Query(expr=number.expr, legend=""), "A"))
    )
    steps = [Threshold(value=None, color="green")]
    if number.bad is not None:
        good, bad = ("red", "green") if number.low else ("green", "red")
        steps = [Threshold(value=None, color=good), Threshold(value=number.bad, color=bad)]
    return panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))


def main(words: Sequence[str]) -> int:
    """Write the files, or compare them; 1 when they differ."""
    files = build()
    if words == ["--check"]:
        stale = [name for name, text in files.items() if (FOLDER / name).read_text(encoding="utf-8") != text]
        print("Run tools/build_grafana.py: these differ: " + ", ".join(stale) if stale else "The dashboards are fresh.")
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
