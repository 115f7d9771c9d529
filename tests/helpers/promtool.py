"""Prometheus' own checker, and what can be read out of expressions and scrapes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
RULES: Final = DEPLOY / "prometheus" / "alerts.yml"
_NAME: Final = re.compile(r"\b(?:glora|process|python)_[a-z0-9_]+\b|\bup\b")
_LITERAL: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABELS: Final = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")


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


def expressions(dashboard: Path) -> list[str]:
    """Every expression of a dashboard's panels, with Grafana's variables filled in."""
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets") or ()]
    return [expr.replace("$__rate_interval", "5m").replace("$run", ".*") for expr in found]


def alert_expressions() -> dict[str, str]:
    """The expression of every alert, read line by line: the tests need no YAML otherwise."""
    found: dict[str, str] = {}
    for block in RULES.read_text(encoding="utf-8").split("- alert: ")[1:]:
        name = block.split("\n", 1)[0].strip()
        expression = re.search(r"expr: (?:\|\n((?: {10,}.*\n)+)|(.*)\n)", block)
        assert expression is not None, f"{name} has no expression"
        found[name] = expression[1] or expression[2]
    return found
