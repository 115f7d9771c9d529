"""Chromium as tests and pictures start and watch it, and a federation that never was for it to look at."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, Request

CHROMIUM: Final = Path(os.environ.get("GLORA_CHROMIUM", "/usr/bin/chromium"))
_ARGS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_TOOL: Final = Path(__file__).resolve().parents[2] / "tools" / "synthetic_server.py"
_FIRST_LINE: Final = re.compile(r"(http://\S+)\s+user (\S+), password (\S+)")


def launch(playwright: Playwright) -> Browser:
    """Chromium without a window, which asks nobody by itself."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server and how to sign in there."""

    url: str
    user: str
    password: str


@contextlib.contextmanager
def synthetic(folder: Path, *, devices: int, rounds: int) -> Iterator[Served]:
    """A synthetic federation, served while the context is open."""
    command = [sys.executable, str(_TOOL), str(folder), "--port", "0"]
    command += ["--devices", str(devices), "--rounds", str(rounds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = next((match for line in process.stdout if (match := _FIRST_LINE.search(line))), None)
            if found is None:
                raise RuntimeError(f"the synthetic server ended with {process.wait()} before it served")
            yield Served(url=found[1], user=found[2], password=found[3])
        finally:
            process.terminate()


@dataclass
class Watch:
    """What a page must not do: complain, or ask anybody but its server."""

    host: str
    problems: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()
    """Parts of messages that are provoked."""

    def follow(self, page: Page) -> None:
        """Note from now on what this page does wrong."""
        page.on("console", self._console)
        page.on("pageerror", lambda error: self._note(f"page error: {error}"))
        page.on("request", self._request)
        page.on("websocket", lambda socket: self._address(socket.url))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self._note(f"{message.type}: {message.text} ({message.location.get('url', '')})")

    def _request(self, request: Request) -> None:
        self._address(request.url)

    def _address(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"data", "blob", "about"} and parts.netloc != self.host:
            self._note(f"left the host: {url}")

    def _note(self, problem: str) -> None:
        if not any(part in problem for part in self.expected):
            self.problems.append(problem)
