"""What a dashboard is made of, and short ways to write expressions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STEP: Final = "$__rate_interval"
"""Grafana puts a span here that is wide enough for a rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """An expression, and how its series are called."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over time; `unit` as Grafana calls it."""

    title: str
    about: str
    queries: tuple[Query, ...]
    unit: str = "short"
    stacked: bool = False
    bottom: float = 0
    top: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One number now; from `bad` on (below it where `low`) it is red."""

    title: str
    about: str
    expr: str
    unit: str = "short"
    bad: float | None = None
    low: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A row of panels under a heading."""

    title: str
    panels: tuple[Chart | Number, ...]


def one(expr: str, legend: str) -> tuple[Query, ...]:
    """The expression alone."""
    return (Query(expr=expr, legend=legend),)


def rate(name: str, by: str, legend: str) -> tuple[Query, ...]:
    """A rate per second, added up by some labels."""
    return one(f"sum by ({by}) (rate({name}[{STEP}]))", legend)


def quantiles(name: str, legend: str = "") -> tuple[Query, ...]:
    """What half and what 95 % of a histogram stay below."""
    return tuple(
        Query(
            expr=f"histogram_quantile({share}, sum by (le) (rate({name}_bucket[{STEP}])))",
            legend=f"{legend} {words}".strip(),
        )
        for share, words in ((0.5, "half"), (0.95, "95 %"))
    )


def by_run(name: str, *stats: str) -> tuple[Query, ...]:
    """A gauge over modules of the chosen runs."""
    return tuple(Query(expr=f'{name}{{run=~"$run", stat="{stat_}"}}', legend=f"{{{{run}}}} {stat_}") for stat_ in stats)


def of_model(name: str) -> tuple[Query, ...]:
    """A gauge of what devices measured of the chosen runs."""
    return one(f'{name}{{run=~"$run"}}', "{{run}} {{phase}}")
