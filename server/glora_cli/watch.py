"""`glora run watch`: a run as it goes on, until it ends; the server answers when something changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from glora_cli.failures import BROKEN
from glora_cli.output import share
from glora_cli.rest import Api, at
from glora_cli.run_view import ENDED, device_line, page, round_line
from glora_dashboard.run_models import RunAnswer
from glora_wire.errors import GloraError, Reason

WAIT_SECONDS: Final = 20.0
"""The server answers after that time also when nothing changed."""
LEAST_SECONDS: Final = 0.25
"""Between two looks, however fast things change."""
_OPEN: Final = frozenset({"collecting", "grace", "aggregating"})
_PAUSES: Final = (0.5, 1.0, 2.0, 5.0)
"""Seconds between attempts to reach a server that went away; the last one is repeated."""


def watch_run(api: Api, name: str, *, as_json: bool = False) -> int:
    """Show the run until it ends; the exit code. A server that goes away on the way is waited for."""
    looks = _looks(api, name)
    if as_json:
        return _each(looks, lambda run: typer.echo(run.model_dump_json()))
    if on_terminal():
        screen = _Screen()
        with Live(console=Console(highlight=False), refresh_per_second=2, get_renderable=screen.render):
            return _each(looks, screen.show)
    return _each(looks, LineView().show)


def on_terminal() -> bool:
    """Whether somebody looks at a screen."""
    return sys.stdout.isatty()


def _each(looks: Iterator[RunAnswer], show: Callable[[RunAnswer], None]) -> int:
    run: RunAnswer | None = None
    for run in looks:
        show(run)
    return 0 if run is not None and run.phase == "completed" else BROKEN


def _looks(api: Api, name: str) -> Iterator[RunAnswer]:
    """The run as it is now, and again after every change, up to its end."""
    run = api.get(RunAnswer, at("runs", name))
    while True:
        yield run
        if run.phase in ENDED:
            return
        started = time.monotonic()
        run = _next_look(api, name, run.revision)
        time.sleep(max(0.0, LEAST_SECONDS - (time.monotonic() - started)))


def _next_look(api: Api, name: str, revision: int) -> RunAnswer:
    attempt = 0
    while True:
        try:
            return api.get(RunAnswer, at("runs", name), {"wait": revision, "timeout": WAIT_SECONDS})
        except GloraError as error:
            if error.reason not in {Reason.SERVER_UNREACHABLE, Reason.SHUTTING_DOWN, Reason.DATABASE_UNUSABLE}:
                raise
            if attempt == 0:
                sys.stderr.write(f"{error.message} Trying again.\n")
            time.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
            attempt += 1


class _Screen:
    """The newest look at a run; drawn again and again, so that what depends on the clock moves."""

    def __init__(self) -> None:
        self._run: RunAnswer | None = None

    def show(self, run: RunAnswer) -> None:
        """Draw this from now on."""
        self._run = run

    def render(self) -> RenderableType:
        """What is on the screen."""
        return "" if self._run is None else page(self._run)


class LineView:
    """Prints what is new about a run, line by line; for logs and pipes."""

    def __init__(self, write: Callable[[str], None] = typer.echo) -> None:
        self._write = write
        self._last: dict[str, str] = {}

    def show(self, run: RunAnswer) -> None:
        """Print the lines that say something else than before."""
        self._say("run", f"{run.name}: {run.phase}{f', {run.message}' if run.message else ''}")
        if run.round is not None:
            key = f"round {run.round.number}.{run.round.attempt}"
            self._say(key, round_line(run.round, run.rounds), changes=f"{run.round.phase} {run.round.accepted}")
            for assignment in (*run.round.assignments, *run.evaluations):
                doing = assignment.progress.phase if assignment.progress else ""
                changes = f"{assignment.phase} {doing if assignment.closed_at is None else ''}"
                self._say(assignment.id, f"  {device_line(assignment)}", changes=changes)
        # While a round is open its devices' lines say what is awaited; the sentence would change with every per cent.
        if run.phase not in ENDED and (run.round is None or run.round.phase not in _OPEN):
            self._say("waiting", f"waits: {run.waiting}" if run.waiting else "", changes=run.waiting)
        for score in run.scores:
            if score.phase == "version":
                line = f"version {score.version_number}, rank {score.rank}: accuracy {share(score.accuracy)}"
                self._say(f"score {score.version_number} {score.rank}", line)

    def _say(self, key: str, line: str, changes: str | None = None) -> None:
        """Print `line` when `changes` (or the line) is new for `key`."""
        news = line if changes is None else changes
        if self._last.get(key) != news:
            self._last[key] = news
            if line:
                self._write(line)
