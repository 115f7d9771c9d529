"""Values that people write on the command line: lengths of time, settings."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from typing import Final

import typer

_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_SECONDS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """Seconds of "90", "90s", "15m", "24h" or "7d"; raises BadParameter."""
    found = _SPAN.fullmatch(text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is not a length of time; write 90s, 15m, 24h or 7d.")
    return float(found[1]) * _SECONDS[found[2]]


def assignments(pairs: Sequence[str]) -> dict[str, object]:
    """Values by key from "key=value", the value as in TOML (words may go without quotes); raises BadParameter."""
    changes: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r} is not of the form KEY=VALUE, such as quorum=3.")
        if key in changes:
            raise typer.BadParameter(f"{key} is given twice.")
        changes[key] = _value(text.strip())
    return changes


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
