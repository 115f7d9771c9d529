"""Chromium as tests and pictures start it, and a federation that never was for it to look at."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from playwright.sync_api import Browser, Playwright

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
