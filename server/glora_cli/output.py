"""How the command line shows things: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Final

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from glora_wire.errors import GloraError, Reason

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
YesFlag = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask whether you are sure.")]
_PIPE_WIDTH: Final = 1000
"""Nothing is cut where nobody looks at a screen."""
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def console() -> Console:
    """A console on today's stdout."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def make_sure(question: str, *, yes: bool) -> None:
    """Return when it is meant: what cannot be undone asks first, also where nobody can answer.

    Raises REQUEST_INVALID otherwise.
    """
    try:
        sure = yes or typer.confirm(question, err=True)
    except typer.Abort:
        sure = False
        typer.echo(err=True)  # nobody has ended the question's line
    if not sure:
        raise GloraError(Reason.REQUEST_INVALID, "Nothing was done; --yes does it without asking.")


def show_json(answer: BaseModel) -> None:
    """Print one answer as JSON."""
    typer.echo(answer.model_dump_json(indent=2))


def show_json_list(answers: Sequence[BaseModel]) -> None:
    """Print a list of answers as JSON."""
    typer.echo(json.dumps([answer.model_dump(mode="json") for answer in answers], indent=2))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """Print rows under headings, or the sentence `empty` when there are none."""
    if not rows:
        typer.echo(empty)
        return
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console().print(table)


def show_pairs(pairs: Sequence[tuple[str, object]]) -> None:
    """Print names with their values, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in pairs:
        table.add_row(name, _cell(value))
    console().print(table)


def moment(seconds: float | None) -> str:
    """A point in time in this machine's zone; "-" where there is none."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def span(seconds: float | None) -> str:
    """A length of time, in the two largest units; "-" where there is none."""
    if seconds is None:
        return "-"
    whole = int(max(0.0, seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


def size(count: int) -> str:
    """A number of bytes in a unit that people can read."""
    value, unit = float(count), 0
    while value >= 1024 and unit + 1 < len(_UNITS):
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def share(value: float | None) -> str:
    """A share of one in per cent; "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value).replace("[", r"\[")
