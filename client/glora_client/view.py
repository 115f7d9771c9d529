"""What a person sees of a running client: progress bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_SECONDS: Final = 10.0


class View(Protocol):
    """Where the session tells what it does."""

    def line(self, text: str) -> None:
        """Say something once."""
        ...

    def progress(self, what: str, done: float, total: float, note: str = "") -> None:
        """How far the present work is."""
        ...

    def rest(self) -> None:
        """The present work is over."""
        ...


class PlainView(AbstractContextManager["PlainView"]):
    """Lines with the time; progress at most every ten seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put back."""

    def line(self, text: str) -> None:
        """Print the text behind the time."""
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        sys.stdout.flush()

    def progress(self, what: str, done: float, total: float, note: str = "") -> None:
        """Print a line now and then."""
        now = time.monotonic()
        if total and now - self._last >= _LINE_SECONDS:
            self._last = now
            self.line(f"{what} {100 * done / total:.0f} % {note}".rstrip())

    def rest(self) -> None:
        """The next work may print at once."""
        self._last = time.monotonic()


class TerminalView(AbstractContextManager["TerminalView"]):
    """One bar that follows the work, and lines above it."""

    def __init__(self) -> None:
        # rich costs memory and time that an agent without a terminal need not spend.
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

        self._bars: Progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            transient=True,
        )
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def line(self, text: str) -> None:
        """Print the text above the bar."""
        self._bars.console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False)

    def progress(self, what: str, done: float, total: float, note: str = "") -> None:
        """Move the bar; a new kind of work gets a new one."""
        if self._task is None or what != self._what:
            self.rest()
            self._what = what
            self._task = self._bars.add_task(what, total=total or None, note=note)
        self._bars.update(self._task, completed=done, total=total or None, note=note)

    def rest(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


def make_view() -> PlainView | TerminalView:
    """Bars where standard output is a terminal, else lines."""
    return TerminalView() if sys.stdout.isatty() else PlainView()
