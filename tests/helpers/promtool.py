"""Prometheus' own checker, and what can be read out of expressions and scrapes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from glora_server.telemetry.names import METRICS

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
RULES: Final = DEPLOY / "prometheus" / "alerts.yml"
_NAME: Final = re.compile(r"\b(?:glora|process|python)_[a-z0-9_]+\b|\bup\b")
_LITERAL: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABELS: Final = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR: Final = re.compile(r"\b(\w+)\{([^}]*)\}")
_AGGREGATION: Final = re.compile(r"\b(?:sum|min|max|avg|count)\s*\(")
_TARGET: Final = {"instance", "job"}
"""Labels that Prometheus gives to whatever it scrapes."""
_MATCHER: Final = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')


class Matcher(NamedTuple):
    """A label of a series that an expression compares, and the regular expression or text that it compares with."""

    series: str
    label: str
    pattern: str


def promtool(*words: str | Path, stdin: str = "") -> str:
    """What `promtool WORDS` says when it is content; skips the test where it is not installed."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not on this machine (Debian: apt-get install prometheus)")
    done = subprocess.run([program, *map(str, words)], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"promtool {' '.join(map(str, words))}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def series_in(expression: str) -> set[str]:
    """Names of the series that an expression asks for; strings and lists of labels aside."""
    return set(_NAME.findall(_LABELS.sub("", _LITERAL.sub('""', expression))))


def matchers_in(expression: str) -> list[Matcher]:
    """Every comparison of a label; no pattern of ours has a brace in it."""
    return [
        Matcher(series, label, pattern)
        for series, inside in _SELECTOR.findall(expression)
        for label, pattern in _MATCHER.findall(inside)
    ]


def groupings_in(expression: str) -> set[str]:
    """The labels by which an expression adds up or joins."""
    return {label.strip() for labels in _LABELS.findall(expression) for label in labels.split(",")}


def labels_of(series: str) -> set[str]:
    """The labels that a series has in Prometheus."""
    own = {label for metric in METRICS if metric.name in {series, base_of(series)} for label in metric.labels}
    return own | _TARGET | ({"le"} if series.endswith("_bucket") else set())


def base_of(series: str) -> str:
    """The metric that a series belongs to: that of a histogram has three."""
    return re.sub(r"_(bucket|sum|count)$", "", series)


def unknown_labels(expression: str) -> set[str]:
    """Labels by which an expression chooses or groups although a series in it lacks them."""
    chosen = {matcher.label for matcher in matchers_in(expression) if matcher.label not in labels_of(matcher.series)}
    grouped = groupings_in(expression)
    return chosen.union(*(grouped - labels_of(series) for series in series_in(expression)))


def labels_left(expression: str) -> set[str]:
    """The labels that the values of an expression have, for legends and texts."""
    if grouped := groupings_in(expression):
        return grouped - {"le"}
    if _AGGREGATION.search(expression):
        return set()
    return set.intersection(*(labels_of(series) for series in series_in(expression)))


def queries(dashboard: Path) -> list[tuple[str, str]]:
    """Every expression of a dashboard's panels with its legend, Grafana's variables not yet filled in."""
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    return [(target["expr"], target["legendFormat"]) for panel in panels for target in panel.get("targets") or ()]


def expressions(dashboard: Path) -> list[str]:
    """Every expression of a dashboard's panels, with Grafana's variables filled in."""
    return [expr.replace("$__rate_interval", "5m").replace("$run", ".*") for expr, _ in queries(dashboard)]


def alert_blocks() -> dict[str, str]:
    """The text of every alert by its name: the tests need no YAML otherwise."""
    blocks = RULES.read_text(encoding="utf-8").split("- alert: ")[1:]
    return {block.split("\n", 1)[0].strip(): block for block in blocks}


def alert_expressions() -> dict[str, str]:
    """The expression of every alert, read line by line."""
    found: dict[str, str] = {}
    for name, block in alert_blocks().items():
        expression = re.search(r"expr: (?:\|\n((?: {10,}.*\n)+)|(.*)\n)", block)
        assert expression is not None, f"{name} has no expression"
        found[name] = expression[1] or expression[2]
    return found
