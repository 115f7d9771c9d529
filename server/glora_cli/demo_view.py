"""The demo on the screen: a live view on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

from rich.console import Group
from rich.live import Live
from rich.text import Text

from glora_cli.output import console, span
from glora_cli.run_view import page
from glora_cli.watch import LineView
from glora_dashboard.run_models import RunAnswer


class View(Protocol):
    """Where the demo tells what it does."""

    def say(self, line: str) -> None:
        """Tell that something was done."""
        ...

    def show(self, run: RunAnswer) -> None:
        """Show where the run stands."""
        ...


class Lines:
    """Plain lines, each with the seconds since the start."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()
        self._run = LineView(self.say)

    def say(self, line: str) -> None:
        """Write a line."""
        self._stream.write(f"{time.monotonic() - self._started:6.1f} s  {line}\n")
        self._stream.flush()

    def show(self, run: RunAnswer) -> None:
        """Write what is new about the run."""
        # How far every device is would be a line a second.
        collecting = run.round is not None and run.round.assignments
        self._run.show(run.model_copy(update={"waiting": ""}) if collecting else run)


class Screen:
    """A page that is kept up to date: what was done so far, then the run with its round and its devices."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._started = time.monotonic()
        self._done: list[Text] = []

    def say(self, line: str) -> None:
        """Add a line at the top."""
        self._done.append(Text(f"✓ {line}", style="dim"))
        self._live.update(Group(*self._done))

    def show(self, run: RunAnswer) -> None:
        """Show the run below the lines."""
        elapsed = Text(f"{span(time.monotonic() - self._started)}, Ctrl-C ends everything", style="dim")
        self._live.update(Group(*self._done, Text(""), page(run), Text(""), elapsed))


@contextlib.contextmanager
def open_view(*, as_json: bool) -> Iterator[View]:
    """The view for today's stdout; with `as_json` stdout is left to the report and lines go to stderr."""
    if as_json:
        yield Lines(sys.stderr)
    elif sys.stdout.isatty():
        with Live(console=console(), refresh_per_second=4, vertical_overflow="visible") as live:
            yield Screen(live)
    else:
        yield Lines(sys.stdout)
