"""Options for ECharts in the pages' look; colours are variables of site.css, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from nicegui import ui

from glora_dashboard.pages.chart_numbers import PERCENT, has_points, numbers_of
from glora_dashboard.pages.parts import Block

Options = dict[str, object]
"""ECharts' own format."""
Points = Sequence[tuple[int, float | None]]
PALETTE: Final = ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)")
_SCALE: Final = ("#30408d", "#2f7fb8", "#35a79c", "#97cc6c", "#f2de4f")
"""From few to many: falls apart into steps on white and on black, and for those who see few colours."""
_TEXT: Final = {"color": "var(--muted)", "fontFamily": "system-ui, sans-serif", "fontSize": 12}
_LINE: Final = {"lineStyle": {"color": "var(--line)"}}
_NEARLY_ONE: Final = "axis.max > 0.9 && axis.max < 1.001"
_AT_MOST_ONE: Final = {
    ":max": f"(axis) => ({_NEARLY_ONE} ? 1 : null)",
    ":min": f"(axis) => ({_NEARLY_ONE} && axis.min > 0.9 ? 0.9 : null)",
}


class Chart:
    """A chart in the page, with its numbers below; `label` is what it says to those who do not see it."""

    def __init__(self, options: Options, *, label: str, height: int = 240, numbers: bool = True) -> None:
        self._label = label
        self._drawn = ui.echart(options, renderer="svg").classes("chart").style(f"height: {height}px")
        self._drawn.props["role"] = "img"
        self._drawn.props["aria-label"] = label
        self._numbers = Block(numbers_of(options, label=label)) if numbers else None

    def show(self, options: Options, *, height: int | None = None) -> None:
        """Show other options, when they are other ones."""
        if self._drawn.options != options:
            self._drawn.options.clear()
            self._drawn.options.update(options)
            self._drawn.update()
            if self._numbers is not None:
                self._numbers.show(numbers_of(options, label=self._label))
        if height is not None:
            self._drawn.style(f"height: {height}px")

    def set_visibility(self, visible: bool) -> None:
        """Show or hide the chart and its numbers."""
        for element in (self._drawn, self._numbers):
            if element is not None:
                element.set_visibility(visible)


def plot(
    series: Sequence[Options],
    *,
    percent: bool = False,
    share: bool = False,
    zero: bool = False,
    legend: bool = True,
    digits: int = 3,
) -> Options:
    """Axes for series over round numbers; `zero` lets the values' axis begin there.

    Where no value can be larger than one (`percent`, `share`), the axis ends there, also if all of them are one.
    """
    unit = PERCENT if percent else _rounded(digits)
    axis_label: Options = {**_TEXT, ":formatter": "(v) => Math.round(100 * v) + ' %'"} if percent else {**_TEXT}
    names = [str(item["name"]) for item in series if not str(item.get("stack", "")).startswith("band")]
    return {
        "animation": False,
        "textStyle": dict(_TEXT),
        "color": list(PALETTE),
        "grid": {"left": 8, "right": 14, "top": 40 if legend else 18, "bottom": 6, "containLabel": True},
        "legend": {"show": legend, "top": 0, "left": 0, "data": names, "textStyle": dict(_TEXT), "itemHeight": 8}
        | {"itemWidth": 16, "itemGap": 14, "type": "scroll"},
        "title": _nothing_yet(series),
        "tooltip": _tooltip("axis") | {":valueFormatter": unit},
        "xAxis": {"type": "category", "axisLabel": dict(_TEXT), "axisLine": dict(_LINE), "axisTick": {"show": False}},
        "yAxis": {
            "type": "value",
            "scale": not zero,
            "axisLabel": axis_label,
            "splitLine": dict(_LINE),
        }
        | (_AT_MOST_ONE if percent or share else {}),
        "series": list(series),
    }


def _nothing_yet(series: Sequence[Options]) -> Options:
    """What a chart says in its middle while nothing is drawn."""
    style = _TEXT | {"fontWeight": "normal"}
    return {
        "show": not has_points(series),
        "text": "Nothing yet",
        "textStyle": style,
        "left": "center",
        "top": "middle",
    }


def line(name: str, points: Points, *, colour: str, thin: bool = False, dashed: bool = False) -> Options:
    """A curve over round numbers; None leaves a gap."""
    style: Options = {"width": 1.3 if thin else 2.6, "color": colour, "type": "dashed" if dashed else "solid"}
    return {
        "name": name,
        "type": "line",
        "data": [[str(number), value] for number, value in points],
        "lineStyle": style,
        "itemStyle": {"color": colour},
        "symbol": "circle",
        "symbolSize": 4 if thin else 6,
        "showSymbol": len(points) <= 40,
        "connectNulls": True,
        "emphasis": {"disabled": True},
        "z": 2 if thin else 3,
    }


def band(name: str, low: Points, high: Points, *, colour: str) -> tuple[Options, Options]:
    """The area between two curves, as two series; the tooltip shows the lower edge and the height."""
    common: Options = {
        "type": "line",
        "stack": f"band {name}",
        "symbol": "none",
        "lineStyle": {"opacity": 0},
        "emphasis": {"disabled": True},
        "tooltip": {"show": False},
        "z": 1,
    }
    heights = [
        [str(number), None if bottom is None or top is None else top - bottom]
        for (number, bottom), (_, top) in zip(low, high, strict=True)
    ]
    floor = common | {"name": f"{name} low", "data": [[str(number), value] for number, value in low]}
    area = {"areaStyle": {"color": colour, "opacity": 0.16}}
    return floor, common | {"name": name, "data": heights} | area


def bars(name: str, points: Points, *, colour: str, stack: str) -> Options:
    """Bars over round numbers, stacked with those of the same `stack`."""
    return {
        "name": name,
        "type": "bar",
        "stack": stack,
        "barMaxWidth": 26,
        "data": [[str(number), value] for number, value in points],
        "itemStyle": {"color": colour},
        "emphasis": {"disabled": True},
    }


def heat_map(
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Sequence[tuple[int, int, float, str]],
    *,
    low: float,
    high: float,
    words: tuple[str, str],
) -> Options:
    """Cells (column, row, value, tooltip text) from `low` to `high`; `words` name the two ends of the scale."""
    drawn: Options = {
        "type": "heatmap",
        "data": [list(cell) for cell in cells],
        "itemStyle": {"borderColor": "var(--card)", "borderWidth": 1},
        "emphasis": {"disabled": True},
    }
    return {
        "animation": False,
        "title": _nothing_yet([drawn]),
        "textStyle": dict(_TEXT),
        "grid": {"left": 8, "right": 14, "top": 8, "bottom": 44, "containLabel": True},
        "tooltip": _tooltip("item") | {":formatter": "(p) => p.data[3]"},
        "xAxis": {"type": "category", "data": list(columns), "axisLabel": dict(_TEXT), "axisLine": {"show": False}}
        | {"axisTick": {"show": False}},
        "yAxis": {"type": "category", "data": list(rows), "inverse": True, "axisLine": {"show": False}}
        | {"axisLabel": {**_TEXT, "fontSize": 11}, "axisTick": {"show": False}},
        "visualMap": {
            "min": low,
            "max": high if high > low else low + 1,
            "dimension": 2,
            "calculable": False,
            "orient": "horizontal",
            "left": 8,
            "bottom": 0,
            "itemWidth": 10,
            "itemHeight": 110,
            "text": [words[1], words[0]],
            "textStyle": dict(_TEXT),
            "inRange": {"color": list(_SCALE)},
        },
        "series": [drawn],
    }


def _tooltip(trigger: str) -> Options:
    return {
        "trigger": trigger,
        "confine": True,
        "backgroundColor": "var(--card)",
        "borderColor": "var(--line)",
        "textStyle": {**_TEXT, "color": "var(--ink)", "fontSize": 13},
        "axisPointer": {"lineStyle": {"color": "var(--muted)"}, "type": "line"},
    }


def _rounded(digits: int) -> str:
    return f"(v) => v == null ? '–' : Number(v).toLocaleString('en-GB', {{maximumSignificantDigits: {digits}}})"


def finite(value: float | None) -> float | None:
    """The value; None where it is no number that can be drawn."""
    return value if value is not None and math.isfinite(value) else None
