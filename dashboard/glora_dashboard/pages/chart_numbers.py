"""The numbers behind a chart as a table, for those who do not see it: read from the chart's own options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.parts import join

MOST_ROWS: Final = 30
_MOST_COLUMNS: Final = 8
PERCENT: Final = "(v) => v == null ? '–' : (100 * v).toFixed(1) + ' %'"
"""How ECharts writes shares; a chart whose tooltip has it shows shares."""


def numbers_of(options: Mapping[str, object], *, label: str) -> Markup:
    """A table that can be opened, of at most MOST_ROWS rows: the newest; empty where nothing is drawn."""
    series = [item for item in _list(options["series"]) if isinstance(item, dict)]
    if not has_points(series):
        return Markup("")
    is_map = any(item.get("type") == "heatmap" for item in series)
    head, rows, left_out = _map_rows(options, series[0]) if is_map else _plot_rows(options, series)
    top = join(Markup('<th scope="col">{}</th>').format(words) for words in head)
    body = join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(row[0], join(map(Markup("<td>{}</td>").format, row[1:])))
        for row in rows
    )
    return Markup(
        '<details class="numbers"><summary>Numbers<span class="visually-hidden"> of {0}</span></summary>{1}'
        '<div class="scroll" tabindex="0" role="region" aria-label="Numbers of {0}">'
        "<table><thead><tr>{2}</tr></thead><tbody>{3}</tbody></table></div></details>"
    ).format(label, Markup('<p class="sub">{}</p>').format(left_out) if left_out else "", top, body)


def has_points(series: Iterable[Mapping[str, object]]) -> bool:
    """Whether anything is drawn."""
    return any(item["data"] for item in series)


Rows = tuple[Sequence[str], Sequence[Sequence[str]], str]
"""Headings, rows whose first cell names them, and a sentence about what is left out."""


def _plot_rows(options: Mapping[str, object], series: Sequence[Mapping[str, object]]) -> Rows:
    """One row for each number, newest first; a band has its lower and its upper edge."""
    is_share = PERCENT in str(options["tooltip"])
    columns: dict[str, dict[str, float | None]] = {}
    floor: dict[str, float | None] = {}
    for item in series:
        name, values = str(item["name"]), {str(point[0]): point[1] for point in _list(item["data"])}
        if not str(item.get("stack", "")).startswith("band"):
            columns[name] = values
        elif name.endswith(" low"):
            floor = values
        else:
            columns[f"{name}, from"] = floor
            columns[f"{name}, to"] = {key: _sum(floor.get(key), height) for key, height in values.items()}
    numbers = sorted({key for values in columns.values() for key in values}, key=int, reverse=True)

    def words(value: float | None) -> str:
        return fmt.percent(value) if is_share else fmt.number(value)

    rows = [[key, *(words(values.get(key)) for values in columns.values())] for key in numbers[:MOST_ROWS]]
    left_out = f"The newest {MOST_ROWS} of {len(numbers):,}." if len(numbers) > MOST_ROWS else ""
    return ("Number", *columns), rows, left_out


def _map_rows(options: Mapping[str, object], series: Mapping[str, object]) -> Rows:
    """One row for each row of the map, with its newest columns."""
    columns, names = _labels(options["xAxis"]), _labels(options["yAxis"])
    first = max(0, len(columns) - _MOST_COLUMNS)
    values = {(point[0], point[1]): point[2] for point in _list(series["data"])}
    rows = [
        [name, *(fmt.number(values.get((column, row))) for column in range(first, len(columns)))]
        for row, name in enumerate(names[:MOST_ROWS])
    ]
    left_out = f"The newest {_MOST_COLUMNS} of {len(columns):,} versions." if first else ""
    if len(names) > MOST_ROWS:
        left_out = f"{left_out} The first {MOST_ROWS} of {len(names):,} modules.".strip()
    return ("Module", *(f"version {number}" for number in columns[first:])), rows, left_out


def _sum(low: float | None, height: float | None) -> float | None:
    return None if low is None or height is None else low + height


def _labels(axis: object) -> list[str]:
    return [str(word) for word in _list(axis.get("data", []))] if isinstance(axis, dict) else []


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
