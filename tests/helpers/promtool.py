"""Prometheus' own checker, and what can be read out of expressions and scrapes."""

from __future__ import annotations

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
